"""What tests of fine-tuning need: a pytest plugin, tiny models, helpers, and the validators.

from finetune.testing import check_convergence, memory_tracker, skip_if_backend_unavailable
"""

from __future__ import annotations

from typing import Any

from finetune.core.lookup import load

_PUBLIC = {
    "MemoryStats": "finetune.testing.helpers:MemoryStats",
    "TrainingSuccessValidator": "finetune.testing.validator:TrainingSuccessValidator",
    "check_convergence": "finetune.testing.helpers:check_convergence",
    "create_test_tokenizer": "finetune.models.tiny:tokenizer",
    "create_tiny_model": "finetune.models.tiny:make",
    "logged_steps": "finetune.testing.logs:logged_steps",
    "memory_tracker": "finetune.testing.helpers:memory_tracker",
    "skip_if_backend_unavailable": "finetune.testing.helpers:skip_if_backend_unavailable",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return load(_PUBLIC[name])
    raise AttributeError(f"module 'finetune.testing' has no attribute '{name}'")
