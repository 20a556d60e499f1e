"""docs/faults.json and docs/faults.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from faults import Seen

RESULTS, PAGE = Path("docs/faults.json"), Path("docs/faults.md")


def write(root: Path, found: Sequence[Seen], names: Sequence[str]) -> None:
    """Both files, of the faults carried out so far, in the order of `names`: all that the table has."""
    machine = f"{os.cpu_count()} cores, {platform.system()}"
    ordered = sorted(found, key=lambda seen: names.index(seen.name))
    document = {"machine": machine, "in_table": len(names), "faults": [asdict(seen) for seen in ordered]}
    (root / RESULTS).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (root / PAGE).write_text(render(machine, ordered, len(names)), encoding="utf-8")


def renew(root: Path, found: Sequence[Seen], names: Sequence[str]) -> None:
    """Put faults that were carried out again in the place of what was seen of them before."""
    stored = json.loads((root / RESULTS).read_text(encoding="utf-8"))["faults"]
    before = {each["name"]: Seen(**{**each, "wrong": tuple(each["wrong"])}) for each in stored}
    kept = {name: seen for name, seen in before.items() if name in names}
    write(root, list((kept | {seen.name: seen for seen in found}).values()), names)


def render(machine: str, found: Sequence[Seen], in_table: int) -> str:
    """The page: what was seen of each fault, by kind."""
    held, lost = sum(seen.held for seen in found), sum(seen.lost for seen in found)
    strange = sum("it said" in wrong for seen in found for wrong in seen.wrong)
    lines = [
        "# Faults",
        "",
        "<!-- Written by `nox -s faults-all` from docs/faults.json. Do not edit. -->",
        "",
        f"{len(found)} of the table's {in_table} faults, carried out by the real command line on a machine with {machine}: "
        f"{held} held, {lost} steps lost, {strange} messages that are none for a user. A fault has held where the same "
        "command again came to the result of an undisturbed run, bit by bit, or where what cannot be done was refused. "
        "`nox -s faults-all -- NAME` carries one out again.",
        "",
        "*Ended*: the exit code with the fault, and that of the same command again, where the first was not 0. *Lost*: steps "
        "that were trained again though a checkpoint had them.",
    ]
    for group in dict.fromkeys(seen.group for seen in found):
        lines += [
            "",
            f"## {group}",
            "",
            "| fault | ended | said | lost | recovered |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [_row(seen) for seen in found if seen.group == group]
    return "\n".join(lines) + "\n"


def _row(seen: Seen) -> str:
    ended = str(seen.first) if seen.again is None else f"{seen.first}, {seen.again}"
    said = seen.said.replace("|", "\\|") or "nothing"
    recovered = "yes" if seen.held else "; ".join(seen.wrong) or "no"
    return f"| {seen.name} | {ended} | {said} | {seen.lost} | {recovered} |"
