"""`python -m faults [NAME ...]`: carry faults out.

Without a name a few of each kind; `--all` for all, and docs/faults.md. `--write` with names puts their rows there anew.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from faults import Seen, page
from faults.bench import Bench
from faults.table import faults

OFTEN = 10  # faults after which the page is written again


def main() -> int:
    """0 when every fault held, 1 otherwise, 2 for a name that is not known."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--all", action="store_true", help="all of them, and write the page")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0, help="of the order of all")
    parser.add_argument("--write", action="store_true", help="renew the rows of those named in docs/faults.md")
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults-", dir=_place()) as scratch:
        bench = Bench(Path(scratch))
        table = faults(bench)
        if options.list:
            print("\n".join(fault.name for fault in table))
            return 0
        unknown = {*options.names} - {fault.name for fault in table}
        if unknown:
            print(f"error: no fault '{min(unknown)}' (--list names them)", file=sys.stderr)
            return 2
        wanted = [
            each for each in table if (each.name in options.names if options.names else each.quick or options.all)
        ]
        whole = options.all and not options.names
        if whole:
            print(f"in an order of seed {options.seed}", flush=True)
            random.Random(options.seed).shuffle(wanted)  # so that whoever stops early has seen some of each kind
        found: list[Seen] = []
        with ThreadPoolExecutor(options.jobs) as pool:
            for done in as_completed([pool.submit(bench.carry_out, fault) for fault in wanted]):
                found.append(done.result())
                print(_line(found[-1]), flush=True)
                if whole and (len(found) % OFTEN == 0 or len(found) == len(wanted)):
                    page.write(Path.cwd(), found, [fault.name for fault in table])
        if options.write:
            page.renew(Path.cwd(), found, [fault.name for fault in table])
    missed = [seen for seen in found if not seen.held]
    print(f"{len(found)} faults, {len(found) - len(missed)} held")
    return 1 if missed else 0


def _place() -> str | None:
    """In memory, where there is room: every fault syncs hundreds of files."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _line(seen: Seen) -> str:
    then = "" if seen.again is None else f", again {seen.again}"
    what = "held" if seen.held else f"NOT HELD: {'; '.join(seen.wrong) or f'{seen.lost} steps lost'}"
    return f"{seen.seconds:6.1f} s  {seen.name}: ended with {seen.first}{then}: {what}" + (
        "" if seen.held else f" | {seen.said}"
    )


if __name__ == "__main__":
    sys.exit(main())
