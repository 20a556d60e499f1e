"""A stored run as plain data: what every report, on a terminal or as JSON, is made from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from finetune.run import Report, Run, read_jsonl
from finetune.stages import STAGES

PHASES = ("base", "trained", "aligned")
SETS = ("probes", "controls", "unseen")


@dataclass(frozen=True, kw_only=True)
class Score:
    """How one kind of question of one set went in one phase. `logprob` is the mean per token of the right answer."""

    set: str
    kind: str
    phase: str
    asked: int
    right: int
    logprob: float | None


def reports(run: Run) -> list[Report]:
    """The reports of the stages that finished, in the stages' order."""
    return [report for stage in STAGES if (report := run.report(stage.name)) is not None]


def answers(run: Run) -> list[dict[str, Any]]:
    """Every question with its answers, or nothing when none was asked."""
    path = run.path / "evaluate" / "answers.jsonl"
    return read_jsonl(path) if path.is_file() else []


def verdicts(run: Run) -> dict[str, Any] | None:
    """The stored verdicts, or None when nothing was verified."""
    path = run.path / "verdicts.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def exports(run: Run) -> list[dict[str, Any]]:
    """Every hop that was compared, in order: its evidence, and whether all of its verdicts passed (None: unverified)."""
    stored = verdicts(run)
    made = run.path / "export" / "exports.json"
    names = [entry["name"] for entry in json.loads(made.read_text(encoding="utf-8"))] if made.is_file() else []
    found = []
    for name in ("merged", *names):
        path = run.path / "compare" / f"{name.replace(':', '-')}.json"
        if path.is_file():
            own = [each["passed"] for each in (stored or {}).get("verdicts", []) if each["name"].endswith(f"[{name}]")]
            found.append({**json.loads(path.read_text(encoding="utf-8")), "passed": all(own) if own else None})
    return found


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


def as_dict(run: Run) -> dict[str, Any]:
    """The whole report as plain data, for `--json`."""
    stored = verdicts(run)
    return {
        "run": str(run.path),
        "passed": stored["passed"] if stored else None,
        "stages": [asdict(report) for report in reports(run)],
        "scores": [asdict(score) for score in scores(answers(run))],
        "answers": answers(run),
        "exports": exports(run),
        "verdicts": stored["verdicts"] if stored else [],
        "manifest": run.manifest(),
    }


def end_to_end(run: Run) -> dict[str, Any]:
    """The whole line in one object: environment, data, training, exports, inference, sample answers, where things are."""
    done = {report.stage: report for report in reports(run)}
    stored = verdicts(run)
    asked = answers(run)
    return {
        "run": str(run.path),
        "passed": stored["passed"] if stored else None,
        "environment": run.manifest(),
        "data_statistics": done["prepare"].metrics if "prepare" in done else {},
        "training_metrics": {name: done[name].metrics for name in ("train", "align", "evaluate") if name in done},
        "export_formats": [
            {key: each[key] for key in ("hop", "reference", "backend", "path", "bytes", "mended", "passed")}
            for each in exports(run)
        ],
        "inference_metrics": {
            each["hop"]: {
                key: each[key]
                for key in (
                    "distributions", "greedy", "stop", "learned", "served", "load_seconds", "prompt_tokens_per_second",
                    "generation_tokens_per_second", "peak_bytes",
                )
            }
            for each in exports(run)
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
