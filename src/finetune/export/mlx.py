"""MLX: a directory that mlx-lm loads, for Apple silicon and for MLX on Linux.

Weights go through mlx-lm's own model, so that they lie as it wants them; the config says in mlx-lm's words what
transformers means by the source's (finetune.backends.mlx.config).
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from finetune.core.errors import MissingError, StageError, UsageError, first_line
from finetune.core.files import strays
from finetune.core.install import install
from finetune.core.lookup import load as load_reference
from finetune.core.memory import need_disk
from finetune.export import Exported, Source, sizes

INSTALL = f"exporting to MLX needs mlx and mlx-lm. Install them with: {install('mlx')}"
TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
BITS = {"q8": 8, "q4": 4}
ROOM = {
    "f32": 32,
    "f16": 16,
    "bf16": 16,
    "q8": 9,
    "q4": 5,
}  # bits a weight, with 32 for a scale and a bias of each group
GROUPS = (64, 32)  # weights that share a scale; a width has to be a multiple
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "*.tiktoken", "chat_template*", "additional_chat_templates",
    "generation_config.json",
)  # fmt: skip


def rehearse(model: Path, variant: str, *, trust_remote_code: bool = False) -> None:
    """Load a model's shapes, without its weights, as `export` would.

    Raises MissingError without mlx-lm, and UsageError for an architecture or widths that it cannot take.
    """
    _open(model, variant, trust_remote_code)


def export(source: Source, variant: str, out: Path) -> Exported:
    """Write the model into `out` for mlx-lm; '' keeps the weights' type. What was written is read back.

    Raises UsageError as `rehearse` does, ResourceError where the disk is too small, StageError where the files cannot be
    written or do not say what they should.
    """
    bits = ROOM.get(variant)
    needed = sizes.stored(source.model) if bits is None else sizes.parameters(source.model) * bits / 8
    need_disk(out, needed, f"the MLX model ({variant or 'as it is'})", "choose another output_dir")
    model, reading, group = _open(source.model, variant, source.trust_remote_code)
    mx = load_reference("finetune.backends.mlx.runtime:mx")
    try:
        with mx.stream(mx.cpu):
            config = _write(model, dict(reading.config), variant, group, out)
        copied = _copy(source.model, out, code=source.trust_remote_code)
        _read_back(source.model, out, reading.config, source.trust_remote_code)
    except (OSError, RuntimeError) as error:
        if isinstance(error, StageError):
            raise
        raise StageError(
            f"the MLX model could not be written to {out}: {first_line(error)}. Is the disk full?"
        ) from error
    notes = [*reading.notes, *([] if "chat_template" in copied else ["the model has no chat template"])]
    if group:
        notes.append(f"{config['quantization']['bits']} bits, one scale for {group} weights")
    return Exported(path=out, mended=reading.mended + _weights_mended(reading.config, variant), notes=tuple(notes))


def _open(model: Path, variant: str, trust_remote_code: bool = False) -> tuple[Any, Any, int | None]:
    """mlx-lm's model (nothing read yet), the mended config, and the group size of a quantized variant."""
    if any(importlib.util.find_spec(name) is None for name in ("mlx", "mlx_lm")):
        raise MissingError(INSTALL)
    mx, nn = (load_reference(f"finetune.backends.mlx.runtime:{name}") for name in ("mx", "nn"))
    with mx.stream(mx.cpu):
        opened, reading = load_reference("finetune.backends.mlx.loading:load_model")(
            model, dtype=TYPES.get(variant), trust_remote_code=trust_remote_code
        )
    if variant not in BITS:
        return opened, reading, None
    if "quantization" in reading.config:
        raise UsageError(f"the model in {model} is quantized already; export it as 'mlx'")
    widths = {m.weight.shape[-1]: n for n, m in opened.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
    for group in GROUPS:
        if all(width % group == 0 for width in widths):
            return opened, reading, group
    width = min(width for width in widths if width % GROUPS[-1])
    raise UsageError(
        f"mlx:{variant} quantizes in groups of {' or '.join(map(str, GROUPS))} weights, and {widths[width]} is {width} wide, "
        "which neither divides. Use 'mlx', 'mlx:f16' or 'mlx:bf16'"
    )


def _write(model: Any, config: dict[str, Any], variant: str, group: int | None, out: Path) -> dict[str, Any]:
    from mlx.utils import tree_flatten
    from mlx_lm.utils import quantize_model, save_config, save_model

    kinds = {str(each.dtype).rpartition(".")[2] for _, each in tree_flatten(model.parameters())}
    if len(kinds) == 1:
        config["dtype"] = kinds.pop()
        config.pop("torch_dtype", None)
    if group:
        with redirect_stdout(StringIO()):  # it prints the bits per weight
            model, config = quantize_model(model, config, group, BITS[variant])
    save_model(out, model, donate_model=True)
    save_config(config, out / "config.json")
    return config


def _copy(model: Path, out: Path, *, code: bool) -> str:
    """The tokenizer as it is; returns the names copied."""
    copied = []
    if led := strays(model):
        raise StageError(f"{model / led[0]} is a link to a file outside of {model.name}, which is not shipped")
    for pattern in (*TOKENIZER_FILES, *(["*.py"] if code else []), "LICENSE*"):
        for file in model.glob(pattern):
            copied.append(file.name)
            (shutil.copytree if file.is_dir() else shutil.copyfile)(file, out / file.name)
    settings = model / "tokenizer_config.json"
    inside = settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    return " ".join([*copied, *(["chat_template"] if inside else [])])


def _read_back(source: Path, out: Path, wanted: dict[str, Any], trust_remote_code: bool) -> None:
    """Raise StageError unless mlx-lm, from the files alone, reads the constants, every weight's place, and the template."""
    from mlx_lm.utils import load_config, load_model

    configs = "finetune.backends.mlx.config"
    tokenizer = load_reference("finetune.backends.mlx.tokenizer:MlxTokenizer")
    written = load_config(out)
    if not wanted.get("model_file"):
        held = vars(load_reference(f"{configs}:classes")(wanted)[1].from_dict(wanted))
        own = {name: value for name, value in held.items() if name != "quantization"}
        load_reference(f"{configs}:compare")(written, own)
    try:
        load_model(out, lazy=True, trust_remote_code=trust_remote_code)
    except (ValueError, FileNotFoundError) as error:
        raise StageError(f"mlx-lm cannot load what was written to {out}: {first_line(error)}") from error
    mine, theirs = (tokenizer(each, trust_remote_code=trust_remote_code) for each in (out, source))
    if mine.chat_template != theirs.chat_template:
        raise StageError(f"the chat template in {out} is not that of {source}")
    if mine.eos_ids != theirs.eos_ids:
        raise StageError(f"mlx-lm stops at {mine.eos_ids} in {out}, and at {theirs.eos_ids} in {source}")


def _weights_mended(config: dict[str, Any], variant: str) -> tuple[str, ...]:
    if config.get("model_type") != "gemma3_text" or variant == "bf16":
        return ()
    if load_reference("finetune.backends.mlx.loading:embedding_scale_error")(config["hidden_size"]) == 1:
        return ()
    return (
        "the norms after attention and feed-forward are scaled: mlx-lm rounds the embeddings' scale to bfloat16, and "
        "what is added to them has to grow alike",
    )
