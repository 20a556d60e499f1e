"""`finetune serve` before any server starts: what it serves, what it refuses, and what a request may say."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from finetune.cli.app import cli
from finetune.core import processes
from finetune.core.errors import MissingError, StageError
from finetune.core.files import digest, digests, write_json
from finetune.core.lookup import load
from finetune.recipe import Recipe
from finetune.recipe import load as load_recipe
from finetune.run import Report, Run, evidence, layout, seal
from finetune.run.report import left_by, written_anew
from finetune.serving import SERVERS, base_url, bind, serving
from finetune.serving.models import Found, exported, final, from_checkpoint, loaded, whole
from finetune.serving.requests import Refused, checked
from finetune.stages.pipeline import run_stages
from support import town
from support.proof import flip, prove
from support.records import MADE

NAME = "town"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Run]:
    """A run on the fake backend, trained, aligned, not merged; tests read it and leave it as it is."""
    place = town.build(tmp_path_factory.mktemp("town"))
    align = {
        "data": {"path": str(place / "preferences.jsonl")},
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 3,
        "max_length": 256,
    }
    recipe = town.only_training(place, place / "runs", align=align)
    run = Run(place / "runs" / NAME)
    run_stages(recipe, run, ["train", "align"])
    return recipe, run


@pytest.fixture
def own(finished: tuple[Recipe, Run], tmp_path: Path) -> tuple[Recipe, Run]:
    """A copy of the run to change."""
    shutil.copytree(finished[1].path, tmp_path / NAME)
    return finished[0], Run(tmp_path / NAME)


@pytest.fixture
def torch_run(own: tuple[Recipe, Run], monkeypatch: pytest.MonkeyPatch) -> Run:
    """The copy as if PyTorch had made it, and every package there; what would load a model fails the test."""
    recipe, run = own
    text = (run.path / "recipe.yaml").read_text(encoding="utf-8")
    (run.path / "recipe.yaml").write_text(text.replace("backend: fake", "backend: torch"), encoding="utf-8")
    run.event("recipe", replaced=True, sha256=digest(run.path / "recipe.yaml"))
    recipe = load_recipe(run.path / "recipe.yaml")
    assert recipe.backend == "torch"
    prove(run, recipe)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    def never(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("finetune.serving.models.whole", never)
    return run


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["serve", *map(str, arguments)], standalone_mode=True)


def merged(run: Run) -> Path:
    model = run.path / "merge" / "model"
    model.mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json"):
        (model / name).write_text("made once")
    write_report(run, "merge", model)
    return model


def write_report(run: Run, stage: str, *artifacts: Path, started: str = "2999-01-01T00:00:00.000Z") -> None:
    """The report of a stage that left what is there."""
    listed = {path.relative_to(run.path).as_posix(): digest(path) for path in artifacts}
    files = left_by(stage, run.path)
    run.write_report(Report(stage=stage, started=started, artifacts=listed, files=files, peak={"process": 1}, **MADE))


def write_exports(run: Run, *names: str, started: str = "2999-01-01T00:00:00.000Z") -> None:
    entries: list[dict[str, Any]] = []
    for name in names:
        path = folder = run.path / "export" / name.replace(":", "-")
        folder.mkdir(parents=True, exist_ok=True)
        if name.startswith("gguf"):
            path = folder / "town.gguf"
        (folder / "town.gguf").write_bytes(b"GGUF" + bytes(100))
        entries.append(
            {"name": name, "path": path.relative_to(run.path).as_posix(), "backend": None, "bytes": 1, "seconds": 0.1,
             "mended": [], "notes": [], "made_from": "", "sha256": digest(path), "files": digests(folder)}
        )  # fmt: skip
    file = evidence.write(run, layout.EXPORTS, entries)  # type: ignore[arg-type]
    write_report(
        run, "export", file, *(run.path / "export" / name.replace(":", "-") for name in names), started=started
    )


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_help_names_every_server_of_the_table() -> None:
    text = CliRunner().invoke(cli, ["serve", "--help"]).stdout
    assert len(SERVERS) == 3
    assert f"[{'|'.join(SERVERS)}]" in text
    assert all(f"  {name} " in text for name in SERVERS)


def test_every_server_of_the_table_can_be_found() -> None:
    assert all(callable(load(row.start)) for row in SERVERS.values())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 3, "no run at"),
        ([], 2, "Missing argument 'RUN'"),
        (["{run}", "--backend", "vllm"], 2, "'vllm' is not one of 'torch', 'llamacpp', 'mlx'"),
        (["{run}", "--port", "70000"], 2, "70000 is not in the range"),
        (["{run}", "--export", "gguf"], 2, "--export goes with --backend llamacpp or mlx"),
        (["{run}", "--backend", "mlx", "--from-checkpoint"], 2, "--from-checkpoint goes with --backend torch"),
        (["{run}", "--backend", "mlx", "--export", "gguf:f16"], 2, "not an export of the format 'mlx'"),
        (["{run}", "--backend", "llamacpp"], 3, "--to gguf:f16"),
        (["{run}", "--backend", "mlx"], 3, "--to mlx"),
        (["{run}", "--backend", "llamacpp", "--export", "gguf:q8_0"], 3, "--to gguf:q8_0"),
        (["{run}", "--from-checkpoint", "checkpoint-99"], 3, "train/checkpoint-3"),
    ],
)
def test_what_cannot_be_served_is_told(torch_run: Run, arguments: list[str], code: int, words: str) -> None:
    done = call(*(each.format(run=torch_run.path) for each in arguments))
    assert (done.exit_code, done.stdout) == (code, "")
    assert words in done.stderr


def test_a_run_without_weights_is_refused(finished: tuple[Recipe, Run]) -> None:
    done = call(finished[1].path)
    assert done.exit_code == 2
    assert "backend 'fake', which has no weights" in done.stderr


@pytest.mark.parametrize("backend", SERVERS)
def test_missing_packages_are_named_with_the_line_that_installs_them(
    torch_run: Run, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    write_exports(torch_run, "gguf:f16", "mlx")
    done = call(torch_run.path, "--backend", backend)
    assert done.exit_code == 3
    assert (
        f"not installed: uvicorn. Install them with: pip install 'finetune-proof[{SERVERS[backend].extra},serve]'"
        in (done.stderr)
    )


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(torch_run: Run) -> None:
    with bind("127.0.0.1", 0) as other:
        other.listen()
        port = other.getsockname()[1]
        done = call(torch_run.path, "--port", port)
    assert done.exit_code == 4
    assert f"port {port} on 127.0.0.1 is taken. Choose another with --port, or any free one: --port 0" in done.stderr


def test_an_unfinished_training_is_not_served_as_if_it_were_the_final_model(torch_run: Run) -> None:
    torch_run.forget("align")
    done = call(torch_run.path)
    assert done.exit_code == 3
    assert "its stage 'align' has not finished" in done.stderr and "--from-checkpoint" in done.stderr


def test_a_run_without_checkpoints_says_how_to_get_one(torch_run: Run) -> None:
    for folder in torch_run.path.glob("*/checkpoint-*"):
        shutil.rmtree(folder)
    done = call(torch_run.path, "--from-checkpoint")
    assert done.exit_code == 3
    assert "train.save_strategy" in done.stderr


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ([], "align/checkpoint-4"),
        (["checkpoint-2"], "align/checkpoint-2"),
        (["checkpoint-9"], "train/checkpoint-9"),
        (["train/checkpoint-3"], "train/checkpoint-3"),
        (["{run}/train/checkpoint-6"], "train/checkpoint-6"),
    ],
)
def test_a_checkpoint_is_the_newest_or_the_one_named(
    torch_run: Run, wanted: list[str], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Found] = []

    def stop(model: Found, *_: Any) -> Any:
        seen.append(model)
        raise StageError("far enough")

    monkeypatch.setattr("finetune.serving.models.whole", stop)
    done = call(torch_run.path, "--port", 0, "--from-checkpoint", *(each.format(run=torch_run.path) for each in wanted))
    assert "far enough" in done.stderr
    assert [(model.what, model.path, model.adapter) for model in seen] == [
        (f"checkpoint {found}", Path(seen[0].path), torch_run.path / found)
    ]


# -- what is not served ------------------------------------------------------------------------------------------------


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 6 // 10])
    return file


def asked_to_load(monkeypatch: pytest.MonkeyPatch) -> list[Found]:
    """The models that the command went on to load."""
    seen: list[Found] = []

    def stop(model: Found, *_: Any) -> Any:
        seen.append(model)
        raise StageError("far enough")

    monkeypatch.setattr("finetune.serving.models.whole", stop)
    return seen


DAMAGED: list[tuple[str, Callable[[Path], Any], list[str]]] = [
    ("export/gguf-f16/town.gguf", flip, ["--backend", "llamacpp"]),
    ("export/gguf-f16/town.gguf", cut, ["--backend", "llamacpp"]),
    ("export/mlx/town.gguf", flip, ["--backend", "mlx"]),
    ("export/exports.json", lambda file: file.write_text(file.read_text() + " "), ["--backend", "mlx"]),
    ("merge/model/model.safetensors", flip, []),
    ("merge/model/tokenizer.json", flip, []),
    ("merge/model/added.json", lambda file: file.write_text("{}"), []),
    ("prepare/chat_template.jinja", flip, []),
    ("recipe.yaml", lambda file: file.write_text(file.read_text() + "# more"), []),
    ("merge/report.json", lambda file: file.write_text(file.read_text() + " "), []),
    ("train/checkpoint-3/adapter.json", flip, ["--from-checkpoint", "train/checkpoint-3"]),
]


@pytest.mark.parametrize(
    ("name", "change", "arguments"), DAMAGED, ids=[f"{row[0]} {row[1].__name__}" for row in DAMAGED]
)
def test_a_damaged_model_is_not_served_unless_someone_insists(
    torch_run: Run, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Path], Any], arguments: list[str]
) -> None:
    merged(torch_run)
    write_exports(torch_run, "gguf:f16", "mlx")
    prove(torch_run, load_recipe(torch_run.path / "recipe.yaml"))
    seen = asked_to_load(monkeypatch)
    arguments = [*arguments, "--port", "0"]
    assert "far enough" in call(torch_run.path, *arguments).stderr
    change(torch_run.path / name)
    for more in ([], ["--proof"]):
        done = call(torch_run.path, *arguments, *more)
        assert (done.exit_code, done.stdout, len(seen)) == (1, "", 1), done.output
        assert f"{torch_run.path} is not served:\n  {name} was " in done.stderr and "--anyway" in done.stderr
    done = call(torch_run.path, *arguments, "--anyway")
    assert len(seen) == 2
    assert f"warning: serving although: {name} was " in done.stderr


def test_an_adapter_that_is_served_and_its_base_are_looked_at(
    torch_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = asked_to_load(monkeypatch)
    call(torch_run.path, "--port", 0)
    assert len(seen) == 1
    kept = (torch_run.path / "fetch" / "model.json").read_text()
    base = tmp_path / "base"
    shutil.copytree(evidence.fetched(torch_run)["base"], base)
    write_json(torch_run.path / "fetch" / "model.json", {**json.loads(kept), "base": str(base)})
    report = torch_run.require("fetch")
    listed = digest(torch_run.path / "fetch" / "model.json")
    torch_run.write_report(written_anew(report, "fetch/model.json", listed))
    prove(torch_run, load_recipe(torch_run.path / "recipe.yaml"))
    call(torch_run.path, "--port", 0)
    assert len(seen) == 2
    flip(base / "fake_model.json")
    flip(torch_run.path / "align" / "adapter" / "adapter.json")
    done = call(torch_run.path, "--port", 0)
    assert (done.exit_code, len(seen)) == (1, 2)
    assert "  align/adapter/adapter.json was changed after it was written\n" in done.stderr
    assert f"  {base}/fake_model.json was changed after it was fetched\n" in done.stderr

    # The list of the base's files, made to fit, is one of its stage's files itself.
    fetched = json.loads((torch_run.path / "fetch" / "model.json").read_text())
    fetched["files"]["fake_model.json"]["sha256"] = digest(base / "fake_model.json")
    write_json(torch_run.path / "fetch" / "model.json", fetched)
    done = call(torch_run.path, "--port", 0)
    assert (done.exit_code, len(seen)) == (1, 2)
    assert "  fetch/model.json was changed after it was written\n" in done.stderr


def test_a_checkpoint_that_nothing_tells_of_is_not_served(
    torch_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = asked_to_load(monkeypatch)
    shutil.copytree(torch_run.path / "train" / "checkpoint-3", tmp_path / "mine" / "checkpoint-3")
    done = call(torch_run.path, "--port", 0, "--from-checkpoint", tmp_path / "mine" / "checkpoint-3")
    assert (done.exit_code, seen) == (1, [])
    assert "lies outside of the run, and no stage knows what it was" in done.stderr


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda run, recipe: (run.path / "verdicts.json").unlink(), "not verified"),
        (lambda run, recipe: prove(run, recipe, refuted=["loss_finite"]), "refuted: loss_finite"),
        (lambda run, recipe: run.event("stage_started", stage="train"), "not verified since the stage 'train' ran"),
        (lambda run, recipe: run.forget("prepare"), "prepare/report.json is gone"),
    ],
    ids=["never", "refuted", "before", "a report gone"],
)
def test_a_run_that_is_not_proved_is_not_served_but_for_proof(
    torch_run: Run, monkeypatch: pytest.MonkeyPatch, change: Callable[[Run, Recipe], Any], why: str
) -> None:
    seen = asked_to_load(monkeypatch)
    (torch_run.path / "prepare" / "chat_template.jinja").unlink()  # nothing of that stage is loaded
    change(torch_run, load_recipe(torch_run.path / "recipe.yaml"))
    done = call(torch_run.path, "--port", 0)
    assert (done.exit_code, seen) == (1, [])
    assert f"is not served:\n  {why}\n" in done.stderr
    for number, more in enumerate(("--proof", "--anyway"), 1):
        done = call(torch_run.path, "--port", 0, more)
        assert len(seen) == number
        assert (f"warning: serving although: {why}" in done.stderr) == (more == "--anyway")


@pytest.mark.parametrize(
    ("more", "flags"), [({}, []), ({"proof": True}, ["--proof"]), ({"anyway": True}, ["--anyway"])]
)
def test_who_starts_a_server_says_whether_it_is_for_proof(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, bool], flags: list[str]
) -> None:
    asked: list[list[str]] = []

    @contextmanager
    def started(module: str, arguments: list[str], **_: Any) -> Iterator[str]:
        asked.append(arguments)
        yield "http://127.0.0.1:1"

    monkeypatch.setattr(processes, "serving", started)
    with serving("town", **more):  # type: ignore[arg-type]
        pass
    assert [each for each in asked[0] if each in ("--proof", "--anyway")] == flags


# -- which model -------------------------------------------------------------------------------------------------------


def test_the_final_model_is_the_adapter_of_the_last_training(finished: tuple[Recipe, Run]) -> None:
    recipe, run = finished
    found = final(run, recipe)
    assert found.adapter == run.path / "align" / "adapter"
    assert final(run, recipe.model_copy(update={"align": None})).adapter == run.path / "train" / "adapter"


def test_the_merged_model_is_served_unless_it_is_older_than_the_training(own: tuple[Recipe, Run]) -> None:
    recipe, run = own
    model = merged(run)
    assert (final(run, recipe).path, final(run, recipe).adapter) == (model, None)
    write_report(run, "merge", started="2000-01-01T00:00:00.000Z")
    assert final(run, recipe).adapter == run.path / "align" / "adapter"


def test_a_whole_checkpoint_needs_no_base(own: tuple[Recipe, Run]) -> None:
    recipe, run = own
    checkpoint = run.path / "train" / "checkpoint-3"
    (checkpoint / "adapter_config.json").unlink()
    assert from_checkpoint(run, recipe, checkpoint).adapter is None
    assert whole(from_checkpoint(run, recipe, checkpoint), run, recipe) == checkpoint


def test_a_checkpoint_of_the_alignment_stands_on_what_was_trained(own: tuple[Recipe, Run]) -> None:
    recipe, run = own
    (run.path / "train" / "adapter").rename(run.path / "train" / "model")  # as full fine-tuning leaves it
    base = from_checkpoint(run, recipe, run.path / "train" / "checkpoint-3").path
    assert (
        from_checkpoint(run, recipe, run.path / "align" / "checkpoint-2").path == run.path / "train" / "model" != base
    )


def test_an_adapter_is_merged_once_and_again_when_it_changes(own: tuple[Recipe, Run]) -> None:
    recipe, run = own
    found = final(run, recipe)
    first = whole(found, run, recipe)
    made = (first / "fake_model.json").stat().st_ino
    assert whole(found, run, recipe) == first and (first / "fake_model.json").stat().st_ino == made
    assert found.adapter is not None
    (found.adapter / "more.txt").write_text("trained again")
    second = whole(found, run, recipe)
    assert second != first
    assert [path.name for path in (run.path / "serve").glob("[!.]*")] == [second.name]


def test_a_model_made_for_serving_that_was_changed_is_made_again(
    own: tuple[Recipe, Run], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = own
    found = final(run, recipe)
    model = whole(found, run, recipe)
    made = (model / "fake_model.json").read_bytes()
    assert loaded(found, run, recipe)[-1] == found.adapter
    flip(model / "fake_model.json")
    assert loaded(found, run, recipe)[-2:] == [found.adapter, found.path]
    assert whole(found, run, recipe) == model
    assert (model / "fake_model.json").read_bytes() == made
    assert f"{model.relative_to(run.path)} was changed after it was made; it is made again" in capsys.readouterr().err


def test_models_made_for_serving_come_and_go_under_a_seal(own: tuple[Recipe, Run]) -> None:
    recipe, run = own
    model = whole(final(run, recipe), run, recipe)
    seal.close(run)
    shutil.rmtree(model)
    assert seal.faults(run) == []


def test_a_merge_that_fails_leaves_nothing_that_could_be_served(
    own: tuple[Recipe, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = own

    def fail(*_: Any, **__: Any) -> Any:
        raise StageError("the disk is full")

    monkeypatch.setattr("finetune.backends.fake.FakeBackend.merge", fail)
    with pytest.raises(StageError, match="disk is full"):
        whole(final(run, recipe), run, recipe)
    assert list((run.path / "serve").glob("[!.]*")) == []


def test_the_export_nearest_to_the_model_is_served(own: tuple[Recipe, Run]) -> None:
    _, run = own
    write_exports(run, "gguf:q4_k_m", "gguf:f16", "gguf:q8_0", "mlx:q4", "mlx", "bundle")
    assert exported(run, "gguf", None).what == "the export gguf:f16"
    assert exported(run, "mlx", None).what == "the export mlx"
    assert exported(run, "gguf", "gguf:q8_0").path == run.path / "export" / "gguf-q8_0" / "town.gguf"
    assert exported(run, "gguf", "gguf").path == run.path / "export" / "gguf-f16" / "town.gguf"
    with pytest.raises(MissingError, match=r"no export gguf:q6_k\. It has gguf:f16, gguf:q8_0, gguf:q4_k_m"):
        exported(run, "gguf", "gguf:q6_k")


def test_exports_older_than_the_training_are_not_served(own: tuple[Recipe, Run]) -> None:
    _, run = own
    write_exports(run, "gguf:f16", started="2000-01-01T00:00:00.000Z")
    with pytest.raises(MissingError, match=r"older than its training\. Make them again with: finetune export"):
        exported(run, "gguf", None)


# -- requests ----------------------------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello"}]


def check(body: Any, *, chat: bool = True, **more: Any) -> dict[str, Any]:
    return checked(body if isinstance(body, bytes) else json.dumps(body).encode(), chat=chat, name=NAME, **more)


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        ({"model": "gpt-5"}, 404, "model", "no model 'gpt-5' here. This server has 'town'"),
        ({"model": 5}, 404, "model", "no model '5'"),
        ({"adapters": "/somewhere"}, 400, "adapters", "this server has one model"),
        ({"draft_model": "other"}, 400, "draft_model", "this server has one model"),
        ({"generation_config": "{}"}, 400, "generation_config", "this server has one model"),
        ({"max_tokens": -5}, 400, "max_tokens", "a whole number of 1 or more, not -5"),
        ({"max_tokens": 1.5}, 400, "max_tokens", "not 1.5"),
        ({"max_tokens": True}, 400, "max_tokens", "not true"),
        ({"max_completion_tokens": 0}, 400, "max_completion_tokens", "1 or more"),
        ({"temperature": -0.1}, 400, "temperature", "a number from 0 to 2, not -0.1"),
        ({"temperature": "hot"}, 400, "temperature", 'not "hot"'),
        ({"temperature": float("nan")}, 400, "temperature", "from 0 to 2"),
        ({"top_p": 0}, 400, "top_p", "above 0"),
        ({"top_p": 1.1}, 400, "top_p", "from 0 to 1"),
        ({"seed": -1}, 400, "seed", "from 0 to"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty", "from -2 to 2"),
        ({"stop": [1]}, 400, "stop", "a list of up to 4 texts"),
        ({"stop": [""]}, 400, "stop", "none of them empty"),
        ({"stop": list("abcde")}, 400, "stop", "up to 4"),
        ({"logit_bias": {"one": 1}}, 400, "logit_bias", "ids of tokens"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias", "from -100 to 100"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"n": 2}, 400, "n", "not supported"),
        ({"messages": []}, 400, "messages", "at least one message"),
        ({"messages": ["Hello"]}, 400, "messages[0]", "an object with 'role' and 'content'"),
        ({"messages": [*HELLO, {"role": "wizard", "content": ""}]}, 400, "messages[1].role", 'not "wizard"'),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content", "'text'"),
    ],
)
def test_a_request_is_refused_with_the_field_the_value_and_what_is_allowed(
    change: dict[str, Any], status: int, param: str, words: str
) -> None:
    with pytest.raises(Refused) as caught:
        check({"messages": HELLO, **change}, ignored=("n",))
    error = caught.value.error["error"]
    assert (caught.value.status, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", b'"Hello"', b"[]", b"null", b"[" * 100_000])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refused, match="the body"):
        check(body)


@pytest.mark.parametrize("prompt", [None, "", [], ["a", "b"], [1, 2], 5])
def test_a_prompt_is_one_text(prompt: Any) -> None:
    with pytest.raises(Refused, match="'prompt' must be one text"):
        check({"prompt": prompt}, chat=False)


def test_what_a_server_gets_has_the_models_name_and_plain_texts() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    asked = check({"messages": [{"role": "user", "content": parts}], "temperature": None, "top_k": 5})
    assert asked == {"messages": HELLO, "model": NAME, "top_k": 5}
    assert check({"prompt": ["Hello"], "model": NAME}, chat=False) == {"prompt": "Hello", "model": NAME}


def test_the_recipes_system_message_comes_first_where_there_is_none() -> None:
    system = {"role": "system", "content": "Be brief."}
    other = [{"role": "system", "content": "No."}, *HELLO]
    assert check({"messages": HELLO}, system="Be brief.")["messages"] == [system, *HELLO]
    assert check({"messages": other}, system="Be brief.")["messages"] == other


@pytest.mark.parametrize("nothing", [{"n": 1}, {"echo": False}, {"best_of": 1}, {"response_format": {"type": "text"}}])
def test_a_field_that_asks_for_nothing_is_no_fault(nothing: dict[str, Any]) -> None:
    assert check({"messages": HELLO, **nothing}, ignored=(*nothing,)).items() >= nothing.items()


# -- processes and addresses -------------------------------------------------------------------------------------------


def resolving_to(address: str, family: int = socket.AF_INET) -> Any:
    """Stands for `socket.getaddrinfo`, which tier 1 keeps from other hosts."""
    return lambda host, port, **_: [(family, socket.SOCK_STREAM, 0, "", (address, port))]


@pytest.mark.parametrize(
    ("address", "family", "seen"),
    [
        ("127.0.0.1", socket.AF_INET, "127.0.0.1"),
        ("0.0.0.0", socket.AF_INET, "127.0.0.1"),
        ("::1", socket.AF_INET6, "[::1]"),
        ("::", socket.AF_INET6, "[::1]"),
    ],
)
def test_an_address_is_one_that_a_client_here_can_use(
    address: str, family: int, seen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to(address, family))
    with bind(address, 0) as held:
        assert base_url(held) == f"http://{seen}:{held.getsockname()[1]}"


def test_a_host_that_is_not_this_machine_is_told(torch_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to("192.0.2.1"))
    done = call(torch_run.path, "--host", "example.test")
    assert (done.exit_code, "--host example.test is not an address of this machine" in done.stderr) == (2, True)

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    done = call(torch_run.path, "--host", "example.test")
    assert (done.exit_code, "--host example.test is no address: Name or" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--host", "0.0.0.0"], 2, "--host 0.0.0.0 would open the model to everyone who reaches this machine"),
        (
            ["--host", "0.0.0.0", "--api-key-env", "NO_SUCH_KEY"],
            3,
            "--api-key-env NO_SUCH_KEY: there is no such variable",
        ),
        (["--api-key-file", "no/such/file"], 3, "--api-key-file no/such/file cannot be read"),
        (["--allowed-host", "http://llm.test/"], 2, "is no host"),
        (["--allowed-origin", "*"], 2, "is no origin"),
        (["--api-key", "secret"], 2, "No such option"),
    ],
)
def test_who_may_ask_is_settled_before_a_model_is_loaded(
    torch_run: Run, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to("0.0.0.0" if "0.0.0.0" in arguments else "127.0.0.1"))
    done = call(torch_run.path, "--port", 0, *arguments)
    assert (done.exit_code, done.stdout) == (code, "")
    assert words in done.stderr


def test_what_the_options_say_reaches_the_server(
    torch_run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def serve(backend: str, model: Path, run: Run, recipe: Recipe, held: Any, asked: Any, ready: Any) -> None:
        seen.append(asked)
        ready()

    monkeypatch.setattr("finetune.serving.models.whole", lambda found, run, recipe: found.path)
    monkeypatch.setattr("finetune.serving.serve", serve)
    monkeypatch.setattr(socket, "getaddrinfo", resolving_to("0.0.0.0"))
    monkeypatch.setenv("TOWN_KEY", "secret-of-the-town")
    names = ["--allowed-host", "llm.test", "--allowed-host", "b.test:90", "--allowed-origin", "https://app.test"]
    done = call(torch_run.path, "--port", 0, "--host", "0.0.0.0", "--api-key-env", "TOWN_KEY", *names)
    assert done.exit_code == 0
    (asked,) = seen
    assert (asked.host, asked.hosts) == ("0.0.0.0", [("llm.test", None), ("b.test", 90)])
    assert (asked.origins, asked.keys) == (["https://app.test"], ["secret-of-the-town"])
    assert "secret-of-the-town" not in done.output and "Authorization: Bearer KEY" in done.stderr
    assert "keys and answers cross the network unencrypted" in done.stderr


def test_a_server_that_does_not_start_says_the_last_that_it_said(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"(?s)ended with exit code 3.*no run at"), serving(tmp_path):
        raise AssertionError("it started")


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function: the name of a module with some source, which a child can run."""

    def write(source: str) -> str:
        (tmp_path / "played.py").write_text(f"import os, signal, sys, time\n{source}\n")
        return "played"

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return write


TELL = "from finetune.core import processes as child\nchild.tell(f'http://{os.getpid()}')"


def test_what_a_child_prints_is_not_its_address(module: Any) -> None:
    source = f"print('http://somewhere.else', flush=True)\n{TELL}\ntime.sleep(60)"
    with processes.serving(module(source), [], what="it") as address:
        assert address != "http://somewhere.else"


def test_what_a_child_prints_is_not_its_answer(module: Any) -> None:
    name = module("from finetune.core import processes as child\nchild.answer(sys.argv[-1], {'a': 1})\nprint({'a': 2})")
    assert processes.answer_of(name, [], what="it failed") == {"a": 1}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("print({})", "it left no answer"),
        ("input('Run it? [y/N] ')", "EOFError"),  # nobody is asked
        ("sys.exit('no such thing')", r"it failed \(exit code 1\): no such thing"),
        ("open(sys.argv[-1], 'w').write('{')", "it left no answer: Expecting property name"),
    ],
)
def test_a_child_without_an_answer_is_an_error(module: Any, source: str, says: str) -> None:
    with pytest.raises(StageError, match=says):
        processes.answer_of(module(source), [], what="it failed")


def test_a_child_that_is_late_is_stopped(module: Any) -> None:
    name = module("print('loading', file=sys.stderr, flush=True)\ntime.sleep(60)")
    late = pytest.raises(StageError, match=r"(?s)it does not start: it was not ready after 1 s\n  loading")
    with late, processes.serving(name, [], what="it", timeout=0.6):
        raise AssertionError("it started")


def test_a_child_that_heeds_nothing_is_killed(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.2)
    source = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{TELL}\ntime.sleep(60)"
    with processes.serving(module(source), [], what="it") as address:
        process = psutil.Process(int(address.removeprefix("http://")))
        assert process.is_running()
    assert not process.is_running()
