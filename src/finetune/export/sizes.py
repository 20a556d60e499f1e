"""How large a model's weights are, told from its directory without reading them: for asking whether a copy has room."""

from __future__ import annotations

from pathlib import Path

from finetune.core.arithmetic import DTYPE_BYTES
from finetune.core.files import read_object

WEIGHTS = ("*.safetensors", "*.bin")


def dtype(model: Path) -> str:
    """The type that the weights of a model directory are in, by its config."""
    config = read_object(model / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def stored(directory: Path) -> int:
    """Bytes of all files in a directory."""
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def parameters(model: Path) -> float:
    """About how many numbers the weights of a model directory are."""
    return sum(file.stat().st_size for pattern in WEIGHTS for file in model.glob(pattern)) / DTYPE_BYTES.get(
        dtype(model), 4
    )


def merged(model: Path, wanted: str) -> float:
    """Bytes of a model directory once its weights are in the type `wanted`."""
    return stored(model) + parameters(model) * (DTYPE_BYTES[wanted] - DTYPE_BYTES.get(dtype(model), 4))
