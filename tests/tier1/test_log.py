"""The log of a run is a chain: whatever is done to a line of it is seen, and where."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from finetune.core.errors import StageError
from finetune.run.log import FIRST, PREVIOUS, Log, broken, is_chained


def write(path: Path, count: int = 6) -> list[bytes]:
    """A log of so many lines; its lines as bytes."""
    log = Log(path)
    for number in range(count):
        log.append("step", {"step": number, "text": "line\u2028separator \ud83d ünï"})
    return path.read_bytes().split(b"\n")[:-1]


def put(path: Path, lines: list[bytes]) -> int | None:
    """Store lines; the number of the first one that does not hold, for a reader that knows nothing yet."""
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    line = broken(Log(path).lines())
    return line.number if line else None


def test_every_line_holds_the_digest_of_the_one_before(tmp_path: Path) -> None:
    write(tmp_path / "events.jsonl")
    lines = Log(tmp_path / "events.jsonl").lines()

    assert [line.event[PREVIOUS] for line in lines] == [FIRST, *(line.digest for line in lines[:-1])]
    assert [line.event["step"] for line in lines] == list(range(6))
    assert broken(lines) is None
    assert is_chained(lines)


@pytest.mark.parametrize("place", range(5))
def test_a_changed_line_is_seen_by_the_next(tmp_path: Path, place: int) -> None:
    lines = write(tmp_path / "events.jsonl")
    lines[place] = lines[place].replace(b'"step": ', b'"step": 1')

    assert put(tmp_path / "events.jsonl", lines) == place + 2


@pytest.mark.parametrize("place", range(5))
def test_a_line_taken_out_or_put_in_or_moved_is_seen(tmp_path: Path, place: int) -> None:
    path = tmp_path / "events.jsonl"
    lines = write(path)

    assert put(path, lines[:place] + lines[place + 1 :]) == place + 1
    assert put(path, [*lines[: place + 1], lines[place], *lines[place + 1 :]]) == place + 2
    assert put(path, [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]]) == place + 1


@pytest.mark.parametrize("place", range(1, 6))
def test_a_line_without_its_link_is_seen(tmp_path: Path, place: int) -> None:
    """Only a log that version 0.1 began may have such lines, and only at its beginning."""
    lines = write(tmp_path / "events.jsonl")
    event = json.loads(lines[place])
    del event[PREVIOUS]
    lines[place] = json.dumps(event).encode()

    assert put(tmp_path / "events.jsonl", lines) == place + 1


def test_a_log_of_version_0_1_goes_on_chained(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": "t", "event": "step", "step": 1}\n{"time": "t", "event": "step", "step": 2}\n')
    log = Log(path)
    assert not is_chained(log.lines())
    log.append("step", {"step": 3})
    lines = path.read_bytes().split(b"\n")[:-1]

    assert broken(log.lines()) is None
    assert put(path, [lines[0].replace(b"1", b"9"), *lines[1:]]) is None  # nothing held it: the manifest's seal does
    assert put(path, [lines[0], lines[1].replace(b"2", b"9"), lines[2]]) == 3


@pytest.mark.parametrize("size", [1, 100, 5_000, 70_000])
def test_the_line_before_is_found_however_long_lines_are(tmp_path: Path, size: int) -> None:
    log = Log(tmp_path / "events.jsonl")
    for number in range(3):
        log.append("note", {"number": number, "text": "x" * size})
    with log.path.open("ab") as stream:
        stream.write(b'{"cut": "' + b"y" * size)
    log.append("note", {"number": 3})

    assert [line.event["number"] for line in log.lines()] == [0, 1, 2, 3]
    assert broken(log.lines()) is None


def test_a_reader_that_has_read_before_sees_what_a_new_one_does(tmp_path: Path) -> None:
    log = Log(tmp_path / "events.jsonl")
    assert log.lines() == []
    for number in range(4):
        log.append("note", {"number": number})
        assert log.lines() == Log(log.path).lines()
    kept = log.path.read_bytes()
    log.path.write_bytes(kept.replace(b'"number": 1', b'"number": 7'))
    assert [line.event["number"] for line in log.lines()] == [0, 7, 2, 3]
    log.path.write_bytes(kept.replace(b'"number": 3', b'"number": 33') + kept)
    assert [line.event["number"] for line in log.lines()] == [0, 1, 2, 33, 0, 1, 2, 3]
    log.path.write_bytes(kept)
    assert [line.event["number"] for line in log.lines()] == [0, 1, 2, 3]
    (tmp_path / "other").write_bytes(kept.replace(b'"number": 1', b'"number": 8') + kept)
    (tmp_path / "other").replace(log.path)
    assert [line.event["number"] for line in log.lines()] == [0, 8, 2, 3, 0, 1, 2, 3]
    log.path.unlink()
    assert log.lines() == []


def test_a_line_is_on_the_disk_at_once_and_that_of_a_step_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = Log(tmp_path / "events.jsonl")
    counts = []
    for every, kinds in ((3600.0, ("note", "note", "step", "step", "note")), (-1.0, ("step", "step"))):
        monkeypatch.setattr("finetune.run.log.SYNC_EVERY", every)
        for kind in kinds:
            log.append(kind, {})
            counts.append(len(synced))
    assert counts == [1, 2, 2, 2, 3, 4, 5]


def test_a_line_that_is_no_event_is_named(tmp_path: Path) -> None:
    lines = write(tmp_path / "events.jsonl")
    for wrong in (b"{oops", b"[1]", b'"text"', b'{"event": 3, "time": "t"}', b'{"event": "step"}', b"\xff\xfe"):
        (tmp_path / "events.jsonl").write_bytes(b"\n".join([*lines[:2], wrong, *lines[2:], b""]))
        with pytest.raises(StageError, match=r"events\.jsonl:3: no"):
            Log(tmp_path / "events.jsonl").lines()
