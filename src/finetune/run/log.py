"""events.jsonl: what happened in a run, a line an event, each holding the digest of the line before it.

So a line that is changed, taken out or put in parts the chain, and `broken` names the first one. Logs that were begun by
version 0.1 have unchained lines at their beginning; what was appended since is chained to the last of them.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.core import schemas
from finetune.core.clock import now
from finetune.core.errors import StageError, first_line
from finetune.core.files import encode
from finetune.core.parsing import loads
from finetune.core.secrets import redacted

PREVIOUS = "prev"
FIRST = hashlib.sha256(b"").hexdigest()  # what the first line of a log holds for the line before it
STEP = "step"
RESTORE = "bring the file back from a copy, or do the run anew: finetune run RECIPE --force"
SYNC_EVERY = 1.0  # seconds: a step's line is on the disk at most so much later; any other line at once


@dataclass(frozen=True)
class Line:
    """A line of the log: its number from 1, its digest (SHA-256 of its bytes without the line's end), its bytes, its event."""

    number: int
    digest: str
    size: int
    event: dict[str, Any]


class Log:
    """The log of one run. Appending is for the process that holds the run's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._synced = 0.0
        self._lines: list[Line] = []  # as read so far, up to the byte `_end` of the file that `_mark` tells
        self._end = 0
        self._mark = (0, 0, 0)

    def append(self, kind: str, values: dict[str, Any]) -> None:
        """Append one event, as one line in one write, so that a killed process leaves at most its last line cut."""
        with self.path.open("a+b", buffering=0) as stream:
            last = _last_line(stream)
            event = {"time": now(), "event": kind, **redacted(values), PREVIOUS: _digest(last) if last else FIRST}
            line = json.dumps(event, ensure_ascii=False, default=str)
            stream.write(encode(f"{line}\n"))
            if kind != STEP or time.monotonic() - self._synced > SYNC_EVERY:
                os.fsync(stream.fileno())
                self._synced = time.monotonic()

    def lines(self) -> list[Line]:
        """Every whole line, oldest first; a last one cut short by a killed writer is left out.

        Raises StageError naming the first line that is no event. What this object has read before is read again only
        where the file is another one, or was changed otherwise than by appending.
        """
        try:
            about = self.path.stat()
        except FileNotFoundError:
            return []
        if not stat.S_ISREG(about.st_mode):
            raise StageError(f"{self.path} is no file; {RESTORE}")
        mark = (about.st_ino, about.st_size, about.st_mtime_ns)
        if mark != self._mark:
            with self.path.open("rb") as stream:
                if not self._goes_on(stream, about):
                    self._lines, self._end = [], 0
                stream.seek(self._end)
                self._take(stream.read(about.st_size - self._end))
            self._mark = mark
        return list(self._lines)

    def _of_today(self, event: dict[str, Any], number: int) -> dict[str, Any]:
        """A chained line that says no schema is of the first; one that is not chained was written by version 0.1."""
        try:
            found = schemas.EVENT.read({schemas.KEY: int(PREVIOUS in event), **event}, f"{self.path}:{number}")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise StageError(f"{self.path}:{number}: {first_line(error)}; {RESTORE}") from None
        found.pop(schemas.KEY)
        return found

    def _goes_on(self, stream: io.BufferedReader, about: os.stat_result) -> bool:
        """Whether the file is the one read before, with more at its end."""
        if not self._lines or about.st_ino != self._mark[0] or about.st_size <= self._mark[1]:
            return False
        last = self._lines[-1]
        stream.seek(self._end - last.size - 1)
        return _digest(stream.read(last.size)) == last.digest

    def _take(self, content: bytes) -> None:
        # Not splitlines(): it also breaks at U+2028 and its like, which JSON strings may hold.
        *whole, _ = content.split(b"\n")
        for number, line in enumerate(whole, len(self._lines) + 1):
            try:
                event = loads(line.decode("utf-8"))
            except ValueError as error:
                raise StageError(f"{self.path}:{number}: not JSON ({error}); {RESTORE}") from None
            if not isinstance(event, dict) or not all(isinstance(event.get(key), str) for key in ("event", "time")):
                raise StageError(f"{self.path}:{number}: no event of a run; {RESTORE}")
            event = self._of_today(event, number)
            self._lines.append(Line(number, _digest(line), len(line), event))
            self._end += len(line) + 1


def broken(lines: list[Line]) -> Line | None:
    """The first line that does not hold the digest of the line before it (that one was changed, or one is gone or new).

    None for a whole chain. Lines of version 0.1, which hold none, may stand at the beginning only.
    """
    before, chained = FIRST, False
    for line in lines:
        said = line.event.get(PREVIOUS)
        if said is None and not chained:
            before = line.digest
            continue
        if said != before:
            return line
        before, chained = line.digest, True
    return None


def is_chained(lines: list[Line]) -> bool:
    """Whether any line is chained; none is in a run of version 0.1."""
    return any(PREVIOUS in line.event for line in lines)


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _last_line(stream: io.FileIO) -> bytes:
    """The last whole line of a log open for appending; one cut short is taken off, since it would spoil the next."""
    end = stream.seek(0, os.SEEK_END)
    block, tail = 1 << 12, b""
    while True:
        begin = max(0, end - block)
        stream.seek(begin)
        tail = _read(stream, end - begin)
        whole = tail[: tail.rfind(b"\n") + 1]
        cut = whole[:-1].rfind(b"\n")
        if begin == 0 or cut >= 0:
            break
        block *= 4
    if len(whole) < len(tail):
        stream.truncate(begin + len(whole))
    return whole[cut + 1 : -1]


def _read(stream: io.FileIO, size: int) -> bytes:
    parts = []
    while size > 0 and (part := stream.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
