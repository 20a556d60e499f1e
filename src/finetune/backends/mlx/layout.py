"""Between mlx-lm's names of weights and those of the Hugging Face directory they came from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from finetune.backends.mlx.config import stored_for_mlx
from finetune.backends.mlx.runtime import mx
from finetune.backends.mlx.tensors import stored
from finetune.backends.torch.tokenizer import HFTokenizer
from finetune.core.errors import StageError, UsageError
from finetune.core.files import aside, read_object, write_json

INDEX = "model.safetensors.index.json"
# Architectures whose linear weights transformers stores as (inputs, outputs), and the modules' names.
INPUTS_FIRST = {"gpt2": ("c_attn", "c_proj", "c_fc")}


def require_hugging_face(directory: Path, verb: str) -> None:
    """Raise UsageError for an MLX directory: what was trained on it would fit no other tool."""
    if stored_for_mlx(directory):
        raise UsageError(
            f"the model in {directory} is stored for MLX, and the mlx backend can {verb} a Hugging Face directory only; "
            "name the model that it was converted from"
        )


def weight_files(directory: Path) -> list[Path]:
    files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise StageError(f"{directory} holds no model*.safetensors")
    return files


def stored_names(directory: Path) -> list[str]:
    return [name for file in weight_files(directory) for name in stored(file)]


def inputs_first(model_type: str, name: str) -> bool:
    """Whether a weight lies transposed in a Hugging Face directory."""
    return any(name.endswith(f".{module}.weight") for module in INPUTS_FIRST.get(model_type, ()))


def hugging_face_modules(directory: Path, modules: Iterable[str]) -> dict[str, str]:
    """Hugging Face's names of mlx-lm's modules; those that it does not store one for one are left out."""
    known = set(stored_names(directory))
    found = {}
    for name in modules:
        bare = name.removeprefix("model.")
        match = next((each for each in (name, f"transformer.{bare}", bare) if f"{each}.weight" in known), None)
        if match is not None:
            # A GPT-2 saved without its head lacks the prefix that transformers' model has.
            found[name] = f"transformer.{bare}" if match == bare != name else match
    return found


def mlx_name(name: str, ours: dict[str, Any]) -> str | None:
    """mlx-lm's name of a stored weight, or None where it has no such weight."""
    bare = name.removeprefix("transformer.")
    return next((each for each in (name, bare, f"model.{bare}") if each in ours), None)


def rewrite(
    directory: Path,
    out: Path,
    change: Callable[[str, Any], Any],
    *,
    tokenizer: Path,
    chat_template: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write a Hugging Face model again with `change(name, weight)` for every weight (None leaves one out), file by file.

    `out` appears whole or not at all.
    """
    with aside(out) as partial:
        partial.mkdir(parents=True)
        kept: set[str] = set()
        for file in weight_files(directory):
            tensors = {name: new for name, old in stored(file).items() if (new := change(name, old)) is not None}
            kept |= tensors.keys()
            mx.save_safetensors(str(partial / file.name), tensors, metadata={"format": "pt"})
        for pattern in ("generation_config.json", "*.py", "LICENSE*"):
            for file in directory.glob(pattern):
                shutil.copy2(file, partial / file.name)
        config = read_object(directory / "config.json")
        if dtype is not None:
            config = {**{k: v for k, v in config.items() if k != "torch_dtype"}, "dtype": dtype}
        write_json(partial / "config.json", config)
        if (directory / INDEX).is_file():
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name in kept}
            write_json(partial / INDEX, index)
        save_tokenizer(tokenizer, partial, chat_template, trust_remote_code=trust_remote_code)


def save_tokenizer(
    source: Path, out: Path, chat_template: str | None = None, *, trust_remote_code: bool = False
) -> None:
    tokenizer = HFTokenizer(source, trust_remote_code=trust_remote_code).hf
    if chat_template:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(out))
