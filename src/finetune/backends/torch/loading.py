"""Models from directories to devices, and adapters onto models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from finetune.backends.torch.tokenizer import HFTokenizer, quiet
from finetune.errors import MissingError, StageError, UsageError, first_line


@dataclass(frozen=True)
class Handle:
    """A loaded model with its tokenizer; opaque outside this package."""

    model: Any
    tokenizer: HFTokenizer
    device: torch.device


def choose_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU. Raises UsageError for a device that is not there."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in found.items() if there))
    if not found[name]:
        raise UsageError(f"model.device is '{name}', which this machine does not have. Use 'auto' or 'cpu'.")
    return torch.device(name)


def load_model(directory: Path, settings: Mapping[str, Any]) -> Any:
    """A causal language model from a local directory, on its device, in evaluation mode.

    Raises StageError when the directory lacks weights: transformers would make them up at random.
    """
    quiet()
    extra = {"attn_implementation": settings["attn_implementation"]} if settings.get("attn_implementation") else {}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=getattr(torch, settings.get("dtype", "float32")),
            trust_remote_code=settings.get("trust_remote_code", False),
            local_files_only=True,
            output_loading_info=True,
            **extra,
        )
    except ImportError as error:
        raise MissingError(f"the model in {directory} cannot be loaded as asked: {first_line(error)}") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise StageError(f"cannot load the model in {directory}: {first_line(error)}") from error
    if found["missing_keys"]:
        raise StageError(
            f"the model in {directory} is not whole: {len(found['missing_keys'])} of its weights are not in its files "
            f"(first: {min(found['missing_keys'])}). Fetch it again, or name another model"
        )
    return model.to(choose_device(settings.get("device", "auto")))


def load_adapter(model: Any, adapter: Path, *, trainable: bool = False) -> Any:
    """`model` with the PEFT adapter stored in a directory. Raises StageError when a tensor finds no place in it."""
    import warnings

    from peft import PeftModel

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            why = first_line(error)
            raise StageError(
                f"the adapter in {adapter} does not fit its base model {model.name_or_path}: "
                f"{why if len(why) < 200 else why[:200] + '...'} If it was trained on another, set model.base_model"
            ) from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message).lower():
            raise StageError(f"the adapter in {adapter} does not fit this model: {str(warning.message)[:200]}")
    return wrapped


def load_for_inference(directory: Path, adapter: Path | None = None, **settings: Any) -> Handle:
    """A handle for `score` and `generate`."""
    model = load_model(directory, settings)
    if adapter is not None:
        model = load_adapter(model, adapter)
    return Handle(model.eval(), HFTokenizer(directory), next(model.parameters()).device)
