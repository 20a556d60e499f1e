"""Models from directories to devices, and adapters onto models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from finetune.backends.torch import quantizers
from finetune.backends.torch.tokenizer import HFTokenizer, quiet
from finetune.core.errors import MissingError, StageError, UsageError, first_line
from finetune.models import files

UNLOADABLE = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError, EOFError)
ADAPTER = "adapter_model.safetensors"
PLACE = re.compile(r"\.default(?=\.|$)")  # the name of the one adapter, which its file leaves out
NAMED = 4  # weights that an error tells of
# What older checkpoints hold beside their weights, and models compute; transformers knows the most of them itself.
COMPUTED = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias|attention\.bias|num_batches_tracked)$")


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

    Raises StageError where weights and model do not fit: transformers would make up at random what is missing, and leave
    out in silence what has no place. UsageError for code that the settings do not trust, and for pickles that are no weights.
    """
    quiet()
    trust = bool(settings.get("trust_remote_code"))
    dtype, device = getattr(torch, settings.get("dtype", "float32")), choose_device(settings.get("device", "auto"))
    quantizer = quantizers.chosen(settings)
    extra = {"attn_implementation": settings["attn_implementation"]} if settings.get("attn_implementation") else {}
    if not any(directory.glob("*.safetensors")):
        files.check_pickles(directory, *files.BINARIES)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            str(directory),
            dtype=dtype,
            trust_remote_code=trust,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name; the library's own error names none
            **extra,
            **(quantizer.loading(dtype, device) if quantizer else {}),
        )
    except ImportError as error:
        raise MissingError(f"the model in {directory} cannot be loaded as asked: {first_line(error)}") from error
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise files.refused_code(directory) from None
        if not isinstance(error, UNLOADABLE) and not (trust and files.code(directory)):
            raise
        kind = "" if isinstance(error, UNLOADABLE) else f"{type(error).__name__} in the code that comes with it: "
        raise StageError(f"cannot load the model in {directory}: {kind}{first_line(error)}") from error
    _check_weights(directory, model, found)
    return quantizer.loaded(model) if quantizer else model.to(device)


def _check_weights(directory: Path, model: Any, found: Mapping[str, Any]) -> None:
    """Raise StageError where a weight was not in the files, had no place in the model, or another shape there."""
    missing = sorted(found["missing_keys"])
    left = sorted(name for name in found["unexpected_keys"] if not COMPUTED.search(name))
    sizes = sorted(
        f"{name} ({_by(stored)} in the files, {_by(wanted)} by the config)"
        for name, stored, wanted in found.get("mismatched_keys", ())
    )
    if not (missing or left or sizes):
        return
    told = [
        f"{len(names)} {what} ({', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''})"
        for names, what in (
            (missing, "of its weights are not in its files"),
            (left, "weights in its files have no place in the model"),
            (sizes, "weights have another shape"),
        )
        if names
    ]
    kind = getattr(model.config, "model_type", "unknown")
    raise StageError(
        f"the model in {directory} is not whole, or its config.json (model_type '{kind}') is another model's: "
        f"{'; '.join(told)}. Fetch it again, or name another model"
    )


def _by(shape: Any) -> str:
    return " x ".join(map(str, shape))


def load_adapter(model: Any, adapter: Path, *, trainable: bool = False) -> Any:
    """`model` with the PEFT adapter stored in a directory. Raises StageError where a tensor of either finds no place in the
    other, UsageError for pickles that are no weights."""
    import warnings

    from peft import PeftModel

    if not (adapter / ADAPTER).is_file():
        files.check_pickles(adapter, *files.BINARIES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            wrapped = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
        except (*UNLOADABLE, TypeError, AttributeError) as error:
            why = first_line(error)
            raise StageError(
                f"the adapter in {adapter} does not fit its base model {model.name_or_path}: "
                f"{why if len(why) < 200 else why[:200] + '...'} If it was trained on another, set model.base_model"
            ) from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message).lower():
            raise StageError(f"the adapter in {adapter} does not fit this model: {str(warning.message)[:200]}")
    if left := _left_out(wrapped, adapter / ADAPTER):
        raise StageError(
            f"the adapter in {adapter} does not fit this model: {len(left)} of its tensors have no place in it "
            f"({', '.join(left[:NAMED])}{', ...' if len(left) > NAMED else ''}). If it was trained on another base, set "
            "model.base_model"
        )
    return wrapped


def _left_out(wrapped: Any, file: Path) -> list[str]:
    """The LoRA tensors of a file that were not put anywhere: PEFT passes over them."""
    if not file.is_file():
        return []
    places = {PLACE.sub("", name) for name in wrapped.state_dict()}
    places |= {
        name.removesuffix(".weight") for name in places if "lora_magnitude" in name
    }  # DoRA's are stored without it
    with safe_open(str(file), framework="pt") as stored:
        return sorted(name for name in stored.keys() if ".lora_" in name and name not in places)  # noqa: SIM118


def load_for_inference(directory: Path, adapter: Path | None = None, **settings: Any) -> Handle:
    """A handle for `score` and `generate`."""
    model = load_model(directory, settings)
    if adapter is not None:
        model = load_adapter(model, adapter)
    tokenizer = HFTokenizer(directory, trust_remote_code=bool(settings.get("trust_remote_code")))
    return Handle(model.eval(), tokenizer, next(model.parameters()).device)
