"""The command line: a table of commands, imported when called, and the one place where errors become exit codes.

0 fine   1 a check refuted, or nothing proved   2 bad usage or recipe   3 something missing   4 a stage failed   130 interrupted
"""

from __future__ import annotations

import codecs
import errno
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from finetune import __version__
from finetune.core import console, streams
from finetune.core.errors import FinetuneError, OutputError
from finetune.core.lookup import did_you_mean
from finetune.core.secrets import redact
from finetune.core.text import visible
from finetune.run.plan import BY_NAME, STAGES


@dataclass(frozen=True)
class Row:
    """One command: where it is (`module:attr`), its one line of help, and the heading that it is listed under."""

    reference: str
    help: str
    group: str


_START, _STAGES, _PROOF = "Start here", "One stage of a recipe (and what it needs)", "Whole runs and their proof"
COMMANDS: dict[str, Row] = {
    "init": Row("init:command", "Write a commented recipe and example data to edit.", _START),
    "doctor": Row("doctor:command", "Show what this machine has and what is missing.", _START),
    "validate": Row("validate:command", "Check a recipe and its files; print it with every default.", _START),
    "estimate": Row("estimate:command", "Memory, disk and steps that a recipe needs, LoRA beside full.", _START),
    "explain": Row("explain:command", "Say what a verdict, check, stage or key of a recipe means.", _START),
    "completion": Row("completion:command", "Print the completion script for bash, zsh or fish.", _START),
    "run": Row("run:command", "Run all stages of a recipe, verify, and report.", _PROOF),
    "verify": Row("verify:command", "Check a stored run again, from what is on disk.", _PROOF),
    "invariance": Row(
        "invariance:command", "Check what no correct trainer changes, on a tiny copy of the model.", _PROOF
    ),
    "report": Row("report:command", "Show a stored run, or compare two; write the page to look at.", _PROOF),
    "perplexity": Row("perplexity:command", "Score a text by how little a reference model expects it.", _PROOF),
    "serve": Row("serve:command", "Answer OpenAI's API with the model of a run.", _PROOF),
    "runs": Row("runs:command", "List runs (ls) or show one (show).", _PROOF),
    "spec": Row(
        "spec:command", "Tests of a recipe as YAML files, which pytest runs: record, validate, schema.", _PROOF
    ),
    **{stage.name: Row(f"stage:{stage.name}", stage.help, _STAGES) for stage in STAGES},
    "export": Row("export:command", BY_NAME["export"].help, _STAGES),
    "train quick": Row("stage:quick", "Train MODEL on DATA without a recipe file.", _STAGES),
}
ALIASES = {"download": "fetch"}


class Commands(click.Group):
    """The group of all commands. Listing them imports none; every error ends in one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        row = COMMANDS.get(ALIASES.get(cmd_name, cmd_name))
        if row is None:
            return None
        module, _, attribute = row.reference.partition(":")
        return getattr(importlib.import_module(f"finetune.cli.{module}"), attribute)  # type: ignore[no-any-return]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[:2] == ["train", "quick"]:
            return "train quick", self.get_command(ctx, "train quick"), args[2:]
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and not ctx.resilient_parsing:
            if name.startswith("-"):
                ctx.fail(f"no such option {name}")
            known = [*COMMANDS, *ALIASES]
            ctx.fail(f"no command '{name}'.{did_you_mean(name, known)} Known: {', '.join(known)}.")
        return name, command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        aliases = {name: alias for alias, name in ALIASES.items()}
        for group in (_START, _STAGES, _PROOF):
            rows = [
                (name, f"(or {aliases[name]}) {row.help}" if name in aliases else row.help)
                for name, row in COMMANDS.items()
                if row.group == group
            ]
            with formatter.section(group):
                formatter.write_dl(rows)

    def main(self, *args: Any, **extra: Any) -> Any:
        run: Callable[..., Any] = super().main
        if not extra.pop("standalone_mode", True):
            return run(*args, standalone_mode=False, **extra)
        from finetune.core.signals import let_go

        code = guarded(lambda: run(*args, standalone_mode=False, **extra))
        let_go()
        sys.exit(code)


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 fine, 1 a check refuted or nothing proved, 2 bad usage or recipe, 3 something missing, 4 a stage "
    "failed, 130 interrupted. 'finetune COMMAND --help' says more. The first thing to try: finetune run --example quickstart",
)
@click.version_option(__version__, prog_name="finetune")
def cli() -> None:
    """Fine-tune small language models, and prove that it worked."""


def options_of(words: list[str]) -> dict[str, Any] | None:
    """The values that a command's words give its options and arguments, by their names; None where there is no such command."""
    command = cli.get_command(None, words[0]) if words else None  # type: ignore[arg-type]
    return command.make_context(words[0], words[1:], resilient_parsing=True).params if command else None


def main() -> None:
    """The entry point of `finetune`, `ft` and `python -m finetune`."""
    from finetune.core.signals import heed

    heed()
    _start_in_utf8()
    name = os.path.basename(sys.argv[0])
    cli.main(prog_name=name if name in ("finetune", "ft") else "finetune")


def _start_in_utf8() -> None:
    """Start this command again in UTF-8 mode, where file names are to be ASCII or Latin-1 (`LC_ALL=C PYTHONUTF8=0`): such a
    Python can name no file with another letter, and reads no text of other programs. What it prints stays as it was."""
    if codecs.lookup(sys.getfilesystemencoding()).name == "utf-8" or sys.flags.utf8_mode:
        return
    kept = getattr(sys.stdout, "encoding", None) or "ascii"
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{kept}:backslashreplace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def guarded(call: Callable[[], Any]) -> int:
    """Run a command and return its exit code; whatever it raises becomes a message on stderr."""
    set_debug(False)
    console.set_mode("auto")
    try:
        with streams.doors():
            code = _exit_code(call)
            return code if code == OutputError.exit_code else _exit_code(sys.stdout.flush) or code
    except OutputError as error:
        return _fail(visible(str(error)), error.exit_code)
    except KeyboardInterrupt:  # another one, while the first was told
        return 130


def _exit_code(call: Callable[[], Any]) -> int:
    try:
        code = call()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.UsageError as error:
        if error.ctx is not None:
            click.echo(error.ctx.get_usage(), err=True)
        return _fail(error.format_message(), 2)
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except click.Abort as error:  # click turns every KeyboardInterrupt, ours included, into this
        cause = error.__cause__
        return _fail(str(cause) if isinstance(cause, FinetuneError) else "interrupted", 130)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted", 130)
    except FinetuneError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(_os_problem(error), 4)
    except MemoryError:
        return _fail("out of memory. End other programs, or use a machine with more; what is done is kept", 4)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        hint = "" if _debug else " (run again with --debug for the traceback; please report)"
        return _fail(f"unexpected {type(error).__name__}: {text}{hint}", 4)


_debug = False


def set_debug(on: bool) -> None:
    """Whether an error shows its traceback (`--debug`, or FT_DEBUG=1)."""
    global _debug
    _debug = on or os.environ.get("FT_DEBUG") == "1"


def _fail(message: str, code: int) -> int:
    if _debug:
        import traceback

        click.echo(redact(traceback.format_exc()), err=True)
    click.echo(redact(f"error: {message}"), err=True)
    return code


def _os_problem(error: OSError) -> str:
    if error.args and isinstance(error.args[0], list) and error.args[0]:  # shutil.Error: (from, to, why) of every file
        source, target, why = error.args[0][0]
        return f"copying {source} to {target} failed: {why}"
    where = f": {error.filename}" if error.filename else ""
    hint = {
        errno.ENOSPC: ". The disk is full: free some space, or choose another disk with --run DIR",
        errno.EACCES: ". Choose a directory that you may write to with --run DIR",
        errno.EROFS: ". Choose a directory that you may write to with --run DIR",
    }.get(error.errno or 0, "")
    return f"{error.strerror or error}{where}{hint}"
