"""What was read of source files, kept between processes: reading the syntax of a hundred takes a second.

A scan is kept under its file's times, size and inode, as `make` and `git` do. A file that was written just before it was
read is not kept: the clock that files are stamped with is coarse, so another write could leave the same stamp.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from finetune.core.cache import cache_dir
from finetune.core.files import write_text

SETTLED_NS = 2_000_000_000
OWN = ("scan.py", "scans.py", "tree.py")  # what a scan says depends on how it is made


@dataclass(frozen=True)
class Scan:
    """What one file says. `runs` are the names that importing it imports, `calls` those that its functions may: `numpy`
    (of a library only the first part), `finetune.run`, `finetune.run:Run` (an attribute or a module), or
    `finetune.backends.*` (every module in that package)."""

    digest: str
    runs: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()


_Entry = tuple[list[int], Scan]


class Scans:
    """The scans of the files in the directory `root`. The file that keeps them may be absent, damaged or out of reach."""

    def __init__(self, root: Path) -> None:
        self.root = root
        place = short(os.fsencode(root))
        self.file = cache_dir() / "code" / f"{place}-{sys.implementation.cache_tag}.json"
        own = [_stamp(Path(__file__).with_name(name).stat()) for name in OWN]
        self.made_by = [sys.version, os.fsdecode(root), own]
        self.kept = _read(self.file, self.made_by)
        self.passing: dict[str, _Entry] = {}
        self.grown = False

    def get(self, path: str, stat: os.stat_result, read: Callable[[Path], Scan]) -> Scan:
        """The scan of a file, read where it is not known as it was at `stat`."""
        stamp = _stamp(stat)
        for entries in (self.kept, self.passing):
            if path in entries and entries[path][0] == stamp:
                return entries[path][1]
        begin = time.time_ns()
        found = read(self.root / path)
        if begin - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_NS:
            self.kept[path] = stamp, found
            self.grown = True
        else:
            self.passing[path] = stamp, found
        return found

    def store(self) -> None:
        """Keep what was read since."""
        if not self.grown:
            return
        self.grown = False
        entries = {path: [stamp, *astuple(found)] for path, (stamp, found) in self.kept.items()}
        text = json.dumps([self.made_by, entries])
        with suppress(OSError):  # no place to write to: the next process reads the sources again
            write_text(self.file, f"{_checksum(text)}\n{text}")


def _read(file: Path, made_by: list[Any]) -> dict[str, _Entry]:
    """What a file keeps; nothing where it is not what was written, or was made another way."""
    try:
        checksum, _, text = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return {}
    if checksum != _checksum(text):
        return {}
    by, entries = json.loads(text)
    if by != made_by:
        return {}
    return {
        path: (stamp, Scan(digest, tuple(runs), tuple(calls))) for path, (stamp, digest, runs, calls) in entries.items()
    }


def short(content: bytes) -> str:
    """64 bits of SHA-256, as hexadecimal digits: enough to tell edits apart, and a report holds a hundred of them."""
    return hashlib.sha256(content).hexdigest()[:16]


def _stamp(stat: os.stat_result) -> list[int]:
    return [stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino]


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
