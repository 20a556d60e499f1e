"""Ctrl-C and SIGTERM as a wish to stop after the step that is being computed, so that nothing done is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from finetune.console import say


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """A function that tells whether a stop was asked for. A second Ctrl-C interrupts at once, as usual.

    Outside the main thread, where Python allows no signal handlers, it always answers False.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        say("stopping after this step, to save a checkpoint (again to stop at once, losing it)")

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
