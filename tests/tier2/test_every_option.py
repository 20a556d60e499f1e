"""Every key of a recipe has an effect: the ledger's rows of training, alignment and the model, on PyTorch.

Each is one training of three steps of a tiny model, in this process, without and with the row's value; what it left on
disk and what the libraries were seen to do is compared. Tier 1 has the other rows.
"""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.backends import get
from finetune.backends.fake.model import make_model
from finetune.core.errors import FinetuneError
from finetune.core.files import digest, write_jsonl
from finetune.recipe import load_mapping
from finetune.run import evidence
from finetune.stages.pipeline import run_directory, run_stages
from support import hub, options
from support.options import Row, of_tier

SHORT = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_strategy": "no"}
FITS = 5  # rows or pairs that a step of the machine made up here has memory for
COMMON = {"name": "ledger", "model": {"path": "{files}/llama", "device": "cpu"}, "template": {"name": "chatml"}}
BASES: dict[str, dict[str, Any]] = {
    "train": {**COMMON, "data": {"path": "shipped:quorra/train.jsonl", "limit": 6}, "train": SHORT},
    "align": {
        **COMMON,
        "train": None,
        "align": {**SHORT, "data": {"path": "shipped:quorra/preferences.jsonl", "limit": 6}},
    },
    "hub": {"name": "ledger", "backend": "fake", "model": {"path": "owner/name"}, "train": None},
}
BASES["dataset"] = {**BASES["train"], "align": BASES["align"]["align"]}
OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKEN = "hf_" + "x" * 30
Seen = dict[str, Any]


@contextmanager
def watched() -> Iterator[Seen]:
    """What the libraries are seen to do in the block, which trains once."""
    import torch
    import transformers
    from torch.utils.data import DataLoader

    seen: Seen = {"calls": Counter(), "loaders": set(), "trainer": None}
    calls: Counter[str] = seen["calls"]
    train, iterator = transformers.Trainer.train, DataLoader._get_iterator
    step = transformers.Trainer.training_step
    attention = torch.nn.functional.scaled_dot_product_attention

    def training(self: Any, *arguments: Any, **more: Any) -> Any:
        seen.update(trainer=self, deterministic=torch.are_deterministic_algorithms_enabled())
        for module in self.model.modules():
            if type(module).__name__ in ("LlamaMLP", "GPT2MLP"):  # inside of a layer, where checkpointing runs it again
                module.register_forward_pre_hook(lambda part, _: calls.update(["train" if part.training else "eval"]))
        return train(self, *arguments, **more)

    def fitting(self: Any, model: Any, inputs: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        if len(inputs["input_ids"]) > FITS * (2 if "DPO" in type(self).__name__ else 1):  # a pair is two rows there
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return step(self, model, inputs, *arguments, **more)

    def loading(self: Any) -> Any:
        found = iterator(self)
        seen["loaders"].add(type(found).__name__)
        return found

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **more: (calls.update([name]), call(*arguments, **more))[1]

    environment = dict(os.environ)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Trainer, "train", training)
        patch.setattr(transformers.Trainer, "training_step", fitting)
        patch.setattr(DataLoader, "_get_iterator", loading)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted("sdpa", attention))
        patch.setattr(torch, "compile", counted("compile", lambda model, **_: model))
        try:
            yield seen
        finally:
            torch.use_deterministic_algorithms(False)
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)


def trained(mapping: dict[str, Any], stage: str) -> Seen:
    """What a training left, and how it went about it."""
    recipe = load_mapping(mapping)
    run = run_directory(recipe)
    with watched() as seen:
        run_stages(recipe, run, [stage])
    steps, out, facts = evidence.steps(run, stage), run.path / stage, run.require(stage).metrics
    result = next(place for place in (out / "adapter", out / "model") if place.is_dir())
    section = recipe.train if stage == "train" else recipe.align
    published = Path(section.output_dir) if section and section.output_dir else None
    initial, calls = out / "initial" / "adapter_model.safetensors", seen["calls"]
    tensors = get("torch").tensors(result)
    return {
        "losses": [(step["step"], step["loss"]) for step in steps],
        "rates": [step["learning_rate"] for step in steps],
        "steps": steps[-1]["step"],
        "rows": [step["rows"] for step in steps],
        "tokens": [step["tokens"] for step in steps],
        "weights": {name: facts.sha256 for name, facts in tensors.items()},
        "tensors": {name: facts.shape for name, facts in tensors.items()},
        "initial": digest(initial) if initial.is_file() else None,
        "checkpoints": sorted(place.name for place in out.glob("checkpoint-*")),
        "evaluations": [log["step"] for log in seen["trainer"].state.log_history if "eval_loss" in log],
        "trackers": [name.name for name in sorted((out / "trackers").glob("*"))],
        "published": sorted(file.name for file in published.glob("*")) if published else None,
        "weight_bytes": facts["weight_bytes"],
        "device": facts["device"],
        "forwards": calls["train"],
        "eval_calls": calls["eval"],
        "sdpa_calls": calls["sdpa"],
        "compiled": calls["compile"],
        "loaders": sorted(seen["loaders"]),
        "deterministic": seen["deterministic"],
    }


def prepared(mapping: dict[str, Any]) -> Seen:
    recipe = load_mapping(mapping)
    run = run_directory(recipe)
    run_stages(recipe, run, ["prepare"])
    return dict(options.prepared(run))


def fetched(mapping: dict[str, Any], served: hub.Hub) -> Seen:
    """What the command line asks of the hub's stand-in."""
    place = Path(mapping["output_dir"])
    place.mkdir()
    recipe = place / "recipe.yaml"
    recipe.write_text(json.dumps(mapping), encoding="utf-8")
    served.requests.clear()
    home = {"HF_ENDPOINT": served.url, "HF_HOME": str(place), "HF_HUB_OFFLINE": "0", "FT_CACHE_DIR": str(place)}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | home
    command = [sys.executable, "-m", "finetune", "fetch", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    asked = [request.path for request in served.requests]
    return {
        "refused": None if done.returncode == 0 else done.stderr,
        "revisions": sorted(
            {match[1] for path in asked if (match := re.search(r"/(?:revision|resolve)/([^/?]+)", path))}
        ),
        "authorizations": sorted({str(request.authorization) for request in served.requests}),
    }


@pytest.fixture(scope="module")
def files(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models and data sets that the rows name."""
    place = tmp_path_factory.mktemp("options")
    small = {"hidden_size": 32, "intermediate_size": 64}
    (place / "llama").symlink_to(tiny_model(**small))
    (place / "other").symlink_to(tiny_model(seed=1, **small))
    (place / "gpt2").symlink_to(tiny_model("gpt2"))
    custom = shutil.copytree(place / "llama", place / "custom")
    config = json.loads((custom / "config.json").read_text("utf-8"))
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (custom / "config.json").write_text(json.dumps({**config, "model_type": "own-llama", "auto_map": own}))
    (custom / "own.py").write_text(OWN_CODE)
    for kind, columns in (("answers", ("completion",)), ("pairs", ("chosen", "rejected"))):
        listed = []
        for subset in ("first", "second"):
            for split in ("train", "test"):
                row = {"prompt": f"{subset} {split}?", **{name: f"{subset} {name}." for name in columns}}
                write_jsonl(place / f"hub-{kind}" / subset / f"{split}.jsonl", [row])
            parts = [{"split": split, "path": f"{subset}/{split}.jsonl"} for split in ("train", "test")]
            listed.append({"config_name": subset, "data_files": parts, "default": subset == "first"})
        (place / f"hub-{kind}" / "README.md").write_text(f"---\n{json.dumps({'configs': listed})}\n---\n")
    return place


@pytest.fixture(scope="module")
def look(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, dict[str, Any]], Seen]]:
    """A function: what the observer of that name sees of a recipe, once for each."""
    import datasets
    import transformers.dynamic_module_utils

    known: dict[str, Seen] = {}

    def at(where: str, mapping: dict[str, Any]) -> Seen:
        mark = json.dumps([where, mapping])
        if mark not in known:
            mapping = {**mapping, "output_dir": str(tmp_path_factory.mktemp("seen") / "runs")}
            try:
                known[mark] = prepared(mapping) if where == "dataset" else trained(mapping, where)
            except FinetuneError as error:
                known[mark] = {"refused": str(error)}
        return known[mark]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(files / "datasets"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(files / "modules"))
        patch.setattr(sys, "path", [*sys.path])
        trained({**options.laid(BASES["train"], {}, files), "output_dir": str(files / "runs")}, "train")
        (files / "adapter").symlink_to(files / "runs" / "ledger" / "train" / "adapter")
        gc.freeze()  # every training collects garbage, half of its time: what the libraries hold is none
        try:
            yield at
        finally:
            gc.unfreeze()


HERE = [row for row in of_tier(2) if row.where != "hub"]
HUB = [row for row in of_tier(2) if row.where == "hub"]


@pytest.mark.usefixtures("look")
@pytest.mark.parametrize("where", ["train", "align"])
def test_the_same_recipe_twice_is_seen_to_do_the_same(where: str, files: Path, tmp_path: Path) -> None:
    """Else every row would hold."""
    mapping = options.laid(BASES[where], {}, files)
    first, second = (trained({**mapping, "output_dir": str(tmp_path / name)}, where) for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.key)
def test_the_option_has_an_effect(row: Row, look: Callable[[str, dict[str, Any]], Seen], files: Path) -> None:
    before, after = options.sides(row, BASES[row.where], files)
    assert options.differs(row, look(row.where, before), look(row.where, after)) == ""


@pytest.mark.parametrize("row", HUB, ids=lambda row: row.key)
def test_the_option_reaches_the_hub(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = make_model(tmp_path / "repository")
    (repository / "model.safetensors").write_bytes(hub.WEIGHTS)
    monkeypatch.setenv("LEDGER_TOKEN", TOKEN)
    with hub.serve({"owner/name": repository}, token=TOKEN) as served:
        sides = options.sides(row, BASES["hub"], served.commit("owner/name"))
        places = [{"output_dir": str(tmp_path / name)} for name in ("before", "after")]
        before, after = (fetched({**side, **place}, served) for side, place in zip(sides, places, strict=True))
    assert options.differs(row, before, after) == ""


@pytest.mark.parametrize("where", ["train", "align"])
def test_a_loader_in_another_process_loses_no_row(where: str, look: Callable[[str, dict[str, Any]], Seen], files: Path):
    mapping = options.laid(BASES[where], {}, files)
    alone, elsewhere = look(where, mapping), look(where, options.laid(mapping, {f"{where}.dataloader_num_workers": 1}))
    assert alone["loaders"] != elsewhere["loaders"]
    assert alone["rows"] == elsewhere["rows"] != [[]] * 3
    assert alone["tokens"] == elsewhere["tokens"]
