"""A stored run as plain data: what every report, on a terminal or as JSON, is made from."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from finetune import __version__
from finetune.core import schemas
from finetune.core.clock import now
from finetune.core.secrets import redacted
from finetune.report import wording
from finetune.report.curves import curve
from finetune.report.stored import PHASES as PHASES
from finetune.report.stored import Stored, with_exports
from finetune.report.stored import answers as answers
from finetune.report.stored import exports as exports
from finetune.report.stored import reports as reports
from finetune.report.stored import verdicts as verdicts
from finetune.run import Run, outcome

SETS = tuple(wording.SETS)
CURVES = ("train", "align")


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one kind of question of one set went in one phase. `logprob` is the mean per token of the right answer."""

    set: str
    kind: str
    phase: str
    asked: int
    right: int
    logprob: float | None


def phases(rows: list[dict[str, Any]]) -> list[str]:
    """The phases that were asked, in order."""
    return [phase for phase in PHASES if any(phase in row.get("phases", {}) for row in rows)]


def scores(rows: list[dict[str, Any]]) -> list[Score]:
    """Right answers and log-probabilities by set, kind and phase."""
    found = []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((str(row["set"]), str(row.get("kind") or "")), []).append(row)
    for group, members in sorted(groups.items(), key=lambda item: rank(item[0][0])):
        for phase in phases(rows):
            given = [row["phases"][phase] for row in members if phase in row["phases"]]
            logprobs = [answer["logprob"] for answer in given if answer.get("logprob") is not None]
            found.append(
                Score(
                    set=group[0],
                    kind=group[1],
                    phase=phase,
                    asked=len(given),
                    right=sum(bool(answer.get("correct")) for answer in given),
                    logprob=sum(logprobs) / len(logprobs) if logprobs else None,
                )
            )
    return found


def size(run: Run) -> int:
    """Bytes of all files of a run."""
    return sum(path.lstat().st_size for path in run.path.rglob("*") if path.is_file() and not path.is_symlink())


def stopped(events: list[dict[str, Any]], stored: dict[str, Any] | None) -> dict[str, Any] | None:
    """Where a run ended before its end: `stage`, `how` (failed, interrupted, or unfinished: still running, or killed),
    `message`, `time`; None where it did not, or where all checks have held since."""
    told = ("stage_started", "stage_finished", "stage_failed", "stage_interrupted")
    last = next((event for event in reversed(events) if event["event"] in told), None)
    if last is None or last["event"] == "stage_finished":
        return None
    if stored and stored["passed"] and last not in _since(events, stored):
        return None
    how = last["event"].removeprefix("stage_").replace("started", "unfinished")
    return {"stage": last["stage"], "how": how, "message": last.get("message", ""), "time": last["time"]}


def _outdated(events: list[dict[str, Any]], stored: dict[str, Any] | None) -> bool:
    """Whether a stage ran after the verdicts were written."""
    if stored is None:
        return False
    return any(
        event["event"] in ("stage_started", "stage_failed", "stage_interrupted") for event in _since(events, stored)
    )


def _since(events: list[dict[str, Any]], stored: dict[str, Any]) -> list[dict[str, Any]]:
    """What happened after the verdicts were written: by the log's order, since clocks are set back; by time where the log
    does not tell of them (version 0.1)."""
    told = [place for place, event in enumerate(events) if event["event"] == "verified"]
    return events[told[-1] + 1 :] if told else [event for event in events if event["time"] > stored["time"]]


def reproduce(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
    """How to make the run again: `command` (in this environment), `typed` (as it was first started), `install` (the
    same versions), `git` (commit and whether it had changes)."""
    wanted = {"finetune": manifest.get("finetune"), **manifest.get("packages", {})}
    # `==2.13.0` also installs 2.13.0+cpu; the other way round an index without that build refuses.
    pins = [f"{name}=={version.partition('+')[0]}" for name, version in wanted.items() if version]
    again = ["finetune", "run", str(run.path / "recipe.yaml"), "--run", f"{run.path}-again"]
    return {
        "command": shlex.join(again),
        "typed": manifest.get("command"),
        "install": shlex.join(["python", "-m", "pip", "install", *pins]) if pins else None,
        "git": manifest.get("git"),
    }


def document(run: Run) -> dict[str, Any]:
    """The whole report as plain data; what report.json holds, but for NaN and infinity (see `portable`).

    `passed` is None where nothing was verified, or where a stage ran since then. `marks` has to be known beside the
    verdicts (`run.outcome.marks`), `damaged` names what could not be read. Secrets are replaced.
    """
    stored = Stored(run)
    verified, events, manifest, done = stored.verdicts(), stored.events(), stored.manifest(), stored.reports()
    stored.sealed()
    ended = stopped(events, verified)
    other = stored.damaged[0] if stored.damaged and verified and verified["passed"] else None
    late = _outdated(events, verified) or other is not None
    listed, cause = (verified["verdicts"], verified["cause"]) if verified else ([], "")
    hops = stored.exports(listed)
    rows = with_exports(stored.answers(), hops)
    marks = stored.marks()
    found = {
        "schema": schemas.SUMMARY.number,
        "generator": f"finetune {__version__}",
        "made": now(),
        "name": run.path.name,
        "run": str(run.path),
        "passed": verified["passed"] if verified and not late else None,
        "conclusion": _conclusion(run, verified, other, marks),
        "cause": cause or None,
        "marks": marks,
        "verified": verified["time"] if verified else None,
        "outdated": late,
        "stopped": ended,
        "verdicts": listed,
        "stages": [asdict(report) for report in done],
        "seconds": round(sum(report.seconds for report in done), 3),
        "scores": [asdict(score) for score in scores(rows)],
        "perplexity": stored.perplexities(),
        "answers": rows,
        "curves": {stage: curve(taken) for stage in CURVES if (taken := stored.steps(stage))},
        "memory": stored.memory(),
        "exports": [{key: value for key, value in hop.items() if key != "answers"} for hop in hops],
        "manifest": manifest,
        "recipe": stored.recipe(),
        "settings": stored.settings(),
        "reproduce": reproduce(run, manifest),
        "damaged": stored.damaged,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return redacted(plain)


def _conclusion(run: Run, verified: Mapping[str, Any] | None, other: str | None, marks: list[str]) -> str:
    """The run in a sentence; `other` is what is not as it was when it was verified."""
    if verified is None:
        return "; ".join(["not verified yet", *marks])
    if other is not None:
        return "; ".join([f"not what was verified: {other}", f"verify again: finetune verify {run.path}", *marks])
    return outcome.headline(verified["verdicts"], cause=verified["cause"], marks=marks)


def as_dict(run: Run) -> dict[str, Any]:
    """What report.json holds: `document`, with NaN and infinity as text, which JSON has no numbers for."""
    found: dict[str, Any] = portable(document(run))
    return found


def portable(value: Any) -> Any:
    """`value` with NaN and infinity as "NaN", "Infinity" and "-Infinity"."""
    if isinstance(value, dict):
        return {key: portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def end_to_end(run: Run) -> dict[str, Any]:
    """The whole line in one object: environment, data, training, exports, inference, sample answers, where things are."""
    done = {report.stage: report for report in reports(run)}
    stored = verdicts(run)
    asked, hops = answers(run), exports(run, stored["verdicts"] if stored else None)
    return {
        "run": str(run.path),
        "passed": stored["passed"] if stored else None,
        "environment": run.manifest(),
        "data_statistics": done["prepare"].metrics if "prepare" in done else {},
        "training_metrics": {name: done[name].metrics for name in ("train", "align", "evaluate") if name in done},
        "export_formats": [
            {key: each[key] for key in ("hop", "reference", "backend", "path", "bytes", "mended", "passed")}
            for each in hops
        ],
        "inference_metrics": {
            each["hop"]: {
                key: each[key]
                for key in (
                    "distributions", "greedy", "stop", "learned", "served", "load_seconds", "prompt_tokens_per_second",
                    "generation_tokens_per_second", "peak_bytes",
                )
            }
            for each in hops
        },
        "sample_answers": [
            {"prompt": row["prompt"], "expected": row["answer"]}
            | {phase: answer["text"] for phase, answer in row["phases"].items()}
            for row in asked[:10]
        ],
        "artifacts": {name: str(run.path / name) for report in done.values() for name in report.artifacts},
        "seconds": {name: report.seconds for name, report in done.items()},
        "verdicts": stored["verdicts"] if stored else [],
    }  # fmt: skip


def rank(name: str) -> int:
    return SETS.index(name) if name in SETS else len(SETS)
