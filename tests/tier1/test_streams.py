"""What comes from data, models and answers reaches a terminal visibly, in any encoding, and a broken stdout is one error."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ruamel.yaml import YAML

from finetune.cli.app import COMMANDS, cli
from finetune.core import console, streams
from finetune.core.errors import OutputError
from finetune.core.files import write_jsonl, write_text
from finetune.core.text import HIDDEN, json_text, visible
from finetune.recipe import dump
from support import town

pytestmark = pytest.mark.timeout(300)  # many commands in one test, some in processes of their own
# A cleared screen, a title, a link, a color in C1, text turned around, a hidden space; and names in three scripts.
HOSTILE = "\x1b[2J\x1b]0;owned\x07\x1b]8;;http://evil.example\x1b\\\x9b31m\u202egnp.exe\u2066\u200b\x7f\x08\r"
FOLDER = "проект 日本 é"
RAW = re.compile(f"[{HIDDEN}]")  # held against Unicode's own categories below
ENCODINGS = ("utf-8", "cp1252", "latin-1", "cp437", "cp932", "ascii")
# How each command is called on a project with a run: all of them but those that need what the fake backend has not.
CALLS: dict[str, list[str]] = {
    "init": ["init", "новый.yaml", "--force"],
    "validate": ["validate", "рецепт.yaml"],
    "estimate": ["estimate", "рецепт.yaml"],
    "completion": ["completion", "bash"],
    "run": ["run", "рецепт.yaml", "--run", "ラン"],
    "plan": ["run", "рецепт.yaml", "--run", "ラン", "--dry-run"],
    "verify": ["verify", "ラン"],
    "verify json": ["verify", "ラン", "--json"],
    "report": ["report", "ラン"],
    "report json": ["report", "ラン", "--json"],
    "compare": ["report", "ラン", "ラン", "--out", "оба.html"],
    "runs ls": ["runs", "ls", "."],
    "runs show": ["runs", "show", "ラン"],
    "runs json": ["runs", "ls", ".", "--json"],
    "prepare": ["prepare", "рецепт.yaml", "--run", "ラン", "--force"],
    "evaluate": ["evaluate", "рецепт.yaml", "--run", "ラン"],
    "serve": ["serve", "ラン"],
    "spec validate": ["spec", "validate", "тест.yaml"],
    "bad data": ["run", "рецепт.yaml", "--set", "data.path=плохо.jsonl", "--run", "два"],
    "bad key": ["validate", "рецепт.yaml", "--set", "ключ.ключ=日本"],
    "no file": ["validate", f"нет{HOSTILE}.yaml"],
    "no command": ["команда"],
}
REFUSED = {"estimate": 2, "serve": 2, "spec validate": 2, "bad data": 2, "bad key": 2, "no file": 3, "no command": 2}
JUDGED = (
    "run",
    "run again",
    "verify",
    "verify json",
    "export",
    "evaluate",
)  # whether such a model learned is another question
JSON = ("verify json", "report json", "runs json")


class Said(NamedTuple):
    code: int
    out: bytes
    err: bytes


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose folder, files, questions and answers are in other scripts and hostile, with one run."""
    folder = tmp_path_factory.mktemp("hostile") / FOLDER
    folder.mkdir()
    town.build(folder)
    rows = [{"prompt": f"Столица {n}? {HOSTILE}", "completion": f"これは {HOSTILE} {n}."} for n in range(3)]
    write_jsonl(folder / "данные.jsonl", rows)
    probes = [{"id": f"п{n}", "prompt": row["prompt"], "answer": row["completion"]} for n, row in enumerate(rows[:2])]
    write_jsonl(folder / "вопросы.jsonl", probes)
    write_text(folder / "плохо.jsonl", json.dumps({HOSTILE: "日本"}) + "\n")
    recipe = town.only_training(
        folder,
        folder / "runs",
        data={"path": str(folder / "данные.jsonl")},
        train={"max_length": 1024, "max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 1},
        evaluate={"probes": str(folder / "вопросы.jsonl"), "max_new_tokens": 4},
        template={"system": f"Система {HOSTILE.replace(chr(13), '')}"},
    )
    write_text(folder / "рецепт.yaml", dump(recipe))
    write_text(folder / "тест.yaml", "test_id: т\nproject_dir: .\nconfig: рецепт.yaml\n")
    return folder


@contextmanager
def _in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _called(arguments: list[str], folder: Path, encoding: str) -> Said:
    """The command line in this process, its streams made as PYTHONIOENCODING makes them."""
    out, err = io.BytesIO(), io.BytesIO()
    texts = [io.TextIOWrapper(each, encoding=encoding, write_through=True) for each in (out, err)]
    before = sys.stdout, sys.stderr
    with _in(folder):
        sys.stdout, sys.stderr = texts
        try:
            cli.main(arguments, prog_name="finetune")
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            sys.stdout, sys.stderr = before
            console.set_mode("auto")
    return Said(code, out.getvalue(), err.getvalue())


# How Python is told of encodings; and nothing keeps what is written from being held back, as in a user's shell.
OURS = ("LC_ALL", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONUNBUFFERED")


def _clean() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key not in OURS}


def _process(arguments: list[str], folder: Path, more: str = "", **environment: str) -> Said:
    """The command line in a process of its own, started by a shell which appends `more`."""
    command = ["sh", "-c", f'"$@" {more}', "sh", sys.executable, "-m", "finetune", *arguments]
    done = subprocess.run(command, cwd=folder, env={**_clean(), **environment}, capture_output=True, check=False)
    return Said(done.returncode, done.stdout, done.stderr)


def _hold(said: Said, encoding: str, what: str) -> None:
    for bytes_ in (said.out, said.err):
        text = bytes_.decode(encoding)
        assert "Traceback" not in text, what
        assert "unexpected" not in text, (what, text)
        assert "Unicode" not in text, (what, text)
        assert not RAW.search(text), (what, RAW.search(text), text)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_command_is_shown_in_every_encoding(project: Path, encoding: str) -> None:
    swept = 0
    for name, arguments in CALLS.items():
        said = _called(arguments, project, encoding)
        _hold(said, encoding, f"{name} in {encoding}")
        assert said.code in (REFUSED.get(name, 0), 1 if name in JUDGED else 0), (name, said)
        if name in JSON:
            json.loads(said.out.decode(encoding))
        swept += 1

    assert swept == len(CALLS) == 22
    assert len(ENCODINGS) == 6
    assert {arguments[0] for arguments in CALLS.values()} - {"команда"} <= set(COMMANDS)


ENVIRONMENTS: list[tuple[str, dict[str, str]]] = [
    ("cp1252", {"PYTHONIOENCODING": "cp1252"}),
    ("cp932", {"PYTHONIOENCODING": "cp932"}),
    ("ascii", {"LC_ALL": "C", "PYTHONUTF8": "0"}),
    ("utf-8", {"LC_ALL": "C"}),
    ("ascii", {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
]


@pytest.mark.parametrize(("encoding", "environment"), ENVIRONMENTS, ids=lambda each: str(each))
def test_a_whole_run_ends_well_whatever_the_environment_says_of_encodings(
    project: Path, tmp_path: Path, encoding: str, environment: dict[str, str]
) -> None:
    run = tmp_path / "ラン é"
    said = _process(["run", "рецепт.yaml", "--run", str(run), "--set", "expect.resume=true"], project, **environment)

    _hold(said, encoding, str(environment))
    assert said.code in (0, 1), said.err.decode(encoding)
    assert "これは" in (run / "evaluate" / "answers.jsonl").read_text(encoding="utf-8")
    assert "проект 日本 é" in (run / "recipe.yaml").read_text(encoding="utf-8")


def test_files_for_readers_hold_nothing_that_is_not_seen(project: Path, tmp_path: Path) -> None:
    _called(["run", "рецепт.yaml", "--run", str(tmp_path / "run")], project, "utf-8")

    for name in ("report.md", "report.html", "report.json", "junit.xml"):
        text = (tmp_path / "run" / name).read_text(encoding="utf-8")
        assert not RAW.search(text), name
        assert "Столица" in text or name in ("junit.xml", "report.md"), name
    answers = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))["answers"]
    assert any(HOSTILE in row["prompt"] for row in answers)


def test_a_validated_recipe_printed_is_the_recipe(project: Path) -> None:
    said = _called(["validate", "рецепт.yaml"], project, "utf-8")

    printed = YAML(typ="safe", pure=True).load(said.out.decode("utf-8"))
    assert printed["template"]["system"] == f"Система {HOSTILE.replace(chr(13), '')}"


# -- a stdout that takes nothing any more ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(project: Path) -> Path:
    _called(["run", "рецепт.yaml", "--run", "stored"], project, "utf-8")
    return project


@pytest.mark.parametrize(
    "command", [["report", "stored"], ["report", "stored", "--json"], ["--help"], ["completion", "zsh"]]
)
@pytest.mark.parametrize(
    ("more", "told"),
    [("> /dev/full", "No space left"), (">&-", "standard output is closed"), ("", "closed it")],
)
def test_a_stdout_that_takes_nothing_is_one_error(stored: Path, command: list[str], more: str, told: str) -> None:
    done = _process(command, stored, more) if more else _piped_to_nobody(stored, command)
    text = done.err.decode()
    assert done.code == 4, text
    assert text.startswith("error: standard output"), text
    assert told in text
    assert text.count("\n") == 1, text


def _piped_to_nobody(folder: Path, arguments: list[str]) -> Said:
    """The reader of the pipe has gone before anything is written."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "finetune", *arguments]
    done = subprocess.run(command, cwd=folder, env=_clean(), stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    return Said(done.returncode, b"", done.stderr)


def test_work_goes_on_where_nobody_reads_what_is_said(project: Path, tmp_path: Path) -> None:
    said = _process(["run", "рецепт.yaml", "--run", str(tmp_path / "run"), "--json"], project, "2>/dev/full")
    assert said.code in (0, 1)
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_number_of_a_closed_stream_goes_to_no_file(tmp_path: Path) -> None:
    """Else what others print lands in it."""
    code = "from finetune.core.streams import doors\nwith doors(), open('some', 'wb') as file: print(file.fileno())"
    command = ["sh", "-c", '"$@" <&- 2>&-', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=_clean(), stdout=subprocess.PIPE, check=True)

    assert int(done.stdout) > 2


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_what_is_not_seen_is_named_and_the_rest_is_kept() -> None:
    shown = visible(f"a\tb\nc{HOSTILE}é日😀")

    assert not RAW.search(shown)
    assert shown.startswith("a\tb\nc\\x1b[2J\\x1b]0;owned\\x07")
    assert shown.endswith("\\u202egnp.exe\\u2066\\u200b\\x7f\\x08\\ré日😀".replace("\\r", "\\x0d"))
    assert visible(shown) == shown


# Marks of formatting which scripts write before, under or around their letters; all but these have no look of their own.
SEEN = "\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd\U00013430-\U0001345f"


def test_every_character_that_unicode_gives_no_look_is_escaped_and_no_other() -> None:
    everything = {chr(code) for code in range(sys.maxunicode + 1)}
    categories = ("Cc", "Cf", "Cs", "Zl", "Zp")
    unseen = {each for each in everything if unicodedata.category(each) in categories} - {"\t", "\n"}
    expected = {each for each in unseen if not re.match(f"[{SEEN}]", each)}
    kept = set(visible("".join(sorted(everything))))

    assert len(expected) > 200
    assert expected <= everything - kept
    tags_not_given_yet = {chr(code) for code in range(0xE0000, 0xE0080)}
    noted = {chr(code) for code in (0x180F, 0x2065)} | tags_not_given_yet
    assert {hex(ord(each)) for each in everything - kept - expected - noted} == set()


@pytest.mark.parametrize("ascii_only", [False, True])
def test_json_for_a_terminal_is_the_same_json(ascii_only: bool) -> None:
    value: Any = {HOSTILE: [HOSTILE, "\x7fé日😀", 1.5, None], "\ud800": "\U000e0001\\u202e\n\t"}
    text = json_text(value, indent=2, ascii_only=ascii_only)

    assert json.loads(text) == value
    assert not RAW.search(text)
    assert text.isascii() == ascii_only
    assert "\x7f" not in text


class _Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_broken_stderr_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", _Full())
    with streams.doors():
        console.say("a note")


def test_a_line_begun_anew_by_a_progress_bar_stays_one(capsys: pytest.CaptureFixture[str]) -> None:
    with streams.doors():
        sys.stderr.write("\r 50 %\rhidden")
        sys.stdout.write("\rover the line before")
    assert capsys.readouterr() == ("\\x0dover the line before", "\r 50 %\\x0dhidden")


def test_an_error_that_was_passed_over_is_raised_again() -> None:
    door = streams.Door(_Full(), needed=True)
    for _ in range(2):
        with pytest.raises(OutputError, match="No space left"):
            door.write("")
