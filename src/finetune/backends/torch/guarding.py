"""Steps of a TRL trainer that cannot be taken: known before they change a weight, told with their rows, and what was trained
up to there saved."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy
import torch
from transformers import TrainerCallback

from finetune.backends import Job
from finetune.backends.failing import NoMemoryError, StepError, is_out_of_memory, leaves_checkpoint, skips, taking
from finetune.backends.torch.callbacks import Recorder
from finetune.core.errors import FinetuneError


class Guard(TrainerCallback):
    """Stands where the trainer takes its steps. `skipping`: whether the step that is being taken changes nothing;
    `losses` are those of the steps since the last log, but for the skipped ones."""

    def __init__(self, trainer: Any, recorder: Recorder, job: Job) -> None:
        self.trainer, self.recorder, self.job = trainer, recorder, job
        self.batches: list[tuple[torch.Tensor, tuple[int, ...]]] = []  # of this step: loss, rows
        self.losses: list[float] = []
        self.bad_loss = math.nan  # of the last step that was skipped
        self.skipped = 0  # since the last log
        self.skipping = False
        self.random: dict[str, Any] = {}
        self.step_of, self.norm_of, self.evaluation_of = trainer.training_step, trainer._get_grad_norm, trainer.evaluate
        trainer.training_step, trainer._get_grad_norm, trainer.evaluate = self._step, self._norm, self._evaluate

    @property
    def _number(self) -> int:
        return int(self.trainer.state.global_step) + 1

    def _step(self, model: Any, inputs: dict[str, Any], *more: Any, **named: Any) -> torch.Tensor:
        rows = self.recorder.batches[0][0] if self.recorder.batches else ()
        with taking(self._number, rows):
            loss: torch.Tensor = self.step_of(model, inputs, *more, **named)
        self.batches.append((loss, rows))
        # The trainer sums them up, and a sum that was NaN once stays so.
        spared = self.job.options.get("on_nan") == "skip" and not torch.isfinite(loss)
        return torch.zeros_like(loss) if spared else loss

    def _norm(self, model: Any, *more: Any, **named: Any) -> Any:
        """The gradient's norm, which the trainer asks for with all of it there and no weight changed yet."""
        norm = self.norm_of(model, *more, **named)
        losses = torch.stack([loss.detach().float() for loss, _ in self.batches]).tolist()
        loss = next((value for value in losses if not math.isfinite(value)), sum(losses))
        of_bad = [rows for value, (_, rows) in zip(losses, self.batches, strict=True) if not math.isfinite(value)]
        rows = [row for batch in of_bad or [rows for _, rows in self.batches] for row in batch]
        found = None if self._scales() else float(norm)
        self.skipping = skips(self.job.options, step=self._number, loss=loss, grad_norm=found, rows=rows)
        if self.skipping:
            self.bad_loss = loss
        else:
            self.losses.append(loss)
        return norm

    def _evaluate(self, *arguments: Any, **named: Any) -> Any:
        """An evaluation draws no random number of the training's: each loader takes a seed, so that dropout would be another
        from there on, and a training that goes on after an evaluation failed would not be the same."""
        states = _random()
        try:
            return self.evaluation_of(*arguments, **named)
        finally:
            _set_random(states)

    def _scales(self) -> bool:
        """Whether a scaler of gradients is at work, which finds its scale by what overflows, and skips such steps itself."""
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        return scaler is not None and scaler.is_enabled() and scaler.get_scale() > 1

    # -- as the trainer goes ----------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.optimizer
        take = optimizer.step

        def step(*arguments: Any, **named: Any) -> Any:
            if self.skipping:
                return None
            with taking(self._number):
                return take(*arguments, **named)

        optimizer.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.batches, self.skipping = [], False

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.skipped += self.skipping

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.random = _random()

    def logged(self, loss: float) -> tuple[float, int]:
        """(the mean loss of the steps since the last log without those that were skipped, how many were): `loss` is the
        trainer's own mean, which counts them."""
        skipped, losses = self.skipped, self.losses
        self.skipped, self.losses = 0, []
        if not skipped:
            return loss, 0
        return (math.fsum(losses) / len(losses) if losses else self.bad_loss), skipped

    # -- when one failed --------------------------------------------------------------------------------------------

    @contextmanager
    def saving(self, hand_out: Callable[[], None]) -> Iterator[None]:
        """A step that fails inside leaves a checkpoint of the one before; `hand_out` hands out what is not logged yet."""
        try:
            yield
        except StepError as error:
            hand_out()
            self._save(error)
            raise
        except FinetuneError:
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = NoMemoryError("out of memory", step=self._number)  # in an evaluation, or before the first step
            hand_out()
            self._save(failed)
            raise failed from error

    def _save(self, error: StepError) -> None:
        """A checkpoint of the step before, where all weights and the log are still of that, and there is none yet. What stands
        in its way is passed over: the step's own error is what is to be told."""
        there = self.job.out / f"checkpoint-{self.trainer.state.global_step}"
        # Losses that are not logged are of steps that changed weights, or were about to.
        known = self.random and not self.losses
        if not known or there.exists() or not leaves_checkpoint(error, self.job.options):
            return
        self.trainer.model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _set_random(self.random)
        with suppress(Exception):
            self.trainer._save_checkpoint(self.trainer.model, None)


def _random() -> dict[str, Any]:
    """The states of all generators that a checkpoint keeps."""
    found = {"python": random.getstate(), "numpy": numpy.random.get_state(), "cpu": torch.get_rng_state()}
    return found | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_random(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
