"""The state of an optimizer, a schedule and the random generators as older libraries wrote it: read as today's, or refused
by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers.trainer as module
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from finetune.core.errors import UsageError, first_line
from finetune.core.files import read_object
from finetune.run.checkpoints import STATE

OPTIMIZER, SCHEDULE, RANDOM = "optimizer.pt", "scheduler.pt", "rng_state*.pth"
STEPS = (
    "logging_steps",
    "eval_steps",
    "save_steps",
    "train_batch_size",
)  # transformers before 4.33 stored none
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# NumPy 1 wrote its generator's state under a name that NumPy 2 still reads, and PyTorch refuses.
_NUMPY_1 = [(np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct")]
_UNREADABLE = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, OSError)


def read_older(trainer: Any, resume: Path | None) -> None:
    """Let `trainer` read older states where it loads the checkpoint `resume`. Raises UsageError, here or there, naming the
    file, for what it cannot go on from: a state that is cut short, of another model or of a later version, or without what
    the optimizer or schedule stands on."""
    if resume is None:
        return
    load, restore = trainer._load_optimizer_and_scheduler, trainer._load_rng_state

    def loaded(checkpoint: str) -> None:
        with named(resume / SCHEDULE):
            _check_schedule(torch.load(resume / SCHEDULE, map_location="cpu", weights_only=True))
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # accelerate wraps it
        hook = optimizer.register_load_state_dict_pre_hook(_with_todays_keys)
        try:
            with named(resume / OPTIMIZER):
                load(checkpoint)
                _check_moments(optimizer)
        finally:
            hook.remove()

    def restored(checkpoint: str) -> None:
        with named(resume / RANDOM), torch.serialization.safe_globals(_NUMPY_1):
            restore(checkpoint)

    trainer._load_optimizer_and_scheduler, trainer._load_rng_state = loaded, restored
    with named(resume / STATE):
        _fill_state(trainer, read_object(resume / STATE))


def _fill_state(trainer: Any, stored: dict[str, Any]) -> None:
    """Let the trainer's own state have this job's settings where the stored one says none: transformers holds the two against
    each other as soon as it has read it, and cannot where one is missing."""
    if unknown := sorted(set(stored) - {field.name for field in fields(TrainerState)}):
        raise ValueError(f"this version of transformers does not know '{unknown[0]}'")
    begin = trainer._init_training_state

    def begun(*arguments: Any) -> Any:
        def compare(args: Any, state: Any) -> None:
            kept = [
                each
                for each in (*trainer.callback_handler.callbacks, trainer.control)
                if isinstance(each, ExportableState)
            ]
            now = TrainerState(train_batch_size=args.train_batch_size, stateful_callbacks=kept)
            now.compute_steps(args, state.max_steps)
            for key in STEPS:
                if stored.get(key) is None:
                    setattr(state, key, getattr(now, key))
            state.stateful_callbacks = {**now.stateful_callbacks, **state.stateful_callbacks}
            original(args, state)

        original, module.compare_trainer_and_checkpoint_args = module.compare_trainer_and_checkpoint_args, compare
        try:
            return begin(*arguments)
        finally:
            module.compare_trainer_and_checkpoint_args = original

    trainer._init_training_state = begun


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Raise UsageError naming the file where it cannot be read inside."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _UNREADABLE as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UsageError(
            f"{file} is no state to go on from: {why}. Resume from another checkpoint, or start anew with --force"
        ) from None


def _with_todays_keys(optimizer: Any, stored: dict[str, Any]) -> dict[str, Any]:
    """A stored state with the settings that its optimizer did not have yet, as this job sets them."""
    groups = optimizer.param_groups
    if len(groups) != len(stored["param_groups"]):  # which the optimizer itself says
        return stored
    named = ("params", "param_names")
    filled = [
        {**{key: value for key, value in now.items() if key not in named}, **then}
        for now, then in zip(groups, stored["param_groups"], strict=True)
    ]
    return {**stored, "param_groups": filled}


def _check_schedule(stored: Any) -> None:
    """Where it has no count of steps, the rate would start anew in silence."""
    if not isinstance(stored, dict) or not isinstance(stored.get("last_epoch"), int):
        raise ValueError("it does not say which step the learning rate is at ('last_epoch')")


def _check_moments(optimizer: Any) -> None:
    """Where weights have no moments of their own shape, Adam would start anew in silence, or break in its first step."""
    if not isinstance(optimizer, torch.optim.Adam):
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = [(weight, optimizer.state[weight]) for weight in weights if optimizer.state.get(weight)]
    if not states:
        raise ValueError("it holds nothing of any weight")
    for weight, state in states:
        if missing := [key for key in MOMENTS if key not in state]:
            raise ValueError(f"a weight has no '{missing[0]}'")
        for key in MOMENTS[1:]:
            if state[key].shape != weight.shape:
                raise ValueError(f"'{key}' of a weight of {list(weight.shape)} is {list(state[key].shape)}")
