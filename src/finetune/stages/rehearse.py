"""Every export tried on the base model's config, tokenizer and template: what cannot work is told before training."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from finetune.core.console import progress
from finetune.core.errors import FinetuneError, MissingError, UsageError
from finetune.export import exporter, targets
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.trained import Rehearsed
from finetune.stages import Result

TEMPLATE = "chat_template.jinja"


def run(recipe: Recipe, run: Run) -> Result:
    """Write `rehearse/exports.json`. Raises UsageError, or MissingError where only tools are missing, naming all."""
    base = Path(evidence.fetched(run)["base"])
    template = evidence.required(run, layout.CHAT_TEMPLATE)
    wanted = targets(recipe.export)
    faults: list[tuple[str, FinetuneError]] = []
    with tempfile.TemporaryDirectory(prefix="rehearse-") as folder, progress(len(wanted), "rehearse") as bar:
        model = _as_merged(base, template, Path(folder) / base.name)
        # The later ones ask for more (a quantizer), and what they found out holds for those before them.
        for number, target in enumerate(reversed(wanted), 1):
            try:
                exporter(target).rehearse(model, target.variant, trust_remote_code=recipe.model.trust_remote_code)
            except (MissingError, UsageError) as error:
                faults.append((target.name, error))
            bar.update(number)
    if faults:
        kind = MissingError if all(isinstance(error, MissingError) for _, error in faults) else UsageError
        lines = [f"{name}: {error}" for name, error in reversed(faults)]
        raise kind("\n  ".join([f"{len(faults)} of {len(wanted)} exports would fail:", *lines]))
    rehearsed: list[Rehearsed] = [{"name": target.name, "ok": True} for target in wanted]
    file = evidence.write(run, layout.REHEARSED, rehearsed)
    return {"metrics": {"exports": len(wanted)}, "artifacts": [file]}


def _as_merged(base: Path, template: Path, folder: Path) -> Path:
    """The base model's files, linked, with the chat template that the trained model will carry."""
    folder.mkdir()
    for file in base.iterdir():
        if file.is_file() and file.name != TEMPLATE:
            os.symlink(file.resolve(), folder / file.name)
    (folder / TEMPLATE).write_bytes(template.read_bytes())
    return folder
