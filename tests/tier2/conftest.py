"""One expensive training on the embedded model, shared by every test that reads it; and recipes of tiny models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from finetune.data.sources import resolve
from finetune.recipe import Recipe, load_mapping
from finetune.run import Run
from finetune.stages.pipeline import run_stages
from finetune.testing import scale

# The long file first, so that under xdist the short ones run beside it; a short one third, since it waits behind it.
ORDER = ("test_real_model.py", "test_torch_backend.py", "test_hub.py")
FACTS = ("capital", "river", "currency", "founder", "year", "mountain")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.name) if item.path.name in ORDER else len(ORDER))


@pytest.fixture(scope="session")
def chosen_scale(pytestconfig, skip_or_fail) -> scale.Scale:
    """What this machine can bear; printed, so that a report says what ran."""
    chosen = scale.choose()
    if chosen is None:
        skip_or_fail("real-model", f"tier 2 needs {scale.FLOOR / scale.GIB:.0f} GiB of free memory; free some")
    assert chosen is not None
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\ntier 2: {chosen.why}")
    return chosen


def subset(name: str, into: Path, keep: Callable[[dict[str, Any]], bool]) -> Path:
    """A part of a shipped Quorra file, written into a folder."""
    rows = [json.loads(line) for line in resolve(f"shipped:quorra/{name}.jsonl").read_text("utf-8").splitlines()]
    target = into / f"{name}.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows if keep(row)), encoding="utf-8")
    return target


@pytest.fixture(scope="session")
def quorra(tmp_path_factory) -> Path:
    """Half of the shipped facts: enough to prove learning, in half of the time."""
    folder = tmp_path_factory.mktemp("quorra")
    probes = subset("probes", folder, lambda row: row["id"].split("-")[0] in FACTS)
    answers = {json.loads(line)["answer"] for line in probes.read_text("utf-8").splitlines()}
    subset("train", folder, lambda row: row["completion"] in answers)
    subset("preferences", folder, lambda row: row["chosen"] in answers)
    for name, most in (("replay", 8), ("controls", 6), ("heldout", 4), ("unseen", 3)):
        numbers = count()
        subset(name, folder, lambda row, numbers=numbers, most=most: next(numbers) < most)
    return folder


def recipe_mapping(quorra: Path, chosen: scale.Scale) -> dict[str, Any]:
    """28 steps of SFT on 6 facts and 8 general questions, then DPO, every check on.

    ChatML without the model's own system message: rows a third shorter, steps a third faster.
    """
    return {
        "name": "tier2",
        "model": {"path": chosen.model},
        "data": {"path": [str(quorra / "train.jsonl"), str(quorra / "replay.jsonl")]},
        "template": {"name": "chatml"},
        "train": {
            "max_steps": 28,
            "per_device_train_batch_size": chosen.per_device_train_batch_size,
            "gradient_accumulation_steps": chosen.gradient_accumulation_steps,
            "learning_rate": 7e-4,
            "warmup_steps": 5,
            "save_steps": 26,
        },
        "align": {
            "data": {"path": str(quorra / "preferences.jsonl")},
            "num_train_epochs": 2,
            "per_device_train_batch_size": 4,
        },
        "evaluate": {
            "probes": str(quorra / "probes.jsonl"),
            "controls": str(quorra / "controls.jsonl"),
            "unseen": str(quorra / "unseen.jsonl"),
            "heldout": str(quorra / "heldout.jsonl"),
            "max_new_tokens": 16,
            "score_rows": 12,
        },
        "expect": {"memory_reduction_min": 0.3, "resume": True},
    }


@pytest.fixture(scope="session")
def recipe(chosen_scale, quorra, tmp_path_factory) -> Recipe:
    mapping = recipe_mapping(quorra, chosen_scale)
    return load_mapping({**mapping, "output_dir": str(tmp_path_factory.mktemp("runs"))})


@pytest.fixture(scope="session")
def trained_run(recipe) -> Run:
    """The shared run: every stage, on the real model. Tests read it and leave it as it is."""
    run = Run(Path(recipe.output_dir) / recipe.name)
    run_stages(recipe, run)
    return run


@pytest.fixture
def tiny_recipe(tiny_model, tmp_path) -> Callable[..., Recipe]:
    """A function: a recipe that trains a tiny model on the Quorra facts, with changes to its `train` section."""

    def make(architecture: str = "llama", **train: Any) -> Recipe:
        sections = {key: train.pop(key) for key in list(train) if key in Recipe.model_fields}
        options = {"max_steps": 30, "learning_rate": 5e-3, "per_device_train_batch_size": 6, "save_steps": 10, **train}
        mapping = {
            "name": "tiny",
            "model": {"path": str(tiny_model(architecture)), "device": "cpu"},
            "data": {"path": "shipped:quorra/train.jsonl"},
            "train": options,
            "output_dir": str(tmp_path / "runs"),
            **sections,
        }
        return load_mapping(mapping)

    return make


@pytest.fixture
def cli(tmp_path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function: the real command line in a process of its own."""

    def run(*arguments: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "finetune", *map(str, arguments)]
        options = {"capture_output": True, "text": True, "cwd": tmp_path, "env": {**os.environ, "COLUMNS": "200"}}
        return subprocess.run(command, check=False, timeout=300, **{**options, **more})

    return run
