"""Training for the fake backend: SFT and DPO, LoRA and full, with the Trainer's order, schedules and checkpoints."""

from __future__ import annotations

import json
import math
import random
import time
from array import array
from collections import defaultdict
from collections.abc import Generator
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.backends import Job, Step
from finetune.backends.failing import StepError, leaves_checkpoint, skips, taking
from finetune.backends.fake.model import (
    GAIN,
    MOMENTUM,
    Adapter,
    Base,
    FakeModel,
    Key,
    Place,
    bucket,
    merged,
    save_adapter,
    save_model,
)
from finetune.backends.fake.rows import Gradient, Row, read_rows
from finetune.backends.weight_updates import CLIPPED_STEPS, Motion
from finetune.core.errors import MissingError, UsageError
from finetune.core.files import read_object
from finetune.recipe import schedule, trackers
from finetune.recipe.sections import Optimization
from finetune.run import checkpoints, identity

# ("A", module, slot, bucket), ("B", topic, tail, slot); in full training ("T", topic, tail, token), ("E", last, token).
Parameter = tuple[Any, ...]


class Training:
    """One job. `steps` yields; everything else is its state."""

    def __init__(self, job: Job) -> None:
        self.job, self.options = job, job.options
        self.lora = job.method == "lora"
        if job.objective == "dpo" and self.options.get("loss_type", "sigmoid") != "sigmoid":
            raise UsageError(f"the fake backend has no DPO loss '{self.options['loss_type']}'. It has: sigmoid.")
        if trackers.named(self.options.get("report_to")):
            section = "align" if job.objective == "dpo" else "train"
            raise UsageError(f"{section}.report_to: the fake backend reports to no tracker; leave it out")
        self.rows = read_rows(job.rows)
        self.eval_rows = read_rows(job.eval_rows) if job.eval_rows else []
        self.step, self.best, self.patience_used = 0, math.inf, 0
        self.stopped = False
        self.begun = 0
        self.velocity: dict[Parameter, float] = defaultdict(float)
        base = Base.read(job.model)
        start = Adapter.read(job.adapter) if job.adapter else None
        if self.lora:
            self.model = FakeModel(base, start or Adapter.fresh(job.lora or {}, self._seed))
        else:
            self.model = FakeModel(merged(base, start) if start else base)
        self.reference: dict[int, tuple[float, float]] = {}
        if job.objective == "dpo":
            reference = FakeModel(Base.read(job.model), Adapter.read(job.adapter) if job.adapter else None)
            both = self.rows + self.eval_rows
            self.reference = {id(row): (_sum(reference, row.chosen), _sum(reference, row.rejected)) for row in both}
        if job.resume:
            self._resume(job.resume)
        identity.check_plan(self.step, self.total)
        for row in self.rows:
            for place in row.chosen + row.rejected:
                self._allocate(place)
        self.model.forget()
        rate = float(self.options.get("learning_rate", 2e-4))
        self.motion = Motion(rate, self._sample(), fresh=False)  # it is no Adam
        self.norms: list[float] = []  # of the first gradients, as the optimizer gets them

    # -- shape of the training, as transformers computes it -------------------------------------------------------

    @property
    def _seed(self) -> int:
        return int(self.options.get("seed", 0))

    @property
    def _batch(self) -> int:
        return int(self.options.get("per_device_train_batch_size", 4))

    @property
    def _accumulation(self) -> int:
        return int(self.options.get("gradient_accumulation_steps", 1))

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(math.ceil(len(self.rows) / self._batch) / self._accumulation)

    @property
    def total(self) -> int:
        limit = int(self.options.get("max_steps", -1))
        epochs = float(self.options.get("num_train_epochs", 3.0))
        return limit if limit > 0 else math.ceil(self.steps_per_epoch * epochs)

    def learning_rate(self, step: int) -> float:
        """The rate that step number `step` (from 1) is taken with."""
        kind, peak = self.options.get("lr_scheduler_type", "cosine"), float(self.options.get("learning_rate", 2e-4))
        return schedule.learning_rate(kind, peak, float(self.options.get("warmup_steps", 0)), step, self.total)

    def _taken(self, step: int) -> list[list[Row]]:
        """The batches of a step: the epoch's seeded order, cut into batches, `accumulation` of them at a time."""
        epoch, within = divmod(step, self.steps_per_epoch)
        seed = self.options.get("data_seed")
        order = list(self.rows)
        random.Random(f"order/{self._seed if seed is None else seed}/{epoch}").shuffle(order)
        batches = [order[at : at + self._batch] for at in range(0, len(order), self._batch)]
        return batches[within * self._accumulation : (within + 1) * self._accumulation]

    # -- the loop -------------------------------------------------------------------------------------------------

    def steps(self) -> Generator[Step, None, dict[str, Any]]:
        frozen = self._frozen_digest()
        resumed = self.step if self.job.resume else None
        if self.lora and resumed is None:
            self._save(self.job.out / "initial")
        while self.step < self.total and not self._out_of_patience:
            began = time.perf_counter()
            try:
                step, stop = self._take_step(began)
            except StepError as error:
                if leaves_checkpoint(error, self.options) and self.step > self.begun:
                    self.checkpoint()
                raise
            self.stopped = self.step < self.total and self.job.should_stop()
            yield step  # its event is in the log before a checkpoint knows of it
            if self._saves(stop) or self.stopped:
                self.checkpoint()
            if self.stopped:
                return self._facts(frozen, resumed)
            if stop:
                break
        self._save(self.job.out / ("adapter" if self.lora else "model"))
        return self._facts(frozen, resumed)

    def _take_step(self, began: float) -> tuple[Step, bool]:
        batches, rate = self._taken(self.step), self.learning_rate(self.step + 1)
        rows = [row for batch in batches for row in batch]
        numbers = tuple(row.number for row in rows)
        gradient = Gradient()
        with taking(self.step + 1, numbers):
            loss, extra = self._loss(rows, gradient)
            norm = self._norm(gradient, self._weight(rows))
        skipped = skips(self.options, step=self.step + 1, loss=loss, grad_norm=norm, rows=numbers)
        if not skipped:
            self._move(gradient, norm, rate, rows)
        self.step += 1
        stop = self._evaluate(extra)
        return (
            Step(
                step=self.step,
                total=self.total,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                seconds=time.perf_counter() - began,
                tokens=sum(row.tokens for row in rows),
                trained_tokens=sum(len(row.chosen) + len(row.rejected) for row in rows),
                rows=numbers,
                epoch=self.step / self.steps_per_epoch,
                skipped=int(skipped),
                extra=extra,
            ),
            stop,
        )

    def _move(self, gradient: Gradient, norm: float, rate: float, rows: list[Row]) -> None:
        """Clip the gradient, and step the weights by it."""
        limit = float(self.options.get("max_grad_norm", 1.0))
        if limit and norm > limit:
            gradient.scale(limit / norm)
        if len(self.norms) < CLIPPED_STEPS:
            self.norms.append(self._norm(gradient, self._weight(rows)))
        self._update(gradient, rate, self._weight(rows))
        self.motion.stepped(rate, self._sample())

    def _evaluate(self, extra: dict[str, float]) -> bool:
        """Add `eval_loss` when one is due; True when early stopping says enough."""
        strategy = self.options.get("eval_strategy", "no")
        chosen = self.options.get("eval_steps") or self.options.get("logging_steps") or 1
        every = self.steps_per_epoch if strategy == "epoch" else int(chosen)
        if strategy == "no" or not self.eval_rows or self.step % every:
            return False
        loss = extra["eval_loss"] = self._loss(self.eval_rows, None)[0]
        if loss < self.best - float(self.options.get("early_stopping_threshold", 0.0)):
            self.best, self.patience_used = loss, 0
        else:
            self.patience_used += 1
        return self._out_of_patience

    @property
    def _out_of_patience(self) -> bool:
        patience = self.options.get("early_stopping_patience")
        return patience is not None and self.patience_used >= patience

    def _weight(self, rows: list[Row]) -> int:
        """What the summed loss is divided by: trained tokens (SFT), pairs (DPO)."""
        return len(rows) if self.job.objective == "dpo" else max(1, sum(len(row.chosen) for row in rows))

    def _loss(self, rows: list[Row], gradient: Gradient | None) -> tuple[float, dict[str, float]]:
        """Mean loss under the weights as they are; adds to `gradient` when there is one."""
        if self.job.objective == "dpo":
            return self._dpo(rows, gradient)
        return -sum(self._add(row.chosen, 1.0, gradient) for row in rows) / self._weight(rows), {}

    def _dpo(self, rows: list[Row], gradient: Gradient | None) -> tuple[float, dict[str, float]]:
        beta, losses, chosen, rejected = float(self.options.get("beta", 0.1)), [], [], []
        for row in rows:
            reference = self.reference[id(row)]
            chosen.append(beta * (_sum(self.model, row.chosen) - reference[0]))
            rejected.append(beta * (_sum(self.model, row.rejected) - reference[1]))
            margin = chosen[-1] - rejected[-1]
            losses.append(max(0.0, -margin) + math.log1p(math.exp(-abs(margin))))
            if gradient is not None:
                force = math.exp(-losses[-1] - margin)  # sigmoid(-margin)
                self._add(row.chosen, force, gradient)
                self._add(row.rejected, -force, gradient)
        margins = [good - bad for good, bad in zip(chosen, rejected, strict=True)]
        return _mean(losses), {
            "rewards/chosen": _mean(chosen),
            "rewards/rejected": _mean(rejected),
            "rewards/margins": _mean(margins),
            "rewards/accuracies": _mean([float(margin > 0) for margin in margins]),
        }

    def _add(self, answer: list[Place], weight: float, gradient: Gradient | None) -> float:
        """The answer's log-probability; adds `weight` times the gradient of its negative."""
        total = 0.0
        for place in answer:
            logits, norm = self.model.logits(place.key, place.last)
            total += logits.get(place.target, 0.0) - norm
            if gradient is None:
                continue
            gradient.seen[place.key] += 1
            for token in self._tokens(place.key):
                error = math.exp(logits.get(token, 0.0) - norm) - (token == place.target)
                gradient.rows[place.key, token] += weight * error
            if not self.lora:
                error = math.exp(logits.get(place.target, 0.0) - norm) - 1
                gradient.bigram[place.last, place.target] += weight * error
        return total

    # -- weights --------------------------------------------------------------------------------------------------

    def _allocate(self, place: Place) -> None:
        if self.model.adapter:
            self.model.adapter.allocate(place.key, place.target)
        else:
            self.model.base.table.setdefault(place.key, {}).setdefault(place.target, 0.0)

    def _tokens(self, key: Key) -> list[int]:
        return self.model.adapter.slots[key] if self.model.adapter else list(self.model.base.table[key])

    def _norm(self, gradient: Gradient, weight: int) -> float:
        """The norm of the gradient of the mean loss."""
        square, adapter = 0.0, self.model.adapter
        for (key, token), total in gradient.rows.items():
            if adapter is None:
                square += _square(total / weight)
                continue
            module, slot, column = adapter.home[key], adapter.slots[key].index(token), bucket(key)
            gate, value = adapter.scale * adapter.a[module][slot][column], adapter.scale * adapter.b[key][slot]
            square += _square(gate * total / weight) + _square(value * total / weight)
        return math.sqrt(square + sum(_square(total / weight) for total in gradient.bigram.values()))

    def _update(self, gradient: Gradient, rate: float, weight: int) -> None:
        """Step every touched weight."""
        gates: dict[Parameter, list[float]] = defaultdict(list)
        adapter = self.model.adapter
        for (key, token), total in gradient.rows.items():
            mean = total / gradient.seen[key]
            if adapter is None:
                row = self.model.base.table[key]
                row[token] -= 4 * GAIN * rate * self._push(("T", *key, token), mean)
                continue
            module, slot, column = adapter.home[key], adapter.slots[key].index(token), bucket(key)
            gate, value = adapter.scale * adapter.a[module][slot][column], adapter.scale * adapter.b[key][slot]
            gates["A", module, slot, column].append(value * mean)
            adapter.b[key][slot] -= GAIN * rate * self._push(("B", *key, slot), gate * mean)
        for parameter, found in gates.items():
            _, module, slot, column = parameter
            if adapter and any(found):
                adapter.a[module][slot][column] -= GAIN / 100 * rate * self._push(parameter, _mean(found))
        for (last, token), total in gradient.bigram.items():
            row = self.model.base.bigram.setdefault(last, {})
            row[token] = row.get(token, 0.0) - GAIN / 100 * rate * self._push(("E", last, token), total / weight)

    def _push(self, parameter: Parameter, gradient: float) -> float:
        self.velocity[parameter] = MOMENTUM * self.velocity[parameter] + gradient
        return self.velocity[parameter]

    def _sample(self) -> bytes:
        """Every weight of the contexts that training knows, as bytes."""
        if self.model.adapter:
            return b"".join(array("d", row).tobytes() for row in self.model.adapter.b.values())
        return b"".join(array("d", row.values()).tobytes() for row in self.model.base.table.values())

    def _frozen_digest(self) -> str:
        total = sha256()
        for name, (_, values) in sorted(self.model.base.tensors().items()) if self.lora else ():
            total.update(name.encode() + values.tobytes())
        return total.hexdigest()

    def _facts(self, frozen_before: str, resumed: int | None) -> dict[str, Any]:
        base, adapter = self.model.base, self.model.adapter
        trainable = adapter.parameters if adapter else base.parameters
        frozen = base.parameters if adapter else 0
        return {
            "trainable_parameters": trainable,
            "frozen_parameters": frozen,
            "frozen_sha256_before": frozen_before,
            "frozen_sha256_after": self._frozen_digest(),
            "world_size": 1,
            "device": "cpu",
            "trainable_bytes": 8 * trainable,
            "gradient_bytes": 8 * trainable,
            "optimizer_bytes": 8 * trainable,
            "weight_bytes": 8 * (trainable + frozen),
            "steps": self.step,
            "planned_steps": self.total,
            **self.motion.facts(),
            "clipped_norm": _largest(self.norms) if self.norms else None,
            "optimized_parameters": trainable,
            **self._settings(),
            "resumed_from": resumed,
            "stopped": self.stopped,
        }

    def _settings(self) -> dict[str, float]:
        """What an optimizer would be set to. This one has no moments, and neither decays nor drops anything."""
        asked = {**Optimization().model_dump(), **self.options}
        keys = ["weight_decay"]
        if asked["optim"].startswith("adamw"):
            keys += ["adam_beta1", "adam_beta2", "adam_epsilon"]
        found = {key: float(asked[key]) for key in keys}
        if self.lora:
            found["lora_dropout"] = 0.0 if self.job.objective == "dpo" else self._dropout()
        return found

    def _dropout(self) -> float:
        """The adapter's: of the one that is trained further, or of the one that was asked for."""
        config = read_object(self.job.adapter / "adapter_config.json") if self.job.adapter else self.job.lora or {}
        return float(config.get("lora_dropout") or 0.0)

    # -- files ----------------------------------------------------------------------------------------------------

    def _save(self, directory: Path, **more: str) -> Path:
        if self.model.adapter:
            return save_adapter(directory, self.model.adapter, self.job.model, self.job.chat_template, **more)
        return save_model(directory, self.model.base, self.job.chat_template, **more)

    def _saves(self, stop: bool) -> bool:
        strategy = self.options.get("save_strategy", "steps")
        every = self.steps_per_epoch if strategy == "epoch" else int(self.options.get("save_steps", 50))
        return strategy != "no" and (stop or self.step == self.total or self.step % every == 0)

    def checkpoint(self) -> None:
        """Write `out/checkpoint-N` and drop the oldest beyond `save_total_limit`."""
        state = {
            "global_step": self.step,
            "max_steps": self.total,
            "best": None if math.isinf(self.best) else self.best,
            "patience_used": self.patience_used,
        }
        counts = {"steps_watched": self.step - self.begun, "planned_steps": self.total}
        known = self.job.identity and identity.grown(self.job.identity, {**counts, **self.motion.facts()})
        files = {
            "optimizer.json": json.dumps([[*parameter, value] for parameter, value in self.velocity.items()]),
            **({identity.FILE: known} if known else {}),
            checkpoints.STATE: json.dumps(state),
        }
        with checkpoints.writing(self.job.out, self.step) as directory:
            self._save(directory, **files)
        checkpoints.rotate(self.job.out, self.options.get("save_total_limit", 2))

    def _resume(self, directory: Path) -> None:
        if not checkpoints.is_checkpoint(directory):
            raise MissingError(f"{directory} is no checkpoint of the fake backend (no {checkpoints.STATE})")
        state = checkpoints.state(directory)
        self.step = self.begun = state["global_step"]
        self.patience_used = state["patience_used"]
        self.best = math.inf if state["best"] is None else state["best"]
        stored = directory / "optimizer.json"  # version 0.1 had it in the trainer's state
        velocity = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else state["velocity"]
        self.velocity.update({tuple(parameter): value for *parameter, value in velocity})
        if self.lora:
            self.model = FakeModel(self.model.base, Adapter.read(directory))
        else:
            self.model = FakeModel(Base.read(directory))


def _sum(model: FakeModel, answer: list[Place]) -> float:
    return sum(model.log_probability(place) for place in answer)


def _square(value: float) -> float:
    """Infinite where it is beyond a float; `value**2` raises there."""
    return value * value


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _largest(values: list[float]) -> float:
    """NaN where one is, which `max` would pass over."""
    return math.nan if any(map(math.isnan, values)) else max(values)
