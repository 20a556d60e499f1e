"""Room on the disk is asked before anything is written; what breaks off halfway leaves what was there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune.core import memory
from finetune.core.errors import ResourceError
from finetune.core.files import aside, copy
from finetune.export import sizes
from finetune.recipe import Recipe
from finetune.run import Run
from finetune.run.checkpoints import writing
from finetune.stages.pipeline import run_directory, run_stages
from support.town import only_training


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | None]:
    """`bytes` that every disk has free, None for what it has."""
    real, left = shutil.disk_usage, {"bytes": None}

    def usage(path: object) -> object:
        found = real(path)  # type: ignore[call-overload]
        return found if left["bytes"] is None else found._replace(free=left["bytes"])

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return left  # type: ignore[return-value]


@pytest.fixture
def trained(town: Path, tmp_path: Path) -> tuple[Recipe, Run]:
    recipe = only_training(town, tmp_path, export=["bundle"])
    run = run_directory(recipe)
    run_stages(recipe, run, ["train"])
    return recipe, run


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_question_names_what_is_needed_what_is_free_the_place_and_the_ways(
    free: dict[str, int | None], tmp_path: Path
) -> None:
    free["bytes"] = 2 * 2**20
    memory.need_disk(tmp_path, 2**20, "a thing")
    with pytest.raises(ResourceError) as caught:
        memory.need_disk(tmp_path / "not" / "there", 2 * 2**20, "a thing", "name another")
    assert str(caught.value) == (
        f"a thing needs about 2.0 MiB on the disk of {tmp_path / 'not' / 'there'}, which has 2.0 MiB left. Make room and run "
        "the same command again, or name another"
    )


@pytest.mark.parametrize(("stage", "left"), [("merge", "merge/model"), ("export", "export/bundle")])
def test_a_disk_that_is_too_small_stops_a_stage_before_it_writes_and_the_same_command_goes_on(
    stage: str, left: str, trained: tuple[Recipe, Run], free: dict[str, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = trained
    if stage == "export":
        run_stages(recipe, run, ["merge"])
    weights = run.report("train")
    free["bytes"] = 1000
    with pytest.raises(
        ResourceError, match=r"needs about .* which has 1000 B left\. Make room and run the same command"
    ):
        run_stages(recipe, run, [stage])
    assert not (run.path / left).exists()
    assert [name for name in names(run.path / stage) if not name.startswith(".")] == []

    free["bytes"] = None
    run_stages(recipe, run, [stage])
    assert (run.path / left).is_dir()
    assert run.report("train") == weights


def test_a_checkpoint_asks_by_what_the_one_before_takes(free: dict[str, int | None], tmp_path: Path) -> None:
    with writing(tmp_path, 1) as folder:
        (folder / "trainer_state.json").write_text("{}")
        (folder / "weights").write_bytes(bytes(5000))
    free["bytes"] = 4000
    with (
        pytest.raises(ResourceError, match="the checkpoint of step 2, by what checkpoint-1 takes"),
        writing(tmp_path, 2),
    ):
        pytest.fail("it was begun")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_an_export_that_breaks_off_leaves_the_one_before_as_it_was(
    trained: tuple[Recipe, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.export import bundle

    recipe, run = trained
    run_stages(recipe, run, ["export"])
    before = {
        name: (run.path / "export" / "bundle" / name).read_bytes() for name in names(run.path / "export" / "bundle")
    }

    def broken(out: Path, facts: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle, "_write_manifest", broken)
    with pytest.raises(Exception, match="No space left"):
        run_stages(recipe, run, ["export"], force=True)
    assert {
        name: (run.path / "export" / "bundle" / name).read_bytes() for name in names(run.path / "export" / "bundle")
    } == before
    assert [path.name for path in (run.path / "export").iterdir() if path.name.startswith(".")] == []


def half_written(place: Path) -> None:
    with aside(place) as partial:
        partial.mkdir()
        (partial / "a").write_text("half")
        raise OSError("broken")


def test_a_folder_written_aside_takes_its_place_whole_or_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with aside(place) as partial:
        partial.mkdir()
        (partial / "a").write_text("old")
        assert not place.exists()
    with pytest.raises(OSError, match="broken"):
        half_written(place)
    assert (place / "a").read_text() == "old"
    with aside(place) as partial:
        partial.mkdir()
        (partial / "b").write_text("new")
    assert names(tmp_path) == ["model/b"]


def test_a_copied_file_is_whole_or_is_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")

    def broken(source: object, target: Path) -> None:
        Path(target).write_text("ha")
        raise OSError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", broken)
        with pytest.raises(OSError, match="broken"):
            copy(tmp_path / "a", tmp_path / "b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "old"}
    copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"


@pytest.mark.parametrize(("stored", "wanted", "needed"), [("float32", "bfloat16", 500), ("bfloat16", "float32", 2000)])
def test_a_merged_model_is_as_large_as_its_type_makes_it(tmp_path: Path, stored: str, wanted: str, needed: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"dtype": stored}))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    config = (tmp_path / "config.json").stat().st_size
    assert sizes.merged(tmp_path, wanted) == needed + config
