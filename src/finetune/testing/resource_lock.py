"""Who uses how much of this machine: so that heavy tests of several pytest processes do not run side by side beyond it.

One small JSON file a user and machine, changed under a lock; a process that is gone no longer counts.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.core.errors import ResourceError

POLL_SECONDS = 0.25
PATIENCE_SECONDS = 4 * 3600.0
SHARE = 0.8  # of the machine's memory; the rest is for the system and for what was estimated too low


@dataclass(frozen=True, kw_only=True)
class Need:
    """What a test takes while it runs: bytes of memory, and GPUs."""

    memory: int
    gpus: int = 0


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One test that runs now; `started` is its process's, since ids are used again."""

    owner: str
    pid: int
    started: float
    memory: int
    gpus: int


def default_path() -> Path:
    """The ledger of this machine's user."""
    return Path(tempfile.gettempdir()) / f"finetune-specs-{os.getuid() if hasattr(os, 'getuid') else 'user'}.json"


def budget() -> Need:
    """What all tests together may take: FT_SPEC_MEMORY_GIB, or a share of the machine's memory; and all GPUs."""
    from finetune.core.memory import gpus, total

    chosen = os.environ.get("FT_SPEC_MEMORY_GIB")
    return Need(memory=int(float(chosen) * 2**30) if chosen else int(total() * SHARE), gpus=len(gpus()))


@contextmanager
def reserved(owner: str, need: Need, *, within: Need | None = None, path: Path | None = None) -> Iterator[float]:
    """Wait until `need` fits beside what others have reserved, and hold it for the block; yields the seconds waited.

    A need beyond the whole budget waits until nobody else is there, and then has the machine to itself. Raises
    ResourceError after PATIENCE_SECONDS.
    """
    from filelock import FileLock

    path, within = path or default_path(), within or budget()
    lock = FileLock(path.with_suffix(".lock"))
    mine = Entry(owner=owner, pid=os.getpid(), started=_started(os.getpid()) or 0.0, **asdict(need))
    begun = time.monotonic()
    while True:
        with lock:
            others = _alive(path)
            if not others or _fits(need, others, within):
                _write(path, [*others, mine])
                break
        if time.monotonic() - begun > PATIENCE_SECONDS:
            names = ", ".join(entry.owner for entry in others)
            raise ResourceError(f"waited {PATIENCE_SECONDS / 3600:.0f} h for memory or a GPU that is held by: {names}")
        time.sleep(POLL_SECONDS)
    try:
        yield time.monotonic() - begun
    finally:
        with lock:
            _write(path, [entry for entry in _alive(path) if entry != mine])


def _fits(need: Need, others: list[Entry], within: Need) -> bool:
    memory = sum(entry.memory for entry in others) + need.memory
    gpus = sum(entry.gpus for entry in others) + need.gpus
    return memory <= within.memory and (gpus <= within.gpus or not need.gpus)


def _alive(path: Path) -> list[Entry]:
    try:
        found = [Entry(**each) for each in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
    return [entry for entry in found if _started(entry.pid) == entry.started]


def _started(pid: int) -> float | None:
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _write(path: Path, entries: list[Entry]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps([asdict(entry) for entry in entries]), encoding="utf-8")
    partial.replace(path)
