"""What the commands share: the recipe, the run directory, and how output is asked for."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from finetune import console
from finetune.errors import MissingError, RecipeError, UsageError
from finetune.lookup import did_you_mean
from finetune.secrets import redact

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.run import Report, Run
    from finetune.stages import Stage

F = TypeVar("F", bound=Callable[..., Any])
EXAMPLES = Path(__file__).parent.parent / "examples"
# Strings rather than Path objects: `fetch` takes a model's name here, and that must reach it unchanged.
FILE = click.Path()


def examples() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


def example(name: str) -> Path:
    """The shipped recipe of that name. Raises UsageError with the known names."""
    path = EXAMPLES / f"{name}.yaml"
    if path.stem not in examples():
        raise UsageError(f"no example '{name}'.{did_you_mean(name, examples())} Known: {', '.join(examples())}.")
    return path


def _complete_example(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
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
    """--run, --force, --dry-run."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Show which stages would run and why; run nothing."),
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
        from finetune.cli import set_debug

        set_debug(True)


def _set_quiet(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        console.set_mode("silent")


def _set_json(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    if value:
        console.set_mode("silent")
    return value


def locate(recipe: str | None, config: str | None, shipped: str | None = None) -> Path:
    """The recipe file meant: the argument, --config, --example, or ./recipe.yaml. A directory stands for its own."""
    given = [value for value in (recipe, config, shipped) if value is not None]
    if len(set(given)) > 1:
        raise UsageError(f"more than one recipe given ({', '.join(given)}); name one")
    if shipped is not None:
        return example(shipped)
    if given:
        path = Path(given[0])
    elif Path("recipe.yaml").is_file():
        path = Path("recipe.yaml")
    else:
        raise UsageError("no recipe given, and no recipe.yaml here. Write one with: finetune init")
    return path / "recipe.yaml" if path.is_dir() else path


def load_recipe(
    recipe: str | None, config: str | None = None, shipped: str | None = None, overrides: tuple[str, ...] = ()
) -> Recipe:
    """The recipe meant, loaded. Warnings (a literal token) go to stderr."""
    from finetune.recipe.load import load, load_mapping, read_mapping

    path = locate(recipe, config, shipped)
    if (recipe, config, shipped) == (None, None, None):
        console.say(f"using {path}")
    with shown_warnings():
        try:
            if shipped is None:
                return load(path, overrides)
            mapping, lines = read_mapping(path)
            source = f"the example {shipped}"
            return load_mapping(mapping, overrides, source=source, lines=lines, base=Path.cwd())
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not a recipe:", [f"{path}: not UTF-8 text (byte {error.start})"]) from None


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Python warnings raised inside become `warning:` lines on stderr."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, UserWarning):
                    click.echo(redact(f"warning: {warning.message}"), err=True)


def stored_run(text: str | None) -> Run:
    """The run meant: a run directory, the name of one under ./runs, or (for None) the newest there."""
    from finetune.run import Run

    if text is None:
        found = sorted(Path("runs").glob("*/recipe.yaml"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise MissingError("no run given, and none in ./runs. Make one with: finetune run RECIPE")
        console.say(f"using {found[-1].parent}")
        return Run.open(found[-1].parent)
    for path in (Path(text), Path("runs") / text):
        if (path / "recipe.yaml").is_file():
            return Run.open(path)
    names = [path.parent.name for path in Path("runs").glob("*/recipe.yaml")]
    if not Path(text).exists() and did_you_mean(text, names):
        raise MissingError(f"no run at {text}.{did_you_mean(text, names)} List runs with: finetune runs ls")
    return Run.open(text)


def stored_recipe(run: Run) -> Recipe:
    """The recipe that a run was made from."""
    from finetune.recipe import load

    with shown_warnings():
        return load(run.path / "recipe.yaml")


def print_json(value: Any) -> None:
    """A result, as JSON, on stdout. NaN and infinity, which JSON does not know, become null."""
    click.echo(redact(json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def listen(moment: str, stage: Stage, report: Report | None) -> None:
    """Say on stderr what the pipeline does."""
    if moment == "start":
        console.say(f"== {stage.name}: {stage.help}")
    elif moment == "kept":
        console.say(f"== {stage.name}: up to date")
    elif report is not None:
        from finetune.memory import human

        console.say(f"   {stage.name} done in {console.duration(report.seconds)}, peak {human(report.peak['process'])}")


def working(
    recipe: Recipe,
    run: Run,
    only: list[str] | None,
    *,
    force: bool = False,
    resume: Path | None = None,
    changed: bool = False,
) -> list[Report]:
    """`pipeline.run_stages`, told on stderr. Whatever libraries print goes to stderr too: stdout is for results."""
    from finetune.commands.validate import refuse_faults
    from finetune.pipeline import run_stages

    refuse_faults(recipe, only)
    with redirect_stdout(sys.stderr):
        return run_stages(recipe, run, only, force=force, resume=resume, changed=changed, listener=listen)


def show_plan(recipe: Recipe, run: Run, only: list[str] | None, *, force: bool, as_json: bool) -> None:
    """What would run, and why (`--dry-run`)."""
    from dataclasses import asdict

    from finetune.pipeline import preview

    planned = preview(recipe, run, only, force=force)
    if as_json:
        print_json({"run": str(run.path), "stages": [asdict(step) for step in planned]})
        return
    from finetune.report.terminal import show_table

    show_table(["stage", "would", "why"], [[step.stage, "run" if step.runs else "keep", step.why] for step in planned])
    click.echo(f"run directory: {run.path}")
