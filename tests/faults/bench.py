"""Carries out a fault: the command with it, the same command again without it, and what is left compared with an honest run."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults import Fault, Seen
from faults.grounds import GROUNDS
from finetune.core.errors import FinetuneError
from finetune.core.files import PARTIAL, digest
from finetune.core.signals import SIGNALS
from finetune.run import Run, checkpoints, evidence

HOOKS = Path(__file__).parent / "hooks"
SECONDS = 240  # that a command may take
STRANGE = ("unexpected ", "Traceback", "please report")  # no word for a user
RESULTS = ("train/adapter", "align/adapter", "merge/model")
Ended = tuple[int, str]


class Bench:
    """Grounds made once, each with an honest run; faults carried out in folders of their own below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.honest: dict[str, Path] = {}
        self.making = threading.Lock()

    def ground(self, name: str) -> Path:
        """The folder of a ground: `recipe.yaml`, and `run`, which ended with every verdict proved."""
        with self.making:
            if name not in self.honest:
                place = self.root / f"ground-{name}"
                place.mkdir(parents=True)
                recipe = GROUNDS[name].make(place)
                code, said = command(GROUNDS[name].verb, recipe, place / "run")
                if code != 0:
                    raise RuntimeError(f"the honest run of '{name}' ended with {code}: {said}")
                self.honest[name] = place
            return self.honest[name]

    def count(self, name: str, *calls: str) -> int:
        """How often an honest run of a ground makes these calls."""
        ground, place = self.ground(name), self.root / f"count-{name}-{'-'.join(calls)}"
        place.mkdir()
        told = place / "count"
        command(
            GROUNDS[name].verb,
            ground / "recipe.yaml",
            place / "run",
            hook={"calls": calls, "do": "count", "file": str(told)},
        )
        return int(told.read_text())

    def carry_out(self, fault: Fault) -> Seen:
        begun = time.perf_counter()
        ground, verb = self.ground(fault.ground), GROUNDS[fault.ground].verb
        place = self.root / fault.name.replace("/", "-").replace(" ", "-")
        place.mkdir()
        with _disk(place, fault.room):
            run = place / "run"
            if fault.done:
                shutil.copytree(ground / "run", run)
            recipe = fault.recipe(place) if fault.recipe else ground / "recipe.yaml"
            if fault.damage:
                fault.damage(run)
            code, said = command(verb, recipe, run, hook=fault.hook, limit=fault.limit, environment=fault.environment)
            wrong = [f"it said '{sign.strip()}'" for sign in STRANGE if sign in said]
            again: int | None = None
            lost = 0
            if fault.refused:
                wrong += [] if code in (2, 3, 4) else [f"it ended with {code}, and could not do its work"]
            else:
                if code != 0:
                    _make_room(place)
                    kept = _newest(run)
                    again, later = command(verb, recipe, run)
                    wrong += [f"again, it said '{sign.strip()}'" for sign in STRANGE if sign in later]
                    lost = sum(_lost(run, stage, step) for stage, step in kept.items())
                    said = said if again == 0 else later
                wrong += (
                    _differences(ground / "run", run)
                    if (again or 0) == 0
                    else [f"the same command again ends with {again}"]
                )
        shutil.rmtree(place, ignore_errors=True)
        return Seen(
            name=fault.name, group=fault.group, first=code, again=again, said=_last(said, self.root), lost=lost,
            wrong=tuple(wrong), seconds=round(time.perf_counter() - begun, 1),
        )  # fmt: skip


def command(
    verb: str,
    recipe: Path,
    run: Path,
    *,
    hook: object = None,
    limit: int | None = None,
    environment: object = None,
) -> Ended:
    """`finetune VERB` in a process of its own: (exit code, what it said on stderr)."""
    values = {**os.environ, **(environment if isinstance(environment, dict) else {}), "PYTHONDONTWRITEBYTECODE": "1"}
    if hook is not None:
        values |= {"FT_FAULT": json.dumps(hook), "PYTHONPATH": str(HOOKS)}

    def limited() -> None:
        for number in SIGNALS:  # what a shell starts in its background ignores Ctrl-C
            signal.signal(number, signal.SIG_DFL)
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    words = [sys.executable, "-m", "finetune", verb, str(recipe), "--run", str(run)]
    try:
        done = subprocess.run(
            words,
            env=values,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            preexec_fn=limited,
            cwd=recipe.parent,
        )
    except subprocess.TimeoutExpired:
        return -1, f"it was not done after {SECONDS} s"
    return done.returncode, done.stderr


@contextmanager
def _disk(place: Path, room: int | None) -> Iterator[None]:
    """A real small file system in a folder, where `room` KiB are asked for."""
    if room is None:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def _make_room(place: Path) -> None:
    if os.path.ismount(place):
        subprocess.run(["mount", "-o", "remount,size=1g", str(place)], check=True)


def _newest(run: Path) -> dict[str, int]:
    """The step of the newest whole checkpoint of each stage that did not end."""
    found = {}
    for stage in ("train", "align"):
        if (run / stage / "report.json").is_file():
            continue
        whole = checkpoints.newest_whole(checkpoints.stored(run / stage), lambda folder, faults: None)
        if whole is not None:
            found[stage] = checkpoints.step_of(whole)
    return found


def _lost(run: Path, stage: str, step: int) -> int:
    """Steps that were trained again though a whole checkpoint had them."""
    try:
        began = Run(run).events("training", stage=stage)
    except FinetuneError:
        return step
    return max(0, step - (began[-1]["resumed_from"] or 0)) if began else 0


def _differences(honest: Path, run: Path) -> list[str]:
    """What is not as an honest run leaves it."""
    found = [
        f"{name} is another"
        for name in RESULTS
        if (honest / name).is_dir() and _weights(honest / name) != _weights(run / name)
    ]
    left = [path.relative_to(run).as_posix() for path in run.rglob(f"*{PARTIAL}")]
    found += [f"{name} is left" for name in left[:1]]
    try:
        for stage in ("train", "align"):
            steps = [[step["step"] for step in evidence.steps(Run(place), stage)] for place in (honest, run)]
            if steps[0] != steps[1]:
                found.append(f"the log has {len(steps[1])} steps of {stage}, not {len(steps[0])}")
        if (honest / "verdicts.json").is_file():
            verdicts = json.loads((run / "verdicts.json").read_text(encoding="utf-8"))
            if not verdicts["passed"]:
                found.append("its verdicts do not hold")
    except (FinetuneError, OSError, ValueError) as error:
        found.append(f"it cannot be read: {error}")
    return found


def _weights(folder: Path) -> dict[str, str]:
    """Digests of the files that hold numbers: what tells of paths or times may differ."""
    return {
        path.name: digest(path)
        for path in sorted(folder.glob("*"))
        if path.name.startswith(("adapter.", "adapter_model.", "model", "fake_model"))
    }


def _last(said: str, root: Path) -> str:
    """The last line of what a command said, without where this machine keeps what is passing."""
    said = said.replace(f"{root}/", "")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""
