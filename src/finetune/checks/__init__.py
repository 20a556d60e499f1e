"""Checks: `check(recipe, run) -> list of Verdicts`, from what is on disk alone. No evidence is a failed check."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from finetune.errors import UsageError
from finetune.lookup import did_you_mean, load
from finetune.run import Run, now, write_json

if TYPE_CHECKING:  # the command line reads this table for its help, and pydantic would cost it its start-up time
    from finetune.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one check found. `measured` is None when the evidence is missing, and then `passed` is False.

    `bound` is the number that `measured` is held against, `compare` says how (`>=`, `<=`, `==`, `>`, `<`).
    `evidence` is the path inside the run directory, `why` one sentence.
    """

    name: str
    passed: bool
    measured: float | None
    compare: str
    bound: float
    unit: str
    evidence: str
    why: str


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    "==": lambda a, b: a == b,
}


def judge(name: str, measured: float | None, compare: str, bound: float, unit: str, evidence: str, why: str) -> Verdict:
    """A verdict from a measurement: passed when `measured compare bound` holds. None and NaN never pass."""
    passed = measured is not None and _HOLDS[compare](measured, bound)
    if measured is not None and math.isnan(measured):
        why += "; what was measured is NaN, not a number"
    return Verdict(
        name=name, passed=passed, measured=measured, compare=compare, bound=bound, unit=unit, evidence=evidence, why=why
    )


def missing(name: str, compare: str, bound: float, unit: str, evidence: str, why: str) -> Verdict:
    """The verdict where there is nothing to measure: failed."""
    return judge(name, None, compare, bound, unit, evidence, f"no evidence: {why}")


def worst(values: Iterable[float]) -> float:
    """The largest value, or NaN when any is NaN, which `max` would pass over."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)


def finite(value: float) -> float:
    """`value`; NaN for infinity, which is beyond every least bound and yet no measure of a gain."""
    return value if math.isfinite(value) else math.nan


def silence(texts: Sequence[str]) -> str:
    """What to say of a model that answers nothing, behind another sentence; empty where it said something."""
    return f"; the model answers nothing: all {len(texts)} answers are empty" if texts and not any(texts) else ""


def short(text: Any) -> str:
    """A text in one line, cut where it is long, to be quoted in a verdict."""
    line = " ".join(str(text).split())
    return line if len(line) <= 70 else line[:67] + "..."


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table; `wanted` says whether the recipe calls for it."""

    name: str
    run: str
    help: str
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    training: bool = True  # about the trained model itself, not about what was made of it


def _trains(recipe: Recipe) -> bool:
    return recipe.train is not None


def _lora(recipe: Recipe) -> bool:
    return recipe.train is not None and recipe.train.method == "lora"


def _asks(recipe: Recipe) -> bool:
    asked = recipe.evaluate
    return any((asked.probes, asked.controls, asked.unseen, asked.heldout))


CHECKS: tuple[Check, ...] = (
    Check(
        name="labels",
        run="finetune.checks.labels:check",
        help="Every row trains its answer, all of it, and nothing else; the end-of-turn token carries a label.",
        wanted=_trains,
    ),
    Check(
        name="rows",
        run="finetune.checks.rows:check",
        help="Every row of the data is prepared and trained, with the tokens it has, for as long as asked.",
        wanted=_trains,
    ),
    Check(
        name="loss",
        run="finetune.checks.loss:check",
        help="The loss fell, beats a model that learned nothing, and is the loss of the answers, scored again.",
        wanted=_trains,
    ),
    Check(
        name="parameters",
        run="finetune.checks.parameters:check",
        help="LoRA tensors changed, B is non-zero in every target module, frozen weights are bit-identical.",
        wanted=_trains,
    ),
    Check(
        name="optimizer",
        run="finetune.checks.optimizer:check",
        help="Every step had the learning rate, optimizer and clipping that the recipe asks for, and moved the weights.",
        wanted=lambda recipe: recipe.train is not None or recipe.align is not None,
    ),
    Check(
        name="questions",
        run="finetune.checks.questions:check",
        help="Questions are all asked, as in training, judged strictly, and nothing of them was trained.",
        wanted=_asks,
    ),
    Check(
        name="learning",
        run="finetune.checks.learning:check",
        help="Probes improve in words and in probability, as trained and paraphrased, net of untrained controls.",
        wanted=lambda recipe: recipe.evaluate.probes is not None,
    ),
    Check(
        name="retention",
        run="finetune.checks.retention:check",
        help="Control questions stay answered and held-out text stays as likely as it was.",
        wanted=lambda recipe: recipe.evaluate.controls is not None or recipe.evaluate.heldout is not None,
    ),
    Check(
        name="preference",
        run="finetune.checks.preference:check",
        help="Pairs are the data's, DPO starts where it must, margins grow, rewards are those scored afresh.",
        wanted=lambda recipe: recipe.align is not None,
    ),
    Check(
        name="artifacts",
        run="finetune.checks.artifacts:check",
        help="Digests match, what is saved is what was trained, and a fresh process answers the same.",
        training=False,
    ),
    Check(
        name="memory",
        run="finetune.checks.memory:check",
        help="LoRA needs less training state than full fine-tuning, both measured in processes of their own.",
        wanted=lambda recipe: _lora(recipe) and recipe.expect.memory_reduction_min is not None,
    ),
    Check(
        name="resume",
        run="finetune.checks.resume:check",
        help="Interrupted and resumed equals uninterrupted: every loss, every weight.",
        wanted=lambda recipe: _trains(recipe) and recipe.expect.resume,
    ),
    Check(
        name="serving",
        run="finetune.checks.serving:check",
        help="The server answers as the model was evaluated, and does what a request says: stop, length, sampling.",
        wanted=lambda recipe: recipe.expect.serving,
        training=False,
    ),
    Check(
        name="invariance",
        run="finetune.checks.invariance:check",
        help="Accumulation, checkpointing, packing, padding and merging change nothing; the seed fixes the order.",
        wanted=lambda recipe: _trains(recipe) and recipe.expect.invariance,
    ),
    Check(
        name="parity",
        run="finetune.checks.parity:check",
        help="The merged model and every export prompt, predict, answer and stop as the model they were made from.",
        wanted=lambda recipe: bool(recipe.export),
        training=False,
    ),
)
BY_NAME = {check.name: check for check in CHECKS}


def verify(recipe: Recipe, run: Run, only: Iterable[str] | None = None) -> list[Verdict]:
    """Run the checks that the recipe calls for (or `only` those named) and store their verdicts in the run."""
    verdicts = results(recipe, run, only)
    write_json(run.path / "verdicts.json", as_dict(verdicts))
    return verdicts


def results(recipe: Recipe, run: Run, only: Iterable[str] | None = None, *, training: bool = False) -> list[Verdict]:
    """As `verify`, without storing anything; with `training`, only what concerns the trained model itself."""
    wanted = [check.name for check in CHECKS if check.wanted(recipe) and (check.training or not training)]
    names = list(only) if only is not None else wanted
    for name in names:
        if name not in BY_NAME:
            raise UsageError(f"unknown check '{name}'.{did_you_mean(name, BY_NAME)} Known: {', '.join(BY_NAME)}.")
    return [verdict for name in names for verdict in load(BY_NAME[name].run)(recipe, run)]


def as_dict(verdicts: list[Verdict]) -> dict[str, Any]:
    """Verdicts as stored: `passed` for all of them, and each."""
    return {
        "time": now(),
        "passed": bool(verdicts) and all(verdict.passed for verdict in verdicts),
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
