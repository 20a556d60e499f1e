"""Base plus adapter as one model."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from statistics import median
from typing import Any

from safetensors import safe_open
from transformers import AutoTokenizer

from finetune.backends.torch.loading import load_adapter, load_model
from finetune.errors import StageError


def merge(model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
    """Write base + adapter to `out` with the adapter's tokenizer (it carries the training's chat template).

    Raises StageError when the merged weights hold NaN or infinity. `out` appears whole or not at all.
    """
    merged = load_adapter(load_model(model, {**settings, "device": "cpu"}), adapter)
    try:
        merged = merged.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise StageError(f"merging {adapter} failed: {error}") from None
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    merged.save_pretrained(str(partial))
    source = adapter if (adapter / "tokenizer_config.json").is_file() else model
    AutoTokenizer.from_pretrained(str(source), local_files_only=True).save_pretrained(str(partial))
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


PROBED = 8  # modules that the factor is measured on


def factor(model: Path, adapter: Path, merged: Path) -> float | None:
    """How often the adapter is in the merged weights: the k in merged = base + k * scale * B A, by least squares.

    1 for a sound merge, 0 for none, 2 for one done twice. None for adapters that are no plain LoRA (DoRA, other bases).
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        return None
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = _Stored(adapter)
    before, after = _Stored(model), _Stored(merged)
    found = []
    for name in [name for name in tensors.files if name.endswith(".lora_A.weight")][:PROBED]:
        stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        weight = f"{stem}.weight"
        if weight not in before.files or weight not in after.files:
            return None
        delta = scale * (tensors.read(name.replace("lora_A", "lora_B")) @ tensors.read(name))
        moved = after.read(weight) - before.read(weight)
        if delta.shape != moved.shape:  # GPT-2 stores its weights the other way round
            delta = delta.T
        size = float((delta * delta).sum())
        if size > 0:
            found.append(float((moved * delta).sum()) / size)
    return median(found) if found else None


class _Stored:
    """The tensors in a directory's safetensors files, read one by one as float32."""

    def __init__(self, directory: Path) -> None:
        self.files: dict[str, Path] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with safe_open(str(file), framework="pt") as stored:
                self.files |= dict.fromkeys(stored.keys(), file)

    def read(self, name: str) -> Any:
        with safe_open(str(self.files[name]), framework="pt") as stored:
            return stored.get_tensor(name).float()
