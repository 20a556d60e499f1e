"""Do the options of a job fit the model and this machine? Said in the recipe's words, before a library says it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.training_args import OptimizerNames

from finetune.backends import Job
from finetune.backends.torch.loading import choose_device
from finetune.core.errors import Faults, FinetuneError, MissingError, UsageError
from finetune.core.lookup import did_you_mean


def check(job: Job, model: Any) -> None:
    """Raise UsageError with every option that cannot be carried out."""
    section = "align" if job.objective == "dpo" else "train"
    faults = [f"{section}.{fault}" for fault in _machine_faults(job)]
    if job.method == "lora" and job.adapter is None and job.lora:
        faults += [f"train.lora.{fault}" for fault in _lora_faults(job.lora, model)]
    if faults:
        raise Faults(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} in the recipe:", faults)


@contextmanager
def translated(section: str) -> Iterator[None]:
    """What a library says against the options of a recipe section, as an error of ours."""
    try:
        yield
    except FinetuneError:
        raise
    except ImportError as error:
        raise MissingError(
            f"the options of '{section}' need a package that is not here: {_first_line(error)}"
        ) from error
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        if "requires" in str(error) and "to be installed" in str(error):  # how transformers refuses a tracker
            raise MissingError(f"{section}.report_to: {_first_line(error)}") from error
        raise UsageError(f"the options of '{section}' cannot be carried out: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip("'\" \n").splitlines() or [type(error).__name__])[0]


def _machine_faults(job: Job) -> list[str]:
    faults = []
    optim, known = job.options.get("optim"), [name.value for name in OptimizerNames]
    if optim is not None and optim not in known:
        faults.append(f"optim: unknown optimizer '{optim}'.{did_you_mean(optim, known)} Known: {', '.join(known)}.")
    device = choose_device(job.settings.get("device", "auto")).type
    if job.options.get("tf32") and device != "cuda":
        faults.append(f"tf32: true needs an NVIDIA GPU, and the model is on the {device}. Leave it out")
    if job.options.get("fp16") and device == "cpu":  # accelerate passes over it there
        faults.append("fp16: true needs a GPU, and the model is on the cpu. Use bf16, or leave it out")
    return faults


def _lora_faults(lora: Any, model: Any) -> list[str]:
    """Names that no module has; PEFT passes over most of them in silence."""
    modules = [name for name, _ in model.named_modules() if name]
    known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _adaptable(module)})
    ends = sorted({end for name in modules if not (end := name.rpartition(".")[2]).isdigit()})
    faults = []

    def unknown(key: str, name: str, among: list[str]) -> str:
        return f"{key}: this model has no module '{name}'.{did_you_mean(name, among)} It has: {', '.join(among)}."

    targets = lora.get("target_modules")
    if isinstance(targets, str):
        if targets != "all-linear" and not any(re.fullmatch(targets, name) for name in modules):
            faults.append(f"target_modules: no module's whole name matches '{targets}'. One is: {_example(model)}")
    else:
        faults += [unknown("target_modules", name, known) for name in targets or () if not _ends_with(modules, name)]
    saved = lora.get("modules_to_save") or ()
    faults += [unknown("modules_to_save", name, ends) for name in saved if not _ends_with(modules, name)]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or {}:
            try:
                matches = any(re.fullmatch(rf"(.*\.)?({pattern})", name) for name in modules)
            except re.error as error:
                faults.append(f"{key}: '{pattern}' is neither a name nor a regular expression: {error}")
                continue
            if not matches:
                faults.append(unknown(key, pattern, known))
    count: int = getattr(model.config, "num_hidden_layers", 0)
    beyond = [layer for layer in lora.get("layers_to_transform") or () if count and not 0 <= layer < count]
    if beyond:
        faults.append(f"layers_to_transform: this model has no layer {beyond[0]}; its layers are 0 to {count - 1}")
    return faults


def linear_names(model: Any) -> list[str]:
    """The last names of the linear modules, less the output's: what `all-linear` means to PEFT."""
    output = model.get_output_embeddings()
    kinds = ("Linear", "Conv1D")
    chosen = [name for name, module in model.named_modules() if type(module).__name__ in kinds and module is not output]
    return sorted({name.rpartition(".")[2] for name in chosen})


def _adaptable(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear | torch.nn.Embedding) or type(module).__name__ == "Conv1D"


def _ends_with(modules: list[str], name: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for module in modules)


def _example(model: Any) -> str:
    names = [name for name, module in model.named_modules() if _adaptable(module)]
    return names[len(names) // 2] if names else "none"
