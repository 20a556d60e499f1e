"""The questions of a run and their answers, as the checks read them."""

from __future__ import annotations

from pathlib import Path

from finetune.backends import tokenizer_of
from finetune.core.errors import StageError
from finetune.data.tokenizer import Tokenizer
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.evaluated import Question

SETS = ("probes", "controls", "unseen")
BASE = "base"


def phases(recipe: Recipe) -> list[str]:
    """The points at which a run of this recipe asks its model, in order; the last one is the final model."""
    later = (("trained", recipe.train), ("aligned", recipe.align))
    return [BASE, *(name for name, section in later if section is not None)]


def sets(recipe: Recipe) -> list[str]:
    """The sets of questions that the recipe has."""
    return [name for name in SETS if getattr(recipe.evaluate, name)]


def base_tokenizer(recipe: Recipe, run: Run) -> Tokenizer:
    """The tokenizer of the base, which the data were prepared with."""
    return tokenizer_of(recipe, Path(evidence.fetched(run)["base"]))


def answered(recipe: Recipe, run: Run, which: str) -> list[Question]:
    """The questions of a set, each with an answer before and after everything. Raises StageError without any."""
    found = [row for row in evidence.rows(run, layout.ANSWERS) if row["set"] == which]
    if not found:
        raise StageError(f"no question of evaluate.{which} was asked")
    for row in found:
        for phase in (BASE, phases(recipe)[-1]):
            if phase not in row["phases"]:
                raise StageError(f"{row['prompt']!r} was not asked of the model '{phase}'")
    return found
