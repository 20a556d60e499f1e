"""The fetch stage writes down what the model is; older download files are carried out from what is on this machine."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from finetune.backends.fake.model import make_model
from finetune.core.errors import MissingError, ResourceError, StageError, UsageError
from finetune.core.files import digest
from finetune.models import sources, weights
from finetune.recipe import load_mapping
from finetune.run import Run
from finetune.run.plan import BY_NAME
from finetune.stages import fetch
from finetune.stages.runner import run_stage


def recipe(path: Path | str, **changes: object):
    mapping = {"backend": "fake", "model": {"path": str(path)}, "train": None}
    return load_mapping({**mapping, **changes})


def safetensors(file: Path, **shapes: list[int]) -> None:
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "model", {"Hello?": "Hello."})


# -- the stage -------------------------------------------------------------------------------------------------------


def test_the_stage_records_the_base_and_the_digest_of_every_file(tmp_path, model):
    run = Run(tmp_path / "run").create()
    report, ran = run_stage(BY_NAME["fetch"], recipe(model), run)
    assert ran
    found = json.loads((run.path / "fetch" / "model.json").read_text())
    assert (found["path"], found["kind"], found["base"], found["adapter"]) == (str(model), "local", str(model), None)
    assert found["files"] == {
        file.name: {"size": file.stat().st_size, "sha256": digest(file)} for file in sorted(model.iterdir())
    }
    assert report.artifacts == {"fetch/model.json": digest(run.path / "fetch" / "model.json")}
    assert report.metrics["bytes"] == sum(file.stat().st_size for file in model.iterdir())
    assert report.metrics["parameters"] == json.loads((model / "config.json").read_text())["num_parameters"] > 0


def test_an_adapter_and_its_base_are_both_recorded(tmp_path, model):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    run = Run(tmp_path / "run").create()
    run_stage(BY_NAME["fetch"], recipe(tuned), run)
    found = json.loads((run.path / "fetch" / "model.json").read_text())
    assert (found["base"], found["adapter"]) == (str(model), str(tuned))
    assert set(found["adapter_files"]) == {"adapter_config.json"}
    assert set(found["files"]) == {file.name for file in model.iterdir()}


def test_a_model_for_another_backend_is_refused_by_name(tmp_path, model):
    run = Run(tmp_path / "run").create()
    with pytest.raises(UsageError, match="backend 'torch' cannot load a model of the fake backend"):
        fetch.run(recipe(model, backend="torch"), run)
    (model / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="backend 'fake' needs a directory made for it"):
        fetch.run(recipe(model), run)
    assert run.report("fetch") is None


def test_parameters_are_counted_from_the_headers_alone(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert weights.count_parameters(tmp_path) is None
    safetensors(tmp_path / "model-00001-of-00002.safetensors", a=[3, 4], b=[5])
    safetensors(tmp_path / "model-00002-of-00002.safetensors", c=[2, 2, 2], scalar=[])
    assert weights.count_parameters(tmp_path) == 12 + 5 + 8 + 1


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 500) + b'{"a"'])
def test_weights_cut_short_are_noticed(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(StageError, match="cut short"):
        weights.count_parameters(tmp_path)


# -- which files -----------------------------------------------------------------------------------------------------

SAFE = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
SHARDED = [
    "config.json",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
]


@pytest.mark.parametrize(
    ("listed", "there", "expected"),
    [
        (["config.json"], SAFE, ["config.json"]),
        ([], SAFE, SAFE),
        (["pytorch_model.bin"], SAFE, ["model.safetensors"]),
        (["model.safetensors"], ["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["pytorch_model.bin"], SHARDED, SHARDED[1:]),
        (["tokenizer.json", "vocab.json", "merges.txt"], SAFE, SAFE[2:]),
        (["vocab.json"], ["vocab.json", "tokenizer.json"], ["vocab.json"]),
    ],
)
def test_a_file_is_taken_as_listed_or_in_another_format(listed, there, expected):
    assert fetch.choose(listed, there, "repo") == expected


def test_every_file_that_nothing_stands_in_for_is_named():
    with pytest.raises(MissingError, match=r"repo has no vocab\.json, notes\.txt\. It has: config\.json"):
        fetch.choose(["config.json", "vocab.json", "notes.txt"], ["config.json"], "repo")


# -- older download files --------------------------------------------------------------------------------------------


def entry(repo: Path | str, out: Path | None, *files: str) -> dict:
    return {
        "repo": str(repo),
        "files": list(files),
        "output_dir": str(out) if out else None,
        "revision": None,
        "token": None,
    }


@pytest.fixture
def source(tmp_path) -> Path:
    place = tmp_path / "source"
    place.mkdir()
    for name in SAFE:
        (place / name).write_text(f"content of {name}")
    return place


def test_listed_files_are_copied_and_substitutes_noted(tmp_path, source, capsys):
    out = tmp_path / "out"
    files = ["config.json", "pytorch_model.bin", "tokenizer.json", "vocab.json", "merges.txt"]
    assert fetch.download(entry(source, out, *files)) == out
    assert {file.name: file.read_text() for file in out.iterdir()} == {name: f"content of {name}" for name in SAFE}
    said = capsys.readouterr().err
    assert "no pytorch_model.bin; taking model.safetensors instead" in said
    assert "no merges.txt; taking tokenizer.json instead" in said


def test_an_empty_list_copies_all_and_no_directory_copies_none(tmp_path, source):
    fetch.download(entry(source, tmp_path / "out"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(SAFE)
    assert fetch.download(entry(source, None, "config.json")) == source
    assert fetch.download(entry(source, source)) == source


def test_the_embedded_model_can_be_downloaded_by_its_name(tmp_path, source, monkeypatch):
    monkeypatch.setattr(sources, "directory", lambda repo: source if repo == "smollm2-135m" else None)
    fetch.download(entry("smollm2-135m", tmp_path / "out", "config.json", "pytorch_model.bin"))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_nothing_is_copied_where_a_file_is_missing(tmp_path, source):
    with pytest.raises(MissingError, match=r"has no notes\.txt"):
        fetch.download(entry(source, tmp_path / "out", "config.json", "notes.txt"))
    assert not (tmp_path / "out").exists()


def test_a_copy_that_broke_off_leaves_no_file_under_the_name(tmp_path, source, monkeypatch):
    def broken(start, end):
        Path(end).write_text("half")
        raise OSError("device gone")

    monkeypatch.setattr(shutil, "copyfile", broken)
    with pytest.raises(OSError, match="device gone"):
        fetch.download(entry(source, tmp_path / "out", "config.json"))
    assert list((tmp_path / "out").iterdir()) == []


def test_disk_space_is_checked_before_anything_is_copied(tmp_path, source, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ResourceError, match="Make room"):
        fetch.download(entry(source, tmp_path / "out", "config.json"))
    assert not (tmp_path / "out").exists()


def test_weights_that_were_cut_short_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 15)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StageError, match="was cut short"):
        weights.count_parameters(tmp_path)
    file.write_bytes(file.read_bytes() + b"\0")
    assert weights.count_parameters(tmp_path) == 4


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(StageError, match=r"config\.json .*get the model again"):
        weights.count_parameters(tmp_path)
