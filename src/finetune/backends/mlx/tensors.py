"""What is stored in a model or adapter directory, tensor by tensor, without building a model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy

from finetune.backends import TensorFacts
from finetune.backends.mlx.runtime import mx, on
from finetune.core.errors import MissingError, StageError, first_line


def read(directory: Path) -> dict[str, TensorFacts]:
    """Facts of every tensor in the directory's `*.safetensors`. Raises MissingError where there is none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise MissingError(f"no *.safetensors in {directory}")
    facts: dict[str, TensorFacts] = {}
    for file in files:
        with on(mx.cpu):
            for name, tensor in stored(file).items():
                facts[name] = tensor_facts(tensor)
    return facts


def stored(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file, each read when it is used."""
    try:
        return dict(mx.load(str(file)))
    except (RuntimeError, ValueError) as error:
        raise StageError(f"{file} cannot be read: {first_line(error)}") from None


def raw(tensor: Any) -> bytes:
    """A tensor's bytes, row by row."""
    data: bytes = numpy.array(mx.contiguous(tensor).reshape(-1).view(mx.uint8)).tobytes()
    return data


def tensor_facts(tensor: Any) -> TensorFacts:
    norm: Any = mx.sqrt(mx.sum(mx.square(tensor.astype(mx.float32)))).item()
    return TensorFacts(sha256=hashlib.sha256(raw(tensor)).hexdigest(), shape=tuple(tensor.shape), norm=float(norm))
