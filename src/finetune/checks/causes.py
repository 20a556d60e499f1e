"""The one thing that explains several refuted verdicts, so that it is read first: a table of causes.

A cause is looked for in verdicts, recipe and run; the first in the table that holds, and explains two refuted verdicts or
more, is named. It takes nothing away from any verdict.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from finetune.checks import Verdict
from finetune.core.errors import FinetuneError
from finetune.core.files import digest
from finetune.recipe import Recipe
from finetune.run import Run, seal
from finetune.run.directory import RECIPE
from finetune.run.plan import plan

LEAST = 2  # refuted verdicts that a cause must explain to be named above them
ABSENT = "no evidence: "  # how the sentence of a verdict begins whose evidence is not there (`checks.missing`)
OF_A_FILE = re.compile(r" is damaged: | is not in |\.jsonl:\d+: ")  # what readers of files say

_LEARNED = "learned_.*|stops_by_itself"
_FELL = "loss_convergence|loss_beyond_noise|loss_end|loss_confirmed"
_STILL = f"steps_move_weights|parameters_changed|lora_b_nonzero|kinds_changed|adapter_effect|{_FELL}|{_LEARNED}"
_STILL += "|merged_once|invariant_(merge|order)|step_size|stop_parity"
_ALIGNED = "dpo_(steps_move_weights|margin|margin_grows|prefers_chosen|step_size)"
_BROKEN = f"loss_.*|gradients_finite|step_size|gradients_clipped|lora_b_nonzero|adapter_effect|{_LEARNED}|controls_kept"
_BROKEN += (
    "|heldout_.*|answers_are_greedy|fresh_process|resume_.*|memory_same_work|(distribution|greedy|learned|stop)_.*"
    "|weights_finite"
)
_ROWS = f"trained_tokens|labels_.*|end_of_turn_trained|prompts_as_served|tokens_as_prepared|loss_.*|{_LEARNED}"
_PROMPTS = f"prompts_as_served|asked_as_trained|labels_are_answers|loss_is_of_answers|loss_start|{_LEARNED}"
_DATA = "rows_prepared|labels_are_answers|prompts_as_served|pairs_are_data|nothing_leaked|every_question_asked"
_DATA += "|asked_as_trained|heldout_whole|heldout_confirmed"


@dataclass(frozen=True)
class Facts:
    """What a cause may look at."""

    recipe: Recipe
    run: Run
    refuted: Sequence[Verdict]

    def named(self, pattern: str) -> list[Verdict]:
        """The refuted verdicts whose name, without its export, matches."""
        return [each for each in self.refuted if re.fullmatch(pattern, each.name.partition("[")[0])]

    @cached_property
    def edited(self) -> list[seal.Found]:
        """Files of the run that are not as they were written, those of stages too."""
        found = seal.faults(self.run)
        for stage in plan(self.recipe):
            try:
                report = self.run.report(stage.name)
            except FinetuneError:
                continue  # damaged: the verdicts that stand on it say so
            found += seal.changed(self.run, report) if report else []
        return found


# A cause that holds: its sentence, and the refuted verdicts that it explains.
Explained = tuple[str, list[Verdict]]


def cause(recipe: Recipe, run: Run, verdicts: Sequence[Verdict]) -> str:
    """The first cause that explains several of the refuted verdicts, as a sentence; empty where none does."""
    facts = Facts(recipe, run, [verdict for verdict in verdicts if verdict.refuted])
    if len(facts.refuted) < LEAST:
        return ""
    for row in CAUSES:
        for said, explained in row(facts):
            if len(explained) >= LEAST:
                return f"{said} (this explains {len(explained)} of the {len(facts.refuted)} refuted checks)"
    return ""


def _another_recipe(facts: Facts) -> Iterator[Explained]:
    """The checks hold a run against a recipe that it was not made from."""
    if any(found.file == RECIPE for found in facts.edited):
        yield f"{RECIPE} was changed after the run, which is held against what it says now", list(facts.refuted)


def _stopped(facts: Facts) -> Iterator[Explained]:
    """The run did not come to its end: what later stages owe is not there."""
    if not facts.named("stages_finished"):
        return
    told = ("stage_started", "stage_finished", "stage_failed", "stage_interrupted")
    try:
        last = next((event for event in reversed(facts.run.events()) if event["event"] in told), None)
    except FinetuneError:
        return
    if last is None or last["event"] == "stage_finished":
        return
    how = {"stage_failed": "failed", "stage_interrupted": "was interrupted"}.get(last["event"], "did not finish")
    why = f": {' '.join(str(last['message']).split())}" if last.get("message") else ""
    without = [each for each in facts.refuted if each.measured is None or each.name == "stages_finished"]
    yield f"the run stopped: its stage '{last['stage']}' {how}{why}", without


def _one_file(facts: Facts) -> Iterator[Explained]:
    """One file is missing or damaged: every verdict that stands on it says the same."""
    yield from (each for each in _reasons(facts) if OF_A_FILE.search(each[0]))


def _one_reason(facts: Facts) -> Iterator[Explained]:
    """Several verdicts have no evidence for the same reason, whatever it is."""
    yield from _reasons(facts)


def _reasons(facts: Facts) -> list[Explained]:
    """Why there is no evidence, and for which verdicts; the reason of most of them first."""
    found: dict[str, list[Verdict]] = {}
    for verdict in facts.refuted:
        if verdict.why.startswith(ABSENT):
            why = verdict.why.removeprefix(ABSENT).replace(f"{facts.run.path}/", "").rstrip(".")
            found.setdefault(why, []).append(verdict)
    return sorted(found.items(), key=lambda each: -len(each[1]))


def _edited(facts: Facts) -> Iterator[Explained]:
    """A file of the run was changed after it was written: what says so, and what reads it."""
    for found in facts.edited:
        file = re.sub(r":\d+$", "", found.file)
        reading = [each for each in facts.refuted if _same_place(each.evidence, file)]
        others = facts.named("sealed|artifacts_intact|saved_.*|fresh_process")
        yield str(found), list({each.name: each for each in (*reading, *others)}.values())


def _same_place(evidence: str, file: str) -> bool:
    return evidence == file or file.startswith(f"{evidence}/") or evidence.startswith(f"{file}/")


def _other_data(facts: Facts) -> Iterator[Explained]:
    """The data is not what was trained: the checks read it again."""
    try:
        known = facts.run.manifest().get("data", {})
    except FinetuneError:
        return
    for name, sha in known.items():
        if not Path(name).is_file():
            yield f"the data file {name} is gone", facts.named(_DATA)
        elif digest(Path(name)) != sha:
            yield f"the data file {name} was changed after the run", facts.named(_DATA)


def _no_rate(facts: Facts) -> Iterator[Explained]:
    """A learning rate of 0 moves nothing."""
    for name, section, pattern, try_ in (
        ("train", facts.recipe.train, _STILL, "2e-4"),
        ("align", facts.recipe.align, _ALIGNED, "5e-5"),
    ):
        if section is not None and section.learning_rate == 0:
            yield f"{name}.learning_rate is 0, so no weight moves: set it to {try_}", facts.named(pattern)


def _wrong_labels(facts: Facts) -> Iterator[Explained]:
    """What is trained are not the answers, so that nothing that follows can be right."""
    for verdict in facts.named("labels_are_answers|labels_aligned|trained_tokens"):
        if not verdict.why.startswith(ABSENT):
            yield f"the rows train something else than the answers of the data ({verdict.name})", facts.named(_ROWS)


def _other_prompts(facts: Facts) -> Iterator[Explained]:
    """The model is asked otherwise than it was trained."""
    for verdict in facts.named("prompts_as_served|asked_as_trained"):
        if not verdict.why.startswith(ABSENT):
            yield f"the model is asked in other tokens than it was trained with ({verdict.name})", facts.named(_PROMPTS)


def _not_a_number(facts: Facts) -> Iterator[Explained]:
    """The training broke: its losses, gradients or weights are no numbers."""
    for verdict in facts.named("loss_finite|gradients_finite"):
        if verdict.measured:
            what = "losses" if verdict.name == "loss_finite" else "gradients"
            yield f"the training broke: {what} became NaN or infinite ({verdict.why})", facts.named(_BROKEN)
    for verdict in facts.named("weights_finite"):
        if verdict.measured:
            yield f"there are weights that are no numbers ({verdict.why})", facts.named(_BROKEN)


def _no_move(facts: Facts) -> Iterator[Explained]:
    """No step moved a weight, whatever the learning rate."""
    for verdict in facts.named("steps_move_weights"):
        if verdict.measured:
            yield f"{verdict.measured:g} steps of the training moved no weight", facts.named(_STILL)


# What lies nearer to the ground comes first.
CAUSES: tuple[Callable[[Facts], Iterator[Explained]], ...] = (
    _another_recipe,
    _stopped,
    _one_file,
    _edited,
    _other_data,
    _no_rate,
    _wrong_labels,
    _other_prompts,
    _not_a_number,
    _no_move,
    _one_reason,
)
