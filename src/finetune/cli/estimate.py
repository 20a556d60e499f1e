"""`finetune estimate`: what a recipe needs, before it is run."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import echo, load_recipe, output_options, print_json, recipe_options
from finetune.core.errors import FinetuneError, UsageError
from finetune.core.files import read_object

if TYPE_CHECKING:
    from finetune.recipe import Recipe

_LINES = ("weights", "gradients", "optimizer", "training_state", "activations", "logits", "runtime", "total")
_LABELS = {"logits": "loss", "runtime": "libraries", "training_state": "= training state", "total": "= peak"}


@click.command("estimate")
@recipe_options
@click.option("--length", type=click.IntRange(min=1), help="Tokens of the longest row [default: train.max_length].")
@output_options
def command(
    recipe: str | None,
    config: str | None,
    example: str | None,
    overrides: tuple[str, ...],
    length: int | None,
    as_json: bool,
) -> None:
    """Memory and disk that training needs, LoRA beside full fine-tuning, and the steps it takes. Trains nothing."""
    from finetune.core import memory
    from finetune.stages.pipeline import run_directory
    from finetune.training import estimate

    loaded = load_recipe(recipe, config, example, overrides)
    shape = estimate.model_config(loaded) or _obtained(loaded)
    if loaded.train is None and loaded.align is None:
        raise UsageError("the recipe trains nothing: it has neither a 'train' nor an 'align' section")
    methods = {method: estimate.by_stage(loaded, shape, length, method=method) for method in ("lora", "full")}
    chosen = loaded.train.method if loaded.train is not None else "lora"
    peak = max(methods[chosen].values(), key=lambda need: need.total)
    room, run = estimate.room(loaded), run_directory(loaded)
    facts: dict[str, Any] = {
        "model": loaded.model.path,
        "method": chosen,
        "stages": {
            stage: {method: methods[method][stage].as_dict() for method in methods} for stage in methods[chosen]
        },
        "peak": peak.total,
        "memory_available": room,
        "fits": peak.total <= room,
        "disk_needed": estimate.disk_needed(loaded, peak),
        "disk_free": memory.disk_free(run.path),
        **steps(loaded),
    }
    if as_json:
        print_json(facts)
    else:
        _show(loaded, facts, length)


def steps(recipe: Recipe) -> dict[str, Any]:
    """Rows, steps and epochs of the SFT, where its data is here to be counted; `note` says why where it is not."""
    from finetune.data.sources import read

    train, data = recipe.train, recipe.data
    if train is None or data is None:
        return {}
    if any(path.startswith("hub:") for path in data.paths):
        return {"note": "rows of a hub data set are not counted"}
    try:
        rows = len(read(data))
    except FinetuneError as error:
        return {"note": f"rows not counted: {error}"}
    held_out = int(rows * data.eval_fraction) if data.eval_path is None else 0
    effective = train.per_device_train_batch_size * train.gradient_accumulation_steps
    epoch = ceil((rows - held_out) / effective)
    total = train.max_steps if train.max_steps > 0 else ceil(epoch * train.num_train_epochs)
    epochs = round(total / epoch, 2)
    facts: dict[str, Any] = {"rows": rows, "rows_per_step": effective, "steps": total, "epochs": epochs}
    if train.packing:
        facts["note"] = "packing puts several rows into one, so there will be fewer steps"
    return facts


def _obtained(recipe: Recipe) -> dict[str, Any]:
    """The `config.json` of a model that must be fetched first."""
    from finetune.core import console
    from finetune.models import sources

    console.say(f"fetching {recipe.model.path} for its shape")
    token = recipe.model.token.get_secret_value() if recipe.model.token else None
    path = sources.directory(recipe.model.path, revision=recipe.model.revision, token=token)
    file = path / "config.json"
    if not file.is_file():
        raise UsageError(f"{path} holds no config.json, so its memory cannot be estimated")
    return read_object(file)


def _show(recipe: Recipe, facts: dict[str, Any], length: int | None) -> None:
    from finetune.core.memory import human
    from finetune.report.terminal import number, show_table

    for stage, section in (("train", recipe.train), ("align", recipe.align)):
        if section is None:
            continue
        methods = facts["stages"][stage]
        rows, what = section.per_device_train_batch_size, "pairs" if stage == "align" else "rows"
        size = f"{facts['model']} ({number(methods['lora']['parameters'])} parameters, {recipe.model.dtype})"
        click.echo(f"{stage}: {size}, {rows} {what} of {length or section.max_length} tokens a step")
        table = [[_LABELS.get(name, name), *(human(each[name]) for each in methods.values())] for name in _LINES]
        table.append(["trained parameters", *(number(each["trainable"]) for each in methods.values())])
        headings = [f">{name}{' (this recipe)' if name == facts['method'] else ''}" for name in methods]
        show_table(["", *headings], table)
    fits = "fits" if facts["fits"] else "does NOT fit"
    click.echo(f"memory: {human(facts['peak'])} of {human(facts['memory_available'])} available: {fits}")
    click.echo(f"disk: {human(facts['disk_needed'])} of {human(facts['disk_free'])} free")
    if "steps" in facts:
        data = f"{facts['rows']} rows, {facts['rows_per_step']} a step"
        echo(f"data: {data}: {facts['steps']} steps, {facts['epochs']} epochs")
    if length is None:
        click.echo("note: rows shorter than max_length need less; --length N shows how much", err=True)
    if "note" in facts:
        echo(f"note: {facts['note']}", err=True)
