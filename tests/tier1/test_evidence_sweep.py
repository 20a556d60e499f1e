"""No evidence is a failed check: in an honest run every key of every file is taken away, emptied and changed, as if it had
been written so; each change refutes a verdict, or the key stands on the list of those that only inform, with a reason.
"""

from __future__ import annotations

import shutil
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from finetune import checks
from finetune.recipe import Recipe
from finetune.run import Run
from support import sweep
from support.town import Ran, whole

PARTS = 4  # tests that share the keys, so that workers can
# (file, key, what may be done to it in silence, why). `*` stands for anything.
INFORMATIVE: tuple[tuple[str, str, str, str], ...] = (
    ("*/report.json", "notes", "changed", "sentences for a reader"),
    ("*/report.json", "peak.process", "changed", "measured once: nobody can measure it again"),
    ("fetch/report.json", "metrics.seconds", "changed", "measured once"),
    ("export/report.json", "notes", "emptied", "sentences for a reader"),
    ("*/report.json", "asked", "changed emptied", "only `run` compares it: a changed one trains again"),
    ("*/report.json", "metrics.device", "changed", "where it was computed; no verdict depends on it"),
    ("*/report.json", "metrics.world_size", "changed", "how many processes; a larger one makes `rows_trained` look at less"),
    ("*/report.json", "metrics.*_bytes", "changed", "measured once; the fake backend stores no bytes to hold them against"),
    ("align/report.json", "metrics.frozen_parameters", "changed", "a count for a reader; its digest is what is compared"),
    ("events.jsonl", "recipe[[]].replaced", "changed", "for a reader"),
    ("events.jsonl", "recipe[[]].sha256", "deleted emptied changed", "made again by `as_if_written_so`; test_seal breaks it"),
    ("events.jsonl", "stage_finished[[]*].report", "deleted emptied changed", "made again by `as_if_written_so` too"),
    ("events.jsonl", "stage_started[[]*].of.*", "emptied changed", "made again by `as_if_written_so`; test_tampered breaks it"),
    ("events.jsonl", "exported[[]].sha256", "deleted emptied changed", "made again by `as_if_written_so` too"),
    ("fetch/model.json", "kind", "emptied changed", "how the model was found, for a reader"),
    ("fetch/model.json", "license_source", "emptied changed", "for a reader"),
    ("prepare/template.json", "name", "emptied changed", "for a reader; its digest is what is compared"),
    ("evaluate/answers.jsonl", "*.phases.base.logprob", "changed", "no second source; `fresh_process` has the final model's"),
    ("evaluate/answers.jsonl", "*.phases.trained.logprob", "changed", "no second source, where alignment comes after it"),
    ("evaluate/greedy.json", "*.worst.likeliest", "emptied changed", "stands in a sentence only"),
    ("evaluate/preferences.jsonl", "*.phases.*.*", "changed", "no second source for pairs that rewards.json has not"),
    ("measure/fresh.json", "peak_bytes", "deleted changed", "measured once"),
    ("measure/memory.json", "*.peak_*_bytes", "changed", "measured once"),
    ("measure/memory.json", "full.estimated*", "deleted emptied changed", "the estimate of full training is held to nothing"),
    ("measure/memory.json", "stored.optimizer", "emptied", "None stands for an optimizer that is no file of PyTorch's"),
    ("measure/resume.json", "tensors", "changed", "stands in a sentence only; 0 proves nothing, and fails"),
    ("measure/serving.json", "server", "emptied changed", "a name for a reader"),
    ("measure/serving.json", "asked[[]].again", "changed", "what the model said alone: another text is a tie at most"),
    ("measure/serving.json", "sampling.likeliest_only", "changed", "one answer of two"),
    ("measure/serving.json", "sampling.temperature", "changed", "another temperature above 0"),
    ("measure/invariance.json", "architecture", "emptied changed", "a name for a reader"),
    ("measure/invariance.json", "*okens", "emptied changed", "conditions of the experiment"),
    ("measure/invariance.json", "options", "emptied changed", "conditions of the experiment"),
    ("measure/invariance.json", "settings", "emptied changed", "conditions of the experiment"),
    ("measure/invariance.json", "*.what", "emptied changed", "a name for a reader"),
    ("measure/invariance.json", "*.note", "deleted emptied changed", "for a reader"),
    ("measure/invariance.json", "invariances.order.*.gradients", "deleted emptied changed", "rows and losses are compared"),
    ("measure/invariance.json", "invariances.order.other_seed.*", "emptied changed", "another order is all that is asked"),
    ("measure/invariance.json", "invariances", "changed", "the last entry, which this recipe does not use"),
    ("measure/invariance.json", "invariances.checkpointing*", "deleted emptied changed", "the fake backend has none to owe"),
    ("measure/invariance.json", "invariances.packing*", "deleted emptied changed", "the fake backend has none to owe"),
    ("export/exports.json", "[[]].seconds", "changed", "measured once"),
    ("export/exports.json", "[[]].notes", "emptied changed", "sentences for a reader"),
    ("export/exports.json", "[[]].made_from", "emptied changed", "the stage's own mark: a changed one exports again"),
    ("compare/material.json", "conversations[[]].name", "emptied changed", "a name for a reader"),
    ("compare/*.json", "mark", "emptied changed", "the stage's own mark: a changed one compares again"),
    ("compare/*.json", "*_per_second", "emptied changed", "measured once"),
    ("compare/*.json", "load_seconds", "changed", "measured once"),
    ("compare/*.json", "peak_bytes", "changed", "measured once"),
    ("compare/*.json", "distributions.top1", "changed", "told beside the divergence, which is judged"),
    ("compare/*.json", "distributions.answers_mean", "emptied changed", "told beside the divergence, which is judged"),
    ("compare/*.json", "distributions.worst.*", "emptied changed", "quoted in a sentence"),
    ("compare/*.json", "greedy.tokens*", "changed", "counts in a sentence"),
    ("compare/*.json", "constants.compared", "changed", "a count in a sentence"),
    ("compare/bundle.json", "adapter.compared", "changed", "a count in a sentence"),
    ("compare/*.json", "bits", "changed", "the fake backend's weights have no bits"),
    ("compare/*.json", "merge_factor", "changed", "the fake backend's merge is no sum"),
)  # fmt: skip


def _informs(key: sweep.Key, how: str) -> list[int]:
    return [
        number
        for number, (file, name, hows, _) in enumerate(INFORMATIVE)
        if fnmatchcase(key.file, file) and fnmatchcase(key.name, name) and how in hows.split()
    ]


@pytest.fixture(scope="module")
def honest(town: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A whole run with every experiment that the fake backend can make."""
    return whole(town, tmp_path_factory.mktemp("runs"), invariance=True)


@pytest.fixture(scope="module")
def work(honest: Ran, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the honest run, whose files are changed and put back."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    shutil.copytree(honest.run.path, folder)
    return Run(folder)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("part", range(PARTS))
def test_every_key_of_every_file_is_stood_on(honest: Ran, work: Run, part: int) -> None:
    watched = sweep.readers(honest.recipe, honest.run)
    every = [key for name in sweep.files(honest.run) for key in sweep.keys(honest.run, name)]
    assert len(sweep.files(honest.run)) >= 30
    assert 700 <= len(every) <= 1600, "what was swept has changed much: look at it, and change this"
    tried: Counter[str] = Counter()
    survived = []
    for key in every[part::PARTS]:
        for how in sweep.EDITS:
            refuted = _refuted(honest.recipe, work, key, how, watched[key.file])
            if refuted is None:
                continue  # nothing there to take away
            tried[how] += 1
            if not refuted and not _informs(key, how):
                survived.append(f"{key} {how}")
    assert survived == []
    assert min(tried.values()) >= 100, tried


def _refuted(recipe: Recipe, work: Run, key: sweep.Key, how: str, readers: list[str]) -> bool | None:
    """Whether an edit refutes a verdict of those checks that open the file; None where it would change nothing."""
    value = sweep.load(work, key.file)
    edited = sweep.edit(value, key, how)
    if edited is None:
        return None
    stage = key.file.partition("/")[0]
    beside = {key.file, "events.jsonl", "manifest.json", f"{stage}/report.json"}
    before = {name: (work.path / name).read_bytes() for name in beside if (work.path / name).is_file()}
    try:
        sweep.store(work, key.file, edited)
        sweep.resealed(work, *([stage] if "/" in key.file and not key.file.endswith("report.json") else []))
        fresh = Run(work.path)
        return any(verdict.refuted for name in readers for verdict in checks.results(recipe, fresh, [name]))
    finally:
        for name, content in before.items():
            (work.path / name).unlink(missing_ok=True)
            (work.path / name).write_bytes(content)


def test_the_sweep_is_of_an_honest_run(honest: Ran) -> None:
    assert [verdict.name for verdict in checks.results(honest.recipe, honest.run) if verdict.refuted] == []


def test_every_informative_key_is_there_and_has_a_reason(honest: Ran) -> None:
    """A row that no key matches is a row too many."""
    every = [key for name in sweep.files(honest.run) for key in sweep.keys(honest.run, name)]
    used = {number for key in every for how in sweep.EDITS for number in _informs(key, how)}
    assert [INFORMATIVE[number] for number in set(range(len(INFORMATIVE))) - used] == []
    assert all(len(reason) > 8 for *_, reason in INFORMATIVE)
    assert len(INFORMATIVE) <= 60, "the list of what only informs is short: more verdicts, not more rows"


@pytest.mark.parametrize("file", ["measure/serving.json", "train/trainer_logs.json"])
def test_the_sweep_would_see_a_check_that_looks_at_nothing(honest: Ran, work: Run, file: str) -> None:
    key = sweep.keys(honest.run, file)[-1]
    assert _refuted(honest.recipe, work, key, "deleted", []) is False
    assert _refuted(honest.recipe, work, key, "deleted", sweep.readers(honest.recipe, honest.run)[file]) is True


def test_every_kind_of_event_that_is_written_is_declared() -> None:
    import re

    import finetune
    from finetune.run.records.events import KINDS

    root = Path(finetune.__file__).parent
    written = {
        kind
        for path in root.rglob("*.py")
        if "sabotage" not in path.parts
        for kind in re.findall(r'\.event\(\s*"(\w+)"', path.read_text(encoding="utf-8"))
    }
    assert written >= {"recipe", "step", "stage_finished", "verified"}
    assert written <= {*KINDS, "step"}
