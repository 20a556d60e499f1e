"""Changes of what stages left, for sabotages that need no patch: of a stage's files when it has finished (`change_...`), and of
any file of a model, as a tool that wrote it otherwise would leave it (`rewrite_...`): always as a new file, since what is
there may be linked to from elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.files import digest, read_jsonl, write_json, write_jsonl
from finetune.run import Run
from sabotage.context import Context

ADAPTER, MODEL = "train/adapter/adapter_model.safetensors", "train/model/model.safetensors"
OTHER_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

Rows = list[dict[str, Any]]
Tensors = dict[str, Any]  # by name

# -- what a stage left -------------------------------------------------------------------------------------------------


def change_rows(context: Context, change: Callable[[Rows], Rows]) -> None:
    """Have `prepare` leave other rows for the training: `row`, `input_ids`, and `labels`, which are -100 where nothing is
    trained."""
    _change_prepared(context, "train.jsonl", change)


def change_pairs(context: Context, change: Callable[[Rows], Rows]) -> None:
    """Have `prepare` leave other pairs for alignment: `row`, `prompt_ids`, `chosen_ids`, `rejected_ids`."""
    _change_prepared(context, "preferences.jsonl", change)


def _change_prepared(context: Context, name: str, change: Callable[[Rows], Rows]) -> None:
    def rewrite(run: Run) -> None:
        file = run.path / "prepare" / name
        write_jsonl(file, change(read_jsonl(file)))

    context.after("prepare", rewrite)


def change_tensors(context: Context, name: str, change: Callable[[Tensors], Tensors]) -> None:
    """Have `train` leave other tensors (PyTorch's, by name) in a file: ADAPTER, or MODEL of full fine-tuning."""

    def rewrite(run: Run) -> None:
        from safetensors.torch import load_file, save_file

        file = run.path / name
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    context.after("train", rewrite)


def change_adapter_config(context: Context, **values: Any) -> None:
    """Have the trained adapter's configuration say something else."""

    def change(run: Run) -> None:
        file = run.path / "train" / "adapter" / "adapter_config.json"
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), **values})

    context.after("train", change)


def change_merged(context: Context, change: Callable[[Path], Any]) -> None:
    """Change the folder of the merged model."""
    context.after("merge", lambda run: change(run.path / "merge" / "model"))


def change_export(context: Context, change: Callable[[Path], Any]) -> None:
    """Change what the run's one export wrote, a file or a folder, so that the stage's own account of it fits."""

    def rewrite(run: Run) -> None:
        account = run.path / "export" / "exports.json"
        (entry,) = json.loads(account.read_text(encoding="utf-8"))
        change(run.path / entry["path"])
        write_json(account, [{**entry, "sha256": digest(run.path / entry["path"])}])

    context.after("export", rewrite)


def change_gguf(context: Context, change: Callable[[Gguf], None]) -> None:
    """Change the GGUF file that was exported."""
    change_export(context, lambda path: rewrite_gguf(path, change))


def change_gguf_metadata(context: Context, changes: dict[str, Any]) -> None:
    """Have the GGUF file that was exported say something else; None leaves a key out."""
    change_gguf(context, lambda file: file.values.update(changes))


# -- any file ----------------------------------------------------------------------------------------------------------


def write(file: Path, text: str) -> None:
    """Write a text file in the place of another."""
    partial = file.with_name(f".{file.name}.new")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)


def rewrite_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the object in a JSON file."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    change(stored)
    write(file, json.dumps(stored, indent=2, ensure_ascii=False))


def rewrite_weights(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the tensors (NumPy arrays by name) of a safetensors file."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    partial = file.with_name(f".{file.name}.new")
    save_file(tensors, partial, metadata={"format": "pt"})
    os.replace(partial, file)


@dataclass
class Gguf:
    """A GGUF file's metadata by key (None: left out), and its tensors, each with its type."""

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, tuple[Any, Any]] = field(default_factory=dict)


def rewrite_gguf(path: Path, change: Callable[[Gguf], None]) -> None:
    """Change a GGUF file."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(path)
    stored = {name: each for name, each in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = stored.pop("general.architecture").contents()
    file = Gguf(
        values={name: each.contents() for name, each in stored.items()},
        tensors={tensor.name: (tensor.data, tensor.tensor_type) for tensor in reader.tensors},
    )
    change(file)
    partial = path.with_name(f".{path.name}.new")
    writer = GGUFWriter(partial, architecture)
    for name, value in file.values.items():
        if value is not None:
            kinds = stored[name].types
            writer.add_key_value(name, value, kinds[0], sub_type=kinds[-1] if kinds[0] == GGUFValueType.ARRAY else None)
    for name, (data, kind) in file.tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, path)
