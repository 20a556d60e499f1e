"""`train`: a TRL trainer run in a thread, its steps handed out one by one.

The trainer blocks until it is done, and the contract is an iterator, so the trainer works in a thread of its own and
puts every logged step into a queue. Closing the iterator asks the trainer to save a checkpoint and stop.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PrinterCallback, TrainerCallback, set_seed

from finetune.backends import Job, Step
from finetune.backends.effect import SAMPLE, Effect
from finetune.backends.torch import options, tracking
from finetune.backends.torch.loading import choose_device, load_adapter, load_model
from finetune.backends.torch.tokenizer import HFTokenizer
from finetune.lookup import load as load_reference
from finetune.recipe import trackers

OBJECTIVES = {"sft": "finetune.backends.torch.sft:make_trainer", "dpo": "finetune.backends.torch.dpo:make_trainer"}
# Recipe keys that are training arguments of transformers and TRL under the same name.
ARGUMENTS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
    "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay",
    "max_grad_norm", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_length", "gradient_checkpointing",
    "bf16", "fp16", "tf32", "torch_compile", "seed", "data_seed", "full_determinism", "logging_steps",
    "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps", "dataloader_num_workers",
)  # fmt: skip


def arguments(job: Job, *names: str) -> dict[str, Any]:
    """The keyword arguments for an SFTConfig or DPOConfig, with every surprising default set by hand."""
    from finetune.recipe.sections import Optimization

    values = {**Optimization().model_dump(mode="json"), **job.options}  # never TRL's own defaults
    chosen = {name: values[name] for name in (*ARGUMENTS, *names) if name in values}
    if chosen.get("data_seed") is None:
        chosen["data_seed"] = chosen.get("seed", 0)
    return {
        **chosen,
        "output_dir": str(job.out),
        "report_to": trackers.named(values["report_to"]),
        "run_name": job.name,
        "project": tracking.PROJECT,
        "use_cpu": choose_device(job.settings.get("device", "auto")).type == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # the default shows the last good loss instead of NaN
        "logging_first_step": True,
    }


def train(job: Job) -> Generator[Step, None, dict[str, Any]]:
    """Yield every logged step; return the facts of the training. See `finetune.backends.Backend.train`."""
    steps: queue.Queue[Step | BaseException | None] = queue.Queue()
    stop = threading.Event()
    facts: dict[str, Any] = {}

    def work() -> None:
        try:
            with tracking.tracked(job):
                facts.update(_train(job, steps.put, stop))
            steps.put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            steps.put(error)

    thread = threading.Thread(target=work, name="trainer", daemon=True)
    thread.start()
    try:
        while (item := steps.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
    return facts


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def adapted(job: Job, model: Any) -> Any:
    """`model` with the adapter this job trains: the stored one, a fresh one, or (full fine-tuning) none."""
    if job.adapter is not None:
        return load_adapter(model, job.adapter, trainable=True)
    if job.method == "full":
        return model
    from peft import LoraConfig, get_peft_model

    lora = dict(job.lora or {})
    if lora.get("layers_to_transform") and lora.get("target_modules") == "all-linear":
        lora["target_modules"] = options.linear_names(model)  # PEFT picks layers for a list of names only
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora))


def _train(job: Job, put: Any, stop: threading.Event) -> dict[str, Any]:
    datasets.disable_progress_bars()
    set_seed(job.options.get("seed", 0), deterministic=job.options.get("full_determinism", False))
    tokenizer = HFTokenizer(job.model)
    if job.chat_template:
        tokenizer.hf.chat_template = job.chat_template
    base = load_model(job.model, job.settings)
    options.check(job, base)
    with options.translated("align" if job.objective == "dpo" else "train"):
        model = adapted(job, base)
        if job.method == "full":
            model.requires_grad_(True)
        trainer = load_reference(OBJECTIVES[job.objective])(job, model, tokenizer)
    recorder = Recorder(trainer)
    trainer.data_collator, trainer.get_batch_samples = recorder, recorder.taken
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Reporter(trainer, recorder, put, lambda: stop.is_set() or job.should_stop()))
    _save(job, trainer.model, tokenizer, job.out / "initial", weights_of_full=False)
    frozen_before = frozen_digest(trainer.model)
    begun = _step_of(job.resume) if job.resume else None  # now: save_total_limit may delete that very checkpoint
    trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
    reporter = next(c for c in trainer.callback_handler.callbacks if isinstance(c, Reporter))
    facts = {
        **parameter_facts(trainer.model),
        **reporter.state_bytes,
        "frozen_sha256_before": frozen_before,
        "frozen_sha256_after": frozen_digest(trainer.model),
        "world_size": trainer.args.world_size,
        "device": trainer.args.device.type,
        "steps": trainer.state.global_step,
        "steps_without_effect": reporter.effect.without,
        "stopped": trainer.state.global_step < trainer.state.max_steps and reporter.stopped,
        "resumed_from": begun,
    }
    if torch.cuda.is_available():
        facts["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    if not facts["stopped"]:
        _save(job, trainer.model, tokenizer, job.out / ("adapter" if job.method == "lora" else "model"))
    return facts


def _step_of(checkpoint: Path) -> int:
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])


def _save(job: Job, model: Any, tokenizer: HFTokenizer, out: Path, *, weights_of_full: bool = True) -> None:
    """The adapter (LoRA) or the whole model (full), with the tokenizer. Only what was trained: TRL's `ref` is left out."""
    if job.method == "lora":
        model.save_pretrained(str(out), selected_adapters=["default"])
    elif weights_of_full:
        model.save_pretrained(str(out))
    else:
        return
    tokenizer.hf.save_pretrained(str(out))


def frozen_digest(model: Any) -> str:
    """SHA-256 over every frozen parameter's bytes, in order of name; adapters are not part of it."""
    total = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if not parameter.requires_grad and "lora_" not in name:
            total.update(name.encode())
            total.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def parameter_facts(model: Any) -> dict[str, int]:
    parameters = [p for name, p in model.named_parameters() if ".ref." not in name]
    trainable = [p for p in parameters if p.requires_grad]
    return {
        "trainable_parameters": sum(p.numel() for p in trainable),
        "frozen_parameters": sum(p.numel() for p in parameters if not p.requires_grad),
        "weight_bytes": sum(p.nbytes for p in parameters),
        "trainable_bytes": sum(p.nbytes for p in trainable),
    }


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

    def __init__(self, trainer: Any, recorder: Recorder, put: Any, stop: Callable[[], bool]) -> None:
        self.trainer, self.recorder, self.put, self.stop = trainer, recorder, put, stop
        self.state_bytes: dict[str, int] = {"gradient_bytes": 0, "optimizer_bytes": 0}
        self.pending: list[tuple[tuple[int, ...], int, int]] = []
        self.stopped = False
        self.effect = Effect(trainer.args.learning_rate, b"")
        self.began = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.effect = Effect(args.learning_rate, _sample(self.trainer.model))
        self.began = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.state_bytes["gradient_bytes"]:
            gradients = (p.grad for p in self.trainer.model.parameters() if p.grad is not None)
            self.state_bytes["gradient_bytes"] = sum(g.nbytes for g in gradients)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.optimizer_step_was_skipped:  # fp16's gradient scaler says so openly
            rate = max(group["lr"] for group in self.trainer.optimizer.param_groups)
            self.effect.stepped(rate, _sample(self.trainer.model))

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._consume()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        self._consume()
        if not self.state_bytes["optimizer_bytes"]:
            self.state_bytes["optimizer_bytes"] = _optimizer_bytes(self.trainer.optimizer)
        if self.stop():
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def _consume(self) -> None:
        if self.recorder.batches:
            self.pending.append(self.recorder.batches.popleft())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        taken = time.perf_counter()
        known = {"loss", "learning_rate", "grad_norm", "epoch"}
        self.put(
            Step(
                step=state.global_step,
                total=state.max_steps,
                loss=float(logs["loss"]),
                learning_rate=float(logs.get("learning_rate", 0.0)),
                grad_norm=None if logs.get("grad_norm") is None else float(logs["grad_norm"]),
                seconds=taken - self.began,
                tokens=sum(tokens for _, tokens, _ in self.pending),
                trained_tokens=sum(trained for _, _, trained in self.pending),
                rows=tuple(row for rows, _, _ in self.pending for row in rows),
                epoch=float(logs.get("epoch", 0.0)),
                extra={k: float(v) for k, v in logs.items() if k not in known and isinstance(v, int | float)},
            )
        )
        self.pending.clear()
        self.began = time.perf_counter()


def _sample(model: Any) -> bytes:
    """The first elements of every trained tensor, as bytes."""
    parts = [p.detach().flatten()[:SAMPLE].float() for p in model.parameters() if p.requires_grad]
    return torch.cat(parts).cpu().numpy().tobytes() if parts else b""


def _optimizer_bytes(optimizer: Any) -> int:
    inner = getattr(optimizer, "optimizer", optimizer)
    values = (value for state in inner.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
