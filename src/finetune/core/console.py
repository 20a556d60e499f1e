"""What a user sees while work is going on. Stdout carries results only; progress and notes go to stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from finetune.core.secrets import redact
from finetune.core.streams import styled
from finetune.core.text import visible

Mode = Literal["auto", "terminal", "plain", "silent"]
_EVERY_SECONDS = 10.0
_EVERY_SHARE = 0.1
_SILENT_AT_MOST = 60.0
_mode: Mode = "auto"


def set_mode(mode: Mode) -> None:
    """`auto` draws bars on a terminal and plain lines elsewhere; `silent` (--quiet, --json) shows nothing."""
    global _mode
    _mode = mode


def mode() -> Literal["terminal", "plain", "silent"]:
    """What `auto` comes to right now."""
    if _mode != "auto":
        return _mode
    return "terminal" if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" else "plain"


def say(text: str) -> None:
    """A note on stderr; nothing when silent."""
    if mode() != "silent":
        print(visible(redact(text)), file=sys.stderr, flush=True)


class Progress(Protocol):
    """What `progress` gives: call `update` after every step."""

    def update(self, step: int, **numbers: float | None) -> None:
        """`step` of the total is done. Known numbers: `loss`, `tokens_per_second`; others show under their own name."""
        ...


@contextmanager
def progress(total: int, label: str) -> Iterator[Progress]:
    """Show the progress of `total` steps: a bar with loss, tokens/s and time left on a terminal; elsewhere a line at
    the start, then one every 10 % but 10 to 60 seconds apart, and one at the end."""
    how = mode()
    if how == "silent":
        yield _Silent()
    elif how == "terminal":
        with _bar(total, label) as bar:
            yield bar
    else:
        lines = _Lines(total, label)
        try:
            yield lines
        finally:
            lines.end()


class _Silent:
    def update(self, step: int, **numbers: float | None) -> None:
        pass


class _Lines:
    """Progress as plain lines, for logs and pipes."""

    def __init__(self, total: int, label: str) -> None:
        self.total, self.label = total, label
        self.step, self.numbers = 0, ""
        self.begin = self.shown_at = time.monotonic()
        self.shown_step = 0
        say(f"{label}: {total} steps")

    def update(self, step: int, **numbers: float | None) -> None:
        self.step, self.numbers = step, numbers_text(numbers)
        now = time.monotonic()
        waited, share = now - self.shown_at, (step - self.shown_step) / max(self.total, 1)
        due = waited >= _SILENT_AT_MOST or (waited >= _EVERY_SECONDS and share >= _EVERY_SHARE)
        if due and step < self.total:
            self.shown_at, self.shown_step = now, step
            left = (now - self.begin) / step * (self.total - step) if step else 0.0
            say(f"{self.label}: {step}/{self.total}{self.numbers}, {duration(left)} left")

    def end(self) -> None:
        say(f"{self.label}: {self.step}/{self.total}{self.numbers}, took {duration(time.monotonic() - self.begin)}")


class _Bar:
    def __init__(self, progress: Any, task: Any) -> None:
        self.progress, self.task = progress, task

    def update(self, step: int, **numbers: float | None) -> None:
        self.progress.update(self.task, completed=step, numbers=numbers_text(numbers).lstrip(", "))


@contextmanager
def _bar(total: int, label: str) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(file=styled(sys.stderr)), refresh_per_second=4) as bars:
        yield _Bar(bars, bars.add_task(visible(label), total=total, numbers=""))


def numbers_text(numbers: dict[str, float | None]) -> str:
    """`, loss 1.234, 310 tok/s` for the numbers that are known."""
    parts = []
    for name, value in numbers.items():
        if value is None:
            continue
        parts.append(f"{value:,.0f} tok/s" if name == "tokens_per_second" else f"{name.replace('_', ' ')} {value:.4g}")
    return "".join(f", {part}" for part in parts)


def duration(seconds: float) -> str:
    """`4.2 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
