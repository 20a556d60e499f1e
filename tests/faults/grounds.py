"""The runs that faults happen to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from finetune.core.files import write_text
from finetune.recipe import dump, load_mapping
from support import town

SAVED = (3, 6, 9, 12)  # the steps of whose end the trainings here keep a checkpoint


def _fake(place: Path) -> Path:
    """Training, alignment, evaluation, merge, experiments and a bundle; a second."""
    recipe = town.recipe(town.build(place / "town"), place / "runs", export=["bundle"], expect={"resume": False})
    write_text(place / "recipe.yaml", dump(recipe))
    return place / "recipe.yaml"


def _torch(place: Path) -> Path:
    """A training by PyTorch and TRL, of a tiny model whose adapter has dropout, which draws random numbers; ten seconds."""
    recipe = load_mapping(
        {
            "name": "torch",
            "model": {"path": "tiny:llama", "device": "cpu"},
            "data": {"path": "shipped:quorra/train.jsonl", "limit": 24},
            "train": {
                "max_steps": SAVED[-1], "per_device_train_batch_size": 4, "save_steps": SAVED[0], "save_total_limit": None,
                "lora": {"r": 4, "lora_dropout": 0.1},
            },
        }
    )  # fmt: skip
    write_text(place / "recipe.yaml", dump(recipe))
    return place / "recipe.yaml"


@dataclass(frozen=True)
class Ground:
    """`make` writes the recipe into a folder; `verb` is the command that is disturbed, `needs` the package that it takes."""

    make: Callable[[Path], Path]
    verb: str
    needs: str = "finetune"


GROUNDS = {"fake": Ground(_fake, "run"), "torch": Ground(_torch, "train", needs="torch")}
