"""What is seen of a TRL trainer at work: the rows of its batches, its logs, and what its optimizer holds and does."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from finetune.backends import Job, Step
from finetune.backends.torch import resuming
from finetune.backends.weight_updates import CLIPPED_STEPS, SAMPLE, Motion
from finetune.run.identity import unmoved

if TYPE_CHECKING:
    from finetune.backends.torch.guarding import Guard


class Recorder:
    """Which data rows went into each batch, and how many tokens it had.

    As a collator it lets the rows' numbers travel in the batch, since it may run in a loader's process of its own; `taken`
    stands where the trainer takes its batches from, and notes them there.
    """

    def __init__(self, trainer: Any) -> None:
        self.collator, self.batches_of = trainer.data_collator, trainer.get_batch_samples
        self.batches: deque[tuple[tuple[int, ...], int, int]] = deque()

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        rows = [int(example["row"]) for example in examples if "row" in example]  # packing knows no rows
        batch = self.collator([{k: v for k, v in example.items() if k != "row"} for example in examples])
        if rows and min(rows) >= 0:  # held-out rows are numbered below zero, and evaluation takes its batches elsewhere
            batch["row"] = torch.tensor(rows)
        return batch

    def taken(self, *arguments: Any) -> tuple[list[Any], Any]:
        """The trainer's next batches, without the rows' numbers."""
        batches, items = self.batches_of(*arguments)
        for batch in batches:
            mask, labels, rows = (batch.get(key) for key in ("attention_mask", "labels", "row"))
            tokens = int(mask.sum()) if mask is not None else batch["input_ids"].numel()
            trained = int((labels != -100).sum()) if labels is not None else int(batch["completion_mask"].sum())
            self.batches.append((tuple(rows.tolist()) if rows is not None else (), tokens, trained))
        return [{key: value for key, value in batch.items() if key != "row"} for batch in batches], items


class Reporter(TrainerCallback):
    """Turns the trainer's logs into steps, measures the training state once, and stops on request."""

    def __init__(
        self,
        trainer: Any,
        recorder: Recorder,
        guard: Guard,
        job: Job,
        put: Callable[[Step], None],
        stop: Callable[[], bool],
    ) -> None:
        self.trainer, self.recorder, self.guard, self.job, self.put, self.stop = (
            trainer,
            recorder,
            guard,
            job,
            put,
            stop,
        )
        self.begun = 0  # steps taken before this process
        self.state_bytes: dict[str, int] = {"gradient_bytes": 0, "optimizer_bytes": 0}
        self.dropout: float | None = None  # of the adapter, as it is while training
        self.norm = 0.0  # of the gradient as the optimizer gets it
        self.norms: list[float] = []
        self.pending: list[tuple[tuple[int, ...], int, int]] = []
        self.stopped = False
        self.motion: Motion | None = None
        self.trained: list[torch.Tensor] = []
        self.logged: Step | None = None  # kept while its evaluation, which comes after its log, is to come
        self.began = time.perf_counter()

    def facts(self) -> dict[str, Any]:
        """What the training took in memory, what its optimizer was set to, and what its steps did."""
        dropout = {} if self.dropout is None else {"lora_dropout": self.dropout}
        return {**self.state_bytes, **_settings(self.trainer.optimizer), **dropout, **self._measured()}

    def so_far(self) -> dict[str, Any]:
        """What a checkpoint's record shall tell of the steps that this process took."""
        state = self.trainer.state
        counts = {"steps_watched": state.global_step - self.begun, "planned_steps": state.max_steps}
        return {**counts, **self._measured()}

    def _measured(self) -> dict[str, Any]:
        assert self.motion is not None
        clipped = float(torch.tensor(self.norms).max()) if self.norms else None  # NaN stays NaN
        return {**self.motion.facts(), "clipped_norm": clipped}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.begun = state.global_step
        fresh = unmoved(self.job.identity, self.begun)
        self.motion = Motion(args.learning_rate, _sample(self.trained), fresh=fresh)
        self.state_bytes["optimizer_bytes"] = _optimizer_bytes(self.trainer.optimizer)  # of a checkpoint
        state.compute_steps(args, state.max_steps)  # transformers logs and saves as often as the checkpoint says
        self.began = time.perf_counter()
        resuming.begin(self.trainer, self.job)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.dropout is None:
            self.dropout = _dropout(self.trainer.model)
        if len(self.norms) < CLIPPED_STEPS:
            gradients = [p.grad for p in self.trained if p.grad is not None]
            self.norm = _norm(gradients)
            self.state_bytes["gradient_bytes"] = max(
                self.state_bytes["gradient_bytes"], sum(g.nbytes for g in gradients)
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # fp16's gradient scaler says so openly
        if not self.trainer.accelerator.optimizer_step_was_skipped and not self.guard.skipping:
            assert self.motion is not None
            rate = max(group["lr"] for group in self.trainer.optimizer.param_groups)
            self.motion.stepped(rate, _sample(self.trained))
            if len(self.norms) < CLIPPED_STEPS:
                self.norms.append(self.norm)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._consume()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._consume()
        if state.global_step >= state.max_steps:
            control.should_log = True  # the rows of steps that are never logged are known to nobody
        if not self.state_bytes["optimizer_bytes"]:
            self.state_bytes["optimizer_bytes"] = _optimizer_bytes(self.trainer.optimizer)
        if self.stop():
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        # A held-out loss is of a logged step; and whoever goes on from a checkpoint knows no step that was not yet logged.
        control.should_log = control.should_log or control.should_evaluate or control.should_save
        return control

    def _consume(self) -> None:
        if self.recorder.batches:
            self.pending.append(self.recorder.batches.popleft())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        taken = time.perf_counter()
        loss, skipped = self.guard.logged(float(logs["loss"]))
        known = {"loss", "learning_rate", "grad_norm", "epoch"}
        self.logged = Step(
            step=state.global_step,
            total=state.max_steps,
            loss=loss,
            skipped=skipped,
            learning_rate=float(logs.get("learning_rate", 0.0)),
            grad_norm=None if logs.get("grad_norm") is None else float(logs["grad_norm"]),
            seconds=taken - self.began,
            tokens=sum(tokens for _, tokens, _ in self.pending),
            trained_tokens=sum(trained for _, _, trained in self.pending),
            rows=tuple(row for rows, _, _ in self.pending for row in rows),
            epoch=float(logs.get("epoch", 0.0)),
            extra={k: float(v) for k, v in logs.items() if k not in known and isinstance(v, int | float)},
        )
        self.pending.clear()
        of_an_epoch = args.eval_strategy == "epoch" and math.isclose(state.epoch, round(state.epoch))
        if not control.should_evaluate and not of_an_epoch:
            self.hand_out()  # before a checkpoint of this step can be there
        self.began = time.perf_counter()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The held-out loss belongs to the step that was logged just before."""
        if self.logged and metrics and "eval_loss" in metrics:
            self.logged = replace(self.logged, extra={**self.logged.extra, "eval_loss": float(metrics["eval_loss"])})
        self.hand_out()
        self.began = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hand_out()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hand_out()

    def hand_out(self) -> None:
        if self.logged:
            self.put(self.logged)
            self.logged = None


def _sample(trained: list[torch.Tensor]) -> bytes:
    """The first elements of every trained tensor, as float32 bytes."""
    parts = [tensor.detach().flatten()[:SAMPLE].float() for tensor in trained]
    return torch.cat(parts).cpu().numpy().tobytes() if parts else b""


def _norm(tensors: list[torch.Tensor]) -> float:
    """The norm of all together, summed in float32 whatever they are in."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float32).cpu() for tensor in tensors]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _dropout(model: Any) -> float | None:
    """The largest share that an adapter's layers drop as they are now; None without an adapter."""
    layers = [module for name, module in model.named_modules() if name.endswith("lora_dropout.default")]
    shares = [float(getattr(layer, "p", 0.0)) if layer.training else 0.0 for layer in layers]  # Identity has no p
    return max(shares, default=None)


def _settings(optimizer: Any) -> dict[str, Any]:
    """How the optimizer is set, and how many parameters it steps. Adam's settings are left out where it has none."""
    groups = optimizer.param_groups
    found = {
        "optimized_parameters": sum(p.numel() for group in groups for p in group["params"]),
        "weight_decay": max(group.get("weight_decay") or 0.0 for group in groups),
    }
    if "betas" in groups[0]:
        found |= {"adam_beta1": groups[0]["betas"][0], "adam_beta2": groups[0]["betas"][1]}
        found |= {"adam_epsilon": groups[0]["eps"]}
    return found


def _optimizer_bytes(optimizer: Any) -> int:
    inner = getattr(optimizer, "optimizer", optimizer)
    values = (value for state in inner.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
