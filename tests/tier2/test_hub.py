"""The real huggingface_hub against a stand-in server on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest

from finetune.backends.fake.model import make_model
from finetune.core import memory, retrying, secrets
from finetune.core.errors import MissingError, ResourceError, UsageError
from finetune.data import sources
from finetune.models import sources as models
from finetune.recipe.sections import Data, Model
from finetune.stages import fetch
from support.hub import WEIGHTS, Hub, serve

huggingface_hub = pytest.importorskip("huggingface_hub", reason="install it with: pip install 'finetune-proof[hub]'")
constants = pytest.importorskip("huggingface_hub.constants")
TOKEN = "hf_" + "x" * 30


@pytest.fixture
def repo(tmp_path) -> Path:
    """A repository with weights in two formats, as many on the hub are."""
    place = make_model(tmp_path / "repo")
    (place / "model.safetensors").write_bytes(WEIGHTS)
    (place / "pytorch_model.bin").write_bytes(b"p" * 5000)
    (place / "tf_model.h5").write_bytes(b"t" * 5000)
    (place / "tokenizer.json").write_text("{}")
    (place / "onnx").mkdir()
    (place / "onnx" / "model.onnx").write_bytes(b"o")
    return place


@pytest.fixture
def point(tmp_path, monkeypatch):
    """A function that makes huggingface_hub talk to a stand-in, with an empty cache and no token of its own."""

    def at(hub: Hub) -> Hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        return hub

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(retrying, "FIRST", 0.01)
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "our-cache"))
    return at


def shown(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def test_a_repository_comes_down_whole_and_with_safetensors_only(point, repo):
    with serve({"owner/name": repo}) as hub:
        place = models.obtain(point(hub) and "owner/name")
    names = {file.name for file in place.iterdir()}
    assert {"config.json", "fake_model.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"pytorch_model.bin", "tf_model.h5", "onnx"}
    assert (place / "model.safetensors").read_bytes() == WEIGHTS


def test_without_safetensors_the_pickled_weights_are_taken(point, repo):
    (repo / "model.safetensors").unlink()
    with serve({"gpt2": repo}) as hub:
        place = models.obtain(point(hub) and "gpt2")
    assert (place / "pytorch_model.bin").is_file()


def test_a_repository_without_weights_is_refused(point, repo):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (repo / name).unlink()
    with serve({"owner/name": repo}) as hub, pytest.raises(MissingError, match="no safetensors or PyTorch weights"):
        models.obtain(point(hub) and "owner/name")


def test_a_second_time_needs_no_download_and_no_connection(point, repo, monkeypatch):
    with serve({"owner/name": repo}) as hub:
        first = models.obtain(point(hub) and "owner/name")
        hub.requests.clear()
        assert models.obtain("owner/name") == first
        assert [r.path for r in hub.requests if r.method == "GET" and "/storage/" in r.path] == []
    assert models.obtain("owner/name") == first  # the server is gone
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert models.obtain("owner/name") == first


def test_an_incomplete_download_does_not_count_offline(point, repo, monkeypatch):
    with serve({"owner/name": repo}) as hub:
        huggingface_hub.hf_hub_download(point(hub) and "owner/name", "config.json")
    with pytest.raises(MissingError, match="cannot be reached"):
        models.obtain("owner/name")


def test_offline_says_so_and_what_works(point, repo, monkeypatch):
    with serve({}) as hub:
        point(hub)
    with pytest.raises(MissingError, match=r"no connection.*smollm2-135m, a local directory, or a GGUF file"):
        models.obtain("owner/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingError, match="HF_HUB_OFFLINE is set"):
        models.obtain("owner/name")


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_missing_repository_is_named(point, token):
    with (
        serve({}, token=TOKEN) as hub,
        pytest.raises(MissingError, match="no repository 'owner/nmae', or it is private") as caught,
    ):
        models.obtain(point(hub) and "owner/nmae", token=token)
    assert TOKEN not in shown(caught.value)


def test_a_private_repository_opens_with_its_token_which_the_storage_never_sees(point, repo):
    with serve({"owner/name": repo}, private={"owner/name"}, token=TOKEN) as hub:
        with pytest.raises(MissingError, match="private"):
            models.obtain(point(hub) and "owner/name")
        hub.requests.clear()
        place = models.obtain("owner/name", token=TOKEN)
    assert (place / "config.json").is_file()
    own = [r for r in hub.requests if r.host.startswith("127.0.0.1")]
    storage = [r for r in hub.requests if r.host.startswith("localhost")]
    assert {r.authorization for r in own} == {f"Bearer {TOKEN}"}
    assert storage
    assert {r.authorization for r in storage} == {None}


def test_the_token_reaches_neither_disk_nor_terminal(point, repo, tmp_path, capfd):
    with serve({"owner/name": repo}, token=TOKEN) as hub:
        models.obtain(point(hub) and "owner/name", token=TOKEN)
    said = capfd.readouterr()
    assert TOKEN not in said.out + said.err
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]
    assert secrets.redact(f"x {TOKEN} y") == "x *** y"


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({"gated": {"owner/name"}}, None, "is gated: accept its terms"),
        ({"gated": {"owner/name"}, "token": TOKEN}, TOKEN, "is gated: accept its terms"),
        ({"token": "hf_" + "y" * 30}, TOKEN, r"refused the token for 'owner/name' \(401\)"),
        ({"busy": 50}, None, r"asked too often \(429\)"),
    ],
    ids=["gated", "gated-with-token", "bad-token", "busy"],
)
def test_each_refusal_has_its_own_message_without_the_token(point, repo, options, given, message):
    with serve({"owner/name": repo}, **options) as hub, pytest.raises(MissingError, match=message) as caught:
        models.obtain(point(hub) and "owner/name", token=given)
    assert TOKEN not in shown(caught.value)


def test_a_missing_revision_and_an_impossible_name_are_told_apart(point, repo):
    with serve({"owner/name": repo}) as hub:
        with pytest.raises(MissingError, match="no revision 'v9'"):
            models.obtain(point(hub) and "owner/name", revision="v9")
        with pytest.raises(UsageError, match="owner/name"):
            models.obtain("owner/na--me")


def test_a_full_disk_is_noticed_before_anything_is_downloaded(point, repo, monkeypatch):
    monkeypatch.setattr(
        memory.shutil, "disk_usage", lambda path: os.terminal_size((1, 1)) and type("U", (), {"free": 99})
    )
    with serve({"owner/name": repo}) as hub, pytest.raises(ResourceError, match="Make room"):
        models.obtain(point(hub) and "owner/name")
    assert not [r for r in hub.requests if "/resolve/" in r.path]


def test_a_broken_download_is_taken_up_again(point, repo):
    with serve({"owner/name": repo}, cut={"model.safetensors"}) as hub:
        place = models.obtain(point(hub) and "owner/name")
    assert (place / "model.safetensors").read_bytes() == WEIGHTS
    assert len([r for r in hub.requests if r.method == "GET" and r.path.endswith("/-/model.safetensors")]) == 2


# -- a hub that is busy or out of reach for a while --------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("at", ["/api/", "/resolve/", "/storage/"], ids=["listing", "file", "storage"])
def test_a_busy_hub_is_asked_again_and_each_wait_is_said(point, repo, capsys, status, at):
    with serve({"owner/name": repo}, busy=2, status=status, busy_at=at) as hub:
        place = models.obtain(point(hub) and "owner/name")
    assert (place / "model.safetensors").read_bytes() == WEIGHTS
    assert [r.status for r in hub.requests].count(status) == 2
    said = capsys.readouterr().err
    waits = said.count(f"the hub, for owner/name: it answered {status}; trying again in 0.")
    # What a file is gets asked for twice at once, by the library itself.
    assert (0 if at == "/resolve/" else 1) <= waits == said.count("again") <= 2


def test_a_hub_that_stays_busy_is_given_up_after_five_tries(point, repo):
    with (
        serve({"owner/name": repo}, busy=50, status=503) as hub,
        pytest.raises(MissingError, match=r"answered 503 for 'owner/name'.*\(tried 5 times\)"),
    ):
        models.obtain(point(hub) and "owner/name")
    assert len(hub.requests) == 5


def test_a_wait_that_is_asked_for_is_kept(point, repo, capsys):
    with serve({"owner/name": repo}, busy=1, retry_after="1") as hub:
        began = time.monotonic()
        models.obtain(point(hub) and "owner/name")
    assert time.monotonic() - began >= 1
    assert "it answered 429; trying again in 1.0 s" in capsys.readouterr().err


@pytest.mark.parametrize("at", ["/api/", "/resolve/", "/storage/"], ids=["listing", "file", "storage"])
def test_a_wait_of_an_hour_is_not_kept(point, repo, at):
    with (
        serve({"owner/name": repo}, busy=99, retry_after="3600", busy_at=at) as hub,
        pytest.raises(MissingError, match=r"asked too often \(429\).*\(tried once\)"),
    ):
        models.obtain(point(hub) and "owner/name")


@pytest.mark.parametrize("way", ["cut", "reset"])
def test_a_download_that_breaks_off_goes_on_where_it_was(point, repo, monkeypatch, capsys, way):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    with serve({"owner/name": repo}, **{way: {"model.safetensors"}}) as hub:
        place = models.obtain(point(hub) and "owner/name")
    assert (place / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [r.range for r in hub.requests if r.method == "GET" and r.path.endswith("/-/model.safetensors")]
    assert ranges == [None, "bytes=2000-"]
    said = capsys.readouterr().err
    assert "the hub: Error while downloading from ..." in said
    assert hub.url.rpartition(":")[2] not in said


@pytest.mark.parametrize(
    "options",
    [{"private": {"owner/name"}}, {"gated": {"owner/name"}, "token": TOKEN}, {"token": "hf_" + "y" * 30}],
    ids=["404", "403", "401"],
)
def test_what_is_refused_is_asked_for_once(point, repo, options, capsys):
    options = {"token": TOKEN, **options}
    there = "other/name" if "private" in options else "owner/name"
    with serve({there: repo}, **options) as hub, pytest.raises(MissingError):
        models.obtain(point(hub) and "owner/name", token=TOKEN)
    assert len(hub.requests) == 1
    assert "again" not in capsys.readouterr().err


def test_a_cached_model_waits_for_no_connection_and_offline_nothing_is_tried(point, repo, monkeypatch, capsys):
    with serve({"owner/name": repo}) as hub:
        models.obtain(point(hub) and "owner/name")
    capsys.readouterr()
    models.obtain("owner/name")
    with serve({"owner/other": repo}, busy=50) as hub:
        point(hub)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(MissingError, match="HF_HUB_OFFLINE is set"):
            models.obtain("owner/other")
        assert hub.requests == []
    assert "again" not in capsys.readouterr().err


def test_rows_of_a_busy_hub_are_asked_for_again(point, tmp_path, monkeypatch, capsys):
    datasets = pytest.importorskip("datasets", reason="install it with: pip install datasets")
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with serve({"datasets/owner/rows": rows}, busy=3, status=503) as hub:
        point(hub)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
        monkeypatch.setattr(
            datasets.config, "HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        )
        assert [row.values for row in sources.read(Data(path="hub:owner/rows"))] == [{"prompt": "a", "completion": "b"}]
        assert "the hub, for owner/rows: it answered 503; trying again" in capsys.readouterr().err
        hub.busy = 50
        with pytest.raises(MissingError, match=r"'owner/rows': it answered 503 \(tried 5 times"):
            sources.read(Data(path="hub:owner/rows", split="test"))


def test_an_adapter_on_the_hub_brings_its_base(point, repo, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/base"}))
    (adapter / "adapter_model.safetensors").write_bytes(WEIGHTS)
    with serve({"owner/tuned": adapter, "owner/base": repo}) as hub:
        found = models.resolve(Model(path=point(hub) and "owner/tuned"))
    assert found.kind == "hub"
    assert (found.base / "config.json").is_file()
    assert found.adapter is not None
    assert (found.adapter / "adapter_model.safetensors").is_file()


# -- the older download files ------------------------------------------------------------------------------------------


def entry(out: Path | None, *files: str, **more: object) -> dict:
    return {
        "repo": "distilgpt2",
        "files": list(files),
        "output_dir": str(out) if out else None,
        "revision": None,
        "token": None,
    } | more


def test_listed_files_land_in_the_output_directory(point, repo, tmp_path):
    out = tmp_path / "models" / "distilgpt2"
    with serve({"distilgpt2": repo}) as hub:
        assert fetch.download(point(hub) and entry(out, "config.json", "pytorch_model.bin", "tokenizer.json")) == out
    assert (out / "pytorch_model.bin").read_bytes() == b"p" * 5000
    assert not (out / "model.safetensors").exists()


def test_a_listed_format_that_is_gone_is_substituted_with_a_note(point, repo, tmp_path, capsys):
    (repo / "pytorch_model.bin").unlink()
    with serve({"distilgpt2": repo}) as hub:
        fetch.download(point(hub) and entry(tmp_path / "out", "config.json", "pytorch_model.bin", "vocab.json"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "no pytorch_model.bin; taking model.safetensors instead" in capsys.readouterr().err


def test_listed_files_that_are_here_already_need_no_connection(point, repo, tmp_path):
    with serve({"distilgpt2": repo}) as hub:
        fetch.download(point(hub) and entry(tmp_path / "out", "config.json", "pytorch_model.bin"))
    assert fetch.download(entry(tmp_path / "out", "config.json", "pytorch_model.bin")) == tmp_path / "out"
    with pytest.raises(MissingError, match="no connection"):
        fetch.download(entry(tmp_path / "other", "config.json"))


def test_without_a_list_the_whole_repository_comes(point, repo, tmp_path):
    with serve({"distilgpt2": repo}) as hub:
        fetch.download(point(hub) and entry(tmp_path / "out"))
        cached = fetch.download(entry(None, "config.json"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (cached / "config.json").is_file()


def test_a_fresh_process_finds_the_hub_through_its_environment(repo, tmp_path):
    code = "from finetune.models import sources as models; print(models.obtain('owner/name'))"
    with serve({"owner/name": repo}, private={"owner/name"}, token=TOKEN) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN}
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert (Path(done.stdout.strip()) / "model.safetensors").is_file()
    assert TOKEN not in done.stdout + done.stderr
