"""Files written whole or not at all, and read by name: digests, JSON, JSONL.

What is written is what was given. Secrets are refused where data come in, and taken out of what is told
(`finetune.core.secrets`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.core.errors import StageError, first_line
from finetune.core.parsing import loads

RACY = 2_000_000_000  # nanoseconds: the grain of the coarsest clock of a file system in use (FAT)
_digests: dict[tuple[int, ...], str] = {}
PARTIAL = ".partial"  # how the neighbour ends that a file is written into first


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a directory: of its sorted relative names and their digests."""
    return digest_of(digests(path)) if path.is_dir() else _file_digest(path)


def digests(directory: Path) -> dict[str, str]:
    """The SHA-256 of every file below a directory, by its path relative to it, sorted as paths are.

    What is no file (a link to a folder or to nothing, a pipe, a device) has one too, that of what it is.
    """
    return {path.relative_to(directory).as_posix(): _file_digest(path) for path in sorted(_entries(directory))}


def _entries(directory: Path) -> Iterator[Path]:
    """All below a directory that is no folder; a link to a folder is one entry, which nobody enters."""
    for folder, folders, names in os.walk(directory):
        yield from (Path(folder, name) for name in names)
        yield from (path for name in folders if (path := Path(folder, name)).is_symlink())


def digest_of(files: Mapping[str, str]) -> str:
    """The digest of a directory whose files have these digests, by relative path (see `digests`)."""
    total = hashlib.sha256()
    for name in sorted(files, key=lambda name: Path(name).parts):
        total.update(f"{name}\0{files[name]}\n".encode())
    return total.hexdigest()


def _file_digest(path: Path) -> str:
    """Known again by what the system says of the file, so that a run's weights are read once a process. A file that was
    changed just now may be changed again within the clock's grain, and is read each time (git calls such files racy)."""
    if not path.is_file():  # opening a pipe would wait for a writer
        what = f"link to {os.readlink(path)}" if path.is_symlink() else stat.filemode(path.lstat().st_mode)
        return hashlib.sha256(f"no file: {what}".encode()).hexdigest()
    about = path.stat()
    key = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if key not in _digests:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) < RACY:
            return found
        _digests[key] = found
    return _digests[key]


def strays(directory: Path) -> list[str]:
    """Links below a directory that lead out of it, by their names in it: what they lead to is none of its files.

    A snapshot in the hub's cache is made of links into the `blobs` beside it, which are its files
    (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
    """
    home = directory.resolve()
    blobs = home.parent.parent / "blobs"
    roots = [home, *([blobs] if home.parent.name == "snapshots" and not blobs.is_symlink() else [])]
    found = []
    for folder, folders, names in os.walk(home):
        for name in (*folders, *names):
            path = Path(folder, name)
            if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
                found.append(path.relative_to(home).as_posix())
    return sorted(found)


def encode(text: str) -> bytes:
    """UTF-8; half of a surrogate pair, which has none, as JSON calls it (`\\ud83d`)."""
    return text.encode("utf-8", "backslashreplace")


def write_text(path: Path, text: str, before: Callable[[Path], None] = lambda partial: None) -> None:
    """Write a file whole or not at all: into a neighbour first, synced, then renamed into place. `before` is called with the
    neighbour just before that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as stream:
            stream.write(encode(text))
            stream.flush()
            os.fsync(stream.fileno())
        before(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk, where the system can sync folders (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Have every file below a directory on the disk, whoever wrote it, and then their names."""
    for path in [directory, *directory.rglob("*")]:
        if path.is_dir():
            sync_folder(path)
        elif not path.is_symlink():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


@contextmanager
def aside(final: Path) -> Iterator[Path]:
    """A folder beside `final`, to write into, which takes its place once all is written; after an error nothing has changed."""
    partial = final.with_name(f".{final.name}{PARTIAL}")
    remove(partial)
    try:
        yield partial
        remove(final)
        partial.rename(final)
    finally:
        remove(partial)


def copy(source: str | Path, target: str | Path) -> None:
    """Copy a file whole or not at all: into a neighbour first, then renamed into place."""
    place = Path(target)
    partial = place.with_name(f".{place.name}.{os.getpid()}{PARTIAL}")
    try:
        shutil.copyfile(source, partial)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Take away a file, or a folder with all that is in it; nothing where nothing is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_way(path: Path) -> None:
    """Take away a folder that stands where a file belongs: it is damage, and no file can replace it."""
    if path.is_dir():
        remove(path)


def clear_partials(directory: Path) -> None:
    """Remove what killed writers left below a directory. Whoever calls this is the only one who writes there."""
    for path in directory.rglob(f".*{PARTIAL}"):
        remove(path)


def write_json(path: Path, value: Any, before: Callable[[Path], None] = lambda partial: None) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n", before)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that others wrote (a model's config). Raises StageError where it holds none."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
        raise StageError(f"{path} is no file")
    try:
        value = loads(path.read_bytes())
    except ValueError as error:
        raise StageError(f"{path} is not JSON ({error}); get the model again") from None
    if not isinstance(value, dict):
        raise StageError(f"{path} holds no JSON object; get the model again")
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSONL file. A last line cut short by a killed writer is left out."""
    # Not splitlines(): it also breaks at U+2028 and its like, which JSON strings may hold.
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(loads(line))
        except ValueError as error:
            if number != len(lines):
                raise StageError(
                    f"{path}:{number}: not JSON ({_reason(error)}); the file was changed by hand"
                ) from None
    return rows


def _reason(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return error.reason if isinstance(error, UnicodeDecodeError) else first_line(error)
