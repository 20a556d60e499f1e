"""How often patches were called, over all processes of a run."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
from array import array
from dataclasses import dataclass
from pathlib import Path

BYTES = array("Q").itemsize  # a number for each patch, in their order


@dataclass(frozen=True)
class Called:
    """How often a patch of `target` was called, in how many processes."""

    target: str
    times: int
    processes: int


class Counter:
    """Counts the calls of `patches` patches in this process, into a file of its own in `folder` that is made at the first.
    The file is memory that outlives the process, so it is right however that ends: killed, or by `os._exit`."""

    def __init__(self, folder: Path, patches: int) -> None:
        self.folder, self.patches = folder, patches
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # a copy that wrote into the same file would undo counts

    def _begin(self) -> None:
        self._lock = threading.RLock()  # a thread of the parent may have held the other
        self._counts: memoryview[int] | None = None

    def add(self, number: int) -> None:
        """One call more of the patch of this number, from 0 on."""
        with self._lock:
            if self._counts is None:
                self._counts = self._made()
            self._counts[number] += 1

    def _made(self) -> memoryview[int]:
        handle, _ = tempfile.mkstemp(dir=self.folder)
        try:
            os.truncate(handle, self.patches * BYTES)
            return memoryview(mmap.mmap(handle, self.patches * BYTES)).cast("Q")
        finally:
            os.close(handle)


def counted(folder: Path, targets: list[str]) -> tuple[Called, ...]:
    """What the processes of a run counted."""
    rows = [array("Q", file.read_bytes()) for file in sorted(folder.iterdir()) if file.stat().st_size]
    return tuple(
        Called(target, sum(row[number] for row in rows), sum(row[number] > 0 for row in rows))
        for number, target in enumerate(targets)
    )
