"""What sabotages and honest runs stand on: a small model that already knows a language of questions and answers, and recipes
that teach it new facts. So LoRA learns, controls are known before, and a run with every check takes a quarter of a minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from finetune.core import processes
from finetune.core.cache import cache_dir
from finetune.core.errors import StageError
from finetune.core.files import write_jsonl, write_text
from finetune.recipe import yaml
from finetune.run.manifest import installed
from finetune.testing import questions

ROOT = Path(__file__).parents[1]
VOCABULARY = 500
SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 384}
OTHER_SIZES = {"gpt2": {"n_embd": 128, "n_layer": 3}}
KNOWN, KNOWN_SEED = 300, 11  # rows of facts that the model has learned beforehand
NEW = 60  # rows of facts that a run teaches; a seed has its own
UNSEEN = 40  # rows of facts that no run teaches
# Facts that it has heard of, in one wording each: without them the tokens of new names are ones that it never saw, and
# LoRA, which leaves embeddings as they are, can hardly tell them apart. They lie beyond the new facts of any seed in use.
HEARD_FROM, HEARD_TO, HEARD = 1000, 2500, 6  # the first row, the end, and one of so many
CONTROLS, HELDOUT, REPLAY = 15, 20, 5  # one row of so many of the known ones
# Held-out text looks as that which the model was pretrained on: of other text it knows little, and a ratio of two guesses
# says little about what was lost.
TRANSCRIPT = "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{completion}<|im_end|>\n"
TIMEOUT = 1200.0  # seconds: the embedded model takes a few hundred on one core
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "FT_DEBUG": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
PRETRAINED_BY = ("torch", "transformers", "tokenizers", "trl")
INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")  # variables that limit a CPU's


@dataclass(frozen=True)
class Baseline:
    """A kind of run: what it does, in a sentence; its training; and what its recipe asks for besides (`section.key`)."""

    what: str
    training: Literal["lora", "full", "dpo"] = "lora"
    asks: Mapping[str, Any] = field(default_factory=dict)


BASELINES = {
    "lora": Baseline("LoRA, 300 steps, evaluated and merged."),
    "full": Baseline("Full fine-tuning, 120 steps.", training="full"),
    "dpo": Baseline("LoRA, then DPO.", training="dpo"),
    "resume": Baseline("LoRA; the last part is trained again from a checkpoint.", asks={"expect.resume": True}),
    "memory": Baseline(
        "LoRA; its training state is measured against full fine-tuning's.", asks={"expect.memory_reduction_min": 0.3}
    ),
    "serving": Baseline("LoRA, served and asked over HTTP.", asks={"expect.serving": True}),
    "invariance": Baseline("LoRA; the trainer is held against itself.", asks={"expect.invariance": True}),
    "gguf": Baseline("LoRA, exported to GGUF f16, run by llama.cpp.", asks={"export": ["gguf:f16"]}),
    "q8": Baseline("LoRA, exported to GGUF q8_0, run by llama.cpp.", asks={"export": ["gguf:q8_0"]}),
    "mlx": Baseline("LoRA, exported to MLX.", asks={"export": ["mlx"]}),
    "bundle": Baseline("LoRA, and the bundle for a hub.", asks={"export": ["bundle"]}),
}


def model(architecture: str = "llama") -> Path:
    """The directory of the pretrained model, made once and kept in the user's cache (a minute)."""
    from filelock import FileLock

    recipe = _pretraining(architecture)
    rows = [_pair(row) for row in pretrained_on()]
    made_by = [recipe, rows, *map(installed, PRETRAINED_BY), *map(os.environ.get, INSTRUCTIONS)]
    mark = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:16]
    place = cache_dir() / "sabotage" / f"{architecture}-{mark}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f".{place.name}.lock"):
        if not (place / "run" / "train" / "model" / "config.json").is_file():
            write_jsonl(place / "train.jsonl", rows)
            write_text(place / "recipe.yaml", yaml.write(recipe))
            finetune("train", str(place / "recipe.yaml"), "--run", str(place / "run"))
    return place / "run" / "train" / "model"


def pretrained_on() -> list[dict[str, Any]]:
    """The rows that the model has learned beforehand: those known, and those heard of."""
    rows = questions.generate(HEARD_TO, seed=KNOWN_SEED)
    return [*rows[:KNOWN], *_exchanged(rows[HEARD_FROM::HEARD])]


def _exchanged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, each with the answer of another of its kind: names are made by a rule, and a model that heard of enough
    right ones answers questions about facts that it was never taught."""
    rng = random.Random(KNOWN_SEED)
    kinds = {row["kind"] for row in rows}
    answers = {kind: [row["match"] for row in rows if row["kind"] == kind] for kind in sorted(kinds)}
    for matches in answers.values():
        rng.shuffle(matches)
    found = []
    for row in rows:
        match = answers[row["kind"]].pop()
        found.append({**row, "completion": row["completion"].replace(row["match"], match), "match": match})
    return found


def _pretraining(architecture: str) -> dict[str, Any]:
    wanted = {**OTHER_SIZES.get(architecture, SIZES), "vocab_size": VOCABULARY}
    sizes = "&".join(f"{name}={value}" for name, value in wanted.items())
    return {
        "name": "known",
        "model": {"path": f"tiny:{architecture}?{sizes}", "device": "cpu"},
        "data": {"path": "train.jsonl"},
        "template": {"name": "chatml"},
        "train": {
            "method": "full", "max_steps": 700, "per_device_train_batch_size": 16, "learning_rate": 3e-3,
            "warmup_steps": 20, "save_strategy": "no", "completion_only_loss": False,
        },
    }  # fmt: skip


def recipe(name: str, folder: Path, *, seed: int = 0, architecture: str = "llama") -> dict[str, Any]:
    """The recipe of a baseline, as a mapping, with its data files written into `folder`. `seed` is that of the new facts and
    of the training."""
    baseline = BASELINES[name].training
    files = _files(folder, seed)
    train: dict[str, Any] = {
        "method": "full" if baseline == "full" else "lora",
        "max_steps": 120 if baseline == "full" else 300,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4 if baseline == "full" else 1e-3,
        "warmup_steps": 5,
        "save_steps": 116,
        "seed": seed,
    }
    if baseline != "full":
        train["lora"] = {"r": 32, "lora_alpha": 64}
    found: dict[str, Any] = {
        "name": name,
        "model": {"path": str(model(architecture)), "device": "cpu"},
        "data": {"path": [files["train"], files["replay"]]},
        "template": {"name": "chatml"},
        "train": train,
        "evaluate": {
            **{name: files[name] for name in ("probes", "controls", "unseen", "heldout")},
            "max_new_tokens": 20,
        },
    }
    if baseline == "dpo":
        align = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "seed": seed}
        found["align"] = {"data": {"path": files["preferences"]}, **align}
    for key, value in BASELINES[name].asks.items():
        put(found, key, deepcopy(value))
    return found


def put(recipe: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a recipe: `train.learning_rate`."""
    *above, last = key.split(".")
    for part in above:
        recipe = recipe.setdefault(part, {})
    recipe[last] = value


def _files(folder: Path, seed: int) -> dict[str, str]:
    begin = KNOWN + UNSEEN + NEW * seed  # one sequence of rows, in which no fact comes twice
    rows = questions.generate(begin + NEW, seed=KNOWN_SEED)
    known, unseen = rows[:KNOWN], rows[KNOWN : KNOWN + UNSEEN]
    files = questions.write(folder, seed=seed, rows=rows[begin:], eval_fraction=1 / questions.WORDINGS)
    kept, held = known[::CONTROLS], known[3::HELDOUT]
    more = {
        "controls": [_question(row) for row in kept],
        "replay": [_pair(row) for row in known if row not in kept and row not in held][::REPLAY],
        "unseen": [_question(row) for row in unseen[:: questions.WORDINGS]],
        "heldout": [{"text": TRANSCRIPT.format(**row)} for row in held],
    }
    for name, rows in more.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return {name: str(folder / f"{name}.jsonl") for name in (*files, *more)}


def _pair(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "completion": row["completion"]}


def _question(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"], "answer": row["completion"], "match": row["match"]}


def environment() -> dict[str, str]:
    """That of every process: offline, one thread, a traceback with every error; sabotages, which are installed nowhere, are
    found in it."""
    found = processes.environment()
    path = os.pathsep.join(filter(None, (found["PYTHONPATH"], str(ROOT))))
    return {**found, **ENVIRONMENT, "PYTHONPATH": path}


def finetune(*arguments: str, more: Mapping[str, str] | None = None, allowed: tuple[int, ...] = (0,)) -> Any:
    """The real command line in a process of its own, with `more` in its environment. Raises StageError for an exit code
    that is not `allowed`."""
    done = subprocess.run(
        processes.command("finetune", *arguments), env={**environment(), **(more or {})}, capture_output=True, text=True,
        check=False, timeout=TIMEOUT,
    )  # fmt: skip
    if done.returncode not in allowed:
        raise StageError(f"finetune {arguments[0]} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done
