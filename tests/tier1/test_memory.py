"""Memory is measured, not guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune.core import memory
from finetune.core.memory import PeakMemory

MIB = 1024**2
SIZE = 64 * MIB


def _use(size: int) -> None:
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])  # touch every page, or the system does not give it


@pytest.fixture(params=["kernel", "sampled"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "sampled":
        monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    elif not memory._reset_high_water_mark():
        pytest.skip("this system does not let a process reset its high-water mark (Linux does)")
    return str(request.param)


def test_peak_sees_memory_that_is_gone_again(way: str) -> None:
    with PeakMemory() as peak:
        block = bytearray(SIZE)
        block[::4096] = b"x" * len(block[::4096])
        if way == "sampled":
            import time

            time.sleep(0.1)
        del block

    assert peak.start > 0
    assert SIZE * 0.9 < peak.peak - peak.start < SIZE * 1.5


def test_peak_of_a_block_forgets_what_was_before_it(way: str) -> None:
    _use(SIZE)
    with PeakMemory() as peak:
        pass

    assert peak.peak - peak.start < SIZE * 0.5


def test_an_inner_block_does_not_hide_the_outer_peak() -> None:
    with PeakMemory() as outer:
        _use(SIZE)
        with PeakMemory() as inner:
            pass

    assert inner.peak - inner.start < SIZE * 0.5
    assert outer.peak - outer.start > SIZE * 0.9


def test_peak_survives_an_error() -> None:
    with pytest.raises(ValueError, match="inside"), PeakMemory() as peak:
        raise ValueError("inside")

    assert peak.peak >= peak.start > 0


def test_available_is_positive_and_below_the_total() -> None:
    assert 0 < memory.available() <= memory.total()


def test_available_respects_a_container_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in (
        ("max", f"{100 * MIB}"),
        ("current", f"{60 * MIB}"),
        ("stat", f"anon 5\ninactive_file {20 * MIB}"),
    ):
        (tmp_path / name).write_text(text)
    names = tuple(str(tmp_path / name) for name in ("max", "current", "stat"))
    monkeypatch.setattr(memory, "_CGROUPS", ((*names, "inactive_file"),))

    assert memory.available() == 60 * MIB

    (tmp_path / "max").write_text("max\n")
    assert memory.available() > 60 * MIB


def test_disk_free_works_for_a_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    assert memory.disk_free(tmp_path / "a" / "b") > 0


def test_gpus_are_read_from_the_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Big GPU, 1000, 900'\necho 'Small GPU, 500, 400'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    assert [(gpu.name, gpu.total // MIB, gpu.free // MIB) for gpu in memory.gpus()] == [
        ("Big GPU", 1000, 900),
        ("Small GPU", 500, 400),
    ]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert [gpu.name for gpu in memory.gpus()] == ["Small GPU"]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert memory.gpus() == []


@pytest.mark.parametrize(("size", "text"), [(512, "512 B"), (37.3 * MIB, "37.3 MiB"), (2977 * MIB, "2.9 GiB")])
def test_sizes_are_readable(size: float, text: str) -> None:
    assert memory.human(size) == text
