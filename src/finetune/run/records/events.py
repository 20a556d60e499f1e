"""Records of the log: what each kind of event says besides its time and its link to the line before."""

from __future__ import annotations

from typing import NotRequired

from typing_extensions import TypedDict

from finetune.run.records import Sha, Time, record


@record
class RecipeStored(TypedDict):
    name: str
    replaced: bool
    sha256: NotRequired[Sha]  # version 0.1 told none


@record
class Started(TypedDict):
    stage: str
    fingerprint: Sha
    started: NotRequired[Time]  # this and the next are not in logs of version 0.1
    of: NotRequired[dict[str, Sha]]  # the models that it speaks of, by stage


@record
class Finished(TypedDict):
    stage: str
    seconds: float
    report: NotRequired[Sha]  # version 0.1 told none


@record
class Interrupted(TypedDict):
    stage: str
    message: str


@record
class Failed(TypedDict):
    stage: str
    error: str
    message: str


@record
class Training(TypedDict):
    stage: str
    resumed_from: int | None
    objective: NotRequired[str]  # not where the log was made again from what the trainer wrote down
    method: NotRequired[str]


@record
class Resumed(TypedDict):
    stage: str
    checkpoint: str
    step: int
    examined: bool
    changed: list[str]
    longer: str | None


@record
class BadStep(TypedDict):
    """A step that could not be taken, and what was done about it: stopped, skipped, shrunk, rolled back."""

    stage: str
    step: int
    rows: list[int]  # of the batch that failed, as prepared; none where that is not known
    what: str
    done: str


@record
class TrackerFailed(TypedDict):
    """See `finetune.recipe.trackers.Failure`."""

    stage: str
    tracker: str
    step: int
    why: str
    offline: bool


@record
class Verified(TypedDict):
    passed: bool
    sha256: Sha


@record
class Exported(TypedDict):
    sha256: Sha  # of the list of exports


@record
class Restored(TypedDict):
    why: str
    aside: str


# `step` is `trained.Step`, which is read with its stage.
KINDS: dict[str, type] = {
    "recipe": RecipeStored,
    "stage_started": Started,
    "stage_finished": Finished,
    "stage_interrupted": Interrupted,
    "stage_failed": Failed,
    "training": Training,
    "resumed": Resumed,
    "bad_step": BadStep,
    "tracker_failed": TrackerFailed,
    "verified": Verified,
    "exported": Exported,
    "log_restored": Restored,
}
