"""Two runs held side by side: what was asked differently, and what came out differently."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from finetune import __version__
from finetune.core import schemas
from finetune.core.clock import now
from finetune.report import html, summary, wording
from finetune.report.charts import chart, points
from finetune.run import Run, outcome

KEPT = ("name", "run", "passed", "conclusion", "cause", "marks", "verified", "outdated", "stopped", "damaged")
_MISSING = "absent"


def compare(first: Run, second: Run) -> dict[str, Any]:
    """What differs between two runs, as plain data; `a` is the first, `b` the second.

    `recipe` (keys, defaults included), `versions`, `verdicts` (those whose outcome differs), `metrics` (all numbers of
    stages and exports, with `difference` b - a and which run is `better`), `curves`, `answers` (those whose last text
    differs; `change` is lost, gained or wording).
    """
    a, b = summary.document(first), summary.document(second)
    return {
        "schema": schemas.SUMMARY.number,
        "generator": f"finetune {__version__}",
        "made": now(),
        "a": {**{key: a[key] for key in KEPT}, "status": wording.status(a)},
        "b": {**{key: b[key] for key in KEPT}, "status": wording.status(b)},
        "recipe": _different(_flat(a["settings"]), _flat(b["settings"])),
        "versions": _different(_versions(a), _versions(b)),
        "verdicts": _verdicts(a, b),
        "metrics": _metrics(a, b),
        "curves": {
            stage: {side: each["curves"][stage] for side, each in (("a", a), ("b", b)) if stage in each["curves"]}
            for stage in summary.CURVES
            if stage in a["curves"] or stage in b["curves"]
        },
        "answers": _answers(a, b),
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {path: value}
    leaves: dict[str, Any] = {}
    for name, inner in value.items():
        leaves |= _flat(inner, f"{path}.{name}".lstrip("."))
    return leaves


def _versions(document: dict[str, Any]) -> dict[str, Any]:
    manifest = document["manifest"]
    kept = {key: manifest.get(key) for key in ("finetune", "python", "platform", "cpu")}
    return {**kept, **manifest.get("packages", {}), "git": (manifest.get("git") or {}).get("sha")}


def _different(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"key": key, "a": a.get(key), "b": b.get(key)} for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    ]


def _verdicts(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """The verdicts with another outcome in the other run, or that it does not have."""
    one, other = ({each["name"]: each for each in document["verdicts"]} for document in (a, b))
    found = []
    for name in dict.fromkeys([*one, *other]):
        sides = {side: each.get(name) for side, each in (("a", one), ("b", other))}
        states = {side: _MISSING if each is None else each["outcome"] for side, each in sides.items()}
        if states["a"] != states["b"]:
            said = {f"{side}_measured": _measured(each) for side, each in sides.items()}
            bounds = {side.upper(): wording.wanted(each) for side, each in sides.items() if each is not None}
            same = len(set(bounds.values())) == 1
            bound = (
                next(iter(bounds.values())) if same else "; ".join(f"{side}: {each}" for side, each in bounds.items())
            )
            found.append({"name": name, **states, **said, "wanted": bound})
    return found


def _measured(verdict: dict[str, Any] | None) -> str | None:
    """What was measured; None where the outcome says it all."""
    if verdict is None or verdict["outcome"] == outcome.NOT_EXAMINED:
        return None
    return wording.measured(verdict)


def _metrics(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    one, other = dict(_numbers(a)), dict(_numbers(b))
    found = []
    for key in dict.fromkeys([*one, *other]):
        metric = (one.get(key) or other[key])[0]
        values = {side: each[key][1] if key in each else None for side, each in (("a", one), ("b", other))}
        difference, better = None, None
        if values["a"] is not None and values["b"] is not None:
            difference = values["b"] - values["a"]
            if metric.better and difference and math.isfinite(difference):
                better = "b" if (difference > 0) == (metric.better == "higher") else "a"
        found.append(
            {"group": key[0], "name": key[1], "label": metric.label, "kind": metric.kind, **values,
             "difference": difference, "better": better}
        )  # fmt: skip
    return found


def _numbers(document: dict[str, Any]) -> Iterator[tuple[tuple[str, str], tuple[wording.Metric, float]]]:
    for stage in document["stages"]:
        name = stage["stage"]
        for metric, value in stage["metrics"].items():
            if wording.is_number(value):
                yield (name, metric), (wording.metric(metric), value)
        yield (name, "time"), (wording.Metric(label="time", kind="seconds", better="lower"), stage["seconds"])
        for kind, size in stage["peak"].items():
            label = "peak memory" if kind == "process" else f"peak memory, {kind}"
            yield (name, f"peak_{kind}"), (wording.Metric(label=label, kind="bytes", better="lower"), size)
    for hop in document["exports"]:
        group = f"export {hop['hop']}"
        if hop["distributions"]:
            yield (group, "kl"), (wording.Metric(label="KL divergence, mean", better="lower"),
                                  hop["distributions"]["mean"])  # fmt: skip
        for label, part in (("same answers", hop["greedy"]["equal"]), ("probes kept", hop["learned"]["kept"])):
            yield (group, label), (wording.Metric(label=label, better="higher"), part)
        if hop["bytes"]:
            yield (group, "bytes"), (wording.Metric(label="size", kind="bytes", better="lower"), hop["bytes"])


def _answers(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions that both were asked and answered differently in their last phase: lost ones first."""
    one, other = ({(row["set"], row["id"], row["prompt"]): row for row in document["answers"]} for document in (a, b))
    found = []
    for key, row in one.items():
        if key not in other:
            continue
        before, after = _last(row), _last(other[key])
        if not before or not after or before["text"] == after["text"]:
            continue
        right = bool(before["correct"]), bool(after["correct"])
        change = {(True, False): "lost", (False, True): "gained"}.get(right, "wording")
        found.append(
            {"set": row["set"], "id": row["id"], "prompt": row["prompt"], "answer": row["answer"], "change": change,
             "a": {"text": before["text"], "correct": right[0]}, "b": {"text": after["text"], "correct": right[1]}}
        )  # fmt: skip
    return sorted(found, key=lambda each: ("lost", "gained", "wording").index(each["change"]))


def _last(row: dict[str, Any]) -> dict[str, Any] | None:
    return next((row["phases"][phase] for phase in reversed(summary.PHASES) if phase in row["phases"]), None)


def told(each: dict[str, Any], side: str) -> str:
    """One side of a metric, or its difference, as text."""
    value = each[side]
    if value is None:
        return ""
    if side != "difference":
        return wording.value(value, each["kind"])
    if not value:
        return "0"
    sign = "+" if value > 0 else "-" if value < 0 else ""
    if each["kind"] == "share":
        return f"{sign}{wording.number(round(abs(value) * 100, 1))} points"
    return sign + wording.value(abs(value), each["kind"]) if math.isfinite(value) else wording.number(value)


def setting(value: Any) -> str:
    """A recipe's value as YAML would have it, on one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def title(compared: dict[str, Any]) -> str:
    return f"{compared['a']['name']} and {compared['b']['name']}"


def render(compared: dict[str, Any]) -> str:
    """The comparison as a page."""
    drawn = []
    for stage, sides in compared["curves"].items():
        for name in ("loss", "grad_norm"):
            series = [
                (f"{side.upper()}: {compared[side]['name']}", side, points(curve, name))
                for side, curve in sides.items()
            ]
            text = ". ".join(
                f"{side.upper()}: {html.told(curve, name) or 'nothing logged'}" for side, curve in sides.items()
            )
            label = f"{html.STAGES[stage]}: {html.TITLES[name].lower()}"
            if found := chart(f"{stage}-{name}", label, text, series):
                drawn.append(found)
    return html.page(
        "compare.html.jinja",
        generator=compared["generator"],
        made=compared["made"],
        it=compared,
        title=title(compared),
        charts=drawn,
        metrics=grouped(compared["metrics"]),
        told=told,
        setting=setting,
        at_most=html.AT_MOST,
    )


def grouped(metrics: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Metrics by the stage or export that they are of."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for each in metrics:
        groups.setdefault(each["group"], []).append(each)
    return groups
