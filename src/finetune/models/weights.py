"""Weights as people have them, and as the pipeline reads them: safetensors, under the model's own names.

What is stored otherwise (pickled, or under the names of a wrapper) is converted once and kept in the cache.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core import hub
from finetune.core.cache import cache_dir
from finetune.core.console import say
from finetune.core.errors import StageError
from finetune.core.files import digest, digest_of, read_object, write_json
from finetune.core.lookup import load
from finetune.models import files as modelfiles
from finetune.models import tensor_names

# The kinds of files that hold a model's weights, the ones that are taken first; with an index where there are several.
MODEL = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
NOTES = "converted.json"
LAYOUT = 1  # raised when a conversion comes out otherwise than before


@dataclass(frozen=True)
class Prepared:
    """A directory to load from. `notes` says what was converted; `sources` are the files that it was made of, with their
    SHA-256, where it is not the directory that was asked for."""

    path: Path
    notes: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)


def prepared(place: Path) -> Prepared:
    """The model or adapter directory `place`, or its converted copy.

    Raises UsageError for pickles that are no weights, StageError for weights that cannot be read, or mean two things.
    """
    files = stored(place)
    adapter = not (place / "config.json").is_file()
    if not files or not all(file.is_file() for file in files):
        return Prepared(place)  # which whoever loads it says, by name
    if files[0].suffix == ".safetensors" and not _are_renamed(place, files, adapter):
        return Prepared(place)
    from filelock import FileLock

    modelfiles.check_pickles(place, *(file.name for file in files if file.suffix == ".bin"))
    sources = {file.name: digest(file) for file in sorted(place.iterdir()) if file.is_file()}
    made = cache_dir() / "converted" / f"{place.name}-{digest_of({**sources, 'layout': str(LAYOUT)})[:16]}"
    convert = load("finetune.models.to_safetensors:convert")
    made.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(made.parent / f".{made.name}.lock"):
        if not made.is_dir():
            hub.check_space(made, 2 * sum(file.stat().st_size for file in files))
            with tempfile.TemporaryDirectory(dir=made.parent, prefix=".making-") as temporary:
                making = Path(temporary) / "model"
                notes = convert(place, making, files, adapter=adapter, norms=not modelfiles.code(place))
                write_json(making / NOTES, {"notes": notes})
                making.rename(made)
    notes = list(read_object(made / NOTES)["notes"])
    for note in notes:
        say(f"note: {note} (kept in {made})")
    return Prepared(made, tuple(notes), {str(place / name): sha256 for name, sha256 in sources.items()})


def stored(place: Path) -> list[Path]:
    """The files of a directory's weights, as transformers and PEFT choose them; empty where there is none of theirs."""
    for name in MODEL if (place / "config.json").is_file() else ADAPTER:
        if (place / name).is_file():
            return [place / name]
        index = place / f"{name}.index.json"
        if index.is_file():
            shards = read_object(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise StageError(f"{index} names no files of weights; get the model again")
            return [place / shard for shard in sorted(set(shards.values()))]
    return []


def header(file: Path) -> dict[str, dict[str, Any]]:
    """The tensors of a safetensors file by name, with dtype, shape and offsets: 8 bytes of length (little-endian), then JSON
    (https://huggingface.co/docs/safetensors). Raises StageError for another file, or one that was cut short."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            found = json.loads(stream.read(min(length, size)))
            tensors = {name: tensor for name, tensor in found.items() if name != "__metadata__"}
            whole = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0) <= size
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
    if not whole:
        raise StageError(f"{file} is no safetensors file, or was cut short; fetch the model again")
    return tensors


def _are_renamed(place: Path, files: list[Path], adapter: bool) -> bool:
    found = [name for file in files for name in header(file)]
    own = tensor_names.of_adapter(found) if adapter else tensor_names.of_model(found, norms=not modelfiles.code(place))
    return any(name != stored_as for stored_as, name in own.items())


def count_parameters(directory: Path) -> int | None:
    """The numbers stored in a model directory, from the headers of its safetensors; None where it has none."""
    config = read_object(directory / "config.json")
    if "num_parameters" in config:
        return int(config["num_parameters"])
    files = list(directory.glob("*.safetensors"))
    return sum(math.prod(tensor["shape"]) for file in files for tensor in header(file).values()) if files else None
