"""Helpers for tests that users write: did it learn, what memory did it take, and can it run here at all."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import TYPE_CHECKING, Any

import pytest

from finetune.core.errors import UsageError
from finetune.core.install import missing_package
from finetune.core.lookup import did_you_mean
from finetune.core.memory import PeakMemory, gpus

if TYPE_CHECKING:
    from finetune.run import Run

MARKER = "needs_backend"
MIB = 2**20
# The packages that a backend, or a device that PyTorch computes on, needs.
_TORCH = ("torch", "transformers", "accelerate", "datasets", "peft", "trl")
NEEDS: dict[str, tuple[str, ...]] = {
    "fake": (),
    "torch": _TORCH,
    "cpu": _TORCH,
    "cuda": _TORCH,
    "mps": _TORCH,
    "mlx": ("mlx", "mlx_lm"),
    "llamacpp": ("cyllama", "xllamacpp"),
    "ollama": (),
}


class MemoryStats:
    """Memory of a block of code: `start_bytes` and `peak_bytes` of the process, and `device_start_bytes` and
    `device_peak_bytes` of a CUDA device (None without one, or without PyTorch). Can be read inside the block too."""

    def __init__(self, process: PeakMemory) -> None:
        self._process = process
        self._open = True
        self.device_start_bytes = _device(reset=True)
        self._device_peak = self.device_start_bytes

    @property
    def start_bytes(self) -> int:
        return self._process.start

    @property
    def peak_bytes(self) -> int:
        return self._process.peak

    @property
    def device_peak_bytes(self) -> int | None:
        if self._open:
            self._device_peak = _device()
        return self._device_peak

    @property
    def total_used_mb(self) -> float:
        """MiB that the block took at its peak beyond what was in use when it began: process and device together."""
        device = (self.device_peak_bytes or 0) - (self.device_start_bytes or 0)
        return (self.peak_bytes - self.start_bytes + device) / MIB

    def close(self) -> None:
        self._device_peak, self._open = self.device_peak_bytes, False


def _device(*, reset: bool = False) -> int | None:
    """Peak bytes that tensors took on the CUDA device, since the last reset; PyTorch is not imported for it."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return int(torch.cuda.max_memory_allocated())


@contextmanager
def memory_tracker() -> Iterator[MemoryStats]:
    """`with memory_tracker() as stats:` measures the block; `stats.total_used_mb` is what it took."""
    with PeakMemory() as process:
        stats = MemoryStats(process)
        try:
            yield stats
        finally:
            stats.close()


def check_convergence(losses: Iterable[float] | Run | str | os.PathLike[str], max_initial: float | None = None) -> bool:
    """True where a training's losses fell, as `TrainingSuccessValidator` has it: as numbers, of a run, or in a trainer's log
    (`finetune.testing.logged_steps`: finetune's, transformers', or a CSV).

    Raises AssertionError with what was measured and its bound. `max_initial` bounds the first loss (nats):
    ln(vocabulary) is what a guess costs, and a broken mask falls too.
    """
    from finetune.checks.loss import fall
    from finetune.run import Run, evidence
    from finetune.testing import validator
    from finetune.testing.logs import logged_steps

    if isinstance(losses, Run):
        values = [float(step["loss"]) for step in evidence.steps(losses, "train")]
    elif isinstance(losses, str | os.PathLike):
        values = [step.loss for step in logged_steps(losses)]
    else:
        values = [float(loss) for loss in losses]
    if validator.TrainingSuccessValidator.validate_loss_convergence(values, max_initial):
        return True
    bad = [number for number, loss in enumerate(values, 1) if not math.isfinite(loss)]
    if len(values) < 4:
        why = f"{len(values)} losses say nothing; 4 are needed"
    elif bad:
        why = f"{len(bad)} of {len(values)} losses are not finite; the first is number {bad[0]}: {values[bad[0] - 1]}"
    elif max_initial is not None and values[0] > max_initial:
        why = f"the first loss is {values[0]:.4g}, and must be at most {max_initial:.4g}"
    else:
        reduction, errors = fall(values)
        why = (
            f"from {values[0]:.4g} to {values[-1]:.4g} in {len(values)} steps: the window mean fell by {reduction:.1%} "
            f"(must be more than {validator.MIN_LOSS_REDUCTION:.0%}), {errors:.2g} standard errors "
            f"(must be more than {validator.MIN_STANDARD_ERRORS:.2g})"
        )
    raise AssertionError(f"the training did not converge: {why}")


def skip_if_backend_unavailable(backend: str | Enum) -> pytest.MarkDecorator:
    """A decorator for tests and classes (or a module's `pytestmark`): skip where a backend or device is not there.

    `backend` is one of NEEDS: torch, cuda, mps, mlx, llamacpp, ollama, ... Whether it is there is found out when the
    test is about to run; where it was required (`--require cuda`, or FT_REQUIRE), the test fails instead.
    """
    name = str(backend.value if isinstance(backend, Enum) else backend).lower()
    if name not in NEEDS:
        raise UsageError(f"unknown backend '{backend}'.{did_you_mean(name, NEEDS)} Known: {', '.join(NEEDS)}.")
    mark: pytest.MarkDecorator = getattr(pytest.mark, MARKER)
    return mark.with_args(name)


def unavailable(name: str) -> str | None:
    """What a backend or device of NEEDS lacks here, with what would get it; None where it can be used."""
    for package in NEEDS[name]:
        if importlib.util.find_spec(package) is None:
            return missing_package(package)
    if name == "ollama":
        from finetune.backends.ollama import unavailable as server

        return server()
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            cards = ", ".join(gpu.name for gpu in gpus())
            if cards:
                return f"torch {torch.__version__} cannot use {cards}: install a CUDA build of torch, as its site says"
            return (
                "no NVIDIA GPU is seen here: run it on a machine that has one ('finetune doctor' shows what is there)"
            )
    if name == "mps":
        import torch

        if not torch.backends.mps.is_available():
            return "no Apple GPU (MPS) is seen here: run it on a Mac with Apple silicon ('finetune doctor' shows more)"
    return None
