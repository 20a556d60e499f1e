"""The one place that imports MLX, so that what has to come before its import does."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune.core.errors import UsageError


def prefer_fast_blas() -> None:
    """Make PyTorch's matrix multiplication the one that MLX finds.

    On Linux `mlx[cpu]` brings the reference BLAS (2.5 GFLOP/s on a core). PyTorch's library holds MKL or OpenBLAS under
    the same names (`sgemm_`), and the first library that offers a name to all others wins: 170 GFLOP/s.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return
    with suppress(OSError):  # then it is slow, and right
        ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)


prefer_fast_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optimizers  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

__all__ = [
    "choose_device", "mx", "nn", "on", "optimizers", "prefer_fast_blas", "tree_flatten", "tree_map", "tree_unflatten",
]  # fmt: skip


def choose_device(name: str) -> Any:
    """`auto` takes the GPU, then the CPU. Raises UsageError for a GPU that is not there."""
    gpu = mx.is_available(mx.gpu)
    if name == "auto":
        return mx.gpu if gpu else mx.cpu
    if name == "cpu":
        return mx.cpu
    if not gpu or (name == "mps") != mx.metal.is_available():
        raise UsageError(f"model.device is '{name}', which MLX does not have on this machine. Use 'auto' or 'cpu'.")
    return mx.gpu


def on(device: Any) -> Any:
    """A context in which everything is computed on a device, whatever the process's default is."""
    return mx.stream(device)
