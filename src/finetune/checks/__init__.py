"""Checks: what they owe for a recipe, and the verdicts that they make of what is on disk alone.

A check is one or more parts (`Part`): a function from recipe and run to verdicts, and one that names the verdicts which it
owes for a recipe. What is owed and not delivered, for whatever reason, is a refuted verdict: no evidence is a failed check.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.core import schemas
from finetune.core.clock import now
from finetune.core.errors import FinetuneError, UsageError, first_line
from finetune.core.lookup import did_you_mean, load
from finetune.run import Run
from finetune.run.outcome import NOT_EXAMINED as NOT_EXAMINED
from finetune.run.outcome import PROVED as PROVED
from finetune.run.outcome import REFUTED as REFUTED
from finetune.run.outcome import Outcome as Outcome
from finetune.run.outcome import holds

if TYPE_CHECKING:  # the command line reads this table for its help, and pydantic would cost it its start-up time
    from finetune.recipe import Recipe
    from finetune.run.records.whole import StoredVerdicts


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one check found. `measured` is None where nothing was measured: refuted, where that was owed; not examined,
    where the recipe gives nothing to examine.

    `bound` is the number that `measured` is held against, `compare` says how (`>=`, `<=`, `==`, `>`, `<`).
    `evidence` is the path inside the run directory, `why` one sentence; `remedy` is what to do about it, where it is not
    proved.
    """

    name: str
    outcome: Outcome
    measured: float | None
    compare: str
    bound: float
    unit: str
    evidence: str
    why: str
    remedy: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome == PROVED

    @property
    def refuted(self) -> bool:
        return self.outcome == REFUTED


_HOLDS: dict[str, Callable[[float, float], bool]] = {
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    "==": lambda a, b: a == b,
}


def judge(name: str, measured: float | None, compare: str, bound: float, unit: str, evidence: str, why: str) -> Verdict:
    """A verdict from a measurement: proved when `measured compare bound` holds. None and NaN never prove anything."""
    holds = measured is not None and _HOLDS[compare](measured, bound)
    if measured is not None and math.isnan(measured):
        why += "; what was measured is NaN, not a number"
    return Verdict(
        name=name, outcome=PROVED if holds else REFUTED, measured=measured, compare=compare, bound=bound, unit=unit,
        evidence=evidence, why=why,
    )  # fmt: skip


def missing(name: str, compare: str, bound: float, unit: str, evidence: str, why: str) -> Verdict:
    """The verdict where there is nothing to measure, and there should be: refuted."""
    return judge(name, None, compare, bound, unit, evidence, f"no evidence: {why}")


def not_examined(name: str, compare: str, bound: float, unit: str, evidence: str, why: str, remedy: str) -> Verdict:
    """The verdict where the recipe gives nothing to examine; `remedy` is the line to add."""
    verdict = judge(name, None, compare, bound, unit, evidence, why)
    return replace(verdict, outcome=NOT_EXAMINED, remedy=remedy)


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
class Part:
    """One part of a check: its verdicts, and the names of those that it owes for a recipe. Parts are run one by one, so
    that a damaged file costs the verdicts that stand on it and no others."""

    check: Callable[[Recipe, Run], list[Verdict]]
    owes: Callable[[Recipe], Iterable[str]]
    evidence: str  # what its verdicts stand on first: where to look when it delivers nothing


@dataclass(frozen=True, kw_only=True)
class Check:
    """One row of the table; `parts` refers to a tuple of `Part`, `wanted` says whether the recipe calls for it."""

    name: str
    parts: str
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
        name="seal",
        parts="finetune.checks.seal:PARTS",
        help="Nothing that the run left was changed since: events, reports, recipe, every file.",
        training=False,
    ),
    Check(
        name="records",
        parts="finetune.checks.records:PARTS",
        help="Every file holds the records declared of it; log, reports and files tell of one another.",
        training=False,
    ),
    Check(
        name="labels",
        parts="finetune.checks.labels:PARTS",
        help="Every row trains its answer, all of it, and nothing else; the end-of-turn token carries a label.",
        wanted=_trains,
    ),
    Check(
        name="rows",
        parts="finetune.checks.rows:PARTS",
        help="Every row of the data is prepared and trained, with the tokens it has, for as long as asked.",
        wanted=_trains,
    ),
    Check(
        name="loss",
        parts="finetune.checks.loss:PARTS",
        help="The loss fell, beats a model that learned nothing, and is the loss of the answers, scored again.",
        wanted=_trains,
    ),
    Check(
        name="parameters",
        parts="finetune.checks.parameters:PARTS",
        help="LoRA tensors changed, B is non-zero in every target module, frozen weights are bit-identical.",
        wanted=lambda recipe: recipe.train is not None or recipe.align is not None,
    ),
    Check(
        name="optimizer",
        parts="finetune.checks.optimizer:PARTS",
        help="Every step had the learning rate, optimizer and clipping that the recipe asks for, and moved the weights.",
        wanted=lambda recipe: recipe.train is not None or recipe.align is not None,
    ),
    Check(
        name="reports",
        parts="finetune.checks.reports:PARTS",
        help="The log, the trainer's own log and the reports say the same, which is what the files hold.",
    ),
    Check(
        name="questions",
        parts="finetune.checks.questions:PARTS",
        help="Questions are all asked, as in training, judged strictly, and nothing of them was trained.",
        wanted=_asks,
    ),
    Check(
        name="learning",
        parts="finetune.checks.learning:PARTS",
        help="Probes improve in words and in probability, as trained and paraphrased, net of untrained controls.",
        wanted=lambda recipe: recipe.train is not None or recipe.align is not None,
    ),
    Check(
        name="retention",
        parts="finetune.checks.retention:PARTS",
        help="Control questions stay answered and held-out text stays as likely as it was.",
        wanted=lambda recipe: recipe.train is not None or recipe.align is not None,
    ),
    Check(
        name="preference",
        parts="finetune.checks.preference:PARTS",
        help="Pairs are the data's, DPO starts where it must, margins grow, rewards are those scored afresh.",
        wanted=lambda recipe: recipe.align is not None,
    ),
    Check(
        name="artifacts",
        parts="finetune.checks.artifacts:PARTS",
        help="Digests match, what is saved is what was trained, and a fresh process answers the same.",
        training=False,
    ),
    Check(
        name="memory",
        parts="finetune.checks.memory:PARTS",
        help="LoRA needs less training state than full fine-tuning, both measured in processes of their own.",
        wanted=lambda recipe: _lora(recipe) and recipe.expect.memory_reduction_min is not None,
    ),
    Check(
        name="resume",
        parts="finetune.checks.resume:PARTS",
        help="Interrupted and resumed equals uninterrupted: every loss, every weight.",
        wanted=lambda recipe: _trains(recipe) and recipe.expect.resume,
    ),
    Check(
        name="serving",
        parts="finetune.checks.serving:PARTS",
        help="The server answers as the model was evaluated, and does what a request says: stop, length, sampling.",
        wanted=lambda recipe: recipe.expect.serving,
        training=False,
    ),
    Check(
        name="invariance",
        parts="finetune.checks.invariance:PARTS",
        help="Accumulation, checkpointing, packing, padding and merging change nothing; the seed fixes the order.",
        wanted=lambda recipe: _trains(recipe) and recipe.expect.invariance,
    ),
    Check(
        name="parity",
        parts="finetune.checks.parity:PARTS",
        help="The merged model and every export prompt, predict, answer and stop as the model they were made from.",
        wanted=lambda recipe: bool(recipe.export),
        training=False,
    ),
)
BY_NAME = {check.name: check for check in CHECKS}


def verify(recipe: Recipe, run: Run, only: Iterable[str] | None = None) -> list[Verdict]:
    """Run the checks that the recipe calls for (or `only` those named) and store their verdicts in the run."""
    verdicts = results(recipe, run, only)
    store(run, judged(recipe, run, verdicts))
    return verdicts


def judged(recipe: Recipe, run: Run, verdicts: list[Verdict]) -> StoredVerdicts:
    """Verdicts as stored, without secrets, with the cause that explains several of the refuted ones, where there is one."""
    from finetune.checks.causes import cause
    from finetune.core.secrets import redacted

    document = as_dict(verdicts)
    if found := cause(recipe, run, verdicts):
        document["cause"] = found
    return redacted(document)


def store(run: Run, document: StoredVerdicts) -> None:
    """Store what `judged` made, and seal the run. Raises OSError where the run cannot be written into."""
    from finetune.core.files import digest
    from finetune.run import evidence, layout, seal

    path = evidence.write(run, layout.VERDICTS, document)
    run.event("verified", passed=document["passed"], sha256=digest(path))
    seal.close(run)


def results(recipe: Recipe, run: Run, only: Iterable[str] | None = None, *, training: bool = False) -> list[Verdict]:
    """As `verify`, without storing anything; with `training`, only what concerns the trained model itself."""
    wanted = [check.name for check in CHECKS if check.wanted(recipe) and (check.training or not training)]
    names = list(only) if only is not None else wanted
    for name in names:
        if name not in BY_NAME:
            raise UsageError(f"unknown check '{name}'.{did_you_mean(name, BY_NAME)} Known: {', '.join(BY_NAME)}.")
    from finetune.checks.remedies import with_remedy

    return [with_remedy(verdict) for name in names for verdict in _of_check(BY_NAME[name], recipe, run)]


def owed(check: Check, recipe: Recipe) -> list[str]:
    """The names of the verdicts that a check owes for a recipe."""
    return [name for part in load(check.parts) for name in part.owes(recipe)]


def _of_check(check: Check, recipe: Recipe, run: Run) -> list[Verdict]:
    return [verdict for part in load(check.parts) for verdict in carried_out(part, recipe, run)]


def carried_out(part: Part, recipe: Recipe, run: Run) -> list[Verdict]:
    """The verdicts of one part; those that it owes and does not deliver are refuted. One that owes nothing is not run."""
    owed, why = list(part.owes(recipe)), "the check said nothing of it"
    if not owed:
        return []
    try:
        given = part.check(recipe, run)
    except FinetuneError as error:
        given, why = [], first_line(error)
    except Exception as error:
        # Evidence that no reader refused and no check understands: that is what was found, whoever's fault it is.
        given, why = [], f"{part.evidence} makes no sense to the check ({type(error).__name__}: {first_line(error)})"
    there = {verdict.name for verdict in given}
    return [*given, *(missing(name, "==", 1, "verdict", part.evidence, why) for name in owed if name not in there)]


def passed(verdicts: Iterable[Verdict]) -> bool:
    """Whether something was proved and nothing refuted."""
    return holds(verdict.outcome for verdict in verdicts)


def as_dict(verdicts: list[Verdict]) -> StoredVerdicts:
    """Verdicts as stored: `passed` for all of them, and each (None: not examined)."""
    said = {PROVED: True, REFUTED: False, NOT_EXAMINED: None}
    return {
        "schema": schemas.VERDICTS.number,
        "time": now(),
        "passed": passed(verdicts),
        "verdicts": [{**asdict(verdict), "passed": said[verdict.outcome]} for verdict in verdicts],  # type: ignore[typeddict-item]
    }
