"""Real weights and real formats: what is damaged is refused by name, and what is whole is handed out to the letter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from finetune.cli.app import cli
from finetune.core.errors import StageError
from finetune.core.files import digests
from finetune.run import Run, evidence, layout
from finetune.stages.pipeline import run_stages
from support.chain import tiny_recipe
from support.proof import flip, prove, stated, whole_folder


@pytest.fixture(scope="module")
def made(recipe, tiny_model, tmp_path_factory) -> Run:
    """A tiny model in the formats that this machine can make, as if verified."""
    exports = [*(name for name in recipe.export if name in ("gguf:f16", "mlx")), "bundle"]
    recipe = tiny_recipe(tiny_model("llama"), tmp_path_factory.mktemp("handed"), exports, max_steps=2)
    run = Run(Path(recipe.output_dir) / recipe.name)
    run_stages(recipe, run, ["export"])
    prove(run, recipe)
    return run


@pytest.fixture
def run(made: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made.path, tmp_path / "run")
    return Run(tmp_path / "run")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(each) for each in arguments], prog_name="finetune")


def export(run: Run, *more: str) -> Result:
    return call("export", run.path, "--no-parity", "--out", "out", *more)


def serve(run: Run, backend: str, monkeypatch: pytest.MonkeyPatch) -> Result:
    """The command, up to where it would load the model."""

    def stop(*_: Any) -> Any:
        raise StageError("far enough")

    monkeypatch.setattr("finetune.serving.models.whole", stop)
    return call("serve", run.path, "--backend", backend, "--port", "0")


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 6 // 10])
    return file


def test_what_is_handed_out_is_what_was_made(run: Run) -> None:
    done = export(run)
    assert done.exit_code == 0, done.output
    entries = evidence.read(run, layout.EXPORTS)
    for entry in entries:
        folder = entry["name"].replace(":", "-")
        anew = {"README.md", "manifest.json"} if folder == "bundle" else set()
        there = {name: sha for name, sha in digests(Path("out") / folder).items() if name not in anew}
        assert there == {name: sha for name, sha in entry["files"].items() if name not in anew} and there
    bundle = digests(Path("out/bundle"))
    assert stated(Path("out/bundle")) == {name: sha for name, sha in bundle.items() if name != "manifest.json"}
    files = [*whole_folder(run.path), *whole_folder(Path("out"))]
    assert [path for path in files if path.is_symlink() or path.stat().st_nlink != 1] == []


@pytest.mark.parametrize("change", [flip, cut])
@pytest.mark.parametrize(
    ("name", "kind", "backend"),
    [
        ("export/bundle/model.safetensors", None, None),
        ("export/gguf-f16/*.gguf", "gguf", "llamacpp"),
        ("export/mlx/model.safetensors", "mlx", "mlx"),
        ("merge/model/model.safetensors", None, "torch"),
        ("merge/model/tokenizer.json", None, "torch"),
        ("prepare/chat_template.jinja", None, "torch"),
    ],
)
def test_what_is_damaged_is_named_and_stays_where_it_is(
    run: Run, family: Any, monkeypatch: pytest.MonkeyPatch, name: str, kind: str | None, backend: str | None,
    change: Callable[[Path], Path],
) -> None:  # fmt: skip
    if kind:
        family(kind)
    if backend:
        assert "far enough" in serve(run, backend, monkeypatch).stderr
    (file,) = run.path.glob(name)
    change(file)
    name = file.relative_to(run.path).as_posix()
    done = export(run)
    assert (done.exit_code, Path("out").exists()) == (1, False), done.output
    assert f"{name} was changed after it was written" in done.stderr
    if backend:
        done = serve(run, backend, monkeypatch)
        assert (done.exit_code, done.stdout) == (1, "")
        assert f"{name} was changed after it was written" in done.stderr
    done = export(run, "--anyway")
    assert done.exit_code == 0, done.output
    assert f"> - {name} was changed after it was written" in Path("out/bundle/README.md").read_text()
    although = json.loads(Path("out/bundle/manifest.json").read_text())["exported_although"]
    assert although == [f"{name} was changed after it was written"]
