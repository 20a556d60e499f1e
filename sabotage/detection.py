"""What sabotages and controls came to: tables in docs/, and the page that is written from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.checks.expected import EXPECT_KEYS
from finetune.core.files import write_json, write_text
from sabotage import Sabotage, table, tables
from sabotage.baseline import BASELINES
from sabotage.bench import Found
from sabotage.context import Context
from sabotage.controls import controls

HEAD = Path("docs/detection.json")  # machine, minutes, versions
RESULTS, CONTROLS, BOUNDS = Path("docs/detection.csv"), Path("docs/controls.csv"), Path("docs/bounds.csv")
PAGE = Path("docs/detection.md")
FOUND: tables.Columns = {"failed": tables.words, "refused": str, "seconds": float}
SABOTAGES: tables.Columns = {"name": str, "area": str, "what": str, "imitates": str, "tiers": tables.numbers, **FOUND}
RUNS: tables.Columns = {"name": str, **FOUND}
SPREADS: tables.Columns = {
    "verdict": str, "compare": str, "strictest": float, "loosest": float, "unit": str, "count": int, "least": float,
    "most": float, "room": tables.number,
}  # fmt: skip
ROOM = 1.5  # times as far as the worst control: the least that a bound of ours lets a measurement go
PROMISED = ("stored_bits", "weights_precision")  # what a format or a type promises is no bound of ours
AREAS = {
    "rows": "Data on its way into training",
    "training": "Supervised fine-tuning",
    "optimizing": "Steps of the optimizer",
    "alignment": "Preference alignment",
    "saving": "Saving and resuming",
    "merging": "Merging",
    "exporting": "Exporting",
    "evaluation": "Evaluation",
    "serving": "Serving",
    "invariances": "Batches, packing, seeds",
}
# Until others measure anew.
BY_OTHERS = (
    "**The table and the checks were written by the same hands.** Of 53 sabotages written by somebody with the docs alone, "
    "35 were caught (66%)."
)

Document = dict[str, Any]


def tiers(each: Sabotage) -> list[int]:
    """The tiers that carry it out with every change: 1, on the fake backend, where only prepared rows of SFT are changed; 2 for
    those marked fast."""
    context = Context()
    each.apply(context)
    rows_alone = (
        each.baseline == "lora" and set(context.changes) == {"prepare"} and not context.patches and not context.recipe
    )
    return [1] * rows_alone + [2] * each.fast


def row(found: Found, each: Sabotage | None = None) -> Document:
    """One run as stored; of a sabotage with what it does."""
    told = {"area": each.area, "what": each.what, "imitates": each.imitates, "tiers": tiers(each)} if each else {}
    return {
        "name": found.name,
        **told,
        "failed": list(found.failed),
        "refused": found.refused,
        "seconds": found.seconds,
    }


def spreads(controls: Iterable[Found]) -> dict[str, Document]:
    """By verdict, over the controls: how many, the least and the most that was measured, the bounds from the strictest to
    the loosest (types of weights and recipes differ in them), and the least room that a run was left by its own.

    Only of verdicts that are held against an amount: what must be equal has no spread.
    """
    found: dict[str, Document] = {}
    for control in controls:
        for verdict in control.verdicts:
            name, measured, compare, bound = (verdict[key] for key in ("name", "measured", "compare", "bound"))
            if compare == "==" or name.startswith(PROMISED) or measured is None or not math.isfinite(measured):
                continue
            here = found.setdefault(
                name,
                {"compare": compare, "strictest": bound, "loosest": bound, "unit": verdict["unit"], "count": 0}
                | {"least": measured, "most": measured, "room": None},
            )
            stricter, looser = (max, min) if compare in (">", ">=") else (min, max)
            here["strictest"], here["loosest"] = stricter(here["strictest"], bound), looser(here["loosest"], bound)
            here["count"] += 1
            here["least"], here["most"] = min(here["least"], measured), max(here["most"], measured)
            left = room(compare, bound, measured, verdict["unit"])
            here["room"] = min((each for each in (here["room"], left) if each is not None), default=None)
    return dict(sorted(found.items()))


def room(compare: str, bound: float, measured: float, unit: str) -> float | None:
    """How many times as far as what was measured a bound lets a measurement go; None where it is ideal.

    Of a share that should be 1 it is what lacks that counts; of a bound of 0 only the side.
    """
    if compare in ("<", "<="):
        return bound / measured if measured > 0 else None
    if bound <= 0:
        return None if measured > bound else 0.0
    if unit.startswith("share") and bound <= 1:
        return (1 - bound) / (1 - measured) if measured < 1 else None
    return measured / bound if measured != bound else None


def caught(entry: Document) -> bool:
    return bool(entry["failed"] or entry["refused"])


def merge(stored: Document, new: Document, *, honest: bool = False) -> Document:
    """`stored` with the rows of `new` in the places of those of the same name; those that are no more are dropped.
    Where `new` has all controls (`honest`), its own are taken whole, and so are the spreads: those are of all controls.
    Minutes and versions are of a whole run.
    """
    taken = {"spreads": new["spreads"]} if honest else {}
    honest_runs = new["controls"] if honest else _in_place(stored["controls"], new["controls"], _honest_names())
    return {
        **stored,
        **taken,
        "controls": honest_runs,
        "sabotages": _in_place(stored["sabotages"], new["sabotages"], list(table())),
    }


def _honest_names() -> list[str]:
    return [*controls(), *(f"baseline {name}" for name in BASELINES)]


def _in_place(stored: list[Document], new: list[Document], order: list[str]) -> list[Document]:
    rows = {entry["name"]: entry for entry in (*stored, *new) if entry["name"] in order}
    return sorted(rows.values(), key=lambda entry: order.index(entry["name"]))


def render(stored: Document) -> str:
    """docs/detection.md."""
    sabotages, controls = stored["sabotages"], stored["controls"]
    found = [entry for entry in sabotages if caught(entry)]
    false = [entry for entry in controls if caught(entry)]
    parts = [
        "# Detection",
        "<!-- Written by `make sabotage` (and `make docs`) from docs/detection.csv. Do not edit. -->",
        f"Of {len(sabotages)} ways in which fine-tuning silently goes wrong, done on purpose to the real pipeline, "
        f"**{len(found)} are caught** ({len(found) / len(sabotages):.0%}). In {len(controls)} honest runs there "
        f"{alarms(len(false))}. `make sabotage` does it again: {stored['minutes']:.0f} minutes on {stored['machine']}.",
        BY_OTHERS,
        *([stored["since"]] if "since" in stored else []),
        "Each row is one function in [sabotage](../sabotage/__init__.py), whose "
        "patches reach every process of the run, the checks' own too; no check knows of them. How to add one: "
        "[sabotage.md](sabotage.md). *Caught by*: the verdicts that failed; *refused*: a stage would not go on, and said "
        "so. *Tier*: 1 and 2 run with every change, *nightly* with `make sabotage`. *Seconds*: the whole run and all "
        "checks, two side by side; what lies before the sabotage is copied from an honest run. As tables: "
        "[detection.csv](detection.csv), [controls.csv](controls.csv), [bounds.csv](bounds.csv).",
    ]
    missed = [entry for entry in sabotages if not caught(entry)]
    if missed:
        rows = [[_name(entry), entry["what"]] for entry in missed]
        parts += ["## Missed", grid(["sabotage", "what it does"], rows)]
    for area in dict.fromkeys(entry["area"] for entry in sabotages):
        here = [entry for entry in sabotages if entry["area"] == area]
        heading = f"## {AREAS.get(area, area.capitalize())}: {sum(map(caught, here))} of {len(here)}"
        parts += [heading, grid(["sabotage", "what it does", "caught by", "tier", "seconds"], map(_cells, here))]
    parts += ["## Honest runs", *_controls(controls), "## Bounds", *_bounds(stored["spreads"]), "## Versions"]
    parts.append(", ".join(f"{name} {version}" for name, version in stored["versions"].items()))
    return "\n\n".join(parts) + "\n"


def alarms(count: int) -> str:
    return (
        "was **no false alarm**"
        if not count
        else f"were **{count} false alarms**"
        if count > 1
        else "was **1 false alarm**"
    )


def _name(entry: Document) -> str:
    return f"[{entry['name']}]({entry['imitates']})" if entry["imitates"] else entry["name"]


def _cells(entry: Document) -> list[str]:
    by = ", ".join(f"`{name}`" for name in entry["failed"])
    if entry["refused"]:
        by = f"refused: {_short(entry['refused'])}"
    tiers = ", ".join(map(str, entry["tiers"])) if entry["tiers"] else "nightly"
    return [_name(entry), " ".join(entry["what"].split()), by or "**missed**", tiers, f"{entry['seconds']:.0f}"]


def _short(text: str, most: int = 160) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= most else line[: most - 3] + "..."


def _controls(controls: list[Document]) -> list[str]:
    alarmed = [[entry["name"], ", ".join(entry["failed"]) or entry["refused"]] for entry in controls if caught(entry)]
    quiet = "; ".join(entry["name"] for entry in controls if not caught(entry))
    parts = [f"Without an alarm: {quiet}."]
    if alarmed:
        parts += ["False alarms:", grid(["run", "alarm"], alarmed)]
    return parts


def _bounds(found: dict[str, Document]) -> list[str]:
    rows = [
        [f"`{name}`", _bound(each), f"{each['least']:.3g} to {each['most']:.3g}", str(each["count"]), _room(each["room"]),
         "recipe" if name in EXPECT_KEYS else "rule", each["unit"]]
        for name, each in found.items()
    ]  # fmt: skip
    rule = (
        "What the honest runs measured, and the bounds that they were held to, which differ by recipe and type of weights. "
        "*Room*: how many times as far as what it measured the bound of a run lets a measurement go (of a share that should "
        f"be 1, what lacks counts), in the run where it is least. The rule where a check chooses its bound: at least {ROOM:g}. "
        "A recipe's own `expect` is what its user wants, whatever honest runs reach. Bounds of `==` are exact and left out."
    )
    return [rule, grid(["verdict", "bound", "measured", "runs", "room", "chosen by", "unit"], rows)]


def _bound(each: Document) -> str:
    strictest, loosest = f"{each['strictest']:.3g}", f"{each['loosest']:.3g}"
    return f"{each['compare']} {strictest}" + (f" to {loosest}" if loosest != strictest else "")


def _room(value: float | None) -> str:
    return "all ideal" if value is None else f"{value:.3g}"


def grid(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def load(root: Path) -> Document:
    """What is stored in docs/ of a checkout; empty where nothing is."""
    if not (root / HEAD).is_file():
        return {}
    found: Document = json.loads((root / HEAD).read_text(encoding="utf-8"))
    spreads = {row.pop("verdict"): row for row in tables.read(root / BOUNDS, SPREADS)}
    sabotages, runs = tables.read(root / RESULTS, SABOTAGES), tables.read(root / CONTROLS, RUNS)
    return {**found, "sabotages": sabotages, "controls": runs, "spreads": spreads}


def store(root: Path, document: Document) -> None:
    """Write the three tables, what they were measured on, and the page."""
    write_json(
        root / HEAD, {name: document[name] for name in ("machine", "minutes", "versions", "since") if name in document}
    )
    tables.write(root / RESULTS, SABOTAGES, document["sabotages"])
    tables.write(root / CONTROLS, RUNS, document["controls"])
    tables.write(root / BOUNDS, SPREADS, ({"verdict": name, **each} for name, each in document["spreads"].items()))
    write_text(root / PAGE, render(document))
