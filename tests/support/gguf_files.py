"""GGUF files changed by hand."""

from __future__ import annotations

from pathlib import Path


def rewrite(source: Path, target: Path, metadata: dict[str, object]) -> Path:
    """Copy a GGUF file, some of its metadata replaced (a double underscore in a name is a dot)."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    changes = {name.replace("__", "."): value for name, value in metadata.items()}
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, element = field.types[0], field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
        value = changes.pop(name, field.contents())
        if value is not None:
            writer.add_key_value(name, value, kind, sub_type=element)
    assert not changes, f"{source} has no {sorted(changes)}"
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
