"""Sabotages and honest runs, carried out: which verdicts failed, and how long it took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.backends import child
from finetune.errors import StageError
from finetune.recipe import yaml
from finetune.report.summary import verdicts
from finetune.run import Run, write_text
from finetune.testing.sabotage import Sabotage, ground, hook
from finetune.testing.sabotage.scene import Scene, as_if_written_so

ENDINGS = (0, 1, 2, 3, 4)  # whatever the command line ends with says something; a crash of Python itself does not


@dataclass(frozen=True, kw_only=True)
class Found:
    """What became of a run. `failed` are the names of the verdicts that failed, `refused` is what a stage said that would
    not go on; both empty: nobody noticed anything. `seconds` is wall time."""

    name: str
    failed: tuple[str, ...]
    refused: str
    seconds: float

    @property
    def caught(self) -> bool:
        return bool(self.failed or self.refused)


def attempt(each: Sabotage, directory: Path) -> Found:
    """Carry out a sabotage in a new folder."""
    scene = Scene(recipe=ground.recipe(each.ground, directory / "data"))
    each.apply(scene)
    environment = {}
    if scene.patches:
        patches = hook.write(directory / "patches", each.reference)
        environment["PYTHONPATH"] = os.pathsep.join([str(patches), child.environment()["PYTHONPATH"]])
    return _carry_out(each.name, scene, directory, environment)


def honest(name: str, recipe: dict[str, Any], directory: Path) -> Found:
    """Carry out an honest run: whatever fails is a false alarm."""
    return _carry_out(name, Scene(recipe=recipe), directory, {})


def _carry_out(name: str, scene: Scene, directory: Path, environment: dict[str, str]) -> Found:
    started = time.monotonic()
    file, run = directory / "recipe.yaml", Run(directory / "run")
    write_text(file, yaml.write(scene.recipe))
    there = ("--run", str(run.path), "--quiet")
    for stage, changes in scene.changes.items():
        ground.finetune(stage, str(file), *there, environment=environment)
        for change in changes:
            change(run)
        as_if_written_so(run, stage)
    done = ground.finetune("run", str(file), *there, environment=environment, allowed=ENDINGS)
    failed, refused = _verdicts(run), ""
    if done.returncode not in (0, 1):
        refused = (done.stderr.strip().splitlines() or ["no word"])[-1].removeprefix("error: ")
    elif bool(failed) != (done.returncode == 1):
        raise StageError(f"'{name}' ended with {done.returncode}, and its failed verdicts are {failed or 'none'}")
    return Found(name=name, failed=failed, refused=refused, seconds=round(time.monotonic() - started, 1))


def _verdicts(run: Run) -> tuple[str, ...]:
    stored = (verdicts(run) or {}).get("verdicts", [])
    return tuple(verdict["name"] for verdict in stored if not verdict["passed"])


def side_by_side(works: Iterable[Callable[[], Found]], workers: int) -> list[Found]:
    """Carry out several, so many at a time, in their order."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda work: work(), works))
