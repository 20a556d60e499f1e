"""A run directory survives what happens to processes: kills half way, two at once, odd text."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from finetune.core import files, secrets
from finetune.core.errors import LockedError, MissingError, StageError, UsageError
from finetune.core.files import digest, read_jsonl, sync_tree, write_json, write_jsonl, write_text
from finetune.run import Report, Run, seal
from finetune.run.manifest import git_state
from support import town
from support.records import MADE, WHEN

ODD = {"text": "line\u2028separator \x85 \x0b\x1c tab\t \ud83d half 😀", "number": 1.5, "nothing": None}


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run").create()


METRICS: dict[str, Any] = {
    **dict.fromkeys(("trainable_parameters", "frozen_parameters", "weight_bytes", "trainable_bytes", "tokens"), 8),
    **dict.fromkeys(("gradient_bytes", "optimizer_bytes", "steps", "planned_steps", "trained_tokens", "world_size"), 1),
    "frozen_sha256_before": "a",
    "frozen_sha256_after": "a",
    "stopped": False,
    "resumed_from": None,
    "steps_without_effect": 0,
    "first_loss": 1.5,
    "last_loss": 1.0,
    "tokens_per_second": None,
    "seconds_per_step": 0.1,
}


def report(**changes: object) -> Report:
    return Report(**{"stage": "train", "started": WHEN, "peak": {"process": 1}, **MADE, **changes})  # type: ignore[arg-type]


# -- files -----------------------------------------------------------------------------------------------------------


def test_a_write_that_breaks_off_leaves_nothing_under_the_name(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "report.json"

    def killed(descriptor):
        os.truncate(descriptor, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(target, {"a": 1})
    assert list(target.parent.iterdir()) == []


def test_a_write_that_breaks_off_keeps_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "report.json"
    write_text(target, "old")
    monkeypatch.setattr(Path, "replace", lambda self, other: (_ for _ in ()).throw(OSError("disk gone")))
    with pytest.raises(OSError, match="disk gone"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_process_killed_while_writing_leaves_the_old_file_whole(tmp_path):
    target = tmp_path / "report.json"
    write_json(target, {"version": 0})
    code = textwrap.dedent(
        f"""
        from pathlib import Path
from typing import Any
        from finetune.core.files import write_json
        print("on", flush=True)
        while True:
            write_json(Path({str(target)!r}), {{"version": 1, "rows": list(range(20000))}})
        """
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.1)
        writer.kill()
    value = json.loads(target.read_text())
    assert value["version"] == 0 or len(value["rows"]) == 20000


def test_what_is_written_is_on_the_disk_and_so_is_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    write_text(tmp_path / "deep" / "file", "text")
    assert synced == [(tmp_path / "deep" / name).stat().st_ino for name in ("file", ".")]


def test_a_tree_is_synced_with_every_file_and_folder_of_it(tmp_path, monkeypatch):
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "deeper" / "file").write_text("of another library")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    sync_tree(tmp_path)
    assert sorted(synced) == sorted(path.stat().st_ino for path in (tmp_path, *tmp_path.rglob("*")))


def test_rows_come_back_as_they_were(tmp_path):
    rows = [ODD, {"id": [1, 2]}, {}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    write_jsonl(tmp_path / "none.jsonl", [])
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_last_row_cut_short_is_left_out_and_a_broken_one_before_it_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": ')
    assert read_jsonl(tmp_path / "rows.jsonl") == [{"a": 1}, {"a": 2}]
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(StageError, match=r"rows\.jsonl:2: not JSON"):
        read_jsonl(tmp_path / "rows.jsonl")


# -- digests ---------------------------------------------------------------------------------------------------------


def test_a_files_digest_is_its_sha_256(tmp_path):
    (tmp_path / "f").write_bytes(b"content")
    assert digest(tmp_path / "f") == hashlib.sha256(b"content").hexdigest()


def test_a_directorys_digest_sees_content_names_and_places_and_nothing_else(tmp_path):
    def tree(name: str, **files: str) -> Path:
        for file, text in files.items():
            place = tmp_path / name / file.replace("__", "/")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        return tmp_path / name

    same = digest(tree("one", a="1", sub__b="2"))
    assert digest(tree("two", sub__b="2", a="1")) == same
    os.utime(tmp_path / "two" / "a", (0, 0))
    assert digest(tmp_path / "two") == same
    others = [
        digest(tree("c", a="1", sub__b="3")),
        digest(tree("n", a="1", sub__c="2")),
        digest(tree("p", a="1", b="2")),
    ]
    assert len({same, *others}) == 4


def test_a_directorys_digest_takes_its_files_in_the_order_of_their_paths(tmp_path):
    """Runs hold such digests, so it stays the same: what is in `a` comes before `a-b`, though `-` comes before `/`."""
    (tmp_path / "a").mkdir()
    for name in ("a-b", "a/x"):
        (tmp_path / name).write_text(name)
    shas = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a/x", "a-b")}
    listed = "".join(f"{name}\0{sha}\n" for name, sha in shas.items())
    assert digest(tmp_path) == hashlib.sha256(listed.encode()).hexdigest()


def test_a_file_changed_in_place_is_read_again_though_its_time_and_size_say_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_digests", {})
    file = tmp_path / "f"
    file.write_text("one")
    digest(file)
    assert files._digests == {}, "changed just now, it may be changed again without another time"

    monkeypatch.setattr(files, "RACY", -(10**18))  # nothing is too new to be known again
    digest(file)
    before = file.stat()
    time.sleep(0.05)
    file.write_text("two")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert digest(file) == hashlib.sha256(b"two").hexdigest()


# -- events ----------------------------------------------------------------------------------------------------------


def test_events_come_back_in_order_and_can_be_picked(run):
    for step in range(3):
        run.event("step", stage="train", step=step, **ODD)
    run.event("note", stage="align")
    assert [event["step"] for event in run.events("step")] == [0, 1, 2]
    assert run.events("step")[0]["text"] == ODD["text"]
    assert [event["event"] for event in run.events(stage="align")] == ["note"]
    assert run.events("step", step=1)[0]["time"].endswith("Z")
    assert Run(run.path / "other").events() == []


@pytest.mark.parametrize("keep", [1, 10, 30, -2])
def test_a_last_event_cut_short_is_left_out_and_the_next_one_is_not_spoilt(run, keep):
    run.event("step", step=1)
    whole = run.events_path.stat().st_size
    run.event("step", step=2, text="ünï" * 9)
    content = run.events_path.read_bytes()
    run.events_path.write_bytes(content[: whole + keep] if keep > 0 else content[:keep])
    assert [event["step"] for event in run.events()] == [1]
    run.event("step", step=3)
    assert [event["step"] for event in run.events()] == [1, 3]


def test_an_event_cut_inside_a_character_is_left_out(run):
    run.event("step", step=1)
    with run.events_path.open("ab") as stream:
        stream.write('{"text": "ü'.encode()[:-1])
    assert [event["step"] for event in run.events()] == [1]


def test_a_broken_line_in_the_middle_is_an_error_with_its_line(run):
    run.event("step", step=1)
    with run.events_path.open("a") as stream:
        stream.write("{oops\n")
    with run.events_path.open("a") as stream:
        stream.write('{"event": "step"}\n')
    with pytest.raises(StageError, match=r"events\.jsonl:2: not JSON"):
        run.events()


def test_an_event_is_one_write(run, monkeypatch):
    writes = []
    real = io.FileIO.write

    class Spy(io.FileIO):
        def write(self, data):
            writes.append(bytes(data))
            return real(self, data)

    monkeypatch.setattr(Path, "open", lambda self, mode, buffering=-1: Spy(str(self), mode.replace("b", "")))
    run.event("step", text="x" * 100_000)
    assert len(writes) == 1
    assert writes[0].endswith(b"\n")


def test_what_is_told_in_a_run_shows_no_secret_and_data_are_what_they_were(run, monkeypatch):
    monkeypatch.setattr(secrets, "_known", set())
    secret = 'se"cret-välue'
    secrets.remember(secret)
    run.event("step", text=f"Bearer {secret}")
    seal.update_manifest(run, command=secret)
    run.write_report(report(notes=[secret]))
    write_jsonl(run.path / "rows.jsonl", [{"t": secret}])
    assert read_jsonl(run.path / "rows.jsonl") == [{"t": secret}]
    texts = [file.read_text() for file in run.path.rglob("*") if file.is_file() and file.name != "rows.jsonl"]
    assert len(texts) == 3
    for text in texts:
        assert "***" in text
        assert "cret-v" not in text


def test_the_manifest_is_sealed_as_it_is_written_without_secrets(run, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "s3cret-of-mine")
    seal.update_manifest(run, **{**town.MANIFEST, "command": "finetune --key s3cret-of-mine"})
    seal.close(run)
    assert run.manifest()["command"] == "finetune --key ***"
    assert seal.own(run, run.manifest(), run.log())


def test_a_run_directory_with_a_secret_in_its_path_is_refused_by_the_variables_name(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "s3cret-of-mine")
    with pytest.raises(UsageError, match="holds the value of MY_API_KEY") as caught:
        Run(tmp_path / "s3cret-of-mine" / "run").create()
    assert "s3cret-of-mine" not in str(caught.value)
    assert not (tmp_path / "s3cret-of-mine").exists()


def test_a_word_that_is_a_variables_value_stays_in_the_path_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "capital")
    run = Run(tmp_path / "capital").create()
    run.event("training", stage="train", objective="capital")
    assert run.events("training")[0]["objective"] == "capital"


# -- reports and the manifest ----------------------------------------------------------------------------------------


def test_a_report_comes_back_as_it_was_and_can_be_forgotten(run):
    first = report(metrics=METRICS, artifacts={"a": "d"}, peak={"process": 1}, notes=["n"], files={"train/a": "d"})
    run.write_report(first)
    assert run.report("train") == first == run.require("train")
    run.forget("train")
    run.forget("train")
    assert run.report("train") is None
    with pytest.raises(MissingError, match="finetune train RECIPE"):
        run.require("train")


def test_a_manifest_tells_the_commit_and_whether_anything_was_changed_since(tmp_path):
    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None, "there is no commit yet"
    (tmp_path / "recipe.yaml").write_text("a")
    git("add", ".")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert state is not None
    assert (len(state["sha"]), state["dirty"]) == (40, False)
    (tmp_path / "recipe.yaml").write_text("b")
    assert git_state(tmp_path) == {**state, "dirty": True}


def test_opening_needs_a_run_and_creates_nothing(tmp_path):
    with pytest.raises(MissingError, match="holds no manifest"):
        Run.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_project_with_a_recipe_is_no_run(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    with pytest.raises(MissingError, match="holds no manifest"):
        Run.open(tmp_path)
    (tmp_path / "manifest.json").write_text("")
    assert Run.open(tmp_path).path == tmp_path


def test_a_file_in_the_way_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="cannot be a run directory"):
            Run(path).create()


# -- the lock --------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from finetune.run import Run
with Run(sys.argv[1]).locked():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_another_process_writes_into_is_refused_at_once(run):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match=r"in use by another finetune process.*--run DIR"), run.locked():
            pass
        assert holder.poll() is None  # nobody waited for its end
        holder.kill()  # a killed holder holds nothing
    with run.locked() as mine:
        assert mine is run


def test_the_lock_is_let_go_after_an_error(run):
    with pytest.raises(StageError), run.locked():
        raise StageError("boom")
    with run.locked():
        pass
