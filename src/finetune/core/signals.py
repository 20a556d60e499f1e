"""SIGTERM and SIGHUP as Ctrl-C is; and, in a training, all three as a wish to stop after the step that is being computed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from finetune.core.console import say

# Windows knows no hangup.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def heed() -> None:
    """Let every signal that asks a process to end raise KeyboardInterrupt, so that what is underway is told and tidied up.

    One that is ignored stays so: `nohup` wants it.
    """
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _interrupt)


def let_go() -> None:
    """Let these signals end the process at once, without a word: all is done and told, and Python is only shutting down."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def heeded_by(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Have these signals call a handler; returns the handlers before, by signal.

    A hangup that is ignored stays so. A shell has what it starts in the background ignore Ctrl-C, too; who sends one by hand
    means it.
    """
    hangup = getattr(signal, "SIGHUP", None)
    heeded = [number for number in SIGNALS if number != hangup or signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heeded}


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"ended by {signal.Signals(number).name}")


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that tells whether a stop was asked for. A second signal interrupts at once.

    Outside the main thread, where Python allows no signal handlers, it always answers False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            _interrupt(number, frame)
        asked.set()
        say("stopping after this step, to save a checkpoint (again to stop at once, losing it)")

    before = heeded_by(ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
