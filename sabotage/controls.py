"""Honest runs in which no verdict may fail: other facts, data orders, learning rates, ways to train, architectures, and the
embedded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.recipe import yaml
from finetune.recipe.examples import example
from sabotage import baseline

EMBEDDED = "embedded model"
SEEDS = {"lora": range(1, 6), "full": (1, 2), "dpo": (1, 2), "gguf": (1,), "resume": (1,), "serving": (1,)}
DATA_SEEDS = (101, 102, 103)
LEARNING_RATES = (5e-4, 7e-4, 1.4e-3)
WAYS: dict[str, dict[str, Any]] = {
    "accumulation": {"train.per_device_train_batch_size": 2, "train.gradient_accumulation_steps": 4},
    "checkpointing": {"train.gradient_checkpointing": True},
    "dropout": {"train.lora.lora_dropout": 0.05},
    "rank 8": {"train.lora.r": 8, "train.lora.lora_alpha": 16, "train.learning_rate": 2e-3},
    "linear schedule": {"train.lr_scheduler_type": "linear", "train.weight_decay": 0.01},
    "warm-up": {"train.warmup_steps": 0.1, "train.lr_scheduler_type": "inverse_sqrt"},
    "adafactor": {"train.optim": "adafactor"},
    "DoRA": {"train.lora.use_dora": True},
    "rank-stabilized": {"train.lora.use_rslora": True, "train.lora.lora_alpha": 8},
    "packed": {"train.packing": True, "train.max_length": 256, "train.per_device_train_batch_size": 2},
    "bfloat16": {"model.dtype": "bfloat16"},
    "mixed precision": {"train.bf16": True},
    "held out": {"data.eval_fraction": 0.1, "train.eval_strategy": "steps", "train.eval_steps": 50},
    "loading in processes": {"train.dataloader_num_workers": 2},
    "no checkpoints": {"train.save_strategy": "no"},
    "seldom logged": {"train.logging_steps": 10},
    "three epochs more": {"train.max_steps": -1, "train.num_train_epochs": 45},
    "trained by MLX": {"backend": "mlx"},
}
WAYS_TO_ALIGN: dict[str, dict[str, Any]] = {
    "IPO": {"align.loss_type": "ipo"},
    "robust DPO": {"align.loss_type": "robust", "align.label_smoothing": 0.1},
    "DPO with warm-up": {"align.warmup_steps": 0.1, "align.weight_decay": 0.01},
}
# The ways in which most may differ, on other baselines too.
ELSEWHERE: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("bfloat16", {"model.dtype": "bfloat16"}, ("full", "dpo", "resume", "gguf", "mlx")),
    ("trained by MLX", {"backend": "mlx"}, ("full", "resume", "memory", "gguf")),
)
ARCHITECTURES = ("qwen2", "qwen3", "phi3")
PER_ARCHITECTURE = 2  # seeds


@dataclass(frozen=True, kw_only=True)
class Control:
    """One honest run: a baseline, and what is set otherwise in its recipe."""

    name: str
    baseline: str = "lora"
    seed: int = 0
    architecture: str = "llama"
    changes: Mapping[str, Any] = field(default_factory=dict)

    def recipe(self, folder: Path) -> dict[str, Any]:
        """The recipe as a mapping, its data files in `folder`."""
        if self.name == EMBEDDED:
            return _embedded()
        found = baseline.recipe(self.baseline, folder, seed=self.seed, architecture=self.architecture)
        for key, value in self.changes.items():
            baseline.put(found, key, value)
        return found


def controls() -> dict[str, Control]:
    """Every control by its name. (The honest runs that sabotages happen to are controls too; see `bench`.)"""
    rows = [Control(name=EMBEDDED)]
    rows += [
        Control(name=f"{name}, seed {seed}", baseline=name, seed=seed) for name, all in SEEDS.items() for seed in all
    ]
    rows += [Control(name=f"data order {seed}", changes={"train.data_seed": seed}) for seed in DATA_SEEDS]
    rows += [Control(name=f"learning rate {rate:g}", changes={"train.learning_rate": rate}) for rate in LEARNING_RATES]
    rows += [Control(name=name, changes=changes) for name, changes in WAYS.items()]
    rows += [Control(name=name, baseline="dpo", changes=changes) for name, changes in WAYS_TO_ALIGN.items()]
    rows += [
        Control(name=f"{name}, {of}", baseline=of, changes=changes)
        for name, changes, baselines in ELSEWHERE
        for of in baselines
    ]
    rows += [
        Control(name=f"{architecture}, seed {seed}", architecture=architecture, seed=seed)
        for architecture in ARCHITECTURES
        for seed in range(PER_ARCHITECTURE)
    ]
    return {row.name: row for row in rows}


def _embedded() -> dict[str, Any]:
    """The quickstart without its alignment and its experiments on memory and resuming."""
    found: dict[str, Any] = yaml.parse(example("quickstart").read_text(encoding="utf-8"), "quickstart")[0]
    del found["align"], found["expect"]
    return found
