"""The handful of facts that tell at a glance what a run did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from finetune.core.console import duration
from finetune.core.memory import human
from finetune.report import wording

_SETS = {"probes": "Taught facts right", "controls": "Control questions right"}
State = Literal["", "good", "bad"]


@dataclass(frozen=True, kw_only=True)
class Fact:
    """`value` as it is now, `before` what it was at first (empty where there is none), `note` a few words."""

    label: str
    value: str
    before: str = ""
    note: str = ""
    state: State = ""


def facts(document: dict[str, Any]) -> list[Fact]:
    """What is known of a run (see `summary.document`), the most telling first."""
    found = [fact for name in ("probes", "controls") if (fact := _answered(document, name))]
    for stage, curve in document["curves"].items():
        found.append(_loss("Loss" if stage == "train" else "Loss of alignment", curve))
    if perplexity := list(document["perplexity"].values()):
        found.append(
            Fact(
                label="Perplexity of held-out text",
                value=wording.number(perplexity[-1]),
                before=wording.number(perplexity[0]) if len(perplexity) > 1 else "",
            )
        )
    if exports := [hop for hop in document["exports"] if hop["hop"] != "merged"]:
        passed = sum(hop["passed"] is True for hop in exports)
        known = any(hop["passed"] is not None for hop in exports)
        state: State = "" if not known else "good" if passed == len(exports) else "bad"
        told = f"{passed} of {len(exports)}" if known else str(len(exports))
        found.append(Fact(label="Exports proved" if known else "Exports", value=told, state=state))
    if document["stages"]:
        peak = max(sum(stage["peak"].values()) for stage in document["stages"])
        found.append(Fact(label="Time of all stages", value=duration(document["seconds"])))
        found.append(Fact(label="Peak memory", value=human(peak)))
    return found


def _answered(document: dict[str, Any], name: str) -> Fact | None:
    """Right answers of a set, first and last phase, all kinds together."""
    scores = [score for score in document["scores"] if score["set"] == name]
    if not scores:
        return None
    phases = list(dict.fromkeys(score["phase"] for score in scores))
    told, right = [], []
    for phase in (phases[0], phases[-1]):
        mine = [score for score in scores if score["phase"] == phase]
        right.append(sum(score["right"] for score in mine))
        told.append(f"{right[-1]} of {sum(score['asked'] for score in mine)}")
    state: State = "bad" if right[-1] < right[0] else "good" if right[-1] > right[0] else ""
    return Fact(label=_SETS[name], value=told[-1], before=told[0] if len(phases) > 1 else "", state=state)


def _loss(label: str, curve: dict[str, Any]) -> Fact:
    bad, ends = curve["not_finite"].get("loss"), curve["ends"].get("loss")
    steps = wording.plural(curve["steps"], "step")
    note = f"{steps}, not a number in {bad['count']} of them" if bad else steps
    if not ends:
        return Fact(label=label, value="not a number", note=note, state="bad")
    return Fact(
        label=label,
        value=wording.number(ends["last"]["value"]),
        before=wording.number(ends["first"]["value"]),
        note=note,
        state="bad" if bad else "",
    )
