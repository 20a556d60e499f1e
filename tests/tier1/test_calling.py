"""Trackers that fail or hang: tried again, made offline, or left, and the training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.backends.torch import calling
from finetune.backends.torch.calling import Tracker
from finetune.recipe.trackers import sentence


class World:
    """A tracker's library: what was called, in which threads, and what fails. `fails` is asked before every call."""

    def __init__(self, fails: Callable[[str, int], None] = lambda call, number: None) -> None:
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.fails = fails
        self.stopped = self.closed = False

    def call(self, name: str) -> None:
        self.calls.append(name)
        self.threads.add(threading.get_ident())
        self.fails(name, self.calls.count(name))

    def tracker(self, *, offline: bool = False) -> Tracker:
        return Tracker(
            "wandb",
            lambda offline: self.call("open offline" if offline else "open"),
            lambda ended: self.call("close"),
            can_go_offline=lambda: offline,
            stop=lambda: self.stopped,
            hurried=lambda: self.closed,
        )

    def training(self, tracker: Tracker, steps: int = 3) -> None:
        """What a trainer calls."""
        world = self

        class Integration:
            def __init__(self) -> None:
                world.call("made")

            def on_init_end(self, *arguments: Any, **values: Any) -> None:
                world.call("init")

            def on_train_begin(self, *arguments: Any, **values: Any) -> None:
                world.call("begin")

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **values: Any) -> None:
                world.call(f"log {logs}")

            def on_train_end(self, *arguments: Any, **values: Any) -> None:
                world.call("end")

        state = SimpleNamespace(global_step=0)
        arguments = (None, state, None)
        tracker.begin()
        tracker.attach(Integration, arguments, {"model": "a model"})
        tracker.event("on_train_begin", arguments, {"model": "a model"})
        for step in range(1, steps + 1):
            state.global_step = step
            tracker.event("on_log", arguments, {"model": "a model", "logs": step})
        tracker.event("on_train_end", arguments, {"model": "a model"})
        tracker.close(True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "WAITS", (0.01, 0.01, 0.01))


def broken(*calls: str, until: int = 10**6) -> Callable[[str, int], None]:
    """Fail these calls, the first `until` times."""

    def fails(call: str, number: int) -> None:
        if call in calls and number <= until:
            raise ConnectionError("refused\nby whoever")

    return fails


WHOLE = ["open", "made", "init", "begin", "log 1", "log 2", "log 3", "end", "close"]


def test_a_sound_tracker_gets_every_event_once_in_a_thread_of_its_own() -> None:
    world = World()
    world.training(tracker := world.tracker())
    assert world.calls == WHOLE
    assert tracker.failures == []
    assert len(world.threads) == 1
    assert threading.get_ident() not in world.threads


def test_a_call_that_fails_for_a_moment_is_made_again(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(broken("log 2", until=3))
    world.training(tracker := world.tracker())
    assert world.calls == ["open", "made", "init", "begin", "log 1", *["log 2"] * 4, "log 3", "end", "close"]
    assert tracker.failures == []
    assert capsys.readouterr().err == ""


def test_an_integration_that_broke_off_while_it_began_is_made_anew() -> None:
    world = World(broken("begin", until=1))
    world.training(world.tracker())
    assert world.calls[:7] == ["open", "made", "init", "begin", "made", "init", "begin"]


@pytest.mark.parametrize("call", ["open", "made", "init", "begin", "log 1", "log 2", "end", "close"])
def test_a_tracker_that_stays_broken_is_left_in_one_line(call: str, capsys: pytest.CaptureFixture[str]) -> None:
    world = World(broken(call))
    world.training(tracker := world.tracker())
    (failure,) = tracker.failures
    step = {"log 1": 1, "log 2": 2, "end": 3, "close": 3}.get(call, 0)
    assert failure == {"tracker": "wandb", "step": step, "why": "refused", "offline": False}
    assert capsys.readouterr().err == sentence(failure) + "\n"
    assert sentence(failure).endswith("(refused); the training went on without it")
    after = WHOLE[WHOLE.index(call) + 1 : -1]
    assert not set(after) & set(world.calls)


def test_what_has_another_place_goes_offline_from_the_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(broken("log 2", until=4))
    world.training(tracker := world.tracker(offline=True))
    anew = ["open offline", "made", "init", "begin"]
    assert world.calls == [*WHOLE[:5], *["log 2"] * 4, *anew, *WHOLE[5:]]
    assert [failure["offline"] for failure in tracker.failures] == [True]
    assert capsys.readouterr().err.count("it went on offline, into its files in the run") == 1


def test_what_fails_offline_too_is_left() -> None:
    world = World(broken("log 2"))
    world.training(tracker := world.tracker(offline=True))
    assert [failure["offline"] for failure in tracker.failures] == [True, False]
    assert "log 3" not in world.calls


@pytest.mark.parametrize("offline", [True, False])
def test_a_call_that_hangs_holds_the_training_for_a_bounded_time_once(
    offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calling, "ANSWER", 0.3)
    over = threading.Event()
    world = World(lambda call, number: over.wait() if call == "log 1" and number == 1 else None)  # type: ignore[arg-type]
    began = time.monotonic()
    world.training(tracker := world.tracker(offline=offline))
    assert 0.3 <= time.monotonic() - began < 30
    assert tracker.failures[0]["why"].startswith("no answer after 0")
    assert world.calls.count("log 1") == 1 + offline
    assert ("log 3" in world.calls) is offline
    over.set()


def test_a_hanging_call_is_left_soon_once_nobody_waits_for_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "HURRY", 0.2)
    over = threading.Event()

    def fails(call: str, number: int) -> None:
        if call == "log 1":
            world.closed = True
            over.wait()

    world = World(fails)
    began = time.monotonic()
    world.training(world.tracker())
    assert time.monotonic() - began < 30
    over.set()


def test_after_a_wish_to_stop_nothing_is_tried_again() -> None:
    world = World(broken("log 2"))
    world.stopped = True
    world.training(world.tracker())
    assert world.calls.count("log 2") == 1


def test_what_took_long_to_fail_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "PATIENCE", 0.0)
    world = World(broken("log 2"))
    world.training(world.tracker())
    assert world.calls.count("log 2") == 1


def test_a_second_trainer_reports_to_a_run_opened_anew() -> None:
    world = World()
    tracker = world.tracker()
    world.training(tracker)
    world.calls.clear()
    tracker.attach(lambda: SimpleNamespace(on_init_end=lambda *a, **v: None), (None, None, None), {})
    assert world.calls == ["close", "open"]
