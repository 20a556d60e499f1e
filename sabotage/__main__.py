"""`python -m sabotage`: carry out sabotages and controls, and write docs/detection.csv and .md.

Without names everything runs (half an hour on two cores). With names, only those do, and the rows of sabotages are
replaced. `--honest` carries out all honest runs and replaces them. `--baselines` runs the baselines by seed and by instruction
set instead, and writes docs/honest.csv and .md.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from finetune.core.errors import StageError
from finetune.core.lookup import did_you_mean
from finetune.run.manifest import installed
from sabotage import Sabotage, baseline, detection, honest, table
from sabotage.bench import Bench, Found
from sabotage.controls import Control, controls

VERSIONS = ("torch", "transformers", "trl", "peft", "tokenizers", "xllamacpp", "cyllama", "mlx", "mlx-lm")


def main(arguments: list[str] | None = None) -> int:
    """0 when every sabotage was caught and no control raised an alarm, 1 otherwise (and where one is broken itself), 2 for
    a name that is not known."""
    options = _parser().parse_args(arguments)
    for module in options.also:
        importlib.import_module(module)
    if options.baselines is not None:
        return _baselines(options)
    sabotages, honest_runs = table(), controls()
    baselines = baseline.BASELINES if options.honest else ()
    whole = not options.names and not options.honest
    wanted = {*options.names, *(honest_runs if options.honest or whole else ()), *(sabotages if whole else ())}
    if _unknown("sabotage or control", wanted, [*sabotages, *honest_runs]):
        return 2
    if options.list:
        for each in sabotages.values():
            print(f"{each.area}: {each.name}{' (fast)' if each.fast else ''}: {each.what}")
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sabotage-") as scratch:
        mine = [each for name, each in sabotages.items() if name in wanted]
        others = [each for name, each in honest_runs.items() if name in wanted]
        with Bench(Path(options.keep or scratch), keep=bool(options.keep)) as bench:
            found = _carry_out(bench, mine, others, baselines, options.jobs)
    document = _document(found, mine, bench, (time.monotonic() - started) / 60)
    if not options.also:
        _write(Path.cwd(), document, whole=whole, honest=options.honest)
    asked = [
        *(each.name for each in mine),
        *(each.name for each in others),
        *(f"baseline {name}" for name in baselines),
    ]
    broken = [name for name in asked if name not in {run.name for run in found}]
    for name in broken:
        print(f"broken: {name}")
    missed = [run for run in found if run.name in sabotages and not run.caught]
    alarms = [run for run in found if run.name not in sabotages and run.caught]
    for said, runs in (("missed", missed), ("false alarm", alarms)):
        for run in runs:
            print(f"{said}: {run.name} {', '.join(run.failed) or run.refused}")
    return 1 if missed or alarms or broken else 0


def _baselines(options: argparse.Namespace) -> int:
    """Baselines by seed and instruction set: 0 when all were quiet, 1 otherwise, 2 for a name that is not known."""
    sets = options.capabilities.split(",")
    if _unknown("baseline", options.baselines, baseline.BASELINES) or _unknown("instruction set", sets, honest.SETS):
        return 2
    names = options.baselines or list(baseline.BASELINES)
    alarms = 0
    with tempfile.TemporaryDirectory(prefix="baselines-") as scratch:
        for each in sets:  # written one by one, as each takes a quarter of an hour
            found = honest.measure(names, options.seeds, each, Path(options.keep or scratch), jobs=options.jobs)
            honest.write(Path.cwd(), found)
            alarms += sum(len(row["alarms"]) for row in found["rows"])
    return 1 if alarms else 0


def _unknown(what: str, names: Iterable[str], known: Iterable[str]) -> bool:
    """Whether a name is not among those known; says so."""
    for name in sorted({*names} - {*known}):
        print(f"error: no {what} '{name}'.{did_you_mean(name, [*known])}", file=sys.stderr)
        return True
    return False


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sabotage", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="sabotages or controls; all without any")
    parser.add_argument(
        "--also", action="append", default=[], metavar="MODULE", help="a module with sabotages of yours"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="how many at a time (default: one a core)"
    )
    parser.add_argument("--keep", metavar="DIR", help="leave the runs in this folder")
    parser.add_argument("--honest", action="store_true", help="all honest runs, and no sabotage that is not named")
    parser.add_argument(
        "--baselines", nargs="*", metavar="NAME", help="baselines by seed and instruction set; all without a name"
    )
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds of each baseline, from 0 on (default: 5)")
    parser.add_argument(
        "--capabilities", default=",".join(honest.SETS), metavar="SETS", help="instruction sets (default: %(default)s)"
    )
    parser.add_argument("--list", action="store_true", help="print the sabotages and do nothing")
    return parser


def _carry_out(
    bench: Bench, sabotages: list[Sabotage], others: list[Control], baselines: Iterable[str], jobs: int
) -> list[Found]:
    """Those that take longest first; each is told as it ends. One that breaks by itself is told too, and left out."""
    by_name = {each.name: each for each in sabotages}

    def carried_out(name: str, job: Callable[[], Found]) -> Found | None:
        try:
            found = job()
        except StageError as error:
            print(f"{name}: BROKEN\n  {error}", file=sys.stderr, flush=True)
            return None
        print(told(found, by_name.get(name)), flush=True)
        return found

    jobs_to_do = [(each.name, partial(bench.control, each.name, each.recipe)) for each in others]
    jobs_to_do += [(f"baseline {name}", partial(bench.baseline, name)) for name in baselines]
    jobs_to_do += [(each.name, partial(bench.attempt, each)) for each in sabotages]
    with ThreadPoolExecutor(jobs) as pool:
        return [found for found in pool.map(lambda job: carried_out(*job), jobs_to_do) if found]


def told(found: Found, each: Sabotage | None = None) -> str:
    """A run as it is printed: of a sabotage what it does, how often each of its patches was called, and what noticed it."""
    noticed = f"refused: {found.refused}" if found.refused else f"failed: {', '.join(found.failed)}"
    if each is None:
        return f"{found.name}: {'FALSE ALARM' if found.caught else 'quiet'}, {found.seconds:.1f} s" + (
            f"\n  {noticed}" if found.caught else ""
        )
    lines = [
        f"{found.name}: {'caught' if found.caught else 'MISSED'}, {found.seconds:.1f} s",
        " ".join(each.what.split()),
    ]
    for call in found.calls:
        often = f"called {_count(call.times, 'time')} in {_count(call.processes, 'process', 'processes')}"
        lines.append(f"{often if call.times else 'NEVER CALLED'}: {call.target}")
    lines.append(noticed if found.caught else "nothing noticed it: no stage refused, and every verdict passed")
    return "\n  ".join(lines)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _document(found: list[Found], sabotages: list[Sabotage], bench: Bench, minutes: float) -> dict[str, Any]:
    by_name = {each.name: each for each in sabotages}
    honest_runs = list(
        {each.name: each for each in (*found, *bench.honest.values()) if each.name not in by_name}.values()
    )
    return {
        "machine": f"{os.cpu_count()} cores, {platform.system()}",
        "minutes": round(minutes, 1),
        "versions": {name: version for name in VERSIONS if (version := installed(name))},
        "sabotages": [detection.row(each, by_name[each.name]) for each in found if each.name in by_name],
        "controls": [detection.row(each) for each in honest_runs],
        "spreads": detection.spreads(honest_runs),
    }


def _write(root: Path, document: dict[str, Any], *, whole: bool, honest: bool) -> None:
    stored = detection.load(root)
    result = document if whole or not stored else detection.merge(stored, document, honest=honest)
    detection.store(root, result)


if __name__ == "__main__":
    sys.exit(main())
