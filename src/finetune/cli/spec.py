"""`finetune spec`: tests of a recipe as YAML files, which pytest runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from finetune.cli.options import FILE, echo, output_options, print_json, stored_run
from finetune.core import console
from finetune.core.errors import Faults, FinetuneError, MissingError, UsageError


@click.group("spec")
def command() -> None:
    """Tests of a recipe as YAML files: write one (record), check them (validate), or describe the format (schema).

    pytest runs them: `pytest specs`.
    """


@command.command("record")
@click.argument("run", required=False, type=FILE)
@click.option("--recipe", "recipe_file", metavar="FILE", type=FILE, help="The recipe [default: the one the run names].")
@click.option("--out", metavar="FILE", type=FILE, help="Where to write it [default: specs/NAME.yaml].")
@click.option("--force", is_flag=True, help="Replace a spec that is there.")
@output_options
def record_command(run: str | None, recipe_file: str | None, out: str | None, force: bool, as_json: bool) -> None:
    """Write a spec from a run in which nothing is refuted: its numbers as bounds, with headroom that the file states.

    RUN is a run directory, or a name under ./runs; the newest run there by default.
    """
    from finetune.cli.app import options_of
    from finetune.testing.spec.record import record

    found = stored_run(run)
    target = Path(out) if out else Path("specs") / f"{found.path.name}.yaml"
    if target.exists() and not force:
        raise UsageError(f"{target} is there already. Replace it with --force, or name another file with --out")
    record(found, target, Path(recipe_file) if recipe_file else None, options_of=options_of)
    if as_json:
        print_json({"spec": str(target)})
    else:
        echo(str(target))
        console.say(f"run it with: pytest {target}")


@command.command("validate")
@click.argument("files", nargs=-1, type=FILE)
@output_options
def validate_command(files: tuple[str, ...], as_json: bool) -> None:
    """Check spec files (or folders of them; ./specs by default): every fault at once, and the tests that they make."""
    from finetune.testing.spec.execute import recipe_of
    from finetune.testing.spec.load import Case, load

    cases: list[Case] = []
    faults: list[str] = []
    for file in _spec_files(files or ("specs",)):
        try:
            found = load(file)
        except Faults as error:
            faults += error.faults
            continue
        for case in found:
            try:
                recipe_of(case, root=Path.cwd())
            except FinetuneError as error:
                said = str(error)
                faults.append(said if said.startswith(str(file)) else f"{file}:{case.line('config')}: config: {said}")
        cases += found
    ids = [case.id for case in cases]
    faults += [
        f"test_id '{name}' is used {ids.count(name)} times" for name in dict.fromkeys(ids) if ids.count(name) > 1
    ]
    if faults:
        raise Faults(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in specs:", list(dict.fromkeys(faults)))
    if as_json:
        print_json([{"id": case.id, "file": str(case.file), "line": case.line("test_id")} for case in cases])
        return
    for case in cases:
        echo(f"{case.file}:{case.line('test_id')}: {case.id}")


def _spec_files(names: tuple[str, ...]) -> list[Path]:
    """The files named, and those in the folders named. Raises MissingError for a name or a folder with nothing there."""
    found: list[Path] = []
    for name in names:
        path = Path(name)
        inside = (
            sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml")) if path.is_dir() else [path]
        )
        if not inside or not inside[0].is_file():
            raise MissingError(f"no spec at {path}. Write one from a good run with: finetune spec record RUN")
        found += inside
    return found


@command.command("schema")
def schema_command() -> None:
    """Print the format as a JSON Schema, for editors that complete and check YAML by one."""
    from finetune.testing.spec.model import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
