"""Which training a checkpoint is of: a record that lies in it as `finetune.json`, and two records compared.

The record has two parts. `training` is what was asked for, as plain data, and the digests of what it was asked of; two
trainings with the same are the same training. `past` is what happened up to the checkpoint, which a training that goes on
from there cannot see any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.core import schemas
from finetune.core.errors import UsageError
from finetune.core.files import read_object, write_text
from finetune.core.parsing import loads
from finetune.recipe.sections import Align, Train

FILE = "finetune.json"
# What may differ in the same training. It is asked for by the recipe, and no weight depends on it.
WITHOUT_EFFECT = (
    "logging_steps",  # which steps are told
    "save_strategy", "save_steps", "save_total_limit",  # which steps are kept
    "report_to",  # who is told
    "on_oom", "on_nan",  # what is done where no step can be taken; what came of it stands among the adaptations
    "dataloader_num_workers",  # the order of rows is drawn before workers share them out
    "device",  # where it is computed; another chip rounds otherwise, and `auto` chooses it by itself
)  # fmt: skip
# What nobody can go on with: the state in the checkpoint is of this shape and kind, or would overrule the recipe.
FIXED = ("backend", "objective", "method", "adapter", "lora", "options.optim")
PLAN = ("max_steps", "num_train_epochs")
ORIGIN = b', "file": '  # where a prepared row begins to tell its file and line; no number before it can hold this
GEOMETRY = ("r", "lora_alpha", "use_rslora", "use_dora")  # what a checkpoint without a record tells of its adapter


class Part(BaseModel):
    """A part of the record. A key that a later version adds is passed over by this one."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, ser_json_inf_nan="constants")


class Rows(Part):
    """Prepared rows: the file inside the run, how many, and the SHA-256 of what is trained of them."""

    file: str
    count: int
    sha256: str


class Training(Part):
    """What a training is. `model` and `adapter` (what it went on from) are file names and their SHA-256."""

    backend: str
    objective: str
    method: str
    section: str
    options: dict[str, Any]
    lora: dict[str, Any] | None
    settings: dict[str, Any]
    rows: Rows
    eval_rows: Rows | None
    model: dict[str, str]
    adapter: dict[str, str] | None
    chat_template: str | None  # SHA-256


class Adaptation(Part):
    """What a training did to go on where it could not: from `step` on, with this batch, accumulation and share of the
    recipe's learning rate. `why` is a phrase."""

    step: int
    kind: Literal["shrink", "rollback"]
    why: str
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    learning_rate_share: float

    def applied(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options as the training goes on with them."""
        batch = self.per_device_train_batch_size
        return {
            **options,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "per_device_eval_batch_size": min(batch, options["per_device_eval_batch_size"]),
            "learning_rate": options["learning_rate"] * self.learning_rate_share,
        }

    def said(self) -> str:
        """What it came to, for a person."""
        return (
            f"from step {self.step}: per_device_train_batch_size {self.per_device_train_batch_size}, "
            f"gradient_accumulation_steps {self.gradient_accumulation_steps}"
            if self.kind == "shrink"
            else f"from step {self.step}: {self.learning_rate_share:g} of the learning rate"
        ) + f" ({self.why})"


class Past(Part):
    """What happened before: see `finetune.backends.weight_updates` for the measurements.

    `plans` are (from this step on, steps planned in all), None where that is not known yet; `changed` says what became
    another when somebody insisted on going on, `unexamined` the steps at which a checkpoint of an earlier version was taken
    up.
    """

    steps_watched: int = 0
    steps_without_effect: int | None = 0  # None: a backend that does not look
    first_move: float | None = None
    clipped_norm: float | None = None
    plans: tuple[tuple[int, int | None], ...] = ((0, None),)
    changed: tuple[str, ...] = ()
    unexamined: tuple[int, ...] = ()
    adaptations: tuple[Adaptation, ...] = ()

    def adapted(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe's options as the training goes on with them."""
        return self.adaptations[-1].applied(options) if self.adaptations else dict(options)

    def grown(self, facts: Mapping[str, Any]) -> Past:
        """With what a training measured since: `steps_watched`, `planned_steps`, and its optimizer's facts."""
        norms = [norm for norm in (self.clipped_norm, facts.get("clipped_norm")) if norm is not None]
        counts = (self.steps_without_effect, facts.get("steps_without_effect"))
        without = None if None in counts else sum(count for count in counts if count is not None)
        return self.model_copy(
            update={
                "steps_watched": self.steps_watched + facts["steps_watched"],
                "steps_without_effect": without,
                "first_move": facts.get("first_move") if self.first_move is None else self.first_move,
                "clipped_norm": _largest(norms),
                "plans": _closed(self.plans, facts["planned_steps"]),
            }
        )

    def facts(self) -> dict[str, Any]:
        """As keys of a stage's metrics; what was never measured, and adaptations where there were none, are left out."""
        found = {key: value for key, value in self.model_dump(mode="json").items() if value is not None}
        return {key: value for key, value in found.items() if value or key != "adaptations"}


class Record(Part):
    """The file."""

    version: int = Field(schemas.TRAINING.number, alias=schemas.KEY)
    training: Training
    past: Past = Past()

    def text(self) -> str:
        return self.model_dump_json(by_alias=True, indent=2) + "\n"


def leave(folder: Path, identity: str, facts: Mapping[str, Any]) -> None:
    """Write a training's record (`Job.identity`) into a checkpoint; to be called before what marks the folder whole."""
    if identity:
        write_text(folder / FILE, grown(identity, facts))


def grown(identity: str, facts: Mapping[str, Any]) -> str:
    """The record's text with what the training has measured up to now."""
    record = Record.model_validate_json(identity)
    return record.model_copy(update={"past": record.past.grown(facts)}).text()


def unmoved(identity: str, done: int) -> bool:
    """Whether no weight could have moved in the `done` steps before: a warm-up begins with a rate of zero."""
    if not done or not identity:
        return not done
    past = Record.model_validate_json(identity).past
    return past.steps_watched == done and past.first_move is None and past.steps_without_effect == 0


def check_plan(done: int, total: int) -> None:
    """Raise UsageError for a checkpoint beyond the last step that is planned."""
    if done > total:
        raise UsageError(
            f"the checkpoint is of step {done}, and the recipe plans {total} steps. Resume from an earlier one, plan more "
            "steps, or start anew with --force"
        )


def read(checkpoint: Path) -> Record | None:
    """A checkpoint's record; None for one of an earlier version, which has none. Raises UsageError for one unreadable,
    NewerError for one of a later version."""
    file = checkpoint / FILE
    if not file.is_file():
        return None
    try:
        return Record.model_validate(schemas.TRAINING.read(loads(file.read_bytes()), file))
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is no record of a training that this version can read ({_first(error)}); resume from another "
            "checkpoint, or start anew with --force"
        ) from None


def of_rows(path: Path, name: str) -> Rows:
    """What is trained of a file of prepared rows. Files and lines that rows came from make no other training."""
    total, count = hashlib.sha256(), 0
    with path.open("rb") as stream:
        for line in stream:  # not parsed: that would take a minute of a large file
            total.update(line.partition(ORIGIN)[0].rstrip(b"}\n") + b"\n")
            count += 1
    return Rows(file=name, count=count, sha256=total.hexdigest())


@dataclass(frozen=True, kw_only=True)
class Differences:
    """How a training differs from a checkpoint's, in phrases. `fixed`: nobody can go on so; `changed`: somebody may want
    to; `longer`: the same training, planned for more steps."""

    fixed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    longer: str | None = None

    def __bool__(self) -> bool:
        return bool(self.fixed or self.changed)


def compare(before: Training, after: Training) -> Differences:
    """What is another in `after` than in `before`."""
    found = list(_differing(before, after))
    longer, plan = _plans(before, after)
    return Differences(
        fixed=tuple(phrase for key, phrase in found if _is_fixed(key)),
        changed=(*(phrase for key, phrase in found if not _is_fixed(key)), *plan),
        longer=longer,
    )


def compare_geometry(checkpoint: Path, after: Training) -> Differences:
    """What a checkpoint without a record tells by its adapter's config."""
    config = checkpoint / "adapter_config.json"
    method = "lora" if config.is_file() else "full"
    if method != after.method:
        return Differences(fixed=(f"{after.section}.method {method} -> {after.method}",))
    if after.lora is None or after.adapter is not None:
        return Differences()
    stored, asked = read_object(config), after.lora
    known = [key for key in GEOMETRY if key in stored and key in asked]
    return Differences(
        fixed=tuple(f"train.lora.{key} {stored[key]} -> {asked[key]}" for key in known if stored[key] != asked[key])
    )


def _differing(before: Training, after: Training) -> Iterator[tuple[str, str]]:
    """(key, phrase) of everything that differs but the plan."""
    for key in ("backend", "objective"):
        if getattr(before, key) != getattr(after, key):
            yield key, f"{key} {getattr(before, key)} -> {getattr(after, key)}"
    if before.method != after.method:
        yield "method", f"train.method {before.method} -> {after.method}"
    else:
        yield from _keys("lora", "train.lora", before.lora or {}, after.lora or {})
    yield from _keys("options", after.section, _with_defaults(before, after), after.options)
    yield from _keys("settings", "model", before.settings, after.settings)
    for key in ("rows", "eval_rows"):
        yield from _rows(key, getattr(before, key), getattr(after, key))
    yield from _files("model", "the base model", before.model, after.model)
    yield from _files("adapter", "the adapter it goes on from", before.adapter or {}, after.adapter or {})
    if before.chat_template != after.chat_template:
        yield "chat_template", "the chat template is another"


def _is_fixed(key: str) -> bool:
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)


def _keys(kind: str, section: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key in dict.fromkeys((*before, *after)):
        if key not in (*WITHOUT_EFFECT, *PLAN) and before.get(key) != after.get(key):
            yield f"{kind}.{key}", f"{section}.{key} {_said(before.get(key))} -> {_said(after.get(key))}"


def _with_defaults(before: Training, after: Training) -> dict[str, Any]:
    """The options of `before`; those that did not exist yet had today's default."""
    fields = (Align if after.section == "align" else Train).model_fields
    news = [key for key in after.options if key not in before.options and key in fields]
    return {**{key: fields[key].get_default(call_default_factory=True) for key in news}, **before.options}


def _plans(before: Training, after: Training) -> tuple[str | None, tuple[str, ...]]:
    """(the phrase of a plan that goes further, the phrases of any other)."""
    (kind, was), (other, now) = _plan(before.options), _plan(after.options)
    if kind != other:
        pairs = [(key, before.options.get(key), after.options.get(key)) for key in PLAN]
        return None, tuple(
            f"{after.section}.{key} {_said(was)} -> {_said(now)}" for key, was, now in pairs if was != now
        )
    if was == now:
        return None, ()
    phrase = f"{after.section}.{kind} {_said(was)} -> {_said(now)}"
    return (phrase, ()) if now > was else (None, (phrase,))


def _plan(options: Mapping[str, Any]) -> tuple[str, float]:
    steps = options.get("max_steps", -1)
    return ("max_steps", steps) if steps > 0 else ("num_train_epochs", options.get("num_train_epochs", 0))


def _rows(key: str, before: Rows | None, after: Rows | None) -> Iterator[tuple[str, str]]:
    if before is None or after is None:
        if before is not after:
            name = before or after
            yield key, f"{name.file if name else key}: held-out rows {'are gone' if before else 'are new'}"
    elif before.sha256 != after.sha256:
        counts = f"{before.count} -> {after.count}" if before.count != after.count else f"{after.count}, as before"
        yield key, f"{after.file} has other rows ({counts})"


def _files(key: str, what: str, before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    other = [name for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        yield key, f"{what} is another: {', '.join(other[:3])}{more}"


def _said(value: Any) -> str:
    return "nothing" if value is None else str(value)


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return "; ".join(line.strip() for line in lines[1:3]) if isinstance(error, ValidationError) else lines[0]


def _largest(norms: list[float]) -> float | None:
    """NaN where any is, which `max` would pass over."""
    return next((norm for norm in norms if norm != norm), max(norms, default=None))


def _closed(plans: tuple[tuple[int, int | None], ...], planned: int) -> tuple[tuple[int, int | None], ...]:
    """The plans with the last one's total known; a resume by the same plan is none of its own."""
    *earlier, (begin, _) = plans
    return tuple(earlier) if earlier and earlier[-1][1] == planned else (*earlier, (begin, planned))
