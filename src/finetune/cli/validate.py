"""`finetune validate`: every fault of a recipe and of the files it names, before anything is computed."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import click

from finetune.cli.options import echo, load_recipe, output_options, print_json, recipe_options
from finetune.core.errors import Faults, FinetuneError, MissingError, UsageError

if TYPE_CHECKING:
    from finetune.recipe import Recipe


@click.command("validate")
@recipe_options
@output_options
def command(
    recipe: str | None, config: str | None, example: str | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """Check a recipe and the files it names, and print it with every default.

    Nothing is downloaded or computed; data rows are read by 'finetune prepare'.
    """
    from finetune.recipe import dump
    from finetune.recipe.examples import locate

    loaded = load_recipe(recipe, config, example, overrides)
    source = str(locate(recipe, config, example))
    _refuse(source, [*faults_of(loaded), *_unprovable(loaded)])
    if as_json:
        value = loaded.model_dump(mode="json")
        value["model"]["token"] = None if loaded.model.token is None else "${HF_TOKEN}"
        print_json({"source": source, "model": model_kind(loaded.model.path), "recipe": value})
        return
    click.echo(dump(loaded, defaults=True), nl=False)
    echo(f"{source}: fine (model: {model_kind(loaded.model.path)})", err=True)


def refuse_faults(recipe: Recipe, only: list[str] | None = None) -> None:
    """Raise every fault of the files that these stages (all when None) will read, before the first of them works: a
    probe file that is missing or malformed must not be found out when the training is over."""
    from finetune.stages.pipeline import chosen

    faults = faults_of(recipe)
    stages = {stage.name for stage in chosen(recipe, only)}
    if "measure" in stages:
        faults += _unprovable(recipe)
    if "compare" in stages and any(name.partition(":")[0] == "ollama" for name in recipe.export):
        from finetune.backends.ollama import unavailable

        if reason := unavailable():
            raise MissingError(
                f"the export 'ollama' cannot be compared: {reason}. To write it uncompared: finetune export --no-parity"
            )
    if "evaluate" not in stages:
        faults = [fault for fault in faults if not str(fault).startswith("evaluate.")]
    elif not faults:
        from finetune.stages.evaluate import read_questions

        read_questions(recipe)
    _refuse("the recipe", faults)


def _unprovable(recipe: Recipe) -> list[FinetuneError]:
    """What the recipe wants proved and leaves no evidence for: better known before the training than after it."""
    train = recipe.train
    if train is None or not recipe.expect.resume:
        return []
    late = train.save_strategy == "steps" and 0 < train.max_steps <= train.save_steps
    if train.save_strategy == "no" or train.save_total_limit == 1 or late:
        why = (
            "expect.resume needs a checkpoint before the last step: train.save_strategy must not be 'no', "
            "train.save_steps must be below train.max_steps, and train.save_total_limit 2 or more"
        )
        return [UsageError(why)]
    return []


def _refuse(source: str, faults: list[FinetuneError]) -> None:
    if faults and all(isinstance(fault, MissingError) for fault in faults):
        raise MissingError("\n".join([_headline(source, faults), *(f"  {fault}" for fault in faults)]))
    if faults:
        raise Faults(_headline(source, faults), [str(fault) for fault in faults])


def faults_of(recipe: Recipe) -> list[FinetuneError]:
    """Everything that can be seen to be missing or wrong without reading a row or loading a weight."""
    from finetune.backends import BACKENDS
    from finetune.core.lookup import did_you_mean
    from finetune.data.sources import resolve
    from finetune.models import tiny

    faults: list[FinetuneError] = []
    known = [*BACKENDS, *(entry.name for entry in entry_points(group="finetune.backend"))]
    if recipe.backend not in known:
        guess = did_you_mean(recipe.backend, known)
        faults.append(UsageError(f"backend: unknown backend '{recipe.backend}'.{guess} Known: {', '.join(known)}."))
    for key, value in (("model.path", recipe.model.path), ("model.base_model", recipe.model.base_model)):
        if value and model_kind(value) == "missing":
            faults.append(
                MissingError(f"{key}: no model at {value} (a name, a directory with a config.json, or a GGUF file)")
            )
        elif value and tiny.is_name(value):
            try:
                tiny.parse(value)
            except UsageError as error:
                faults.append(UsageError(f"{key}: {error}"))
    for key, name in data_files(recipe):
        if not name.startswith("hub:"):
            try:
                resolve(name)
            except FinetuneError as error:
                faults.append(type(error)(f"{key}: {error}"))
    return faults


def data_files(recipe: Recipe) -> list[tuple[str, str]]:
    """The recipe's keys that name data files, and the names."""
    named: list[tuple[str, str | None]] = []
    for prefix, data in (("data", recipe.data), ("align.data", recipe.align.data if recipe.align else None)):
        if data is not None:
            named += [(f"{prefix}.path", path) for path in data.paths] + [(f"{prefix}.eval_path", data.eval_path)]
    named.append(("template.path", recipe.template.path))
    named += [(f"evaluate.{key}", getattr(recipe.evaluate, key)) for key in ("probes", "controls", "unseen", "heldout")]
    return [(key, name) for key, name in named if name]


def model_kind(path: str) -> str:
    """What a model's name refers to: `embedded`, `tiny`, `directory`, `gguf file`, `hub id`, or `missing`."""
    from finetune.core.hub import is_id
    from finetune.models import tiny
    from finetune.models.sources import EMBEDDED

    here = Path(path).expanduser()
    if path in EMBEDDED:
        return "embedded"
    if tiny.is_name(path):
        return "tiny"
    if here.is_dir():
        is_model = any((here / name).is_file() for name in ("config.json", "adapter_config.json"))
        return "directory" if is_model else "missing"
    if here.is_file():
        with here.open("rb") as stream:
            return "gguf file" if stream.read(4) == b"GGUF" else "missing"
    return "hub id" if is_id(path) and here.suffix != ".gguf" else "missing"


def _headline(source: str, faults: list[FinetuneError]) -> str:
    return f"{source} has {len(faults)} fault{'s' if len(faults) > 1 else ''}:"
