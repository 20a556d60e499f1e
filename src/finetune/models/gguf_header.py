"""The metadata at the head of a GGUF file, read without any library.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (little-endian, versions 2 and 3).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from finetune.core.errors import StageError

Value = int | float | bool | str
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
LONGEST = 1 << 26  # bytes of a text; chat templates have thousands


def read(file: Path, *, before: str | None = None) -> dict[str, Value]:
    """Every single value (no arrays) by its key; those that stand before the first key that begins with `before`, which
    spares the tokenizer's megabytes. Raises StageError for what is no GGUF file."""
    try:
        with file.open("rb") as stream:
            magic, version, _, count = struct.unpack("<4sIQQ", stream.read(24))
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"it begins with {magic!r}, version {version}")
            found: dict[str, Value] = {}
            for _ in range(count):
                key = _text(stream)
                if before is not None and key.startswith(before):
                    break
                if (value := _value(stream, *_numbers(stream, "I"))) is not None:
                    found[key] = value
            return found
    except (struct.error, ValueError, KeyError, OSError, OverflowError) as error:
        raise StageError(f"{file} is no GGUF file that can be read: {error}. Export it again") from None


def _numbers(stream: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(f"<{form}", stream.read(struct.calcsize(f"<{form}")))


def _text(stream: BinaryIO) -> str:
    (length,) = _numbers(stream, "Q")
    if length > LONGEST:
        raise ValueError(f"a text of {length} bytes")
    data = stream.read(length)
    if len(data) < length:
        raise ValueError("it is cut short")
    return data.decode("utf-8", "replace")


def _value(stream: BinaryIO, kind: int) -> Value | None:
    if kind == _STRING:
        return _text(stream)
    if kind != _ARRAY:
        return _numbers(stream, _NUMBERS[kind])[0]
    inner, length = _numbers(stream, "IQ")
    if inner in _NUMBERS:
        stream.seek(length * struct.calcsize(f"<{_NUMBERS[inner]}"), 1)
    else:
        for _ in range(length):
            _value(stream, inner)
    return None
