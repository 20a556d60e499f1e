"""Calls into a tracker, which no training waits for or ends with: tried again, bounded in time, then made offline or left.

A tracker's calls are made one after the other in a thread of its own (mlflow and trackio keep what they know by thread),
while the trainer waits, at most ANSWER, ENDING or SAVING seconds. A call that takes longer is left behind in its thread, a
daemon, which ends with the process. Nothing of a tracker's goes back to the trainer.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from finetune.core.console import say
from finetune.core.errors import first_line
from finetune.recipe import trackers

WAITS = (0.25, 0.5, 1.0)  # seconds before a failed call is made again
PATIENCE = 5.0  # seconds: what took longer until it failed is not made again
ANSWER, ENDING, SAVING = (
    45.0,
    90.0,
    600.0,
)  # seconds for a call; for the last ones, which send what is left; for uploads
HURRY = 5.0  # seconds for any, once nobody waits for the training's result
LONGEST = 200  # characters of an error that are told
_SECONDS = {
    "on_save": SAVING,
    "on_train_end": SAVING,
}  # either can upload a model, where the user asked the tracker for it
# What transformers hands to every event.
ALWAYS = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")


class _Unanswered(Exception):
    """A call that did not come back in time."""


class _Caller:
    """A thread that makes calls one after the other."""

    def __init__(self, name: str) -> None:
        self.calls: queue.SimpleQueue[tuple[Callable[[], object], queue.SimpleQueue[BaseException | None]]]
        self.calls = queue.SimpleQueue()
        threading.Thread(target=self._work, name=f"tracker {name}", daemon=True).start()

    def _work(self) -> None:
        while True:
            call, answer = self.calls.get()
            try:
                call()
                error = None
            except BaseException as raised:  # whatever a tracker does, its thread goes on
                error = raised
            answer.put(error)
            del call, answer, error  # they hold a model

    def call(self, call: Callable[[], object], seconds: float, hurried: Callable[[], bool]) -> None:
        """Make a call and wait for its end. Raises what it raises, and _Unanswered."""
        answer: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        begun = time.monotonic()
        self.calls.put((call, answer))
        while (taken := time.monotonic() - begun) < (min(seconds, HURRY) if hurried() else seconds):
            try:
                error = answer.get(timeout=min(0.2, seconds - taken))
            except queue.Empty:
                continue
            if error is not None:
                raise error
            return
        raise _Unanswered(f"no answer after {time.monotonic() - begun:.0f} s")


class Tracker:
    """A tracker in one training. `open(offline)` and `close(ended)` are made in its thread, too; `can_go_offline` tells
    whether there is another place for it. `failures` holds what went wrong for good (`trackers.Failure`)."""

    def __init__(
        self,
        name: str,
        open: Callable[[bool], None],
        close: Callable[[bool], None],
        *,
        can_go_offline: Callable[[], bool],
        stop: Callable[[], bool],
        hurried: Callable[[], bool],
    ) -> None:
        self.name, self.open, self.close_it, self.can_go_offline = name, open, close, can_go_offline
        self.stop, self.hurried = stop, hurried
        self.caller = _Caller(name)
        self.make: Callable[[], Any] | None = None
        self.integration: Any = None
        self.offline = self.left = False
        self.step = 0
        self.failures: list[trackers.Failure] = []

    def begin(self) -> None:
        """Make the tracker ready, before there is a trainer."""
        self._carry_out(partial(self.open, False), lambda: None)

    def attach(self, make: Callable[[], Any], arguments: tuple[Any, ...], shared: dict[str, Any]) -> None:
        """Have transformers' integration made, and told that there is a trainer; of a second one, in a run opened anew."""
        again, self.make = self.make is not None, make

        def begin() -> None:
            if again:
                self.close_it(False)
                self.open(self.offline)
            self._begin(("on_init_end",), arguments, shared)

        if not self.left:
            self._carry_out(begin, partial(self._begin, ("on_init_end",), arguments, shared))

    def event(self, event: str, arguments: tuple[Any, ...], values: dict[str, Any]) -> None:
        """Hand an event of the trainer to the integration."""
        if self.left:
            return
        self.step = arguments[1].global_step
        shared = {name: values[name] for name in ALWAYS if name in values}

        def anew() -> None:
            self._begin(("on_init_end", "on_train_begin"), arguments, shared)
            if event != "on_train_begin":
                getattr(self.integration, event)(*arguments, **values)

        # An integration that broke off while it began takes itself to have begun.
        hand_on = partial(getattr(self.integration, event), *arguments, **values)
        self._carry_out(hand_on, anew, _SECONDS.get(event, ANSWER), renew=event == "on_train_begin")

    def close(self, ended: bool) -> None:
        """End what is open; of a tracker that was left, in a thread that is not stuck, and whatever comes of it."""
        caller = _Caller(self.name) if self.left else self.caller
        try:
            caller.call(partial(self.close_it, ended), HURRY if self.left else ENDING, self.hurried)
        except BaseException as error:
            if not self.left:
                self.left = True
                self._told(error)

    def _begin(self, events: tuple[str, ...], arguments: tuple[Any, ...], shared: dict[str, Any]) -> None:
        assert self.make is not None
        self.integration = self.make()
        for event in events:
            getattr(self.integration, event)(*arguments, **shared)

    def _carry_out(
        self, call: Callable[[], object], anew: Callable[[], object], seconds: float = ANSWER, *, renew: bool = False
    ) -> None:
        """Make a call; where it fails for good, offline and from the beginning (`anew`), or not at all from then on."""
        error = self._tried(call, anew if renew else call, seconds)
        if error is not None and not self.offline and self.can_go_offline():
            self.offline = True
            self._told(error)
            self.caller = _Caller(self.name)  # the one before may be stuck

            def go_offline() -> None:
                self.open(True)
                anew()

            error = self._tried(go_offline, go_offline, seconds)
        if error is not None:
            self.left = True
            self._told(error)

    def _tried(self, call: Callable[[], object], again: Callable[[], object], seconds: float) -> BaseException | None:
        """What a call raised the last time it was made; None where it worked."""
        begun = time.monotonic()
        for wait in (*WAITS, None):
            try:
                self.caller.call(call, seconds, self.hurried)
                return None
            except BaseException as error:
                late = isinstance(error, _Unanswered) or time.monotonic() - begun > PATIENCE
                if wait is None or late or self._waits(wait):
                    return error
            call = again
        return None

    def _waits(self, seconds: float) -> bool:
        """Wait; whether a stop was asked for meanwhile."""
        end = time.monotonic() + seconds
        while not self.stop() and time.monotonic() < end:
            time.sleep(0.05)
        return self.stop()

    def _told(self, error: BaseException) -> None:
        failure = trackers.Failure(
            tracker=self.name, step=self.step, why=first_line(error)[:LONGEST], offline=self.offline and not self.left
        )
        self.failures.append(failure)
        say(trackers.sentence(failure))
