"""Sabotages and honest runs, carried out: which verdicts failed, and how long it took."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.core.cache import cache_dir
from finetune.core.errors import StageError
from finetune.core.files import write_text
from finetune.recipe import yaml
from finetune.report.summary import verdicts
from finetune.run import Run
from finetune.run.plan import STAGES
from sabotage import Sabotage, baseline, fork_server, starting
from sabotage.calls import Called, counted
from sabotage.context import Context, as_if_written_so

ENDINGS = (0, 1, 2, 3, 4)  # whatever the command line ends with says something; a crash of Python itself does not
SABOTAGES = Path(__file__).parent
ORDER = [stage.name for stage in STAGES]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of a run. `failed` are the names of the verdicts that failed, `refused` is what a stage said that would
    not go on; both empty: nobody noticed anything. `verdicts` are all that were given, `calls` is how often each patch was
    called, `seconds` is wall time."""

    name: str
    failed: tuple[str, ...]
    refused: str
    seconds: float
    verdicts: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    calls: tuple[Called, ...] = ()

    @property
    def caught(self) -> bool:
        return bool(self.failed or self.refused)


class Bench:
    """A folder in which sabotages are carried out, each on a copy of its baseline's honest run, which is made once.

    A context manager: within it, processes start warm (see `warm`). `keep` leaves every run where it was.
    """

    def __init__(self, directory: Path, *, keep: bool = False) -> None:
        self.directory, self.keep = directory, keep
        self.honest: dict[str, Found] = {}  # by baseline
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)
        self._open = ExitStack()
        start = _new(directory / "start")
        shutil.copyfile(starting.__file__, start / "sitecustomize.py")
        self.environment = {"PYTHONPATH": os.pathsep.join([str(start), baseline.environment()["PYTHONPATH"]])}

    def __enter__(self) -> Bench:
        place = self._open.enter_context(tempfile.TemporaryDirectory(prefix="warm-"))  # a socket's path must be short
        server = Path(place) / "socket"
        self._open.enter_context(fork_server.serving(server, baseline.environment()))
        self.environment[starting.SOCKET] = str(server)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def control(self, name: str, recipe: Callable[[Path], dict[str, Any]]) -> Found:
        """Carry out an honest run of the recipe that `recipe(folder for data)` gives: whatever fails is a false alarm."""
        directory = self.directory / "controls" / _folder(name)
        found = self._carry_out(name, Context(recipe=recipe(directory / "data")), Run(_new(directory / "run")))
        self._clear(directory)
        return found

    def baseline(self, name: str) -> Found:
        """The honest run of a baseline, made once."""
        self._honest(name)
        return self.honest[name]

    def attempt(self, each: Sabotage) -> Found:
        """Carry out a sabotage. Raises StageError where the honest run raises an alarm already, or where it was the
        sabotage itself that broke."""
        honest, recipe = self._honest(each.baseline)
        directory = _new(self.directory / _folder(each.name))
        run, own = Run(directory / "run"), directory / "own"
        own.mkdir()
        shutil.copytree(honest / "run", run.path, symlinks=True)
        context = Context(recipe=recipe, folder=own)
        each.apply(context)
        if context.patches and not each.keep:
            for stage in ORDER[ORDER.index(each.since) :]:
                shutil.rmtree(run.path / stage, ignore_errors=True)
        (run.path / "verdicts.json").unlink()
        found = self._patched(each, context, run) if context.patches else self._carry_out(each.name, context, run)
        self._clear(directory)
        return found

    def _patched(self, each: Sabotage, context: Context, run: Run) -> Found:
        """Carry out a sabotage that patches. Raises StageError where one of its patches was never called: what it was to
        break is whole."""
        calls = _new(run.path.parent / "calls")
        told = {starting.PATCHES: each.reference, starting.SINCE: each.since, starting.CALLS: str(calls)}
        found = self._carry_out(each.name, context, run, told, of=each.apply.__code__.co_filename)
        found = replace(found, calls=counted(calls, [patch.target for patch in context.patches]))
        never = [called.target for called in found.calls if not called.times]
        if never and not found.refused:  # where a stage would not go on, it may not have come to that
            raise StageError(f"NEVER CALLED, from '{each.since}' on: {', '.join(never)}")
        return found

    def _without_places(self, said: str) -> str:
        """Text without the folders of this machine."""
        for place in (self.directory, cache_dir()):
            said = said.replace(f"{place}{os.sep}", "")
        return said

    def _clear(self, directory: Path) -> None:
        if not self.keep:
            shutil.rmtree(directory)

    def _honest(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The folder of a baseline's honest run, and its recipe."""
        directory = self.directory / "honest" / name
        with self._locks[name]:
            recipe = baseline.recipe(name, directory / "data")
            if name not in self.honest:
                found = self._carry_out(f"baseline {name}", Context(recipe=recipe), Run(_new(directory / "run")))
                if found.caught:
                    raise StageError(f"the honest run '{name}' raises an alarm: {found.failed or found.refused}")
                self.honest[name] = found
        return directory, recipe

    def _carry_out(
        self, name: str, context: Context, run: Run, patches: dict[str, str] | None = None, of: str = ""
    ) -> Found:
        """`patches` is what processes are told in their environment, `of` the file of the function that made them."""
        started = time.monotonic()
        environment = {**self.environment, **(patches or {})}
        file = run.path.parent / "recipe.yaml"
        write_text(file, yaml.write(context.recipe))
        there = ("--run", str(run.path), "--quiet")
        for stage in sorted(context.changes, key=ORDER.index):
            if context.settings or run.report(stage) is None:
                baseline.finetune(stage, str(file), *there, more=environment)
            for change in context.changes[stage]:
                change(run)
            as_if_written_so(run, stage, missed=False)
        done = baseline.finetune("run", str(file), *there, more=environment, allowed=ENDINGS)
        stored = tuple((verdicts(run) or {}).get("verdicts", []))
        failed = tuple(verdict["name"] for verdict in stored if not verdict["passed"])
        refused = "" if done.returncode in (0, 1) else _refused(name, self._without_places(done.stderr), of)
        if not refused and bool(failed) != (done.returncode == 1):
            last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise StageError(
                f"'{name}' ended with {done.returncode}, and its failed verdicts are {failed or 'none'}; it said: {last}"
            )
        seconds = round(time.monotonic() - started, 1)
        return Found(name=name, failed=() if refused else failed, refused=refused, seconds=seconds, verdicts=stored)


def _folder(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _new(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _refused(name: str, said: str, of: str = "") -> str:
    """The last line that a stage said. Raises StageError where it was the sabotage that broke (in its own file, `of`, or in
    ours), not what it was done to."""
    refused = next((line for line in said.splitlines() if line.startswith("error: ")), "error: no word")
    places = [line for line in said.splitlines() if line.lstrip().startswith('File "')]
    if (
        refused.startswith("error: unexpected")
        and places
        and any(own in places[-1] for own in (str(SABOTAGES), of) if own)
    ):
        raise StageError(f"the sabotage '{name}' is broken itself: {refused}\n{said[-800:]}")
    return refused.removeprefix("error: ")


def side_by_side(works: Iterable[Callable[[], Found]], workers: int) -> list[Found]:
    """Carry out several, so many at a time, in their order."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda work: work(), works))
