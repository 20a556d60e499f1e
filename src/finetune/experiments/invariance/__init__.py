"""What any correct trainer leaves unchanged, measured on a tiny copy of a recipe's model, in float32, on the CPU.

    shrink   the tiny copy, and a few short rows
    measure  the experiments, each pair of trainings that must agree; the evidence
    trials   what a process of its own does for it

`finetune.checks.invariance` reads the evidence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetune.recipe import Recipe

MEASURED = "measure/invariance.json"
NAMES = ("accumulation", "checkpointing", "packing", "padding", "order", "merge")
# What a backend has not got, and why; the torch backend has all of it.
_OF_BACKENDS: dict[str, dict[str, str]] = {
    "mlx": {"packing": "the mlx backend packs no rows"},
    "fake": {
        "packing": "the fake backend packs no rows",
        "checkpointing": "the fake backend keeps no activations, so there is nothing to compute again",
    },
}


def lacks(recipe: Recipe) -> dict[str, str]:
    """The invariances of which there is nothing to compare for a recipe, and why. (A model may be one that packs no rows,
    whatever the recipe says: see `shrink.unpackable`.)"""
    found = dict(_OF_BACKENDS.get(recipe.backend, {}))
    assert recipe.train is not None
    if recipe.train.packing_strategy == "wrapped":
        found["packing"] = "packing_strategy 'wrapped' cuts rows, and lets them attend to each other; 'bfd' does not"
    if recipe.train.method == "full":
        found["merge"] = "full fine-tuning has no adapter to merge"
    return found


def uses(recipe: Recipe, name: str) -> bool:
    """Whether the recipe's own training does what an invariance is of, so that it must hold."""
    assert recipe.train is not None
    used = {"packing": recipe.train.packing, "checkpointing": recipe.train.gradient_checkpointing}
    return used.get(name, False)
