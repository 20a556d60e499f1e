"""Checkpoints on the disk: written aside, with the digests of their files, synced, and then given their name.

So a folder `checkpoint-N` is whole, or somebody changed it since, which `faults` tells. Checkpoints of version 0.1 have no
digests; of those it can only be told whether they can be read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune.core import schemas
from finetune.core.errors import StageError
from finetune.core.files import PARTIAL, digests, sync_folder, sync_tree, write_json
from finetune.core.memory import need_disk
from finetune.core.parsing import loads
from finetune.run import identity

STATE = "trainer_state.json"
DIGESTS = "digests.json"


@contextmanager
def writing(out: Path, step: int, logged: Callable[[], bool] = lambda: True) -> Iterator[Path]:
    """A folder to write the checkpoint of a step into; afterwards it stands in `out` as `checkpoint-N`.

    `logged` is asked when all is written, and may wait: whether the events of all steps up to this one are in the log. A
    checkpoint of a step that no log knows is thrown away, since who goes on from it would miss that step for good. Raises
    ResourceError where the disk has less room than the checkpoint before it took.
    """
    final = out / f"checkpoint-{step}"
    aside = out / f".{final.name}{PARTIAL}"
    shutil.rmtree(aside, ignore_errors=True)
    _check_room(out, step)
    try:
        folder = aside / final.name  # transformers writes into a folder of that name only
        folder.mkdir(parents=True)
        yield folder
        write_json(folder / DIGESTS, schemas.CHECKPOINT.written({"files": digests(folder)}))
        sync_tree(folder)
        if logged():
            if final.exists():  # a folder cannot replace one that holds something
                final.rename(aside / "before")
            folder.rename(final)
            sync_folder(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check_room(out: Path, step: int) -> None:
    before = [folder for folder in stored(out) if step_of(folder) != step]
    need = sum(file.stat().st_size for file in before[-1].rglob("*") if file.is_file()) if before else 0
    if need:
        need_disk(out, need, f"the checkpoint of step {step}, by what {before[-1].name} takes, which it goes on from,")


def rotate(out: Path, limit: int | None, best: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `limit`; never the last one, nor `best`, which counts."""
    if not limit:
        return
    others = [folder for folder in stored(out) if folder != best]
    kept = max(1, limit - (best is not None and best.is_dir()))
    for folder in others[:-kept]:
        shutil.rmtree(folder)


def stored(directory: Path) -> list[Path]:
    """The `checkpoint-N` folders in a directory, whole or not, oldest first."""
    return sorted((path for path in directory.glob("checkpoint-*") if is_checkpoint(path)), key=step_of)


def is_checkpoint(path: Path) -> bool:
    return any((path / name).is_file() for name in (STATE, DIGESTS))


def step_of(path: Path) -> int:
    """The step in a checkpoint folder's name, or -1."""
    tail = path.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state. Raises StageError where it cannot be read."""
    try:
        found = loads((checkpoint / STATE).read_bytes())
        return {**found, "global_step": int(found["global_step"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StageError(f"{checkpoint} is damaged: {STATE} cannot be read ({error})") from None


def faults(checkpoint: Path) -> list[str]:
    """What is not as it was written, a phrase each; of a checkpoint of version 0.1, what is empty or cannot be read. Raises
    NewerError for one of a later version."""
    file = checkpoint / DIGESTS
    try:
        there = digests(checkpoint)
        if not file.is_file():
            return [f"{DIGESTS} is gone"] if (checkpoint / identity.FILE).is_file() else _unreadable(checkpoint)
        written = schemas.CHECKPOINT.read(loads(file.read_bytes()), file)["files"]
        there.pop(DIGESTS)
        return [
            f"{name} {'is gone' if name not in there else 'was not there' if name not in written else 'was changed'}"
            for name in sorted({*there, *written})
            if there.get(name) != written.get(name)
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return [f"{DIGESTS} cannot be read ({error})"]


def _unreadable(checkpoint: Path) -> list[str]:
    empty = [
        f"{path.name} is empty" for path in sorted(checkpoint.rglob("*")) if path.is_file() and not path.stat().st_size
    ]
    try:
        state(checkpoint)
    except StageError as error:
        return [*empty, str(error).partition(": ")[2]]
    return empty


def newest_whole(folders: Iterable[Path], damaged: Callable[[Path, list[str]], None]) -> Path | None:
    """The last of these checkpoints, oldest first, that is as it was written; `damaged` is told of each that is not."""
    for folder in reversed(list(folders)):
        found = faults(folder)
        if not found:
            return folder
        damaged(folder, found)
    return None
