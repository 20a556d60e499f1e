"""GGUF files of a few hundred bytes, written and looked over without any library."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.models import gguf_header

ALIGNMENT = 32  # the format's default
WEIGHTS = ("token_embd.weight", 64)  # the one tensor: its name, how many 32-bit floats
F32 = 0


def write_gguf(file: Path, metadata: Mapping[str, Any], tokens: Sequence[str] = ("a", "b")) -> Path:
    """Metadata (flags, integers and floats of 32 bits, texts, the tokens as an array) and one tensor of zeros."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(given: Any) -> bytes:
        if isinstance(given, bool):
            return struct.pack("<I?", 7, given)
        if isinstance(given, int):
            return struct.pack("<Ii", 5, given)
        if isinstance(given, float):
            return struct.pack("<If", 6, given)
        return struct.pack("<I", 8) + text(given)

    pairs = [text(key) + value(given) for key, given in metadata.items()]
    scores = struct.pack("<IIQ", 9, 6, len(tokens)) + struct.pack(f"<{len(tokens)}f", *([0.0] * len(tokens)))
    pairs.insert(1, text("tokenizer.ggml.scores") + scores)
    pairs.insert(
        1, text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(tokens)) + b"".join(map(text, tokens))
    )
    name, count = WEIGHTS
    tensor = text(name) + struct.pack("<IQIQ", 1, count, F32, 0)
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, len(pairs)) + b"".join(pairs) + tensor
    file.write_bytes(head + bytes(-len(head) % ALIGNMENT) + bytes(4 * count))
    return file


def ends(file: Path) -> Iterator[tuple[str, int]]:
    """The name of each tensor of a file that `write_gguf` made, and the byte at which it ends.

    Raises struct.error, or ValueError, where the file ends before they are told.
    """
    with file.open("rb") as stream:
        _, _, tensors, pairs = struct.unpack("<4sIQQ", stream.read(24))
        for _ in range(pairs):
            gguf_header._text(stream)
            gguf_header._value(stream, *gguf_header._numbers(stream, "I"))
        told = [(gguf_header._text(stream), *gguf_header._numbers(stream, "IQIQ")) for _ in range(tensors)]
        begin = stream.tell() + -stream.tell() % ALIGNMENT
    for name, _, count, _, offset in told:
        yield name, begin + offset + 4 * count
