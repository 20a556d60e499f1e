"""What stands in a model's, an adapter's or a checkpoint's directory, looked at before anything in it is used.

Such a directory may come from anybody. Its files are its own, none is a pipe or a device, none names a file outside of it,
and no pickle is run.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from finetune.core import pickles
from finetune.core.errors import UsageError
from finetune.core.files import strays

INDEX = "*.index.json"
BINARIES = ("pytorch_model*.bin", "adapter_model*.bin")
STATES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", *BINARIES)
# Read, by us or by a library, as what their names say; a pickle among them is no accident.
PLAIN = (
    "*.json", "*.jsonl", "*.jinja", "*.safetensors", "*.model", "*.txt", "*.tiktoken", "*.md", "*.gguf", "*.py",
    "LICEN[SC]E*", "COPYING*", "NOTICE*",
)  # fmt: skip
CONFIGS = ("config.json", "tokenizer_config.json", "adapter_config.json")
REMEDY = (
    "Nothing in it was run. Take the model as safetensors, or have whoever made it save it so: "
    "model.save_pretrained(folder, safe_serialization=True)"
)


def check(directory: Path, what: str = "model") -> None:
    """Raise UsageError for the first thing in a directory that is not to be read: `what` names it in the sentence."""
    # One after the other: what reads files comes after what knows that there is no pipe among them.
    for fault in chain(_foreign(directory, what), _irregular(directory), _named(directory), _disguised(directory)):
        raise UsageError(fault)


def check_pickles(directory: Path, *patterns: str, remedy: str = REMEDY) -> None:
    """Raise UsageError for a pickled file of these names that would do more than hold tensors."""
    for pattern in patterns:
        for file in sorted(directory.glob(pattern)):
            found = pickles.read(file) if file.is_file() else None
            if found is not None and found.foreign:
                raise UsageError(f"{file} holds {found}, which is no stored tensor and may run anything. {remedy}")


def check_checkpoint(directory: Path) -> None:
    """As `check`, for a checkpoint that a training is to go on from, and the pickles of its state."""
    check(directory, "checkpoint")
    check_pickles(
        directory, *STATES, remedy="Nothing in it was run. Resume from another checkpoint, or start anew with --force"
    )


def code(directory: Path) -> str:
    """The Python code that a directory's configs name as its own, in words: files, and where they are named; empty without."""
    told = [f"{name} names {reference}" for name, reference in _references(directory)]
    return ", ".join(dict.fromkeys(told))


def refused_code(directory: Path) -> UsageError:
    """What is said where code would have to run that the recipe does not trust."""
    named = code(directory) or "it says so in its config"
    return UsageError(
        f"{directory} comes with Python code of its own ({named}), which is not run: model.trust_remote_code is false. Read "
        "that code; if you trust it, write 'trust_remote_code: true' under 'model', or take a model that needs none"
    )


def _foreign(directory: Path, what: str) -> Iterator[str]:
    for name in strays(directory):
        yield (
            f"{directory / name} is a link to {(directory / name).resolve()}, outside of the {what}'s directory, and would be "
            "copied into the run and its exports. Put the file itself there, or take the link away"
        )


def _irregular(directory: Path) -> Iterator[str]:
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder, name)
            try:
                mode = path.stat().st_mode
            except OSError:  # a link to nothing, which nothing can be read from
                continue
            if not stat.S_ISREG(mode):
                kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
                yield f"{path} is a {kind}, not a file. Take it away, or put the file itself there"


def _named(directory: Path) -> Iterator[str]:
    """Files outside of the directory that its indexes and configs name."""
    for file in sorted(directory.glob(INDEX)):
        shards = _object(file).get("weight_map")
        for shard in dict.fromkeys(shards.values()) if isinstance(shards, dict) else ():
            if not isinstance(shard, str) or _leads_out(shard):
                yield _outside(file, "weight_map", shard)
    for name, reference in _references(directory):
        if "/" in reference.rpartition("--")[2] or "\\" in reference or ".." in reference:
            yield _outside(directory / name, "auto_map", reference)
    for name in CONFIGS:
        for key, value in _object(directory / name).items():
            # Published models carry such keys from the machines they were made on, where they lead nowhere here.
            if key.endswith("_file") and isinstance(value, str) and _leads_out(value) and (directory / value).exists():
                yield _outside(directory / name, key, value)


def _outside(file: Path, key: str, value: object) -> str:
    return (
        f"{file} names {value!r} under {key}, which is outside of its directory, and is not read. Take it out of there"
    )


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or name.startswith("~")


def _disguised(directory: Path) -> Iterator[str]:
    for pattern in PLAIN:
        for file in sorted(directory.rglob(pattern)):
            if file.is_file() and (found := pickles.in_place_of(file)) is not None:
                yield f"{file} holds {found}, and is not what its name says. {REMEDY}"


def _references(directory: Path) -> Iterator[tuple[str, str]]:
    """(config's name, reference) of the code that configs name, as `modeling_own.OwnModel`."""
    for name in CONFIGS:
        config = _object(directory / name)
        named = config.get("auto_map")
        for value in named.values() if isinstance(named, dict) else named if isinstance(named, list) else [named]:
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str):
                    yield name, each
        if isinstance(file := config.get("model_file"), str):  # mlx-lm's
            yield name, file


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty for one that cannot be read, which whoever needs it says."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
