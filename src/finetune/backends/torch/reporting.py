"""Trackers among a trainer's callbacks: transformers' own integrations, each behind a guard."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partialmethod
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from finetune.backends.torch.calling import ALWAYS, Tracker


class Guarded(TrainerCallback):
    """Hands the events of a trainer to a tracker's integration that does something with them."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def _hand_on(self, event: str, args: Any, state: Any, control: Any, **values: Any) -> None:
        integration = self.tracker.integration
        if getattr(type(integration), event, None) is getattr(TrainerCallback, event):
            return
        if event == "on_log" and hasattr(integration, "_async_log"):
            integration._async_log = False  # mlflow's errors would stay in a thread of its own
        self.tracker.event(event, (args, state, control), values)


for _event in (name for name in dir(TrainerCallback) if name.startswith("on_") and name != "on_init_end"):
    setattr(Guarded, _event, partialmethod(Guarded._hand_on, _event))


def attach(trainer: Any, trackers: Sequence[Tracker]) -> None:
    """Let a trainer, which was made with none, report to these trackers."""
    if not trackers:
        return
    trainer.args.report_to = [tracker.name for tracker in trackers]
    shared = {name: getattr(trainer.callback_handler, name, None) for name in ALWAYS}
    for tracker in trackers:
        tracker.attach(INTEGRATION_TO_CALLBACK[tracker.name], (trainer.args, trainer.state, trainer.control), shared)
        trainer.add_callback(Guarded(tracker))
