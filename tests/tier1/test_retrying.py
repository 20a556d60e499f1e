"""What may work a moment later is tried again: boundedly, said, and until Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from finetune.core import retrying
from finetune.core.retrying import GaveUp, Passing, retried


class Flaky:
    """Fails some times before it works, and comes farther every time where it `advances`."""

    def __init__(self, fails: int, *, advances: bool = False) -> None:
        self.fails, self.advances, self.tries, self.farthest = fails, advances, 0, 0

    def __call__(self) -> str:
        self.tries += 1
        self.farthest += self.advances
        if self.tries <= self.fails:
            raise OSError(f"try {self.tries}")
        return "done"


def passing(error: Exception) -> Passing | None:
    return Passing("it is busy")


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited, in a time that passes by waiting alone."""
    slept: list[float] = []
    monkeypatch.setattr(retrying.time, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(retrying.time, "sleep", slept.append)
    return slept


def test_waits_double_up_to_a_half_more_or_less_and_are_said(
    waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert retried("the hub", Flaky(4), passing) == "done"
    assert len(waits) == 4
    assert all(0.5 * 2**number <= wait <= 1.5 * 2**number for number, wait in enumerate(waits))
    assert capsys.readouterr().err.splitlines() == [
        f"the hub: it is busy; trying again in {wait:.1f} s" for wait in waits
    ]


def test_five_tries_are_all(waits: list[float]) -> None:
    flaky = Flaky(100)
    with pytest.raises(GaveUp, match=r"it is busy \(tried 5 times\)") as caught:
        retried("the hub", flaky, passing)
    assert flaky.tries == 5
    assert str(caught.value.error) == "try 5"


def test_what_comes_farther_is_tried_for_as_long_as_it_does(waits: list[float]) -> None:
    flaky = Flaky(50, advances=True)
    assert retried("the hub", flaky, passing, lambda: flaky.farthest) == "done"
    assert max(waits) <= 1.5


@pytest.mark.parametrize(("asked", "tries"), [(5.0, 5), (29.0, 2), (3600.0, 1)])
def test_a_wait_that_is_asked_for_is_kept_within_the_bound(waits: list[float], asked: float, tries: int) -> None:
    flaky = Flaky(100)
    with pytest.raises(GaveUp):
        retried("the hub", flaky, lambda error: Passing("it is busy", asked))
    assert flaky.tries == tries
    assert sum(waits) <= retrying.TOTAL
    assert asked in waits or tries == 1


def test_an_error_that_stays_is_raised_as_it_is(waits: list[float]) -> None:
    flaky = Flaky(1)
    with pytest.raises(OSError, match="try 1"):
        retried("the hub", flaky, lambda error: None)
    assert waits == []


def test_ctrl_c_ends_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST", 15.0)
    interrupt: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    began = time.monotonic()
    timer = threading.Timer(0.3, interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            retried("the hub", Flaky(1), passing)
        timer.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 5
