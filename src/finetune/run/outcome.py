"""Proved, refuted, not examined: what a stored verdict says, and all of them in a sentence. The one place where reports,
cards, specs and exit codes take that from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

V = TypeVar("V", bound=Mapping[str, Any])
Outcome = Literal["proved", "refuted", "not examined"]
PROVED: Outcome = "proved"
REFUTED: Outcome = "refuted"
NOT_EXAMINED: Outcome = "not examined"

# What is not known where a verdict is not examined; of any other verdict its name in words says it.
_SUBJECTS = {
    "learned_as_trained": "what it knows",
    "learned_paraphrased": "what it knows in other words",
    "learned_net": "whether it improves at what nobody taught",
    "stops_by_itself": "whether its answers end",
    "controls_kept": "what it still knows of before",
    "heldout_perplexity": "how it reads other text",
    "sealed": "whether files were changed since",
}
_SHORT = re.compile(r": | \(|; ")  # where a remedy goes into detail
_MOVED = ("steps_move_weights", "dpo_steps_move_weights")  # proved where something was trained, and refuted otherwise
_NAMED = 3  # subjects, and files, that a headline names
_NOUNS = {"train": "training", "align": "alignment"}


def outcome(verdict: Mapping[str, Any]) -> Outcome:
    """The outcome that a verdict says; a word that is none refutes it."""
    said: Outcome | None = verdict.get("outcome")
    return said if said in (PROVED, NOT_EXAMINED) else REFUTED


def holds(outcomes: Iterable[Outcome]) -> bool:
    """Whether something was proved and nothing refuted."""
    found = set(outcomes)
    return PROVED in found and REFUTED not in found


def of(verdicts: Iterable[V], wanted: Outcome) -> list[V]:
    """The verdicts with one outcome, in their order."""
    return [verdict for verdict in verdicts if outcome(verdict) == wanted]


def count(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """All verdicts in a few words, for a title: `3 of 73 checks refuted`."""
    if not verdicts:
        return "no check was run"
    proved, refuted, open_ = (len(of(verdicts, each)) for each in (PROVED, REFUTED, NOT_EXAMINED))
    more = f", {open_} not examined" if open_ else ""
    if refuted:
        return f"{refuted} of {_checks(len(verdicts))} refuted{more}"
    if not proved:
        return f"nothing proved: {_checks(open_)} not examined"
    return f"{_checks(proved)} proved{more}" if open_ else f"all {_checks(proved)} proved"


def headline(verdicts: Sequence[Mapping[str, Any]], *, cause: str = "", marks: Sequence[str] = ()) -> str:
    """All verdicts in a sentence: what explains the refuted ones and their names, or else what was not examined and what
    to do about it; then what else has to be known of the training (see `marks`)."""
    refuted, unknown = of(verdicts, REFUTED), of(verdicts, NOT_EXAMINED)
    proved = len(verdicts) - len(refuted) - len(unknown)
    if refuted:
        names = ", ".join(verdict["name"] for verdict in refuted)
        more = f" ({len(unknown)} not examined)" if unknown else ""
        parts = [cause, f"{len(refuted)} of {_checks(len(verdicts))} refuted: {names}{more}"]
    elif not verdicts or not unknown:
        parts = [count(verdicts)]
    elif not proved:
        parts = ["nothing was proved", *_unknown(unknown)]
    else:
        moved = any(verdict["name"] in _MOVED for verdict in of(verdicts, PROVED))
        open_ = _unknown(unknown)
        first = f"trained correctly ({_checks(proved)} proved)" if moved and open_ else count(verdicts)
        parts = [first, *open_]
    return "; ".join(part for part in (*parts, *marks) if part)


def _unknown(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """`what it knows was not examined: add evaluate.probes`, once for all that want the same; what a reader minds first.
    Where nothing can be done, nothing is said."""
    known = list(_SUBJECTS)
    first: dict[str, str] = {}
    for verdict in sorted(
        verdicts, key=lambda each: known.index(each["name"]) if each["name"] in known else len(known)
    ):
        remedy = _SHORT.split(str(verdict.get("remedy") or ""), maxsplit=1)[0].rstrip(".")
        if remedy != "nothing":
            first.setdefault(remedy, _SUBJECTS.get(verdict["name"]) or verdict["name"].replace("_", " "))
    said = [f"{subject} was not examined" + (f": {remedy}" if remedy else "") for remedy, subject in first.items()]
    more = [f"and {len(said) - _NAMED} more"] if len(said) > _NAMED else []
    return [*said[:_NAMED], *more]


def _checks(number: int) -> str:
    return f"{number} check{'' if number == 1 else 's'}"


def marks(manifest: Mapping[str, Any], trainings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What has to be known of trainings beside their verdicts, a phrase each: made with other code or libraries and kept
    (the manifest's `kept`), or gone on with after a change (`changed` in the metrics of `trainings`, by stage)."""
    found = []
    for stage, phrases in (manifest.get("kept") or {}).items():
        if phrases:
            found.append(f"the {_NOUNS.get(stage, stage)} was made with {_made_with(phrases)}: --retrain does it anew")
    for stage, metrics in trainings.items():
        if phrases := metrics.get("changed"):
            found.append(f"the {_NOUNS.get(stage, stage)} was gone on with after a change: {', '.join(phrases)}")
    return found


def _made_with(phrases: Sequence[str]) -> str:
    """Of `transformers 5.23.0 -> 5.24.0`, `finetune/training/job.py changed`: versions as they are, files as other code."""
    versions = [phrase.replace(" -> ", ", now ") for phrase in phrases if " -> " in phrase]
    files = [phrase for phrase in phrases if " -> " not in phrase]
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    code = [f"other code ({', '.join(files[:_NAMED])}{more})"] if files else []
    return " and ".join([*versions, *code])
