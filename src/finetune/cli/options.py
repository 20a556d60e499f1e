"""What the commands share: the recipe, the run directory, and how output is asked for."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from finetune.core import console
from finetune.core.errors import FinetuneError, MissingError, NewerError, StageError, first_line
from finetune.core.lookup import did_you_mean
from finetune.core.secrets import redact, redacted
from finetune.core.streams import is_unicode
from finetune.core.text import json_text

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.run import Report, Run
    from finetune.run.plan import Stage

F = TypeVar("F", bound=Callable[..., Any])
# Strings rather than Path objects: `fetch` takes a model's name here, and that must reach it unchanged.
FILE = click.Path()


def _complete_example(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    from finetune.recipe.examples import examples

    return [name for name in examples() if name.startswith(incomplete)]


def recipe_options(command: F) -> F:
    """RECIPE, --config, --example, --set."""
    for option in (
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key: --set train.max_steps=1"
        ),
        click.option(
            "--example", metavar="NAME", shell_complete=_complete_example, help="A shipped recipe instead of a file."
        ),
        click.option("--config", metavar="RECIPE", type=FILE, help="The recipe; the same as the argument."),
        click.argument("recipe", required=False, type=FILE),
    ):
        command = option(command)
    return command


def run_options(command: F) -> F:
    """--run, --force, --retrain, --dry-run."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Show which stages would run and why; run nothing."),
        click.option("--retrain", is_flag=True, help="Do a finished training anew that other code or libraries made."),
        click.option("--force", is_flag=True, help="Run again what is already up to date."),
        click.option(
            "--run", "run_path", metavar="DIR", type=FILE, help="Run directory [default: the recipe's output_dir/name]."
        ),
    ):
        command = option(command)
    return command


def output_options(command: F) -> F:
    """--json, --quiet, --debug. They take effect at once, and `as_json` reaches the command."""
    hidden: dict[str, Any] = {"is_flag": True, "is_eager": True, "expose_value": False}
    for option in (
        click.option("--debug", callback=_set_debug, help="Show tracebacks.", **hidden),
        click.option("--quiet", "-q", callback=_set_quiet, help="No progress, no notes.", **hidden),
        click.option("--json", "as_json", is_flag=True, is_eager=True, callback=_set_json, help="Result as JSON."),
    ):
        command = option(command)
    return command


def _set_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        from finetune.cli.app import set_debug

        set_debug(True)


def _set_quiet(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        console.set_mode("silent")


def _set_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    if value:
        console.set_mode("silent")
    return value


def load_recipe(
    recipe: str | None, config: str | None = None, shipped: str | None = None, overrides: tuple[str, ...] = ()
) -> Recipe:
    """The recipe meant, loaded. Warnings (a literal token) go to stderr."""
    from finetune.recipe.examples import locate
    from finetune.recipe.load import load, load_mapping, read_mapping

    path = locate(recipe, config, shipped)
    if (recipe, config, shipped) == (None, None, None):
        console.say(f"using {path}")
    with shown_warnings():
        if shipped is None:
            return load(path, overrides)
        mapping, lines = read_mapping(path)
        source = f"the example {shipped}"
        return load_mapping(mapping, overrides, source=source, lines=lines, base=Path.cwd())


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Python warnings raised inside become lines on stderr: `warning:`, and `note:` for what a later version will refuse."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, UserWarning | FutureWarning):
                    kind = "note" if issubclass(warning.category, FutureWarning) else "warning"
                    echo(f"{kind}: {warning.message}", err=True)


def stored_run(text: str | None) -> Run:
    """The run meant: a run directory, the name of one under ./runs, a recipe (or the folder of one) whose run it is, or
    (for None) the newest under ./runs. Raises MissingError naming what was looked for."""
    from finetune.run import Run

    if text is None:
        found = sorted(runs_in(Path("runs")), key=last_change)
        if not found:
            raise MissingError("no run given, and none in ./runs. Make one with: finetune run RECIPE")
        console.say(f"using {Path('runs') / found[-1].path.name}")
        return found[-1]
    for path in (Path(text), Path("runs") / text):
        if (run := Run(path)).exists:
            return run
    if recipe := recipe_at(Path(text)):
        return _run_of(recipe)
    names = [run.path.name for run in runs_in(Path("runs"))]
    if not Path(text).exists() and did_you_mean(text, names):
        raise MissingError(f"no run at {text}.{did_you_mean(text, names)} List runs with: finetune runs ls")
    return Run.open(text)


def _run_of(recipe: Path) -> Run:
    """The run of a recipe: the one that its file lies in, or output_dir/name."""
    from finetune.run import Run
    from finetune.stages.pipeline import run_directory

    if (inside := Run(recipe.parent)).exists:
        return inside
    run = run_directory(load_recipe(str(recipe)))
    if not run.exists:
        raise MissingError(
            f"{recipe} has not been run: there is no run at {run.path}. Make it with: finetune run {recipe}"
        )
    return run


def recipe_at(path: Path) -> Path | None:
    """The recipe that a path means: a file that is one by its name, or the recipe.yaml of a folder that is no run."""
    from finetune.run import Run

    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return path
    inside = path / "recipe.yaml"
    return inside if inside.is_file() and not Run(path).exists else None


def runs_in(folder: Path) -> list[Run]:
    """The runs directly inside a folder, by name."""
    from finetune.run import Run

    found = [Run(path) for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    return [run for run in found if run.exists]


def last_change(run: Run) -> float:
    """When something was last asked of a run: the time of its recipe, or of its log where that is gone (seconds)."""
    files = [run.path / "recipe.yaml", run.events_path, run.path / "manifest.json"]
    return next(path.stat().st_mtime for path in files if path.is_file())


def stored_recipe(run: Run) -> Recipe:
    """The recipe that a run was made from. Raises StageError where its file is damaged or gone."""
    from finetune.recipe import load
    from finetune.run import evidence, layout

    try:
        evidence.text(run, layout.RECIPE)
        with shown_warnings():
            return load(run.path / layout.RECIPE.path)
    except NewerError:
        raise
    except FinetuneError as error:
        again = "Bring the file back from a copy; the model and its files are as they were"
        raise StageError(f"the recipe that the run was made from cannot be read: {error}\n{again}") from None


@contextmanager
def held(run: Run) -> Iterator[str]:
    """Hold a run that is to be written into. Inside: why it cannot be (read-only, no lock to be had), or nothing.

    Raises LockedError where another process works in the run.
    """
    with ExitStack() as stack:
        yield attempt(lambda: stack.enter_context(run.locked()))


def attempt(write: Callable[[], object]) -> str:
    """Write something into a run; why that is not possible there, or nothing where it was done."""
    try:
        write()
    except FinetuneError:
        raise
    except (OSError, NotImplementedError) as error:
        return (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    return ""


def not_stored(run: Run, what: str, why: str, instead: str) -> None:
    """Say on stderr that something is not in the run now, and where to put it instead."""
    echo(f"note: {what} could not be stored in {run.path} ({why}). Keep it elsewhere with: {instead}", err=True)


def echo(text: str, *, err: bool = False) -> None:
    """A line for people that may hold paths, names or reasons from outside, without secrets."""
    click.echo(redact(text), err=err)


def print_json(value: Any) -> None:
    """A result, as JSON, on stdout (see `finite`)."""
    plain = redacted(json.loads(json.dumps(finite(value), default=str)))
    click.echo(json_text(plain, ascii_only=not is_unicode(sys.stdout), indent=2))


def finite(value: Any) -> Any:
    """A value as JSON knows it: NaN and infinity as null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def listen(moment: str, stage: Stage, report: Report | None) -> None:
    """Say on stderr what the pipeline does."""
    if moment == "start":
        console.say(f"== {stage.name}: {stage.help}")
    elif moment == "kept":
        console.say(f"== {stage.name}: up to date")
    elif report is not None:
        from finetune.core.memory import human

        console.say(f"   {stage.name} done in {console.duration(report.seconds)}, peak {human(report.peak['process'])}")


def working(
    recipe: Recipe,
    run: Run,
    only: list[str] | None,
    *,
    force: bool = False,
    resume: Path | None = None,
    retrain: bool = False,
    changed: bool = False,
) -> list[Report]:
    """`pipeline.run_stages`, told on stderr. Whatever libraries print goes to stderr too: stdout is for results."""
    from finetune.cli.validate import refuse_faults
    from finetune.stages.pipeline import run_stages

    refuse_faults(recipe, only)
    with redirect_stdout(sys.stderr):
        return run_stages(
            recipe, run, only, force=force, resume=resume, retrain=retrain, changed=changed, listener=listen
        )


def show_plan(
    recipe: Recipe, run: Run, only: list[str] | None, *, force: bool, as_json: bool, retrain: bool = False
) -> None:
    """What would run, and why (`--dry-run`)."""
    from dataclasses import asdict

    from finetune.stages.pipeline import preview

    planned = preview(recipe, run, only, force=force, retrain=retrain)
    if as_json:
        print_json({"run": str(run.path), "stages": [asdict(step) for step in planned]})
        return
    from finetune.report.terminal import show_table

    show_table(["stage", "would", "why"], [[step.stage, "run" if step.runs else "keep", step.why] for step in planned])
    echo(f"run directory: {run.path}")
