"""`train`: a TRL trainer run in a thread, its steps handed out one by one.

The trainer blocks until it is done, and the contract is an iterator, so the trainer works in a thread of its own and
puts every logged step into a queue. Closing the iterator asks the trainer to save a checkpoint and stop.
"""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Generator
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import datasets
import torch
from transformers import PrinterCallback, set_seed

from finetune.backends import Job, Step
from finetune.backends.torch import options, quantizers, reporting, resuming, states, tracking
from finetune.backends.torch.callbacks import Recorder, Reporter
from finetune.backends.torch.calling import Tracker
from finetune.backends.torch.guarding import Guard
from finetune.backends.torch.loading import choose_device, load_adapter, load_model
from finetune.backends.torch.tokenizer import HFTokenizer
from finetune.core.errors import StageError, first_line
from finetune.core.lookup import load as load_reference
from finetune.models import files
from finetune.run import checkpoints

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
        "report_to": "none",  # trackers come later, guarded (see reporting)
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
    steps, facts = _Steps(), dict[str, Any]()

    def work() -> None:
        try:
            with tracking.tracked(job, steps.closed.is_set) as tracked:
                facts.update(_train(job, steps, tracked))
            facts["trackers"] = [failure for tracker in tracked for failure in tracker.failures]
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
            steps.task_done()
    finally:
        steps.close()
        thread.join()
    return facts


class _Steps(queue.Queue[Step | BaseException | None]):
    """Steps on their way from the trainer to who logs them."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = threading.Event()

    def close(self) -> None:
        """Nobody logs any more."""
        self.closed.set()
        with self.all_tasks_done:
            self.all_tasks_done.notify_all()

    def logged(self) -> bool:
        """Whether every step that was put in is logged; waits for whoever is still at it."""
        with self.all_tasks_done:
            self.all_tasks_done.wait_for(lambda: not self.unfinished_tasks or self.closed.is_set())
            return not self.unfinished_tasks


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


def _train(job: Job, steps: _Steps, trackers: list[Tracker]) -> dict[str, Any]:
    datasets.disable_progress_bars()
    if job.resume:
        files.check_checkpoint(job.resume)
    set_seed(job.options.get("seed", 0), deterministic=job.options.get("full_determinism", False))
    tokenizer = HFTokenizer(job.model, trust_remote_code=bool(job.settings.get("trust_remote_code")))
    if job.chat_template:
        tokenizer.hf.chat_template = job.chat_template
    base = load_model(job.model, job.settings)
    options.check(job, base)
    with options.translated("align" if job.objective == "dpo" else "train"):
        model = adapted(job, base)
        if job.method == "full":
            model.requires_grad_(True)
        trainer = load_reference(OBJECTIVES[job.objective])(job, model, tokenizer)
    quantizer = quantizers.chosen(job.settings)
    if quantizer:  # TRL makes adapters on a quantized base bfloat16, whatever was asked for
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    recorder = Recorder(trainer)
    trainer.data_collator, trainer.get_batch_samples = recorder, recorder.taken
    trainer.remove_callback(PrinterCallback)
    reporting.attach(trainer, trackers)
    guard = Guard(trainer, recorder, job)
    trainer.add_callback(guard)
    reporter = Reporter(trainer, recorder, guard, job, steps.put, lambda: steps.closed.is_set() or job.should_stop())
    trainer.add_callback(reporter)
    resuming.keep_whole(trainer, job, reporter.so_far, steps.logged)
    states.read_older(trainer, job.resume)
    resuming.keep_own_settings(trainer)
    resuming.check_fits(job, trainer.model)
    _save(job, trainer.model, tokenizer, job.out / "initial", weights_of_full=False)
    frozen_before = frozen_digest(trainer.model)
    # Read now: save_total_limit may delete that very checkpoint.
    begun = checkpoints.state(job.resume)["global_step"] if job.resume else None
    try:
        with guard.saving(reporter.hand_out):
            trainer.train(resume_from_checkpoint=str(job.resume) if job.resume else None)
    except resuming.NothingLeftError:
        resuming.conclude(trainer)
    except UnpicklingError as error:
        raise StageError(
            f"{job.resume} holds a file with more than tensors, of which nothing was run: {first_line(error)}. Resume from "
            "another checkpoint, or start anew with --force"
        ) from None
    facts = {
        **parameter_facts(trainer.model, quantizer),
        **reporter.facts(),
        "frozen_sha256_before": frozen_before,
        "frozen_sha256_after": frozen_digest(trainer.model),
        "world_size": trainer.args.world_size,
        "device": trainer.args.device.type,
        "steps": trainer.state.global_step,
        "planned_steps": trainer.state.max_steps,
        "stopped": trainer.state.global_step < trainer.state.max_steps and reporter.stopped,
        "resumed_from": begun,
    }
    if torch.cuda.is_available():
        facts["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    if not facts["stopped"]:
        _save(job, trainer.model, tokenizer, job.out / ("adapter" if job.method == "lora" else "model"))
    return facts


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


def parameter_facts(model: Any, quantizer: ModuleType | None = None) -> dict[str, int]:
    parameters = [p for name, p in model.named_parameters() if ".ref." not in name]
    held = [quantizer.held(p) if quantizer else None for p in parameters]
    plain = [p for p, found in zip(parameters, held, strict=True) if found is None]
    trainable = [p for p in parameters if p.requires_grad]
    numbers, size = (sum(found[part] for found in held if found) for part in (0, 1))
    return {
        "trainable_parameters": sum(p.numel() for p in trainable),
        "frozen_parameters": sum(p.numel() for p in plain if not p.requires_grad) + numbers,
        "weight_bytes": sum(p.nbytes for p in plain) + size,
        "trainable_bytes": sum(p.nbytes for p in trainable),
        **({"quantized_parameters": numbers, "quantized_bytes": size} if quantizer else {}),
    }
