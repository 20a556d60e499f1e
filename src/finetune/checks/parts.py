"""How the parts of a check are made: one of one verdict, and those that speak of every training alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from finetune.backends import TensorFacts, get
from finetune.checks import Part, Verdict
from finetune.core.errors import StageError
from finetune.core.files import digest
from finetune.recipe import Recipe
from finetune.recipe.sections import Lora, Optimization
from finetune.run import Run, evidence
from finetune.run.layout import TRAININGS as REPORTS
from finetune.run.records.trained import Step
from finetune.run.records.whole import TrainMetrics

When = Callable[[Recipe], bool]

# What a backend has nothing to tell of, and why: no such verdict is owed of it.
WITHOUT: dict[str, dict[str, str]] = {
    "fake": {
        "step_size": "it is no Adam, whose first step is as large as the learning rate",
        "saved_precision": "it stores its weights as JSON, which has no types",
    },
}


def tells(recipe: Recipe, name: str) -> bool:
    """Whether the recipe's backend has what a verdict speaks of."""
    return name not in WITHOUT.get(recipe.backend, {})


def trains(recipe: Recipe) -> bool:
    """Whether the recipe has a supervised training."""
    return recipe.train is not None


def several(
    names: tuple[str, ...], check: Callable[[Recipe, Run], list[Verdict]], place: str, when: When = trains
) -> Part:
    """The part that owes these verdicts, where the recipe calls for them."""
    return Part(
        check=lambda recipe, run: check(recipe, run) if when(recipe) else [],
        owes=lambda recipe: names if when(recipe) else (),
        evidence=place,
    )


def single(name: str, check: Callable[[Recipe, Run], Verdict], place: str, when: When = trains) -> Part:
    """As `several`, of one verdict."""
    return several((name,), lambda recipe, run: [check(recipe, run)], place, when)


@dataclass(frozen=True)
class Training:
    """A stage that trains, and what its verdicts' names begin with."""

    stage: str
    prefix: str

    def section(self, recipe: Recipe) -> Optimization | None:
        return recipe.train if self.stage == "train" else recipe.align

    def asked(self, recipe: Recipe) -> Optimization:
        """Its section. Raises StageError where the recipe has none."""
        section = self.section(recipe)
        if section is None:
            raise StageError(f"the recipe has no section '{self.stage}'")
        return section

    def result(self, run: Run, recipe: Recipe) -> Path:
        """The directory that it leaves."""
        return run.path / self.stage / ("adapter" if is_lora(recipe) else "model")

    @property
    def report(self) -> str:
        return REPORTS[self.stage].path

    def facts(self, run: Run) -> TrainMetrics:
        """What its report says of it."""
        return evidence.read(run, REPORTS[self.stage])["metrics"]

    def steps(self, run: Run) -> list[Step]:
        """Its logged steps. Raises StageError where there is none."""
        found = evidence.steps(run, self.stage)
        if not found:
            raise StageError(f"the stage '{self.stage}' logged no step")
        return found


def wholly_skipped(step: Step) -> bool:
    """Whether a logged step tells of skipped ones alone, so that its loss or gradient is none that changed anything."""
    odd = not math.isfinite(step["loss"]) or not math.isfinite(step["grad_norm"] or 0.0)
    return bool(step.get("skipped")) and odd


def taken(asked: Optimization, steps: Sequence[Step]) -> list[Step]:
    """The steps that changed the weights; all where the recipe does not ask for any to be skipped."""
    return [step for step in steps if asked.on_nan != "skip" or not wholly_skipped(step)]


SFT, DPO = Training("train", ""), Training("align", "dpo_")
TRAININGS = (SFT, DPO)


def of_trainings(
    name: str,
    check: Callable[[Recipe, Run, Training], Verdict],
    place: str = "{stage}/report.json",
    when: Callable[[Recipe, Training], bool] = lambda recipe, training: True,
) -> tuple[Part, ...]:
    """A part for each stage that trains, of one verdict, whose name in alignment begins with `dpo_`."""

    def of(training: Training) -> Part:
        return single(
            training.prefix + name,
            lambda recipe, run: check(recipe, run, training),
            place.format(stage=training.stage),
            lambda recipe: training.section(recipe) is not None and when(recipe, training),
        )

    return tuple(map(of, TRAININGS))


def fake_of_0_1(recipe: Recipe, run: Run, training: Training) -> bool:
    """Whether the fake backend of version 0.1 trained it, which told neither its settings nor its gradients' norms."""
    return recipe.backend == "fake" and of_0_1(run, training)


def of_0_1(run: Run, training: Training) -> bool:
    """Whether version 0.1 made it, taken over since or not."""
    report = run.require(training.stage)
    return report.schema == 0 or "finetune" in report.made_with


def is_lora(recipe: Recipe) -> bool:
    """Whether what is trained is an adapter. Alignment trains what the training before it did, else an adapter."""
    return recipe.train is None or recipe.train.method == "lora"


def lora(recipe: Recipe) -> Lora:
    return recipe.train.lora if recipe.train else Lora()


def tensors(recipe: Recipe, directory: Path) -> dict[str, TensorFacts]:
    """What is stored in a model or adapter directory, read once for all checks. Raises FinetuneError where it is none."""
    known = digest(directory) if directory.is_dir() else ""
    return dict(_tensors(recipe.backend, directory, known))


@lru_cache(maxsize=16)
def _tensors(backend: str, directory: Path, sha256: str) -> dict[str, TensorFacts]:
    return get(backend).tensors(directory)
