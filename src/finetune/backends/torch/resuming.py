"""What a resumed TRL training needs beside transformers' own: its record, its own settings, and an end without a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetune.backends import Job
from finetune.backends.torch import states
from finetune.core.errors import UsageError
from finetune.core.files import read_object
from finetune.run import checkpoints, identity

# Settings of the recipe that a checkpoint's optimizer would bring back with its state.
OWN = ("initial_lr", "weight_decay", "betas", "eps")
NAMED = 3  # tensors that an error tells of


class NothingLeftError(Exception):
    """Raised where training would begin, with everything loaded, when the checkpoint is of the last step."""


def keep_whole(trainer: Any, job: Job, facts: Callable[[], dict[str, Any]], logged: Callable[[], bool]) -> None:
    """Let every checkpoint appear whole, with the training's record in it, once the log knows its step (`logged`)."""
    save, place = trainer._save_checkpoint, trainer._get_output_dir

    def saved(model: Any, trial: Any) -> None:
        state = trainer.state
        with checkpoints.writing(job.out, state.global_step, logged) as folder:
            identity.leave(folder, job.identity, facts())
            trainer._get_output_dir = lambda trial: str(folder.parent)
            try:
                save(model, trial)
            finally:
                trainer._get_output_dir = place
            best = _best(trainer, job)
            if best is not None:  # transformers looked for it beside the folder that is written into
                state.best_model_checkpoint = str(best)
                state.save_to_json(str(folder / checkpoints.STATE))
        checkpoints.rotate(job.out, trainer.args.save_total_limit, best)

    trainer._save_checkpoint = saved


def _best(trainer: Any, job: Job) -> Path | None:
    """The checkpoint of the best step so far, where that is known and it is there, or is being written."""
    step = trainer.state.best_global_step
    folder = job.out / f"checkpoint-{step}"
    return folder if step and (step == trainer.state.global_step or folder.is_dir()) else None


def keep_own_settings(trainer: Any) -> None:
    """Let the optimizer be set as this job asks, and its rate follow this job's schedule from the first step on.

    transformers takes both from the checkpoint: the rate of the first step, and the peak of all that follow.
    """
    load = trainer._load_optimizer_and_scheduler

    def loaded(checkpoint: str | None) -> None:
        groups, scheduler = trainer.optimizer.param_groups, trainer.lr_scheduler
        own = [{key: group[key] for key in OWN if key in group} for group in groups]
        load(checkpoint)
        if checkpoint is None or not hasattr(scheduler, "lr_lambdas"):
            return
        scheduler.base_lrs = [settings["initial_lr"] for settings in own]
        scheduler._last_lr = scheduler.get_lr()
        for group, settings, rate in zip(trainer.optimizer.param_groups, own, scheduler._last_lr, strict=True):
            group.update(settings)
            if isinstance(group["lr"], torch.Tensor):  # a compiled optimizer holds on to the tensor
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    trainer._load_optimizer_and_scheduler = loaded


def check_fits(job: Job, model: Any) -> None:
    """Raise UsageError where the checkpoint's tensors are not those of the model that is trained."""
    if job.resume is None:
        return
    lora = job.method == "lora"
    ours = {name.replace(".default.", "."): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {name: shape for name, shape in _shapes(job.resume, lora).items() if not lora or _is_lora(name)}
    wanted = {name for name in ours if _is_lora(name) and ".ref." not in name} if lora else _alone(model, set(stored))
    kind, other = model.config.model_type, _kind(job.resume)
    faults = [f"the model is a {other} in the checkpoint and a {kind} here"] if other not in (None, kind) else []
    faults += [f"{name} is not in the checkpoint" for name in sorted(wanted - set(stored))]
    faults += [f"{name} is not in the model" for name in sorted(set(stored) - set(ours)) if lora]
    faults += [
        f"{name} is {_by(stored[name])} in the checkpoint and {_by(ours[name])} in the model"
        for name in sorted(wanted & set(stored))
        if stored[name] != ours[name]
    ]
    if faults or not stored:
        more = f"; and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise UsageError(
            f"{job.resume} is of another model or adapter: {'; '.join(faults[:NAMED]) or 'it holds no weights'}{more}. "
            "Resume with the recipe it was made by, or start anew with --force"
        )


def begin(trainer: Any, job: Job) -> None:
    """As training is about to begin: raise NothingLeftError after the last step, UsageError beyond it."""
    done, total = trainer.state.global_step, trainer.state.max_steps
    identity.check_plan(done, total)
    if best := _best(trainer, job):  # the run may lie elsewhere now
        trainer.state.best_model_checkpoint = str(best)
    if done == total or (done and _out_of_patience(trainer)):
        raise NothingLeftError


def conclude(trainer: Any) -> None:
    """What transformers does at the end of a training, where there was nothing left to train."""
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer.control = trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)


def _out_of_patience(trainer: Any) -> bool:
    callbacks = [
        each for each in trainer.callback_handler.callbacks if hasattr(each, "early_stopping_patience_counter")
    ]
    return any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in callbacks)


def _kind(checkpoint: Path) -> str | None:
    """The architecture of a checkpoint that holds a whole model."""
    config = checkpoint / "config.json"
    return read_object(config).get("model_type") if config.is_file() else None


def _alone(model: Any, stored: set[str]) -> set[str]:
    """The names of a whole model's tensors that a checkpoint has to hold; of those that are tied, as a head to the embedding,
    one is enough."""
    tensors = model.state_dict()
    held = {tensor.data_ptr() for name, tensor in tensors.items() if name in stored}
    return {name for name, tensor in tensors.items() if name in stored or tensor.data_ptr() not in held}


def _shapes(checkpoint: Path, lora: bool) -> dict[str, tuple[int, ...]]:
    """The shapes in a checkpoint's weights, as transformers and PEFT look for them: older versions pickled tensors."""
    found: dict[str, tuple[int, ...]] = {}
    for file in checkpoint.glob("adapter_model.safetensors" if lora else "*.safetensors"):
        with safe_open(str(file), "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    if not found:
        for file in checkpoint.glob("adapter_model.bin" if lora else "pytorch_model*.bin"):
            with states.named(file):
                tensors = torch.load(file, map_location="meta", weights_only=True)
                found |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return found


def _is_lora(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
