"""A run as a few lines of Markdown: first what explains the refuted verdicts, then these and what was not examined, each
with what to do about it. For a CI job's summary."""

from __future__ import annotations

import re
from typing import Any

from finetune.core.console import duration
from finetune.core.memory import human
from finetune.core.text import visible
from finetune.report import wording
from finetune.report.facts import facts
from finetune.run import outcome

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#&~$@])")
_SHOWN = 20
_LONG = 400


def render(document: dict[str, Any]) -> str:
    """The Markdown of a report (see `summary.document`)."""
    parts = [
        f"## {escape(document['name'])}: {escape(wording.status(document))}",
        *_failures(document),
        *_facts(document),
    ]
    if document["exports"]:
        parts.append(_exports(document["exports"]))
    parts.append(
        f"{len(document['stages'])} stages in {duration(document['seconds'])}. The whole report: report.html beside this "
        f"file. Check again: `finetune verify {document['run'].replace('`', '')}`"
    )
    return visible("\n\n".join(parts)) + "\n"


def escape(text: str) -> str:
    """Text as it is: nothing in it is markup, and it stays on one line."""
    return _SPECIAL.sub(r"\\\1", visible(" ".join(text.split())))


def _failures(document: dict[str, Any]) -> list[str]:
    parts = [f"**{escape(document['cause'])}**"] if document["cause"] else []
    if document["stopped"]:
        parts.append(f"**{escape(wording.ended(document['stopped']))}**")
    parts += [escape(mark) for mark in (*document["marks"], *document["damaged"])]
    refuted = outcome.of(document["verdicts"], outcome.REFUTED)
    if refuted:
        rows = [
            [f"**{escape(each['name'])}**", escape(wording.measured(each)), escape(wording.wanted(each)),
             escape(_cut(each["why"])), escape(each["remedy"])]
            for each in refuted[:_SHOWN]
        ]  # fmt: skip
        parts.append(_table(["refuted", "measured", "wanted", "why", "what to do"], rows))
    if len(refuted) > _SHOWN:
        parts.append(f"and {len(refuted) - _SHOWN} more")
    if unknown := outcome.of(document["verdicts"], outcome.NOT_EXAMINED):
        rows = [[escape(each["name"]), escape(_cut(each["why"])), escape(each["remedy"])] for each in unknown[:_SHOWN]]
        parts.append(_table(["not examined", "why", "what to do"], rows))
    return parts


def _cut(text: str) -> str:
    return text if len(text) <= _LONG else text[: _LONG - 3] + "..."


def _facts(document: dict[str, Any]) -> list[str]:
    rows = [
        [escape(fact.label), escape(f"{fact.before} → {fact.value}" if fact.before else fact.value), escape(fact.note)]
        for fact in facts(document)
    ]
    return [_table(["", "", ""], rows)] if rows else []


def _exports(hops: list[dict[str, Any]]) -> str:
    rows = []
    for hop in hops:
        apart, same, kept = hop["distributions"], hop["greedy"], hop["learned"]
        rows.append(
            [
                escape(hop["hop"]),
                "" if hop["passed"] is None else outcome.PROVED if hop["passed"] else f"**{outcome.REFUTED}**",
                human(hop["bytes"]) if hop["bytes"] else "",
                wording.small(apart["mean"]) if apart else "",
                f"{same['equal']} of {same['compared']}",
                f"{kept['kept']} of {kept['known']}",
            ]
        )
    return _table(["export", "checks", "size", "KL mean", "same answers", "probes kept"], rows)


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
