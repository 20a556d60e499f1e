"""The runs that faults happen to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from finetune.core.files import write_text
from finetune.recipe import dump
from support import town


def fake(place: Path) -> Path:
    """Training, alignment, evaluation, merge, experiments and a bundle; a second."""
    recipe = town.recipe(town.build(place / "town"), place / "runs", export=["bundle"], expect={"resume": False})
    write_text(place / "recipe.yaml", dump(recipe))
    return place / "recipe.yaml"


GROUNDS: dict[str, Callable[[Path], Path]] = {"fake": fake}
