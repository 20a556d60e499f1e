"""Baselines by seed and by instruction set: docs/honest.csv, and the page that is written from it.

A CPU without some instructions rounds otherwise, so its training goes another way. Environment variables make such CPUs
of one; libraries read them when they are loaded, so each set has a server of warm starts, and a pretrained model, of its own.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from finetune.checks.expected import EXPECT_KEYS
from finetune.core.files import write_json, write_text
from finetune.run.manifest import installed
from sabotage import baseline, detection, tables
from sabotage.bench import Bench, Found

HEAD, RESULTS = Path("docs/honest.json"), Path("docs/honest.csv")  # what was measured on, and what
PAGE = Path("docs/honest.md")
SETS: dict[str, Mapping[str, str]] = {
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "own": {},
}
VERSIONS = ("torch", "transformers", "trl", "peft", "tokenizers")
WANTED = 2.0  # times as far as the worst run: the room that a baseline's settings are chosen for
CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"
# What a training that goes another way moves, in the page's order: verdict, and its column.
DELICATE = {
    "controls_kept": "controls kept",
    "heldout_perplexity": "held-out ratio",
    "learned_as_trained": "learned",
    "learned_paraphrased": "in other words",
    "learned_net": "net",
    "stops_by_itself": "stops",
    "loss_start": "first loss",
    "loss_beyond_noise": "beyond noise",
    "dpo_prefers_chosen": "prefers chosen",
}

# A line of the table: `kind` is `nearest`, once for every baseline and set, `worst` or `alarm`.
COLUMNS: tables.Columns = {
    "baseline": str, "instructions": str, "capability": str, "runs": int, "kind": str, "name": str, "measured": tables.number,
    "compare": str, "bound": tables.number, "room": tables.number, "said": str,
}  # fmt: skip

Document = dict[str, Any]


def measure(baselines: Sequence[str], seeds: int, name: str, directory: Path, *, jobs: int) -> Document:
    """Run each baseline with seeds 0 to `seeds` - 1 under the instruction set `name`, a line for each run as it ends. Where
    it comes to the same instructions as `own`, nothing is run, and the rows say so."""
    capability, own = _capability(name), _capability("own")
    same = name != "own" and capability == own
    found = {} if same else _runs(baselines, seeds, name, directory / name, jobs)
    return {
        "machine": f"{os.cpu_count()} cores, {platform.system()} on {platform.machine()}, {own}",
        "versions": {package: version for package in VERSIONS if (version := installed(package))},
        "rows": [row(each, name, capability, found.get(each, ())) for each in baselines],
    }


def _runs(baselines: Sequence[str], seeds: int, name: str, directory: Path, jobs: int) -> dict[str, list[Found]]:
    with instructions(name), Bench(directory) as bench, ThreadPoolExecutor(jobs) as pool:
        baseline.model()

        def run(where: tuple[str, int]) -> Found:
            each, seed = where
            found = bench.control(f"{each}, seed {seed}", partial(baseline.recipe, each, seed=seed))
            said = ", ".join(found.failed) or found.refused or "nothing"
            print(f"{found.seconds:6.1f} s  {name}: {found.name}: {said}", flush=True)
            return found

        places = [(each, seed) for each in baselines for seed in range(seeds)]
        done = list(pool.map(run, places))
    return {each: [found for (of, _), found in zip(places, done, strict=True) if of == each] for each in baselines}


@contextmanager
def instructions(name: str) -> Iterator[None]:
    """Processes started within may use this set of instructions."""
    before = {variable: os.environ.pop(variable, None) for variable in baseline.INSTRUCTIONS}
    os.environ.update(SETS[name])
    try:
        yield
    finally:
        for variable, value in before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value


def _capability(name: str) -> str:
    """The instructions that PyTorch says it uses under a set: `AVX2`, `AVX512`, `DEFAULT`."""
    with instructions(name):
        done = subprocess.run(
            [sys.executable, "-P", "-c", CAPABILITY],
            env=baseline.environment(),
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout.strip()


def row(name: str, instructions: str, capability: str, found: Iterable[Found]) -> Document:
    """One baseline under one instruction set: how many runs, the alarms, and how far its delicate measurements went."""
    runs = list(found)
    spreads = detection.spreads(runs)
    return {
        "baseline": name,
        "instructions": instructions,
        "capability": capability,
        "runs": len(runs),
        "alarms": {each.name: ", ".join(each.failed) or each.refused for each in runs if each.caught},
        "worst": {verdict: _worst(verdict, spreads[verdict]) for verdict in DELICATE if verdict in spreads},
        "nearest": _nearest(spreads),
    }


def _worst(name: str, spread: Document) -> Document:
    above = spread["compare"] in ("<", "<=")
    measured, bound = (spread["most"], spread["strictest"]) if above else (spread["least"], spread["strictest"])
    return {"measured": measured, "bound": bound, "compare": spread["compare"], "room": _room(spread, measured, bound)}


def _room(spread: Document, measured: float, bound: float) -> float | None:
    """That of detection's; of a ratio, which is 1 where nothing is lost, what lies above 1 counts."""
    if spread["unit"] == "ratio":
        return (bound - 1) / (measured - 1) if measured > 1 else None
    room: float | None = spread["room"]
    return room


def _nearest(spreads: Mapping[str, Document]) -> Document | None:
    """Of the verdicts whose bound a check chose, the one that a run came nearest to."""
    ours = {
        name: each["room"] for name, each in spreads.items() if name not in EXPECT_KEYS and each["room"] is not None
    }
    name = min(ours, key=lambda each: ours[each], default=None)
    return {"name": name, "room": ours[name]} if name is not None else None


def merge(stored: Document, new: Document) -> Document:
    """`stored` with the rows of `new` in their places; rows of baselines and sets that are no more are dropped."""
    rows = {(each["baseline"], each["instructions"]): each for each in (*stored.get("rows", ()), *new["rows"])}
    order = [(name, instructions) for name in baseline.BASELINES for instructions in SETS]
    return {**new, "rows": [rows[place] for place in order if place in rows]}


def write(root: Path, new: Document) -> Document:
    """Put `new` into what docs/ of a checkout has, write the page, and return all that is stored then."""
    result = merge(load(root), new)
    write_json(root / HEAD, {name: result[name] for name in ("machine", "versions")})
    tables.write(root / RESULTS, COLUMNS, (line for each in result["rows"] for line in _lines(each)))
    write_text(root / PAGE, render(result))
    return result


def load(root: Path) -> Document:
    """What is stored in docs/ of a checkout; empty where nothing is."""
    if not (root / HEAD).is_file():
        return {}
    found: Document = {**json.loads((root / HEAD).read_text(encoding="utf-8")), "rows": []}
    for line in tables.read(root / RESULTS, COLUMNS):
        name = line["name"]
        if line["kind"] == "nearest":
            where = {column: line[column] for column in ("baseline", "instructions", "capability", "runs")}
            nearest = {"name": name, "room": line["room"]} if name else None
            found["rows"].append({**where, "alarms": {}, "worst": {}, "nearest": nearest})
        elif line["kind"] == "worst":
            measured = {column: line[column] for column in ("measured", "bound", "compare", "room")}
            found["rows"][-1]["worst"][name] = measured
        else:
            found["rows"][-1]["alarms"][name] = line["said"]
    return found


def _lines(each: Document) -> Iterator[Document]:
    """The lines of one baseline under one instruction set."""
    where = dict.fromkeys(COLUMNS) | {name: each[name] for name in ("baseline", "instructions", "capability", "runs")}
    yield where | {"kind": "nearest"} | (each["nearest"] or {})
    for name, worst in each["worst"].items():
        yield where | {"kind": "worst", "name": name} | worst
    for name, said in each["alarms"].items():
        yield where | {"kind": "alarm", "name": name, "said": said}


def render(stored: Document) -> str:
    """docs/honest.md."""
    rows = stored["rows"]
    runs, alarms = sum(each["runs"] for each in rows), sum(len(each["alarms"]) for each in rows)
    parts = [
        "# Honest runs, by CPU",
        "<!-- Written by `python -m sabotage --baselines` from docs/honest.csv. Do not edit. -->",
        f"In {runs} honest runs of the bench's baselines there {detection.alarms(alarms)}. Measured on {stored['machine']}; "
        "`python -m sabotage --baselines` does it again.",
        "Each baseline runs with several seeds (other facts, another order, other adapters) under each *instruction set*: "
        "`avx2` is what PyTorch, MKL and oneDNN do on a CPU that has no more, `default` holds PyTorch alone to "
        "its plainest code, `own` is all that this one has. "
        "A set rounds in its own way, so training goes another way, as it does on another machine; the model that a baseline "
        "begins with is pretrained under the same set.",
        f"A cell is the worst of a row's runs and, in brackets, how many times as far its bound lets it go (of a share that "
        "should be 1, what lacks counts; of the held-out ratio, what lies above 1). The settings of the baselines are chosen "
        f"so that this is at least {WANTED:g}. *Nearest*: of the verdicts whose bound a check chose, the one that a run came "
        "nearest to.",
        detection.grid(["baseline", "instructions", "quiet", *DELICATE.values(), "nearest"], map(_cells, rows)),
        "## Alarms", _alarms(rows), "## Room", _narrow(rows), "## Versions",
        ", ".join(f"{name} {version}" for name, version in stored["versions"].items()),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _cells(each: Document) -> list[str]:
    where = [f"`{each['baseline']}`", f"`{each['instructions']}` ({each['capability']})"]
    if not each["runs"]:
        return [*where, "the same as `own`", *[""] * (len(DELICATE) + 1)]
    nearest = f"`{each['nearest']['name']}` ({each['nearest']['room']:.3g})" if each["nearest"] else ""
    quiet = f"{each['runs'] - len(each['alarms'])} of {each['runs']}"
    return [*where, quiet, *(_cell(each["worst"].get(name)) for name in DELICATE), nearest]


def _cell(worst: Document | None) -> str:
    if worst is None:
        return ""
    room = "" if worst["room"] is None else f" ({worst['room']:.3g})"
    return f"{worst['measured']:.3g} {worst['compare']} {worst['bound']:.3g}{room}"


def _alarms(rows: Iterable[Document]) -> str:
    lines = [
        [f"{name}, `{each['instructions']}`", said.replace("|", "\\|")]
        for each in rows
        for name, said in each["alarms"].items()
    ]
    return detection.grid(["run", "alarm"], lines) if lines else "None."


def _narrow(rows: Iterable[Document]) -> str:
    """Where a row's worst run had less room than is wanted."""
    lines = [
        [f"`{each['baseline']}`", f"`{each['instructions']}`", f"`{name}`", _cell(worst)]
        for each in rows
        for name, worst in each["worst"].items()
        if worst["room"] is not None and worst["room"] < WANTED
    ]
    what = f"Less than {WANTED:g} times:"
    table = detection.grid(["baseline", "instructions", "verdict", "worst"], lines)
    return f"{what}\n\n{table}" if lines else f"Nowhere less than {WANTED:g} times."
