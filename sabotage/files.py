"""Files of models, changed as a tool that wrote them otherwise would leave them: always as new files, since what is there
may be linked to from elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def write(file: Path, text: str) -> None:
    """A text file in the place of another."""
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
