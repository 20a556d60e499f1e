"""What is stored in a model or adapter directory, tensor by tensor, without building a model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from finetune.backends import TensorFacts
from finetune.core.errors import MissingError, StageError


def read(directory: Path) -> dict[str, TensorFacts]:
    """Facts of every tensor in the directory's `*.safetensors`. Raises MissingError where there is none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise MissingError(f"no *.safetensors in {directory}")
    facts: dict[str, TensorFacts] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    facts[name] = tensor_facts(stored.get_tensor(name))
        except SafetensorError as error:
            raise StageError(f"{file} cannot be read: {error}") from None
    return facts


def tensor_facts(tensor: torch.Tensor) -> TensorFacts:
    tensor = tensor.detach().cpu().contiguous()
    stored = tensor.reshape(-1).view(torch.uint8).numpy()
    sha256 = hashlib.sha256(stored.data).hexdigest()
    return TensorFacts(sha256=sha256, shape=tuple(tensor.shape), norm=float(tensor.float().norm()))
