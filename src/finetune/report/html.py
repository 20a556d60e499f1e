"""A run as one HTML file that needs nothing else: styles, script and charts are inside, and nothing is loaded."""

from __future__ import annotations

import base64
import hashlib
import shlex
from pathlib import Path
from typing import Any

from finetune.core.console import duration
from finetune.core.memory import human
from finetune.core.text import visible
from finetune.report import charts, wording
from finetune.report.facts import facts
from finetune.run import Report, outcome

PAGE = Path(__file__).parent / "page"
FIRST, AT_MOST = 6, 300  # questions of a set: shown at once, and shown at all
LONG = 1000  # characters of an answer
TITLES = {
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens a second",
    "margin": "Reward margin",
    "accuracy": "Share that prefer the chosen",
}
STAGES = {"train": "Training", "align": "Alignment"}


def render(document: dict[str, Any]) -> str:
    """The page of a report (see `summary.document`)."""
    verdicts = [_verdict(verdict, number) for number, verdict in enumerate(document["verdicts"])]
    return page(
        "report.html.jinja",
        generator=document["generator"],
        made=document["made"],
        doc=document,
        status=wording.status(document),
        state={True: "good", False: "bad"}.get(document["passed"], "bad" if document["stopped"] else "open"),
        ended=wording.ended(document["stopped"]) if document["stopped"] else "",
        about=_about(document),
        facts=facts(document),
        sections=_sections(document),
        refuted=outcome.of(verdicts, outcome.REFUTED),
        unknown=outcome.of(verdicts, outcome.NOT_EXAMINED),
        proved=_proved(verdicts),
        phases=_phases(document),
        scores=_scores(document),
        perplexity=document["perplexity"],
        sets=_sets(document),
        curves=[_curve(stage, curve) for stage, curve in document["curves"].items()],
        hops=[_hop(hop) for hop in document["exports"]],
        mended=[f"{hop['hop']}: {line}" for hop in document["exports"] for line in hop["mended"]],
        stages=_stages(document),
        total_time=duration(document["seconds"]),
        memory=_memory(document),
        environment=_environment(document["manifest"]),
        packages=list(document["manifest"].get("packages", {}).items()),
        digests=[(name, sha) for part in ("model", "data") for name, sha in document["manifest"].get(part, {}).items()],
        verify=shlex.join(["finetune", "verify", document["run"]]),
    )


def page(template: str, **values: Any) -> str:
    """A template of `page/` as a whole page. Whatever it is given is escaped; only the page's own script may run."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters |= {"shown": shown, "number": wording.number, "moment": moment, "sentence": wording.sentence}
    environment.filters["capital"] = lambda text: text[:1].upper() + text[1:]
    style, script = (Markup((PAGE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    return environment.get_template(template).render(
        style=style, script=script, style_hash=_hash(style), script_hash=_hash(script), wording=wording, **values
    )


def _visible(value: Any) -> Any:
    """What a page is given, visible wherever it stands: in text, attributes, links. Our own markup is as it is."""
    return visible(value) if type(value) is str else value


def _hash(text: str) -> str:
    """What a content security policy names an inline style or script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def shown(text: Any) -> str:
    """Text as `core.text.visible`, and not longer than a reader follows."""
    whole = str(text)
    cut = whole if len(whole) <= LONG else f"{whole[:LONG]} … ({len(whole) - LONG:,} characters more)"
    return visible(cut)


def moment(time: str) -> str:
    """`2026-11-21 13:04 UTC` of a time stamp."""
    return f"{time[:10]} {time[11:16]} UTC"


def _about(document: dict[str, Any]) -> list[str]:
    """Model, method, backend, when: as far as the recipe and the manifest tell."""
    settings, manifest = document["settings"], document["manifest"]
    model, train, align = (settings.get(name) for name in ("model", "train", "align"))
    found: list[str] = [Path(model["path"]).name if isinstance(model, dict) and model.get("path") else ""]
    if isinstance(train, dict) and train.get("method"):
        method = str(train["method"])
        found.append({"lora": "LoRA", "full": "full fine-tuning"}.get(method, method))
    if isinstance(align, dict):
        found.append("DPO")
    devices = [stage["metrics"].get("device") for stage in document["stages"] if stage["stage"] in STAGES]
    backend = str(settings.get("backend") or "")
    found.append(f"{backend} on {devices[0]}" if backend and devices and devices[0] else backend)
    if manifest.get("time"):
        found.append(moment(manifest["time"]))
    return [part for part in found if part]


def _sections(document: dict[str, Any]) -> list[tuple[str, str]]:
    found = [("verdicts", "Verdicts"), ("answers", "What it learned"), ("curves", "Curves")]
    found += [("exports", "Exports")] if document["exports"] else []
    return [*found, ("resources", "Time and memory"), ("reproduce", "Make it again"), ("recipe", "Recipe"),
            ("environment", "Environment")]  # fmt: skip


def _verdict(verdict: dict[str, Any], number: int) -> dict[str, Any]:
    name = verdict["name"]
    return {
        **verdict,
        "id": f"verdict-{number}",
        "title": wording.title(name),
        "hop": wording.hop(name),
        "measured": wording.measured(verdict),
        "wanted": wording.wanted(verdict),
    }


def _proved(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that are proved, by what they are about: the training, then each export."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for verdict in verdicts:
        if verdict["outcome"] == outcome.PROVED:
            groups.setdefault(verdict["hop"], []).append(verdict)
    return [
        {"name": {"": "Training and its data", "merged": "Merged model"}.get(hop, f"Export {hop}"), "verdicts": members}
        for hop, members in groups.items()
    ]


# -- answers -----------------------------------------------------------------------------------------------------------


def _phases(document: dict[str, Any]) -> list[str]:
    asked = {score["phase"] for score in document["scores"]} | set(document["perplexity"])
    return [phase for phase in wording.PHASES if phase in asked]


def _scores(document: dict[str, Any]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for score in document["scores"]:
        groups.setdefault((score["set"], score["kind"]), {})[score["phase"]] = score
    empty = {"asked": 0, "right": 0, "logprob": None}
    return [
        {
            "name": wording.SETS.get(name, name),
            "kind": "" if kind == name else wording.KINDS.get(kind, kind),
            "phases": [
                {**phases.get(phase, empty), "label": wording.sentence(wording.PHASES[phase])}
                for phase in _phases(document)
            ],
        }
        for (name, kind), phases in groups.items()
    ]


def _sets(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions set by set, those that are answered wrongly at the end first."""
    phases, hops = _phases(document), [hop["hop"] for hop in document["exports"]]
    found = []
    for name in dict.fromkeys(row["set"] for row in document["answers"]):
        rows = [_question(row, phases, hops) for row in document["answers"] if row["set"] == name]
        rows.sort(key=lambda row: not row["missed"])
        first, rest = rows[:FIRST], rows[FIRST:AT_MOST]
        found.append(
            {
                "title": wording.SETS.get(name, name),
                "first": first,
                "rest": rest,
                "all_right": name != "unseen" and not any(row["missed"] for row in rest),
                "left_out": len(rows[AT_MOST:]),
            }
        )
    return found


def _question(row: dict[str, Any], phases: list[str], hops: list[str]) -> dict[str, Any]:
    """A question with its answers; `missed` when it should be answered at the end and is not. Exports that answer as
    the last phase does are named together."""
    given = {phase: row["phases"].get(phase) for phase in phases}
    last = next((given[phase] for phase in reversed(phases) if given[phase]), None)
    exports = row.get("exports", {})
    same = [hop for hop in hops if hop in exports and last and _alike(exports[hop], last)]
    return {
        "prompt": row["prompt"],
        "answer": row["answer"],
        "phases": given,
        "missed": row["set"] != "unseen" and last is not None and not last["correct"],
        "same": [f"all {len(hops)}"] if hops and len(same) == len(hops) > 1 else same,
        "other": [(hop, exports[hop]) for hop in hops if hop in exports and hop not in same],
        "unknown": [hop for hop in hops if hop not in exports] if exports else [],
    }


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return bool(one["text"].strip() == other["text"].strip())


# -- curves ------------------------------------------------------------------------------------------------------------


def _curve(stage: str, curve: dict[str, Any]) -> dict[str, Any]:
    present = [name for name in TITLES if any(name in point for point in curve["points"])]
    drawn = []
    for column, name in enumerate(present, 1):
        series = [("training", "a", charts.points(curve, name))]
        if name == "loss" and (held_out := charts.points(curve, "eval_loss")):
            series.append(("evaluation", "b", held_out))
        chart = charts.chart(f"{stage}-{name}", TITLES[name], told(curve, name), series)
        if chart:
            drawn.append((chart, column))
    bad = [f"{title}: {not_numbers(curve['not_finite'][name])}." for name, title in TITLES.items()
           if name in curve["not_finite"]]  # fmt: skip
    shown_ = f"{curve['shown']:,} of {curve['steps']:,} steps are drawn"
    return {
        "id": stage,
        "title": STAGES[stage],
        "charts": drawn,
        "bad": " ".join(bad),
        "thinned": f"{shown_}: the lowest and the highest of every stretch." if curve["shown"] < curve["steps"] else "",
        "headings": ["Step", *(TITLES[name] for name in present)],
        "rows": [
            [f"{point['step']:,}", *(wording.number(point[name]) if name in point else "" for name in present)]
            for point in curve["points"]
        ],
    }


def told(curve: dict[str, Any], name: str) -> str:
    """A curve in a sentence, for those who do not see it."""
    ends, bad = curve["ends"].get(name), curve["not_finite"].get(name)
    parts = []
    if ends:
        first, last, low, high = (ends[key] for key in ("first", "last", "lowest", "highest"))
        if low["value"] == high["value"]:
            parts.append(f"{wording.number(low['value'])} throughout, {wording.plural(curve['steps'], 'step')}")
        else:
            parts.append(f"{_at(first)}, {_at(last)}; lowest {_at(low)}, highest {_at(high)}")
    if bad:
        parts.append(not_numbers(bad))
    return "; ".join(parts)


def _at(place: dict[str, Any]) -> str:
    return f"{wording.number(place['value'])} at step {place['step']:,}"


def not_numbers(found: dict[str, Any]) -> str:
    """`not a finite number at 12 steps: 4, 5, ...`"""
    steps = ", ".join(f"{step:,}" for step in found["steps"])
    more = ", ..." if found["count"] > len(found["steps"]) else ""
    return f"not a finite number at {wording.plural(found['count'], 'step')}: {steps}{more}"


# -- exports, time, memory, environment --------------------------------------------------------------------------------


def _hop(hop: dict[str, Any]) -> dict[str, Any]:
    apart, same, kept = hop["distributions"], hop["greedy"], hop["learned"]
    return {
        "name": hop["hop"],
        "reference": hop["reference"],
        "state": {True: "good", False: "bad"}.get(hop["passed"], ""),
        "verdict": {True: "✓ proved", False: "✗ refuted"}.get(hop["passed"], "not verified"),
        "cells": [
            human(hop["bytes"]) if hop["bytes"] else "",
            duration(hop["load_seconds"]),
            *(_speed(hop[f"{kind}_tokens_per_second"]) for kind in ("prompt", "generation")),
            *(wording.small(apart[key]) if apart else "" for key in ("mean", "max")),
            f"{same['equal']} of {same['compared']}",
            f"{kept['kept']} of {kept['known']}",
        ],
    }


def _speed(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _stages(document: dict[str, Any]) -> list[dict[str, Any]]:
    stages = document["stages"]
    longest = max((stage["seconds"] for stage in stages), default=0) or 1
    largest = max((sum(stage["peak"].values()) for stage in stages), default=0) or 1
    return [
        {
            "name": stage["stage"],
            "result": wording.sentence(wording.result(Report(**stage))),
            "notes": stage["notes"],
            "time": duration(stage["seconds"]),
            "time_share": stage["seconds"] / longest,
            "peak": " + ".join(
                human(size) + (" GPU" if kind == "device" else "") for kind, size in stage["peak"].items()
            ),
            "peak_share": sum(stage["peak"].values()) / largest,
        }
        for stage in stages
    ]


def _memory(document: dict[str, Any]) -> list[dict[str, Any]]:
    """What the training held, and LoRA beside full fine-tuning where both were measured."""
    tables = []
    parts = {"weight_bytes": "Weights", "gradient_bytes": "Gradients", "optimizer_bytes": "Optimizer"}
    trained = {stage["stage"]: stage["metrics"] for stage in document["stages"] if stage["stage"] in STAGES}
    trained = {name: metrics for name, metrics in trained.items() if parts.keys() <= metrics.keys()}
    if trained:
        rows = [[label, *(human(metrics[key]) for metrics in trained.values())] for key, label in parts.items()]
        sums = [human(sum(metrics[key] for key in parts)) for metrics in trained.values()]
        tables.append(
            {
                "caption": "Memory that the state of a training takes",
                "headings": [STAGES[name] for name in trained],
                "rows": [*rows, ["All of it", *sums]],
            }
        )
    if (measured := document["memory"]) and {"lora", "full"} <= measured.keys():
        kinds = {**parts, "training_state_bytes": "All of it", "peak_process_bytes": "Peak of the process"}
        tables.append(
            {
                "caption": "LoRA beside full fine-tuning, each measured in a process of its own "
                f"({measured['batch_size']} rows of {measured['tokens_per_row']} tokens, {measured['dtype']})",
                "headings": ["LoRA", "Full"],
                "rows": [
                    [label, *(human(measured[side][key]) for side in ("lora", "full"))] for key, label in kinds.items()
                ],
            }
        )
    return tables


def _environment(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    git = manifest.get("git") or {}
    gpus = ", ".join(f"{gpu['name']} ({human(gpu['memory_bytes'])})" for gpu in manifest.get("gpus", []))
    seeds = ", ".join(f"{name} {each['seed']}" for name, each in manifest.get("seeds", {}).items())
    threads = ", ".join(f"{name}={value}" for name, value in manifest.get("threads", {}).items())
    found = [
        ("Processor", f"{manifest['cpu']}, {manifest['cores']} cores" if "cpu" in manifest else ""),
        ("Memory", human(manifest["memory_bytes"]) if "memory_bytes" in manifest else ""),
        ("GPU", gpus or ("none" if manifest else "")),
        ("System", manifest.get("platform", "")),
        ("Python", manifest.get("python", "")),
        ("finetune", manifest.get("finetune", "")),
        ("Git commit", f"{git['sha']}{' with uncommitted changes' if git.get('dirty') else ''}" if git else ""),
        ("Seeds", seeds),
        ("Threads", threads),
    ]
    return [(name, value) for name, value in found if value]
