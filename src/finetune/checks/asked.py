"""The questions of a run and their answers, as the checks read them."""

from __future__ import annotations

from finetune.errors import StageError
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.evaluated import Question

SETS = ("probes", "controls", "unseen")
BASE = "base"


def phases(recipe: Recipe) -> list[str]:
    """The points at which a run of this recipe asks its model, in order; the last one is the final model."""
    later = (("trained", recipe.train), ("aligned", recipe.align))
    return [BASE, *(name for name, section in later if section is not None)]


def trains(recipe: Recipe) -> bool:
    """Whether a run of this recipe makes a model that can know something else than its base."""
    return recipe.train is not None or recipe.align is not None


def sets(recipe: Recipe) -> list[str]:
    """The sets of questions that the recipe has."""
    return [name for name in SETS if getattr(recipe.evaluate, name)]


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
