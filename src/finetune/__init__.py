"""finetune: fine-tune small language models, and prove that it worked."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_PUBLIC = {
    "Recipe": "finetune.recipe",
    "Run": "finetune.run",
    "Report": "finetune.run",
    "Verdict": "finetune.checks",
    "verify": "finetune.checks",
    "TrainingSuccessValidator": "finetune.testing.validator",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'finetune' has no attribute '{name}'")
