"""The whole line on the embedded model, once: trained on generated facts, aligned, merged, exported to what is here."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.checks import verify
from finetune.core.files import read_jsonl, write_jsonl
from finetune.data.sources import resolve
from finetune.recipe import Recipe, load_mapping
from finetune.run import Run
from finetune.stages.pipeline import run_stages
from finetune.testing import questions

# The line takes most of the time: first, so that under xdist the others run beside it.
ORDER = ("test_line.py", "test_mlx_architectures.py")
NEEDS = {"gguf": ("cyllama", "xllamacpp", "conversion"), "mlx": ("mlx_lm",), "ollama": ("cyllama", "conversion")}
EXPORTS = {"gguf": ("gguf:f16", "gguf:q8_0", "gguf:q4_k_m"), "mlx": ("mlx",), "ollama": ("ollama",)}
ONLY = os.environ.get("FT_TIER3")  # the family that a session is for; all that are here without it
MODEL = os.environ.get("FT_E2E_MODEL_ID", "smollm2-135m")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: ORDER.index(item.path.name) if item.path.name in ORDER else len(ORDER))


def lacking(family: str) -> str | None:
    """Why a family of formats cannot be tried here, with what would get it; None where it can."""
    missing = [name for name in NEEDS[family] if importlib.util.find_spec(name) is None]
    if missing:
        extra = "mlx" if family == "mlx" else "gguf"
        return f"{', '.join(missing)} not installed. Install with: pip install 'finetune-proof[{extra}]'"
    if family == "ollama":
        from finetune.backends.ollama import unavailable

        return unavailable()
    return None


@pytest.fixture(scope="session")
def family(skip_or_fail) -> Callable[[str], str]:
    """A function: the family's name, or a skip (a failure where it was required) with the reason."""

    def need(name: str) -> str:
        if ONLY and name != ONLY:
            pytest.skip(f"this session is for {ONLY}; run: nox -s tier3-{name}")
        if reason := lacking(name):
            skip_or_fail(name, reason)
        return name

    return need


@pytest.fixture(scope="session")
def asked(tmp_path_factory) -> dict[str, Path]:
    """100 generated question and answer pairs, 90 trained and 10 held out, and what is made from them."""
    files = questions.write(tmp_path_factory.mktemp("asked"))
    probes = read_jsonl(files["probes"])
    write_jsonl(files["probes"], [*probes[:12], *probes[-6:]])  # as trained, and in words held out
    for name, most in (("controls", 6), ("unseen", 3)):
        files[name] = files["train"].with_name(f"{name}.jsonl")
        write_jsonl(files[name], read_jsonl(resolve(f"shipped:quorra/{name}.jsonl"))[:most])
    return files


@pytest.fixture(scope="session")
def recipe(asked, tmp_path_factory) -> Recipe:
    """90 generated rows and 20 general ones, 56 steps; then DPO; every export that this machine can make."""
    wanted = {kind: names for kind, names in EXPORTS.items() if ONLY in (None, kind) and lacking(kind) is None}
    exports = [name for names in wanted.values() for name in names]
    return load_mapping(
        {
            "name": "line",
            "model": {"path": MODEL},
            "data": {"path": [str(asked["train"]), "shipped:quorra/replay.jsonl"], "eval_path": str(asked["eval"])},
            "template": {"name": "chatml" if MODEL == "smollm2-135m" else "model"},
            "train": {
                "max_steps": 56,
                "per_device_train_batch_size": 6,
                "learning_rate": 7e-4,
                "warmup_steps": 5,
                "save_strategy": "no",
            },
            "align": {
                "data": {"path": str(asked["preferences"]), "limit": 12},
                "num_train_epochs": 1,
                "per_device_train_batch_size": 4,
                "save_strategy": "no",
            },
            "evaluate": {
                "probes": str(asked["probes"]),
                "controls": str(asked["controls"]),
                "unseen": str(asked["unseen"]),
                "max_new_tokens": 20,
                "score_rows": 12,
            },
            "expect": {"controls_kept_min": 0.5},  # of six questions, one is 17 %
            "export": [*exports, "bundle"],
            "output_dir": str(tmp_path_factory.mktemp("runs")),
        }
    )


@pytest.fixture(scope="session")
def line(recipe, family) -> Run:
    """The run of the whole line, verified. Tests read it and leave it as it is.

    On all cores: what runs beside it under xdist is done long before it.
    """
    import torch

    if ONLY:
        family(ONLY)
    run = Run(Path(recipe.output_dir) / recipe.name)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(os.cpu_count() or 1))
        torch.set_num_threads(os.cpu_count() or 1)
        run_stages(recipe, run)
        torch.set_num_threads(threads)
    verify(recipe, run)
    return run


@pytest.fixture(scope="session")
def tiny_model(tiny_model) -> Callable[..., Path]:
    """A function: the directory of a tiny random model with odd constants, made once for each architecture."""
    return functools.partial(tiny_model, texts=[json.dumps(row) for row in questions.generate()], odd=True)
