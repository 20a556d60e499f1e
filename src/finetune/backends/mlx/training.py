"""`train`: a loop of its own over mlx-lm's model and layers and MLX's AdamW; supervised, LoRA or full.

Row order and dropout are drawn from the seed and the step's number, so a resumed training continues bit by bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.backends import Job, Step
from finetune.backends.failing import StepError, leaves_checkpoint, skips, taking
from finetune.backends.mlx import layout, lora, options
from finetune.backends.mlx.loading import device_of, load_model
from finetune.backends.mlx.runtime import mx, nn, on, optimizers, tree_flatten, tree_map, tree_unflatten
from finetune.backends.mlx.tensors import raw, stored
from finetune.backends.weight_updates import CLIPPED_STEPS, SAMPLE, Motion
from finetune.core.errors import StageError, UsageError
from finetune.core.files import write_json
from finetune.recipe.schedule import learning_rate
from finetune.run import checkpoints, identity

# The optimizer's state lies apart from the weights, which are found by a glob.
OPTIMIZER = "optimizer/state.safetensors"


@dataclass(frozen=True)
class Row:
    number: int
    ids: list[int]
    labels: list[int]

    @property
    def trained(self) -> int:
        return sum(label != -100 for label in self.labels[1:])


def train(job: Job) -> Generator[Step, None, dict[str, Any]]:
    """Yield every logged step; return the facts of the training. See `finetune.backends.Backend.train`."""
    values = options.chosen(job)
    device = device_of(job.settings)
    layout.require_hugging_face(job.model, "train on")
    with on(device):
        training = Training(job, values, device)
    unpatch = training.checkpoint_gradients() if values["gradient_checkpointing"] else lambda: None
    stopped = False
    try:
        for number in range(training.done + 1, training.total + 1):
            with on(device):
                try:
                    step = training.step(number)
                except StepError as error:
                    training.failed(error)
                    raise
                stopped = number < training.total and job.should_stop()
                saved = stopped or training.saves(number)
                if saved and step is None:
                    step = training.told()
            if step is not None:
                yield step  # its event is in the log before a checkpoint knows of it
            if saved:
                with on(device):
                    training.save_checkpoint()
            if stopped:
                break
    finally:
        unpatch()
    with on(device):
        return training.finish(stopped)


class Training:
    """A model in training and what belongs to it; made from a job, and from its checkpoint where it resumes."""

    def __init__(self, job: Job, values: dict[str, Any], device: Any) -> None:
        self.job, self.values, self.device = job, values, device
        self.rows = _rows(job.rows)
        self.held_out = _rows(job.eval_rows) if job.eval_rows and values["eval_strategy"] != "no" else []
        self.trusts = bool(job.settings.get("trust_remote_code"))
        mx.random.seed(values["seed"])
        self.model, reading = load_model(
            job.model,
            dtype=job.settings.get("dtype"),
            trust_remote_code=self.trusts,
            mend_weights=job.method == "lora",  # a full training writes these weights, as transformers means them
        )
        self.model_type = reading.config["model_type"]
        self.lora = self._prepare()
        # Another layout adds up in another order, and a resumed training would differ in the last bit.
        self.model.update(tree_map(mx.contiguous, self.model.parameters()))
        mx.eval(self.model.parameters())
        self.optimizer = optimizers.AdamW(
            learning_rate=0.0,
            betas=[values["adam_beta1"], values["adam_beta2"]],
            eps=values["adam_epsilon"],
            weight_decay=0.0,  # decayed by hand: torch's trainers spare biases and norms
            bias_correction=True,
        )
        self.optimizer.init(self.model.trainable_parameters())
        self.done = self._resume() if job.resume else 0
        self.begun = self.done
        per_epoch = math.ceil(len(self.rows) / values["per_device_train_batch_size"])
        self.steps_per_epoch = math.ceil(per_epoch / values["gradient_accumulation_steps"])
        self.total = options.total_steps(values, self.steps_per_epoch)
        identity.check_plan(self.done, self.total)
        self.gradients = nn.value_and_grad(self.model, _summed_loss)
        self.frozen_before = self.frozen_digest()
        self.gradient_bytes = 0
        self.norms: list[float] = []
        self.decay = 0.0  # as the last step had it
        self.dropout: float | None = None  # of the adapter, as the last step had it; None before one
        self.motion = Motion(values["learning_rate"], self._sample(), fresh=identity.unmoved(job.identity, self.done))
        self.pending: list[Step] = []
        if not job.resume and job.method == "lora":
            self.save_adapter(job.out / "initial")

    def _prepare(self) -> dict[str, Any]:
        """Choose what is trained; returns the adapter's config (empty for a full training)."""
        job = self.job
        if job.method == "full":
            self._check_layout()
            self.model.unfreeze()
            return {}
        adapter = job.resume or job.adapter
        if adapter is not None:
            return lora.attach(self.model, job.model, adapter)
        chosen = dict(job.lora or {})
        lora.apply(self.model, job.model, chosen)
        return chosen

    def _check_layout(self) -> None:
        ours = dict(tree_flatten(self.model.parameters()))
        theirs = {layout.mlx_name(name, ours) for name in layout.stored_names(self.job.model)}
        if missing := sorted(ours.keys() - theirs):
            raise UsageError(
                f"train.method: 'full' is not possible with mlx-lm's {self.model_type}, which stores weights otherwise "
                f"than Hugging Face (first: {missing[0]}). Use 'lora', or set 'backend: torch'"
            )

    # -- one step -------------------------------------------------------------------------------------------------

    def step(self, number: int) -> Step | None:
        """Take one optimizer step; the step as it is logged, or None where `logging_steps` leaves it out."""
        began = time.perf_counter()
        mx.random.seed((self.values["seed"] << 24) + number)
        self.model.train()
        self.dropout = lora.dropout(self.model)
        window = self._window(number)
        trained = sum(row.trained for batch in window for row in batch)
        total, gradients = 0.0, None
        for batch in window:
            with taking(number, [row.number for row in batch]):
                loss, found = self.gradients(self.model, *_padded(batch))
                gradients = found if gradients is None else tree_map(mx.add, gradients, found)
                mx.eval(loss, gradients)
                total += float(loss.item())
        gradients = tree_map(lambda each: each / max(1, trained), gradients)
        limit = self.values["max_grad_norm"]
        clipped, norm = optimizers.clip_grad_norm(gradients, limit or math.inf)
        kind, peak, warmup = (self.values[key] for key in ("lr_scheduler_type", "learning_rate", "warmup_steps"))
        rate = learning_rate(kind, peak, warmup, number, self.total)
        rows = tuple(row.number for batch in window for row in batch)
        mean, size = total / max(1, trained), float(norm.item())
        skipped = skips(self.values, step=number, loss=mean, grad_norm=size, rows=rows)
        if not skipped:
            self._move(clipped if limit else gradients, rate)
        self.gradient_bytes = sum(each.nbytes for _, each in tree_flatten(gradients))
        self.done = number
        self.pending.append(
            Step(
                step=number,
                total=self.total,
                loss=mean,
                learning_rate=rate,
                grad_norm=size,
                seconds=time.perf_counter() - began,
                tokens=sum(len(row.ids) for batch in window for row in batch),
                trained_tokens=trained,
                rows=rows,
                epoch=number / self.steps_per_epoch,
                skipped=int(skipped),
            )
        )
        return self._logged(number)

    def _move(self, gradients: Any, rate: float) -> None:
        if len(self.norms) < CLIPPED_STEPS:
            self.norms.append(float(optimizers.clip_grad_norm(gradients, math.inf)[1].item()))
        self.decay = self.values["weight_decay"]
        if self.decay:
            keep = 1 - rate * self.decay
            spared = tree_map(lambda p: p * keep if p.ndim > 1 else p, self.model.trainable_parameters())
            self.model.update(spared)
        self.optimizer.learning_rate = rate
        self.optimizer.update(self.model, gradients)
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.motion.stepped(rate, self._sample())

    def _sample(self) -> bytes:
        """The first elements of every trained tensor, as bytes."""
        trained = tree_flatten(self.model.trainable_parameters())
        return raw(mx.concatenate([each.reshape(-1)[:SAMPLE].astype(mx.float32) for _, each in trained]))

    def _logged(self, number: int) -> Step | None:
        due = number == 1 or number % self.values["logging_steps"] == 0 or number == self.total or self.saves(number)
        every = self.values["eval_steps"] or self.values["logging_steps"]
        evaluates = bool(self.held_out) and (
            number % every == 0 if self.values["eval_strategy"] == "steps" else number % self.steps_per_epoch == 0
        )
        extra = {"eval_loss": self.held_out_loss()} if evaluates else {}
        if not due and not evaluates:
            return None
        return self.told(extra)

    def told(self, extra: dict[str, float] | None = None) -> Step:
        """The steps since the last that was logged, as one."""
        parts, self.pending = self.pending, []
        taken = [part for part in parts if not part.skipped] or parts
        return replace(
            parts[-1],
            loss=sum(part.loss for part in taken) / len(taken),
            skipped=sum(part.skipped for part in parts),
            seconds=sum(part.seconds for part in parts),
            tokens=sum(part.tokens for part in parts),
            trained_tokens=sum(part.trained_tokens for part in parts),
            rows=tuple(row for part in parts for row in part.rows),
            extra=extra or {},
        )

    def held_out_loss(self) -> float:
        """Mean loss of the held-out rows' trained tokens."""
        self.model.eval()
        size = self.values["per_device_eval_batch_size"]
        batches = [self.held_out[at : at + size] for at in range(0, len(self.held_out), size)]
        losses = [float(_summed_loss(self.model, *_padded(batch)).item()) for batch in batches]
        return sum(losses) / max(1, sum(row.trained for row in self.held_out))

    def _window(self, number: int) -> list[list[Row]]:
        """The batches of one optimizer step; a window never reaches into the next epoch."""
        epoch, place = divmod(number - 1, self.steps_per_epoch)
        seed = self.values["data_seed"] if self.values["data_seed"] is not None else self.values["seed"]
        order = list(range(len(self.rows)))
        random.Random(f"{seed}:{epoch}").shuffle(order)
        size, count = self.values["per_device_train_batch_size"], self.values["gradient_accumulation_steps"]
        chosen = order[place * size * count : (place + 1) * size * count]
        return [[self.rows[i] for i in chosen[at : at + size]] for at in range(0, len(chosen), size)]

    def checkpoint_gradients(self) -> Any:
        """Compute activations again instead of keeping them; returns what undoes it, since mlx-lm changes the class."""
        from mlx_lm.tuner.trainer import grad_checkpoint

        kinds = {type(layer): layer for layer in self.model.layers}
        calls = {kind: kind.__call__ for kind in kinds}
        for layer in kinds.values():
            grad_checkpoint(layer)

        def undo() -> None:
            for kind, call in calls.items():
                kind.__call__ = call

        return undo

    # -- what is written ------------------------------------------------------------------------------------------

    def saves(self, number: int) -> bool:
        strategy = self.values["save_strategy"]
        every = self.values["save_steps"] if strategy == "steps" else self.steps_per_epoch
        return strategy != "no" and (number % every == 0 or number == self.total)

    def failed(self, error: StepError) -> None:
        """Keep the step before one that failed, where the log has it."""
        if leaves_checkpoint(error, self.values) and self.done > self.begun and not self.pending:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Write `checkpoint-N`, and delete the oldest beyond `save_total_limit`."""
        state = {"global_step": self.done, "max_steps": self.total, "epoch": self.done / self.steps_per_epoch}
        with checkpoints.writing(self.job.out, self.done) as folder:
            (self.save_adapter if self.job.method == "lora" else self.save_model)(folder)
            (folder / OPTIMIZER).parent.mkdir()
            mx.save_safetensors(str(folder / OPTIMIZER), dict(tree_flatten(self.optimizer.state)))
            identity.leave(folder, self.job.identity, self.so_far())
            write_json(folder / checkpoints.STATE, state)
        checkpoints.rotate(self.job.out, self.values["save_total_limit"])

    def so_far(self) -> dict[str, Any]:
        """What a checkpoint's record shall tell of the steps that this process took."""
        counts = {"steps_watched": self.done - self.begun, "planned_steps": self.total}
        return {**counts, **self._measured()}

    def _measured(self) -> dict[str, Any]:
        clipped = mx.max(mx.array(self.norms)).item() if self.norms else None
        return {**self.motion.facts(), "clipped_norm": clipped}

    def _resume(self) -> int:
        assert self.job.resume is not None
        try:
            state = checkpoints.state(self.job.resume)
            self.optimizer.state = tree_unflatten(list(stored(self.job.resume / OPTIMIZER).items()))
        except (OSError, ValueError) as error:
            raise StageError(f"{self.job.resume} is no checkpoint of the mlx backend: {error}") from None
        if self.job.method == "full":
            ours = dict(tree_flatten(self.model.parameters()))
            weights = []
            for file in layout.weight_files(self.job.resume):
                for name, tensor in stored(file).items():
                    if (mine := layout.mlx_name(name, ours)) is not None:
                        flipped = layout.inputs_first(self.model_type, name)
                        weights.append((mine, mx.contiguous(tensor.T) if flipped else tensor))
            self.model.load_weights(weights, strict=False)
        mx.eval(self.model.parameters(), self.optimizer.state)
        return int(state["global_step"])

    def save_adapter(self, out: Path) -> None:
        flipped = self.model_type in layout.INPUTS_FIRST
        lora.save(self.model, self.job.model, self.lora, out, fan_in_fan_out=flipped)
        layout.save_tokenizer(self.job.model, out, self.job.chat_template, trust_remote_code=self.trusts)

    def save_model(self, out: Path) -> None:
        ours = dict(tree_flatten(self.model.parameters()))

        def trained(name: str, _: Any) -> Any:
            mine = layout.mlx_name(name, ours)
            if mine is None:
                return None  # a head tied to the embeddings, or a table that can be computed
            return ours[mine].T if layout.inputs_first(self.model_type, name) else ours[mine]

        layout.rewrite(
            self.job.model, out, trained, tokenizer=self.job.model, chat_template=self.job.chat_template,
            dtype=self.job.settings.get("dtype"), trust_remote_code=self.trusts,
        )  # fmt: skip

    def finish(self, stopped: bool) -> dict[str, Any]:
        """Write the result unless the training was stopped; returns its facts."""
        parameters = dict(tree_flatten(self.model.parameters()))
        trainable = dict(tree_flatten(self.model.trainable_parameters()))
        kept = tree_flatten(self.optimizer.state)
        facts = {
            "trainable_parameters": sum(each.size for each in trainable.values()),
            "frozen_parameters": sum(each.size for name, each in parameters.items() if name not in trainable),
            "weight_bytes": sum(each.nbytes for each in parameters.values()),
            "trainable_bytes": sum(each.nbytes for each in trainable.values()),
            "gradient_bytes": self.gradient_bytes,
            "optimizer_bytes": sum(each.nbytes for _, each in kept),
            "frozen_sha256_before": self.frozen_before,
            "frozen_sha256_after": self.frozen_digest(),
            "world_size": 1,
            "device": "cpu" if self.device == mx.cpu else "gpu",
            "steps": self.done,
            "planned_steps": self.total,
            **self._measured(),
            "weight_decay": self.decay,
            "optimized_parameters": sum(each.size for name, each in kept if name.endswith(".m")),
            "adam_beta1": self.optimizer.betas[0],
            "adam_beta2": self.optimizer.betas[1],
            "adam_epsilon": self.optimizer.eps,
            "stopped": stopped,
            "resumed_from": self.begun if self.job.resume else None,
        }
        if self.job.method == "lora":
            facts["lora_dropout"] = self.dropout
        if self.device != mx.cpu:
            facts["device_peak_bytes"] = mx.get_peak_memory()
        if not stopped:
            if self.job.method == "lora":
                self.save_adapter(self.job.out / "adapter")
            else:
                self.save_model(self.job.out / "model")
        return facts

    def frozen_digest(self) -> str:
        """SHA-256 over every frozen parameter's bytes, in order of name."""
        trainable = {name for name, _ in tree_flatten(self.model.trainable_parameters())}
        total = hashlib.sha256()
        for name, parameter in sorted(tree_flatten(self.model.parameters())):
            if name not in trainable:
                total.update(name.encode())
                total.update(raw(parameter))
        return total.hexdigest()


def _rows(path: Path) -> list[Row]:
    lines: Iterator[str] = (line for line in path.read_text(encoding="utf-8").split("\n") if line)
    return [Row(row["row"], row["input_ids"], row["labels"]) for row in map(json.loads, lines)]


def _padded(batch: list[Row]) -> tuple[Any, Any]:
    """Token ids and labels, both batch x longest row, padded on the right."""
    width = max(len(row.ids) for row in batch)
    ids = mx.array([row.ids + [0] * (width - len(row.ids)) for row in batch])
    labels = mx.array([row.labels + [-100] * (width - len(row.labels)) for row in batch])
    return ids, labels


def _summed_loss(model: Any, ids: Any, labels: Any) -> Any:
    """Cross entropy (nats) summed over the trained tokens; logits in float32."""
    logits = model(ids[:, :-1]).astype(mx.float32)
    targets = labels[:, 1:]
    mask = targets != -100
    losses = nn.losses.cross_entropy(logits, mx.where(mask, targets, 0))
    return mx.sum(mx.where(mask, losses, 0.0))
