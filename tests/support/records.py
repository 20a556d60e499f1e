"""What stages and checks write, for tests that stand in for them: whole records, with what a test says in them."""

from __future__ import annotations

from typing import Any

from finetune.checks import Verdict, as_dict
from finetune.core.files import digest
from finetune.run import Run, evidence, layout

# What a report of a stage has besides what a test is about.
WHEN = "2026-01-01T00:00:00.000Z"
MADE: dict[str, Any] = {
    "fingerprint": "f",
    "seconds": 1.0,
    "made_with": {"python": "3.11", "libraries": {}, "modules": {}},
}


# What a report of a stage has besides what a test is about.
WHEN = "2026-01-01T00:00:00.000Z"
MADE: dict[str, Any] = {
    "fingerprint": "f",
    "seconds": 1.0,
    "made_with": {"python": "3.11", "libraries": {}, "modules": {}},
}
_TRAINED = {
    "trainable_parameters": 8, "frozen_parameters": 64, "weight_bytes": 288, "trainable_bytes": 32, "gradient_bytes": 32,
    "optimizer_bytes": 64, "frozen_sha256_before": "a", "frozen_sha256_after": "a", "world_size": 1, "steps": 3,
    "planned_steps": 3, "stopped": False, "resumed_from": None, "steps_without_effect": 0, "first_loss": 4.0,
    "last_loss": 1.0, "tokens": 30, "trained_tokens": 15, "tokens_per_second": 50.0, "seconds_per_step": 0.1,
    "device": "cpu", "clipped_norm": 1.0, "optimized_parameters": 8,
}  # fmt: skip
_METRICS: dict[str, dict[str, Any]] = {
    "fetch": {"bytes": 1, "seconds": 0.1},
    "prepare": {"vocab_size": 300, "template_sha256": "a"},
    "train": _TRAINED,
    "align": _TRAINED,
    "evaluate": {},
    "measure": {"experiments": []},
}


def metrics(stage: str, **values: Any) -> dict[str, Any]:
    """The metrics of a stage's report, all that must be there, and `values`."""
    return {**_METRICS.get(stage, {}), **values}


def step(number: int, loss: float, **values: Any) -> dict[str, Any]:
    """One logged step."""
    return {
        "time": "2026-01-01T00:00:00.000Z", "step": number, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0,
        "seconds": 0.1, "tokens": 10, "trained_tokens": 5, "epoch": number / 3, "rows": [0, 1], **values,
    }  # fmt: skip


def verdict(name: str, outcome: str = "proved", **values: Any) -> dict[str, Any]:
    """One verdict as stored."""
    passed = {"proved": True, "refuted": False, "not examined": None}[outcome]
    measured = None if passed is None else 0.5 if passed else 0.01
    held = {
        "measured": measured,
        "compare": ">=",
        "bound": 0.05,
        "unit": "share",
        "evidence": "train/x",
        "why": "so it is",
    }
    remedy = "" if passed else f"mend {name}"
    return {"name": name, "outcome": outcome, "passed": passed, "remedy": remedy, **held, **values}


def store_verdicts(run: Run, listed: list[dict[str, Any]], **values: Any) -> None:
    """Store verdicts as `verify` does, with the event that holds their digest."""
    document: Any = {**as_dict([]), "verdicts": listed, **values}
    document["passed"] = any(each["passed"] for each in listed) and not any(each["passed"] is False for each in listed)
    path = evidence.write(run, layout.VERDICTS, document)
    run.event("verified", passed=document["passed"], sha256=digest(path))


def restate(run: Run, **changes: dict[str, Any]) -> None:
    """Store other verdicts of these names, as if the checks had found that; the others stay."""
    stored: Any = evidence.read(run, layout.VERDICTS)
    listed = [{**each, **changes.get(each["name"].replace("[", "__").rstrip("]"), {})} for each in stored["verdicts"]]
    store_verdicts(run, listed, **({"cause": stored["cause"]} if "cause" in stored else {}))


def refuted(**values: Any) -> dict[str, Any]:
    """What makes a stored verdict a refuted one."""
    return {"outcome": "refuted", "passed": False, **values}


def as_stored(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    return [dict(each) for each in as_dict(verdicts)["verdicts"]]
