"""What a model's files say without being run: how much room its weights take, and where generation is to stop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from finetune.core.files import read_object
from finetune.core.lookup import load


def weight_bytes(model: Path) -> int | None:
    """Bytes of all tensors of a model directory, of a GGUF file, or of the one beside a Modelfile; None for others."""
    if model.is_dir():
        return sum(end - begin for each in _tensors(model) for begin, end in [each["data_offsets"]]) or None
    gguf = model if model.suffix == ".gguf" else next(model.parent.glob("*.gguf"), None)
    return None if gguf is None else int(load("finetune.backends.llamacpp.reading:weight_bytes")(gguf))


def parameters(model: Path) -> int:
    """How many numbers the weights of a model directory are."""
    return sum(math.prod(each["shape"]) for each in _tensors(model))


def names(directory: Path) -> list[str]:
    """The tensors of a model or adapter directory, by name."""
    return [name for name, _ in _heads(directory)]


def _tensors(model: Path) -> list[dict[str, Any]]:
    """`dtype`, `shape` and `data_offsets` of each tensor."""
    return [head for _, head in _heads(model)]


def _heads(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    """The heads of safetensors files, tensor by tensor.

    Format: https://github.com/huggingface/safetensors#format
    """
    found = []
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as stream:
            head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found += [(name, each) for name, each in head.items() if name != "__metadata__"]
    return found


def declared_stops(model: Path) -> list[int]:
    """The ids at which transformers' `generate` stops a model by itself: those of generation_config.json, or those of
    config.json where there is none."""
    file = next((model / name for name in ("generation_config.json", "config.json") if (model / name).is_file()), None)
    declared = read_object(file).get("eos_token_id") if file else None
    return [] if declared is None else declared if isinstance(declared, list) else [declared]
