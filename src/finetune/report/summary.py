"""A stored run as plain data: what every report, on a terminal or as JSON, is made from."""

from __future__ import annotations

import json
import math
import shlex
import warnings
from dataclasses import asdict, dataclass
from typing import Any

from finetune import __version__
from finetune.answers import is_correct
from finetune.core.clock import now
from finetune.core.files import read_jsonl
from finetune.errors import FinetuneError
from finetune.recipe import load
from finetune.recipe.yaml import parse
from finetune.report import wording
from finetune.report.curves import curve
from finetune.run import Report, Run, evidence
from finetune.secrets import redact
from finetune.stages import STAGES

SCHEMA = 1  # of report.json, see docs/report.schema.json; raised when a key changes its meaning or goes
PHASES = tuple(wording.PHASES)
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


def reports(run: Run) -> list[Report]:
    """The reports of the stages that finished, in the stages' order."""
    return [report for stage in STAGES if (report := run.report(stage.name)) is not None]


def answers(run: Run) -> list[dict[str, Any]]:
    """Every question with its answers, or nothing when none was asked."""
    path = run.path / "evaluate" / "answers.jsonl"
    return read_jsonl(path) if path.is_file() else []


def verdicts(run: Run) -> dict[str, Any] | None:
    """The stored verdicts, or None when nothing was verified."""
    found: dict[str, Any] | None = _json(run, "verdicts.json")
    return found


def _json(run: Run, name: str) -> Any:
    path = run.path / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def exports(run: Run) -> list[dict[str, Any]]:
    """Every hop that was compared, in order: its evidence, and whether all of its verdicts passed (None: unverified)."""
    stored = verdicts(run)
    names = [entry["name"] for entry in _json(run, "export/exports.json") or []]
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


def hop_answers(run: Run, rows: list[dict[str, Any]]) -> None:
    """Give every question that was compared its `exports`: what each hop answered, as far as the run has it.

    An answer is `text` and `correct`, or `same`: True where all of that hop's answers are those of the model before.
    """
    for hop in exports(run):
        given = hop.get("answers")
        unequal = {place["prompt"]: place for place in _differing(hop)}
        for number, row in enumerate(rows):
            found = row.setdefault("exports", {})
            if given is not None and number < len(given):
                answer = given[number]
            elif row["prompt"] in unequal:
                answer = unequal[row["prompt"]]
            elif number < hop["greedy"]["compared"] == hop["greedy"]["equal"]:
                found[hop["hop"]] = {"same": True}
                continue
            else:
                continue
            correct = is_correct(answer["text"], row["answer"], row.get("match"))
            found[hop["hop"]] = {"text": answer["text"], "finish": answer.get("finish"), "correct": correct}


def _differing(hop: dict[str, Any]) -> list[dict[str, str]]:
    """The answers that a hop's evidence quotes, as {prompt, text}."""
    quoted = [{"prompt": each["prompt"], "text": each["found"]} for each in hop["learned"]["lost"]]
    if first := hop["greedy"]["first"]:
        quoted.append({"prompt": first["prompt"], "text": first["found_text"]})
    if first := hop["stop"]["first_unstopped"]:
        quoted.append({"prompt": first["prompt"], "text": first["text"]})
    return quoted


def perplexities(run: Run) -> dict[str, float]:
    """Perplexity of the held-out text by phase, as far as it was measured."""
    found = _json(run, "evaluate/heldout.json") or {}
    return {phase: found[phase]["perplexity"] for phase in PHASES if phase in found}


def stopped(run: Run) -> dict[str, Any] | None:
    """Where a run ended before its end: `stage`, `how` (failed, interrupted, or unfinished: still running, or killed),
    `message`, `time`; None where it did not, or where all checks have passed since."""
    told = ("stage_started", "stage_finished", "stage_failed", "stage_interrupted")
    last = next((event for event in reversed(run.events()) if event["event"] in told), None)
    stored = verdicts(run)
    if last is None or last["event"] == "stage_finished":
        return None
    if stored and stored["passed"] and stored["time"] > last["time"]:
        return None
    how = last["event"].removeprefix("stage_").replace("started", "unfinished")
    return {"stage": last["stage"], "how": how, "message": last.get("message", ""), "time": last["time"]}


def outdated(run: Run) -> bool:
    """Whether a stage ran after the verdicts were written."""
    stored = verdicts(run)
    return stored is not None and any(event["time"] > stored["time"] for event in run.events("stage_started"))


def settings(run: Run) -> dict[str, Any]:
    """The recipe with every default filled in, without its token; as it is written where it cannot be loaded here."""
    path = run.path / "recipe.yaml"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recipe = load(path)
        return recipe.model_dump(mode="json", exclude={"model": {"token"}})
    except FinetuneError:
        written = parse(path.read_text(encoding="utf-8"), str(path))[0]
        return written if isinstance(written, dict) else {}


def reproduce(run: Run) -> dict[str, Any]:
    """How to make the run again: `command` (in this environment), `typed` (as it was first started), `install` (the
    same versions), `git` (commit and whether it had changes)."""
    manifest = run.manifest()
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
    """The whole report as plain data; what report.json holds, but for NaN and infinity (see `as_dict`).

    `passed` is None where nothing was verified, or where a stage ran since then. Secrets are replaced.
    """
    stored, ended = verdicts(run), stopped(run)
    late = outdated(run) or bool(stored and ended and ended["time"] > stored["time"])
    rows = answers(run)
    hop_answers(run, rows)
    done = reports(run)
    listed = stored["verdicts"] if stored else []
    found = {
        "schema": SCHEMA,
        "generator": f"finetune {__version__}",
        "made": now(),
        "name": run.path.name,
        "run": str(run.path),
        "passed": stored["passed"] if stored and not late else None,
        "conclusion": wording.conclusion(listed) if stored else "not verified yet",
        "verified": stored["time"] if stored else None,
        "outdated": late,
        "stopped": ended,
        "verdicts": listed,
        "stages": [asdict(report) for report in done],
        "seconds": round(sum(report.seconds for report in done), 3),
        "scores": [asdict(score) for score in scores(rows)],
        "perplexity": perplexities(run),
        "answers": rows,
        "curves": {stage: curve(taken) for stage in CURVES if (taken := evidence.steps(run, stage))},
        "memory": _json(run, "measure/memory.json"),
        "exports": [{key: value for key, value in hop.items() if key != "answers"} for hop in exports(run)],
        "manifest": run.manifest(),
        "recipe": (run.path / "recipe.yaml").read_text(encoding="utf-8"),
        "settings": settings(run),
        "reproduce": reproduce(run),
    }
    clean: dict[str, Any] = json.loads(redact(json.dumps(found, default=str)))
    return clean


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
