"""The time, as everything in a run writes it."""

from __future__ import annotations

import time


def now() -> str:
    """UTC, to the millisecond, ISO 8601."""
    seconds = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1000):03d}Z"
