"""Every file of a run, cut, emptied, changed by one bit and taken away: `verify` names it, and every other check still runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune import checks
from finetune.run import Run, seal
from finetune.stages.pipeline import preview
from support.town import as_if_written_so

PARTS = 4  # tests that share the files, so that workers can
ALONE = {".lock"}  # holds nothing


def cut(content: bytes) -> bytes | None:
    return content[: len(content) // 2]


def emptied(content: bytes) -> bytes | None:
    return b""


def one_bit(content: bytes) -> bytes | None:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def gone(content: bytes) -> bytes | None:
    return None


DAMAGES: tuple[Callable[[bytes], bytes | None], ...] = (cut, emptied, one_bit, gone)


def files(run: Run) -> list[str]:
    return sorted(
        path.relative_to(run.path).as_posix()
        for path in run.path.rglob("*")
        if path.is_file() and path.name not in ALONE and path.stat().st_size
    )


@pytest.fixture(scope="module")
def work(honest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the honest run, verified and sealed, whose files are damaged and put back."""
    folder = tmp_path_factory.mktemp("files") / "run"
    shutil.copytree(honest.run.path, folder)
    run = Run(folder)
    checks.verify(honest.recipe, run)
    seal.close(run)
    return run


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_file_is_named_and_every_other_check_still_runs(honest, work: Run, part: int) -> None:
    every = files(work)
    assert len(every) >= 80
    names = {verdict.name for verdict in checks.results(honest.recipe, work)}
    tried = 0
    for number, name in enumerate(every):
        if number % PARTS != part:
            continue
        content = (work.path / name).read_bytes()
        # A report to look at is held by the manifest's seal; a checkpoint's files by their stage's report: one damage each.
        evidence = name.endswith((".json", ".jsonl", ".yaml")) and "checkpoint" not in name
        for damage in DAMAGES if evidence else (DAMAGES[number // PARTS % len(DAMAGES)],):
            damaged = damage(content)
            if damaged == content or (damaged is None and name == "verdicts.json"):
                continue  # nothing to damage; verdicts are what is being written
            _put(work.path / name, damaged)
            try:
                found = checks.results(honest.recipe, Run(work.path))
            finally:
                _put(work.path / name, content)
            tried += 1
            blamed = [verdict for verdict in found if verdict.refuted and name in f"{verdict.why} {verdict.evidence}"]
            assert blamed, f"{name} {damage.__name__}: {[verdict.name for verdict in found if verdict.refuted]}"
            assert {verdict.name for verdict in found} == names, f"{name} {damage.__name__}"
            assert not [
                verdict.why for verdict in found if re.search(r"unexpected \w+Error|please report", verdict.why)
            ]
    assert tried >= 40


def _put(path: Path, content: bytes | None) -> None:
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)


def test_nothing_is_named_in_a_run_that_is_as_it_was(honest, work: Run) -> None:
    assert [verdict.name for verdict in checks.results(honest.recipe, Run(work.path)) if verdict.refuted] == []


def test_a_damage_that_was_sealed_is_seen_by_what_stands_on_it(honest, copied) -> None:
    """The seal is not the only one who looks."""
    _put(copied.run.path / "measure" / "fresh.json", b"{}")
    as_if_written_so(copied.run)
    refuted = {verdict.name for verdict in checks.results(copied.recipe, Run(copied.run.path)) if verdict.refuted}
    assert refuted == {"fresh_process", "heldout_confirmed", "records_whole"}


@pytest.mark.parametrize("name", ["manifest.json", "events.jsonl", "prepare/report.json", "evaluate/answers.jsonl"])
def test_a_damaged_file_is_a_reason_to_run_and_never_stops_a_preview(honest, copied, name: str) -> None:
    _put(copied.run.path / name, b"{oops")
    preview(honest.recipe, Run(copied.run.path))
