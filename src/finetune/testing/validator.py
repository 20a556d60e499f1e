"""`TrainingSuccessValidator`: the checks' arithmetic on plain numbers, for tests that hold their own."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.backends import TensorFacts
from finetune.checks.loss import fall
from finetune.checks.memory import reduction
from finetune.core.errors import StageError
from finetune.evaluation.answers import is_correct

MIN_LOSS_REDUCTION = 0.05
MIN_IMPROVED = 0.3
MIN_MEMORY_REDUCTION = 0.3
MIN_PARAMETERS_CHANGED = 0.8
MIN_STANDARD_ERRORS = 2.0


class TrainingSuccessValidator:
    """Each method answers True only where the evidence shows success. Too little evidence is False, never True."""

    @staticmethod
    def validate_loss_convergence(losses: Sequence[float], max_initial: float | None = None) -> bool:
        """The window mean fell by more than 5 %, by more than the noise, and all losses are finite (nats).

        `max_initial` bounds the first loss: ln(vocabulary) for a language model, since a broken mask also falls.
        """
        if len(losses) < 4 or not all(math.isfinite(loss) for loss in losses):
            return False
        if max_initial is not None and losses[0] > max_initial:
            return False
        reduction_of_mean, standard_errors = fall(losses)
        return reduction_of_mean > MIN_LOSS_REDUCTION and standard_errors > MIN_STANDARD_ERRORS

    @staticmethod
    def validate_model_learning(
        pre_outputs: Sequence[str], post_outputs: Sequence[str], test_cases: Sequence[Mapping[str, Any]]
    ) -> bool:
        """More than 30 % of the cases wrong before are right after, net of cases that were right and are now wrong.

        A case has `expected` (or `answer`), the whole answer, or `match`, a phrase that must occur as whole words.
        """
        if not test_cases or not len(pre_outputs) == len(post_outputs) == len(test_cases):
            return False
        before = [_right(text, case) for text, case in zip(pre_outputs, test_cases, strict=True)]
        after = [_right(text, case) for text, case in zip(post_outputs, test_cases, strict=True)]
        improved = sum(now and not then for then, now in zip(before, after, strict=True))
        spoiled = sum(then and not now for then, now in zip(before, after, strict=True))
        return (improved - spoiled) / len(test_cases) > MIN_IMPROVED

    @staticmethod
    def validate_memory_efficiency(base_memory: float, lora_memory: float) -> bool:
        """LoRA needs more than 30 % less than full fine-tuning. Bytes, both measured at the same shape."""
        return base_memory > 0 and lora_memory > 0 and reduction(base_memory, lora_memory) > MIN_MEMORY_REDUCTION

    @staticmethod
    def validate_parameter_updates(before: Mapping[str, TensorFacts], after: Mapping[str, TensorFacts]) -> bool:
        """More than 80 % of the LoRA tensors changed, and no B matrix is zero. See `Backend.tensors`."""
        if not after or set(before) != set(after):
            return False
        changed = sum(before[name].sha256 != facts.sha256 for name, facts in after.items())
        matrices = [facts for name, facts in after.items() if "lora_B" in name]
        return bool(matrices) and all(m.norm > 0 for m in matrices) and changed / len(after) > MIN_PARAMETERS_CHANGED

    @staticmethod
    def validate_artifacts(directory: Any, expected: Sequence[str] = ("adapter_config.json",)) -> bool:
        """Every expected file is in the directory and not empty, and some weights are."""
        place = Path(directory)
        weights = [f for f in place.glob("*.safetensors") if f.stat().st_size > 0]
        return bool(weights) and all(
            (place / name).is_file() and (place / name).stat().st_size > 0 for name in expected
        )

    @staticmethod
    def validate_run(run: str | os.PathLike[str]) -> bool:
        """Something of a stored run is proved and nothing refuted, as `finetune verify` ends with 0; what was not examined
        is neither. False where nothing was verified, or the verdicts were changed after they were written."""
        from finetune.report.summary import verdicts
        from finetune.run import Run

        try:
            stored = verdicts(Run(os.fspath(run)))
        except StageError:
            return False
        return stored is not None and bool(stored["passed"])


def _right(text: str, case: Mapping[str, Any]) -> bool:
    return is_correct(text, str(case.get("expected", case.get("answer", ""))), case.get("match"))
