"""`finetune report`: one stored run, or two side by side; on the terminal, as JSON, and as files to look at."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune.cli.options import FILE, attempt, echo, held, not_stored, output_options, print_json, stored_run
from finetune.core import console
from finetune.core.errors import LockedError, UsageError, first_line

if TYPE_CHECKING:
    from finetune.run import Run


@click.command("report")
@click.argument("runs", nargs=-1, metavar="[RUN|RECIPE [RUN_B]]", type=FILE)
@click.option(
    "--out",
    metavar="FILE",
    type=FILE,
    help="Where to put the HTML page [default: report.html in the run; of two runs RUN-vs-RUN_B.html here].",
)
@output_options
def command(runs: tuple[str, ...], out: str | None, as_json: bool) -> None:
    """Show a stored run: answers before and after, verdicts, times and memory, files; or compare two runs.

    RUN is a run directory, or a name under ./runs; RECIPE a file whose run is meant; the newest run in ./runs by default.
    Of one run, report.html, report.json, report.md and junit.xml are written into it anew; with --out only the page is
    written, and there. What is damaged is named, and the rest is shown.
    Of two runs, the recipe keys, verdicts, numbers, curves and answers that differ are shown side by side.
    """
    if len(runs) > 2:
        raise UsageError(f"report takes one run, or two to compare; {len(runs)} were given")
    found = [stored_run(run) for run in runs or (None,)]
    if len(found) == 2:
        _compare(found[0], found[1], out, as_json)
    else:
        _one(found[0], out, as_json)


def _one(run: Run, out: str | None, as_json: bool) -> None:
    from finetune.report import files, summary

    document = summary.document(run)
    if not as_json:
        from finetune.report.terminal import show

        show(document)
    plain, texts = files.render(document)
    if as_json:
        print_json(plain)
    tell = _nothing if as_json else echo
    if out is None:
        _write_into(run, texts, tell)
    else:
        _write_page(Path(out), texts[files.HTML], tell)


def show_and_write(run: Run, *, as_json: bool) -> None:
    """Print the report of a run, and write its files into it (`finetune run`, when all is done)."""
    _one(run, None, as_json)


def leave_behind(run: Run) -> None:
    """Write the files of a run whose stage failed or was interrupted. What goes wrong here never hides that failure."""
    from finetune.report import files, summary

    try:
        if not run.exists:
            return
        document = summary.document(run)
        if document["stopped"] and document["stopped"]["how"] != "unfinished":  # else another process works there
            _write_into(run, files.render(document)[1], console.say)
    except Exception as error:
        echo(f"warning: no report of what there is could be written: {first_line(error)}", err=True)


def _write_into(run: Run, texts: dict[str, str], tell: Callable[[str], None]) -> None:
    """Write the files of a run, seal them in it, and tell where the page is; where the run cannot be written into, or
    another process works in it, say so on stderr."""
    from finetune.report import files

    try:
        with held(run) as why:
            why = why or attempt(lambda: _write_and_seal(run, texts))
    except LockedError:
        why = "another finetune process works in it"
    if why:
        not_stored(run, "the report", why, f"finetune report {run.path} --out report.html")
    else:
        tell(f"to look at: {run.path / files.HTML}")


def _write_and_seal(run: Run, texts: dict[str, str]) -> None:
    from finetune.report import files
    from finetune.run import seal

    files.write(run, texts)
    seal.close(run)


def _write_page(path: Path, text: str, tell: Callable[[str], None]) -> None:
    from finetune.core.files import write_text

    if path.is_dir():
        raise UsageError(f"{path} is a directory; name a file with --out FILE")
    write_text(path, text)
    tell(f"to look at: {path.resolve()}")


def _nothing(text: str) -> None:
    pass


def _compare(a: Run, b: Run, out: str | None, as_json: bool) -> None:
    from finetune.report import compare, summary

    found = compare.compare(a, b)
    if as_json:
        print_json(summary.portable(found))
    else:
        from finetune.report.terminal import show_comparison

        show_comparison(found)
    path = Path(out or f"{_in_a_name(a)}-vs-{_in_a_name(b)}.html")
    try:
        _write_page(path, compare.render(found), _nothing if as_json else echo)
    except OSError as error:
        if out is not None:
            raise
        why = error.strerror or error
        echo(f"warning: {path} could not be written here: {why}. Put it elsewhere with --out FILE", err=True)


def _in_a_name(run: Run) -> str:
    return re.sub(r"[^\w.+-]", "_", run.path.name) or "run"
