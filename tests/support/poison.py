"""Pickles that leave a mark when they are run, in every shape that libraries store them in."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path


class Payload:
    """Unpickled, it makes a directory."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.mark),)


def plain(mark: Path, protocol: int = 2) -> bytes:
    return pickle.dumps({"weight": Payload(mark)}, protocol)


def by_instance(mark: Path) -> bytes:
    """The opcodes that no pickler writes any more: INST, which calls while it reads."""
    return f"(S{str(mark)!r}\niposix\nmkdir\n.".encode()


def hidden(mark: Path) -> bytes:
    """The function's name comes out of the memo: GET, then STACK_GLOBAL."""
    text = str(mark).encode()
    body = b"\x8c\x05posix\x94" + b"\x8c\x05mkdir\x94" + b"00h\x00h\x01\x93"
    return b"\x80\x04" + body + b"\x8c" + bytes([len(text)]) + text + b"\x85R."


def decoy(mark: Path) -> bytes:
    """Names that are pushed and taken away again stand between the function's name and STACK_GLOBAL."""
    text = str(mark).encode()
    names = b"\x8c\x05posix\x8c\x05mkdir" + b"\x8c\x0bcollections0" + b"\x8c\x0bOrderedDict0" + b"\x93"
    return b"\x80\x04" + names + b"\x8c" + bytes([len(text)]) + text + b"\x85R."


def row(mark: Path) -> bytes:
    """PyTorch's first format: five pickles, then the tensors' bytes."""
    magic = 0x1950A86A20F9469CFC6C
    parts = (magic, 1001, {"little_endian": True}, {"weight": Payload(mark)}, [])
    return b"".join(pickle.dumps(part, 2) for part in parts) + bytes(64)


def cut_row(mark: Path) -> bytes:
    """The same, whose last pickle has done its work before it turns out to be cut short."""
    return b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})) + plain(mark)[:-1]


def torch_zip(mark: Path) -> bytes:
    """What `torch.save` writes."""
    return _zipped({"archive/data.pkl": plain(mark), "archive/version": b"3\n", "archive/byteorder": b"little"})


def nested_zip(mark: Path) -> bytes:
    return _zipped({"inner/archive.pt": torch_zip(mark), "archive/data.pkl": pickle.dumps({}, 2)})


def tar(mark: Path) -> bytes:
    """The tar that PyTorch wrote in the beginning."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:") as archive:
        for name, data in (
            ("sys_info", pickle.dumps({}, 2)),
            ("pickle", plain(mark)),
            ("storages", b""),
            ("tensors", b""),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return made.getvalue()


def array(mark: Path) -> bytes:
    """A NumPy array of objects."""
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
    header += b" " * (63 - (10 + len(header)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + plain(mark, 3)


def arrays(mark: Path) -> bytes:
    return _zipped({"weight.npy": array(mark)})


def _zipped(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return made.getvalue()


FORMS: dict[str, Callable[[Path], bytes]] = {
    "protocol 0": lambda mark: plain(mark, 0),
    "protocol 2": plain,
    "protocol 5": lambda mark: plain(mark, 5),  # joblib's, too
    "instance": by_instance,
    "names from the memo": hidden,
    "names between names": decoy,
    "row of pickles": row,
    "row cut short": cut_row,
    "torch zip": torch_zip,
    "nested zip": nested_zip,
    "tar": tar,
    "npy": array,
    "npz": arrays,
}
