"""What a pickle would call, read from its opcodes: nothing in it is ever run.

Pickles stand alone, in the zip that `torch.save` writes, in the tar and the row of pickles that it wrote before, and in
NumPy's arrays of objects (https://docs.python.org/3/library/pickletools.html).
"""

from __future__ import annotations

import io
import pickletools
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ZIP, NUMPY, PROTOCOL = b"PK\x03\x04", b"\x93NUMPY", b"\x80"
MOST = 64  # pickles in one file
ROW = 5  # pickles of PyTorch's old format; the tensors' bytes are after them
LARGEST_MEMBER = 64_000_000  # bytes; the pickle in a checkpoint has names and shapes, not numbers
# What stored tensors are made of. Which of these modules' functions may be called is for PyTorch to say, which loads
# weights and nothing else (`weights_only`).
HARMLESS = ("torch", "torchao", "bitsandbytes", "numpy", "ml_dtypes")
PLAIN = {
    "collections": {"OrderedDict", "defaultdict", "Counter"},
    "_codecs": {"encode"},
    **dict.fromkeys(
        ("builtins", "__builtin__"),
        {"set", "frozenset", "bytearray", "bytes", "complex", "int", "float", "bool", "str", "list", "dict", "tuple", "slice",
         "object"},
    ),
}  # fmt: skip
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_ASIDE = {"MEMOIZE", "PROTO", "FRAME"}  # which leave the stack as it is
_UNKNOWN = "what it puts together"
_PUTS, _GETS = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}


@dataclass(frozen=True)
class Pickled:
    """What the pickles in a file name: `calls` are functions and classes, as `os.system`."""

    calls: tuple[str, ...] = ()

    @property
    def foreign(self) -> tuple[str, ...]:
        """Those that no stored tensor is made of."""
        return tuple(call for call in self.calls if not _is_plain(call))

    def __str__(self) -> str:
        named = self.foreign or self.calls
        return f"a pickle that calls {', '.join(named[:3])}" if named else "a pickle"


def read(file: Path) -> Pickled | None:
    """What the pickles in a file would call; None where there is none in it."""
    with file.open("rb") as stream:
        found = list(_pickles(stream, file.name, file.stat().st_size))
    return Pickled(tuple(dict.fromkeys(call for calls in found for call in calls))) if found else None


def in_place_of(file: Path) -> Pickled | None:
    """As `read`, for a file that should be none: what begins as a pickle does, or as an archive of pickles."""
    with file.open("rb") as stream:
        begin = stream.read(8)
    return read(file) if begin.startswith((ZIP, NUMPY)) or _is_protocol(begin) else None


def _is_protocol(begin: bytes) -> bool:
    return begin[:1] == PROTOCOL and len(begin) > 1 and 2 <= begin[1] <= 5


def _is_plain(call: str) -> bool:
    module, _, name = call.rpartition(".")
    return module.partition(".")[0] in HARMLESS or name in PLAIN.get(module, ())


def _pickles(stream: IO[bytes], name: str, size: int) -> Iterator[list[str]]:
    """The calls of each pickle in a stream that can be read anew."""
    begin = stream.read(8)
    stream.seek(0)
    if begin.startswith(ZIP):
        yield from _in_zip(stream)
    elif begin.startswith(NUMPY):
        yield from _in_array(stream)
    elif _is_tar(stream):
        yield from _in_tar(stream)
    elif _is_protocol(begin) or Path(name).suffix not in (".safetensors", ".json", ".npy", ".npz"):
        yield from _in_a_row(stream, size)


def _in_zip(stream: IO[bytes]) -> Iterator[list[str]]:
    try:
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                # The numbers of PyTorch's tensors are files under `data`.
                if member.file_size <= LARGEST_MEMBER and "/data/" not in member.filename:
                    yield from _pickles(io.BytesIO(archive.read(member)), member.filename, member.file_size)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, EOFError):
        return


def _is_tar(stream: IO[bytes]) -> bool:
    try:
        found = tarfile.is_tarfile(stream)
    except (tarfile.TarError, OSError, ValueError, EOFError):
        found = False
    stream.seek(0)
    return found


def _in_tar(stream: IO[bytes]) -> Iterator[list[str]]:
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                if member.isfile() and (held := archive.extractfile(member)) is not None:
                    yield from _pickles(io.BytesIO(held.read(LARGEST_MEMBER)), member.name, member.size)
    except (tarfile.TarError, OSError, EOFError):
        return


def _in_array(stream: IO[bytes]) -> Iterator[list[str]]:
    """An array of objects is a pickle behind NumPy's header, of which the lines tell its type."""
    begin = stream.read(12)
    length = int.from_bytes(begin[8:10] if begin[6:7] == b"\x01" else begin[8:12], "little")
    stream.seek(10 if begin[6:7] == b"\x01" else 12)
    header = stream.read(min(length, 1 << 16))
    if b"O" in header.partition(b"descr")[2].partition(b"fortran")[0]:
        found = list(_in_a_row(stream, LARGEST_MEMBER))
        yield from found or [[]]


def _in_a_row(stream: IO[bytes], size: int) -> Iterator[list[str]]:
    for number in range(MOST):
        calls, whole = _calls(stream, size)
        if whole or (calls and number < ROW):
            yield calls
        if not whole:
            return


def _calls(stream: IO[bytes], size: int) -> tuple[list[str], bool]:
    """What one pickle calls, as far as it can be read, and whether it could be to its end."""
    calls: list[str] = []
    memo: dict[int, object] = {}
    pushed: list[object] = []  # the top of the stack, as far as it is known
    top: object = None
    bounded = _Bounded(stream, size)
    try:
        for opcode, argument, _ in pickletools.genops(bounded):  # type: ignore[arg-type]
            name = opcode.name
            if name in _PUTS or name == "MEMOIZE":
                memo[len(memo) if name == "MEMOIZE" else int(str(argument))] = top
            if name in _PUTS or name in _ASIDE:
                continue
            if name == "POP" and pushed:
                pushed.pop()
                continue
            top = memo.get(int(str(argument))) if name in _GETS else argument if name in _STRINGS else None
            if name in ("GLOBAL", "INST"):
                calls.append(".".join(str(argument).split(" ")))
            elif name == "STACK_GLOBAL":
                named = [each for each in pushed[-2:] if isinstance(each, str)]
                calls.append(".".join(named) if len(named) == 2 else _UNKNOWN)
            elif name.startswith("EXT"):
                calls.append(f"copyreg.extension {argument}")
            if name in _GETS or name in _STRINGS:
                pushed.append(top)
            else:
                pushed.clear()
    except (ValueError, OverflowError, MemoryError, IndexError):  # no pickle, or cut short
        return calls, False
    return calls, True


class _Bounded:
    """A stream of which no more is read at a time than there is: a damaged length would ask for all of the memory."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self.stream, self.most = stream, most

    def read(self, size: int = -1) -> bytes:
        return self.stream.read(min(size, self.most) if size >= 0 else self.most)

    def readline(self) -> bytes:
        return self.stream.readline(1 << 16)

    def tell(self) -> int:
        return self.stream.tell()
