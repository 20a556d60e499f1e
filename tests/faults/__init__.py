"""What happens to a run when something breaks under it: faults put in by the real command line, and what is left.

`python -m faults` (with `tests` on the path; `nox -s faults`) carries them out and writes docs/faults.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault. `ground` names the run that it happens to; with `done` that has ended before.

    `hook` is what `hooks/sitecustomize.py` does in the command's process, `limit` bytes that a file may have, `room` KiB of
    the disk that the run lies on. `damage` changes the run before the command. `refused`: the command cannot do its work,
    and says so; else it does, or the same command again does.
    """

    name: str
    group: str
    ground: str = "fake"
    done: bool = False
    hook: Mapping[str, Any] | None = None
    limit: int | None = None
    room: int | None = None
    damage: Callable[[Path], None] | None = None
    recipe: Callable[[Path], Path] | None = None  # makes another recipe file in a folder, instead of the ground's
    refused: bool = False
    quick: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What came of a fault: the exit codes of the command and of the same command again (None: not needed), the last line that
    it said, steps that were trained though a checkpoint had them, and what is wrong in the end."""

    name: str
    group: str
    first: int
    again: int | None
    said: str
    lost: int
    wrong: tuple[str, ...]
    seconds: float

    @property
    def held(self) -> bool:
        return not self.wrong and not self.lost
