"""What may work a moment later, tried again with waits that grow: without progress ATTEMPTS times, for TOTAL seconds or so."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from finetune.core.console import say

ATTEMPTS = 5
FIRST, FACTOR, TOTAL = 1.0, 2.0, 30.0  # seconds; between tries 1, 2, 4 and 8, each up to a half more or less
_jitter = random.SystemRandom()  # never Python's own: a training's random numbers come from it
T = TypeVar("T")


@dataclass(frozen=True)
class Passing:
    """Why something may work later, in a phrase; `after`: seconds that it asked to be left alone."""

    why: str
    after: float = 0.0


class GaveUp(Exception):
    """What failed for good: the last of its tries raised `error`, for the reason `why`; `tried` says how many there were."""

    def __init__(self, times: int, why: str, error: Exception) -> None:
        self.tried = f"tried {'once' if times == 1 else f'{times} times'}"
        self.why, self.error = why, error
        super().__init__(f"{why} ({self.tried})")


def retried(
    what: str,
    attempt: Callable[[], T],
    passing: Callable[[Exception], Passing | None],
    progress: Callable[[], int] = lambda: 0,
) -> T:
    """What `attempt` returns. Each wait is said; Ctrl-C ends it.

    `progress` tells how far it has come, whatever that is: where it came farther than ever, tries and seconds count anew. An
    error for which `passing` returns None is raised as it is. Raises GaveUp after the last try, and where the next wait, or
    the one that is asked for, would go beyond TOTAL.
    """
    farthest, tries, tried, begun = progress(), 0, 0, time.monotonic()
    while True:
        tries, tried = tries + 1, tried + 1
        try:
            return attempt()
        except Exception as error:
            found = passing(error)
            if found is None:
                raise
            if (now := progress()) > farthest:
                farthest, tries, begun = now, 1, time.monotonic()
            wait = max(found.after, FIRST * FACTOR ** (tries - 1) * _jitter.uniform(0.5, 1.5))
            if tries >= ATTEMPTS or time.monotonic() - begun + wait > TOTAL:
                raise GaveUp(tried, found.why, error) from error
            say(f"{what}: {found.why}; trying again in {wait:.1f} s")
        time.sleep(wait)
