"""What the tests in a browser share: the sizes of windows, a page as it was opened, and where pictures are left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SCREENSHOTS = Path(__file__).parents[2] / "reports" / "screenshots"
DESK, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 780}


class Opened(NamedTuple):
    page: Any
    problems: list[str]
    requests: list[str]


Open = Callable[..., Opened]


def open_all(page: Any) -> int:
    """Open every fold of a page; how many there are."""
    count: int = page.evaluate("() => { const all = [...document.querySelectorAll('details')];"
                               "all.forEach((each) => { each.open = true; }); return all.length; }")  # fmt: skip
    return count
