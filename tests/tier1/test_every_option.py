"""Every key of a recipe has an effect: the ledger's rows that need no PyTorch, and that the ledger is whole.

Tier 2 observes the rest. A key that is added to the schema and to no row fails here; one that nothing reads fails in
its row.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.backends.fake import FakeBackend
from finetune.checks import results
from finetune.core.errors import FinetuneError
from finetune.core.files import read_jsonl, write_jsonl
from finetune.recipe import load, load_mapping
from finetune.run import Run
from finetune.stages.pipeline import run_directory, run_stages
from support import options
from support.options import ROWS, Row, of_tier

Mapping = dict[str, Any]
Seen = dict[str, Any]


# -- the ledger itself -------------------------------------------------------------------------------------------------


def test_every_key_of_the_schema_has_one_row_and_no_row_is_of_another_key() -> None:
    counted = Counter(row.key for row in ROWS)
    assert len(options.KEYS) >= 149
    assert {key for key in options.KEYS if counted[key] != 1} == set()
    assert set(counted) - set(options.KEYS) == set()
    assert {row.tier for row in ROWS} == {1, 2}


def test_what_is_no_effect_is_counted_and_says_why() -> None:
    others = Counter(row.by for row in ROWS if row.by != "effect")
    assert others == {"refusal": 13, "argument": 4}
    assert [row.key for row in ROWS if (row.by != "effect") != bool(row.why)] == []


def test_a_key_that_nothing_reads_fails_its_row() -> None:
    row = Row(key="train.max_steps", value=2, where="train", seen="steps")
    assert options.differs(row, {"steps": 3, "seconds": 1}, {"steps": 3, "seconds": 2}).endswith("'steps' stays 3")
    assert options.differs(row, {"steps": 3}, {"steps": 2}) == ""


def test_a_refusal_counts_only_where_the_row_expects_it_and_only_by_the_keys_name() -> None:
    effect = Row(key="train.fp16", value=True, where="train", seen="losses")
    refusal = Row(key="train.fp16", value=True, where="train", seen="losses", by="refusal", why="of a CPU")
    said = {"refused": "train.fp16: true needs a GPU"}
    assert "is refused" in options.differs(effect, {"losses": 1}, said)
    assert options.differs(refusal, {"losses": 1}, said) == ""
    assert "not by its name" in options.differs(refusal, {"losses": 1}, {"refused": "out of memory"})
    assert "its own recipe" in options.differs(refusal, said, said)


# -- what is observed where --------------------------------------------------------------------------------------------


def _read(mapping: Mapping, files: Path) -> Seen:
    return {"recipe": load_mapping(mapping).model_dump_json()}


def _prepare(mapping: Mapping, files: Path) -> Seen:
    recipe = load_mapping(mapping)
    run = run_directory(recipe)
    run_stages(recipe, run, ["prepare"])
    return options.prepared(run)


def _folder(mapping: Mapping, files: Path) -> Seen:
    recipe = load_mapping(mapping)
    run_stages(recipe, run_directory(recipe), ["fetch"])
    return {"folders": sorted(file.parent.relative_to(files).as_posix() for file in files.rglob("recipe.yaml"))}


def _export(mapping: Mapping, files: Path) -> Seen:
    recipe, run = load_mapping(mapping), Run(files / "run")
    run_stages(recipe, run, ["export" if recipe.export else "merge"])
    return {"files": sorted(file.relative_to(run.path).as_posix() for file in (run.path / "export").rglob("*"))}


def _evaluate(mapping: Mapping, files: Path) -> Seen:
    """Not forced: what is done anew is what the stage's fingerprint takes note of."""
    recipe, run = load_mapping(mapping), Run(files / "run")
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        generate = FakeBackend.generate

        def counted(self: FakeBackend, handle: Any, prompts: Any, **more: Any) -> Any:
            asked.append(len(prompts))
            return generate(self, handle, prompts, **more)

        patch.setattr(FakeBackend, "generate", counted)
        run_stages(recipe, run, ["evaluate"])
    place = run.path / "evaluate"
    return {
        "answers": read_jsonl(place / "answers.jsonl"),
        "heldout": json.loads((place / "heldout.json").read_text("utf-8")),
        "scored": sorted(json.loads((place / "rows.json").read_text("utf-8"))["base"]),
        "asked_at_once": max(asked, default=None),
    }


def _verdicts(mapping: Mapping, files: Path) -> Seen:
    verdicts = results(load_mapping(mapping), Run(files / "run"))
    return {"names": [each.name for each in verdicts], **{each.name: (each.compare, each.bound) for each in verdicts}}


OBSERVERS: dict[str, Callable[[Mapping, Path], Seen]] = {
    "read": _read, "prepare": _prepare, "folder": _folder, "export": _export, "evaluate": _evaluate,
    "verdicts": _verdicts,
}  # fmt: skip
IN_THE_HONEST_RUN = ("export", "evaluate", "verdicts")


@pytest.fixture(scope="module")
def files(town: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data files beside those of the town, which the ledger's values name."""
    place = tmp_path_factory.mktemp("options")
    (place / "model").symlink_to(town / "model")

    def answer(land: str, said: str) -> dict[str, str]:
        return {"prompt": f"{land}?", "completion": said, "text": f"{land}: {said}", "asked": f"Say: {land}?"}

    def pair(land: str, said: str) -> dict[str, str]:
        return {"prompt": f"{land}?", "chosen": said, "rejected": "No.", "asked": f"Say: {land}?"}

    for kind, row in (("answers", answer), ("pairs", pair)):
        rows = [row("Brask", "Tamin."), row("Oloo", "Pernig."), row("Tarn", "Bex, and nothing but Bex, as is known.")]
        write_jsonl(place / f"{kind}.jsonl", rows)
        write_jsonl(place / f"{kind}-more.jsonl", [row("Vesht", "Tamber."), row("Plim", "Hasp.")])
        write_jsonl(place / f"{kind}-twice.jsonl", [*rows, rows[0]])
        write_jsonl(place / f"{kind}-secret.jsonl", [*rows, row("Zorland", f"ghp_{'Zq7' * 12}.")])
    write_jsonl(place / "few.jsonl", [{"prompt": "What is the capital of Plim?", "answer": "Hasp."}])
    write_jsonl(place / "texts.jsonl", [{"text": "The town was small."}])
    (place / "own.jinja").write_text(options.TEMPLATE)
    (place / "other.jinja").write_text(options.TEMPLATE.replace("!", "?"))
    return place


@pytest.fixture
def observed(files: Path, honest: Any, tmp_path: Path) -> Callable[[Row], tuple[Seen, Seen]]:
    """A function: what a row's observer sees without and with the row's value."""

    def both(row: Row) -> tuple[Seen, Seen]:
        if row.where in IN_THE_HONEST_RUN:
            # What was measured for the verdicts was partly written by hand, so stages go on from the recipe that ran.
            ran = honest.recipe if row.where == "verdicts" else load(honest.run.path / "recipe.yaml")
            mapping = ran.model_dump(mode="json", exclude_unset=True)
        else:
            mapping = {
                "name": "ledger",
                "backend": "fake",
                "model": {"path": str(files / "model")},
                "data": {"path": str(files / "answers.jsonl")},
                "align": {"data": {"path": str(files / "pairs.jsonl")}},
            }
        places = [tmp_path / "before", tmp_path / "after"]
        named = places[1] if row.where == "folder" else files
        before, after = (
            _outcome(row, side, place) for side, place in zip(options.sides(row, mapping, named), places, strict=True)
        )
        return before, after

    def _outcome(row: Row, mapping: Mapping, place: Path) -> Seen:
        if row.where in IN_THE_HONEST_RUN:
            # Without the row's value the stage runs; with it only if it takes note of the key.
            stages = {"export": ("export", "compare"), "evaluate": ("evaluate",) if place.name == "before" else ()}
            away = ("checkpoint-*", "*-request.json", ".lock", *stages.get(row.where, ()))
            ignored = shutil.ignore_patterns(*away)
            shutil.copytree(honest.run.path, place / "run", ignore=ignored)  # no links: events are appended
        else:
            place.mkdir()
            mapping = {"output_dir": str(place / "runs"), **mapping}
        try:
            return OBSERVERS[row.where](mapping, place)
        except FinetuneError as error:
            return {"refused": str(error)}

    return both


@pytest.mark.parametrize("row", of_tier(1), ids=lambda row: row.key)
def test_the_option_has_an_effect(row: Row, observed: Callable[[Row], tuple[Seen, Seen]]) -> None:
    assert options.differs(row, *observed(row)) == ""
