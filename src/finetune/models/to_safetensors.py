"""A model or adapter directory as the pipeline reads it: safetensors, under the model's own names.

Pickled weights are loaded as weights and nothing else (`weights_only`); what training wrappers put before names goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finetune.core.errors import StageError, UsageError, first_line
from finetune.core.files import write_json
from finetune.models import files as modelfiles
from finetune.models import tensor_names

SHOWN = 3
# Where training scripts put the weights among other things.
INSIDE = ("state_dict", "model_state_dict", "model", "module")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.bin.index.json")
SAFETENSORS = ("*.safetensors", "*.safetensors.index.json")


def convert(place: Path, out: Path, files: list[Path], *, adapter: bool, norms: bool = True) -> list[str]:
    """Write the directory `place` again into `out` with the weights of `files` as safetensors, under their own names; other
    pickles stay behind. Returns what was done, a sentence each.

    Raises UsageError for a pickle that is no weights, StageError for a file that cannot be read, and for two tensors that
    would have one name and are not the same.
    """
    shutil.copytree(place, out, ignore=shutil.ignore_patterns(*PICKLES, *SAFETENSORS), copy_function=shutil.copyfile)
    done: dict[str, Path] = {}
    renamed: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        tensors = dict(_tensors(file))
        own = tensor_names.of_adapter(tensors) if adapter else tensor_names.of_model(tensors, norms=norms)
        target = out / _name(number, len(files), adapter)
        kept: dict[str, Any] = {}
        for name, tensor in tensors.items():
            twin = own[name]
            if twin in kept or twin in done:
                _check_same(place, name, tensor, kept[twin] if twin in kept else load_file(done[twin])[twin])
            else:
                kept[twin] = tensor
            if twin != name:
                renamed[name] = twin
        _check_whole(file, kept, adapter)
        # Tensors that share their memory, as a head tied to the embedding, are written each by itself.
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in kept.items()}, target, metadata={"format": "pt"}
        )
        done |= dict.fromkeys(kept, target)
    if len(files) > 1:
        total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        shards = {name: file.name for name, file in sorted(done.items())}
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": shards})
    return _notes(place, files, renamed)


def _name(number: int, of: int, adapter: bool) -> str:
    stem = "adapter_model" if adapter else "model"
    return f"{stem}.safetensors" if of == 1 else f"{stem}-{number:05}-of-{of:05}.safetensors"


def _tensors(file: Path) -> Iterator[tuple[str, Any]]:
    """The tensors of a file by their stored names. Raises as `convert` does."""
    if file.suffix == ".safetensors":
        try:
            yield from load_file(file).items()
        except (SafetensorError, OSError) as error:
            raise StageError(f"{file} cannot be read: {first_line(error)}; fetch the model again") from None
        return
    modelfiles.check_pickles(file.parent, file.name)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UsageError(f"{file} holds more than tensors: {_reason(error)}. {modelfiles.REMEDY}") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise StageError(f"{file} cannot be read as weights: {first_line(error)}; fetch the model again") from None
    inside = next((key for key in INSIDE if isinstance(found, Mapping) and isinstance(found.get(key), Mapping)), None)
    for name, value in (found[inside] if inside else found if isinstance(found, Mapping) else {"": found}).items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(
                f"{file} holds {type(value).__name__} under {name!r}, and weights are tensors. {modelfiles.REMEDY}"
            )
        yield str(name), value


def _reason(error: BaseException) -> str:
    """What PyTorch says, without its advice to load the file all the same."""
    said = str(error)
    at = said.rfind("WeightsUnpickler error:")
    return first_line(ValueError(said[at:])) if at >= 0 else first_line(error)


def _check_same(place: Path, name: str, tensor: Any, other: Any) -> None:
    if tensor.shape != other.shape or not torch.equal(tensor, other):
        raise StageError(
            f"the weights in {place} hold one tensor twice, and not alike: {name}, and the same without what wrappers put into "
            "its name. Which of the two is meant is not known: leave one out, or save the model anew"
        )


def _check_whole(file: Path, tensors: Mapping[str, Any], adapter: bool) -> None:
    unmerged = sorted(name for name in tensors if ".lora_" in name)
    if unmerged and not adapter:
        raise StageError(
            f"{file} holds a model with an adapter that is not merged into it ({len(unmerged)} tensors, as {unmerged[0]}). "
            "Save the adapter by itself, or merge it first: model.merge_and_unload().save_pretrained(folder)"
        )


def _notes(place: Path, files: list[Path], renamed: Mapping[str, str]) -> list[str]:
    notes = []
    pickled = [file.name for file in files if file.suffix != ".safetensors"]
    if pickled:
        notes.append(
            f"{place}: the weights in {', '.join(pickled)} are pickled; they were read as tensors alone and converted"
        )
    if renamed:
        told = ", ".join(f"{name} is {own}" for name, own in sorted(renamed.items())[:SHOWN])
        more = ", ..." if len(renamed) > SHOWN else ""
        notes.append(
            f"{place}: {len(renamed)} tensors have names that a wrapper or an older version gave them: {told}{more}"
        )
    return notes
