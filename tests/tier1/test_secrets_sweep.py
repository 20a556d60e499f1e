"""Every kind of secret by every way in: nothing of it in any file of the run, on stdout or stderr, or the command refuses
by name. By the real command line, on the fake backend."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from finetune.backends.fake import FakeBackend
from finetune.cli.app import cli
from finetune.core import secrets
from support import secret_kinds
from support.secret_kinds import ADDRESSES, NAMED, SHAPED, places, spellings

RECIPE = """\
name: kept
backend: fake
model: {path: model}
data: {path: train.jsonl}
train: {max_steps: 2, save_steps: 1, max_length: 256}
evaluate: {probes: probes.jsonl, max_new_tokens: 4, score_rows: 2}
"""
# Every secret by the variable that it stands in while it is looked for; a shape is known without one.
KINDS = {**SHAPED, **NAMED, **ADDRESSES}
VARIABLE = "OTHER_THING"
pytestmark = pytest.mark.timeout(240)  # dozens of commands each


@dataclass(frozen=True)
class Told:
    """What a command came to."""

    code: int
    out: str


@pytest.fixture
def here(town: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a recipe and its data, the working directory."""
    monkeypatch.setattr(secrets, "_known", set())
    project = tmp_path / "project"
    shutil.copytree(town, project)
    (project / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.chdir(project)
    return project


def call(*arguments: str) -> Told:
    """The command line in this process, with its arguments where the manifest finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune", *arguments])
        result = CliRunner().invoke(cli, list(arguments), prog_name="finetune")
    return Told(result.exit_code, result.output)


def hold(kind: str, secret: str, patch: pytest.MonkeyPatch) -> str | None:
    """Set the variable of a secret, where it needs one to be known; its name."""
    if kind in SHAPED:
        return None
    patch.setenv(kind, secret_kinds.address(kind) if kind in ADDRESSES else secret)
    return kind


def shown(secret: str, told: Told) -> bool:
    return any(form in told.out.encode() for form in spellings(secret))


# -- ways in that are refused ------------------------------------------------------------------------------------------


def _field(project: Path, secret: str) -> list[str]:
    text = RECIPE + json.dumps({"template": {"system": f"Use {secret} now."}})[1:-1] + "\n"
    (project / "recipe.yaml").write_text(text, encoding="utf-8")
    return ["run", "recipe.yaml"]


def _name(project: Path, secret: str) -> list[str]:
    return ["run", "recipe.yaml", "--set", f"data.fields.prompt={json.dumps(secret)}"]


def _set(project: Path, secret: str) -> list[str]:
    return ["run", "recipe.yaml", "--set", f"template.system={json.dumps(secret)}"]


def _tracker(project: Path, secret: str) -> list[str]:
    return ["run", "recipe.yaml", "--set", f"train.report_to={json.dumps(secret)}"]


def _model(project: Path, secret: str) -> list[str]:
    return ["run", "recipe.yaml", "--set", f"model.path=hub:https://ada:{quote(secret, safe='')}@host.example/x"]


def _source(project: Path, secret: str) -> list[str]:
    return ["run", "recipe.yaml", "--set", f"data.path=https://ada:{quote(secret, safe='')}@host.example/x.jsonl"]


def _row(project: Path, secret: str) -> list[str]:
    with (project / "train.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": "What is it?", "completion": f"It is {secret}, of course."}) + "\n")
    return ["prepare", "recipe.yaml"]


def _question(project: Path, secret: str) -> list[str]:
    with (project / "probes.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"prompt": f"Is it {secret}?", "answer": "Yes."}, ensure_ascii=False) + "\n")
    return ["run", "recipe.yaml"]


def _template(project: Path, secret: str) -> list[str]:
    text = "{# " + secret + " #}\n{% for message in messages %}{{ message.content }}\n{% endfor %}"
    (project / "own.jinja").write_text(text, encoding="utf-8")
    return ["prepare", "recipe.yaml", "--set", "template={name: custom, path: own.jinja}"]


def _directory(project: Path, secret: str) -> list[str]:
    return ["run", "recipe.yaml", "--run", str(project / "runs" / quote(secret, safe=""))]


def _config(project: Path, secret: str) -> list[str]:
    config = json.loads((project / "model" / "config.json").read_text(encoding="utf-8"))
    (project / "model" / "config.json").write_text(json.dumps({**config, "_name_or_path": secret}), encoding="utf-8")
    return ["fetch", "recipe.yaml"]


REFUSED: tuple[Callable[[Path, str], list[str]], ...] = (
    _field, _name, _set, _tracker, _model, _source, _row, _question, _template, _directory, _config,
)  # fmt: skip


ARGUMENTS = (
    ("run", "SECRET.yaml"),
    ("verify", "SECRET"),
    ("report", "runs/SECRET"),
    ("validate", "recipe.yaml", "--set", "SECRET"),
    ("train", "recipe.yaml", "--resume", "SECRET"),
    ("fetch", "SECRET"),
    ("SECRET",),
)


@pytest.mark.parametrize("kinds", [SHAPED, {**NAMED, **ADDRESSES}], ids=["shapes", "names"])
@pytest.mark.parametrize("way", REFUSED, ids=lambda way: way.__name__.strip("_"))
def test_a_secret_that_data_or_settings_hold_is_refused_by_name_and_is_nowhere(
    here: Path, way: Callable[[Path, str], list[str]], kinds: dict[str, str]
) -> None:
    before = {file: file.read_bytes() for file in here.rglob("*") if file.is_file()}
    wrong = {}
    for kind, secret in kinds.items():
        with pytest.MonkeyPatch.context() as patch:
            variable = hold(kind, secret, patch)
            told = call(*way(here, secret))
        said = variable or "what looks like a"
        address = way in (_model, _source) and "an address with a password" in told.out
        if told.code != 2 or not (said in told.out or address) or shown(secret, told) or places(secret, here / "runs"):
            wrong[kind] = (told, places(secret, here / "runs"))
        shutil.rmtree(here / "runs", ignore_errors=True)
        for file, content in before.items():
            file.write_bytes(content)
    assert wrong == {}


def test_so_many_combinations_are_tried() -> None:
    assert (len(SHAPED), len(NAMED), len(ADDRESSES), len(REFUSED)) == (36, 20, 4, 11)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: arguments[0])
def test_an_argument_with_a_secret_is_not_repeated(here: Path, arguments: tuple[str, ...]) -> None:
    wrong = {}
    for kind, secret in KINDS.items():
        with pytest.MonkeyPatch.context() as patch:
            hold(kind, secret, patch)
            given = [text.replace("SECRET", quote(secret, safe="")) for text in arguments]
            told = call(*given)
        if not told.code or shown(secret, told):
            wrong[kind] = told
    assert wrong == {}


@pytest.mark.parametrize("name", [*NAMED, *ADDRESSES, VARIABLE])
def test_a_variable_with_a_secret_may_be_named_by_the_token_alone(
    here: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = secret_kinds.environment().get(name, SHAPED["slack bot"])
    monkeypatch.setenv(name, value)
    told = call("run", "recipe.yaml", "--set", "train.max_steps=1", "--set", "name=x", "--dry-run")
    assert told.code == 0
    (here / "recipe.yaml").write_text(RECIPE + "output_dir: ${" + name + "}\n")
    told = call("run", "recipe.yaml")
    assert told.code == 2
    assert f"'${{{name}}}' holds a secret" in told.out
    assert not shown(value, told)


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["lines", "json"])
def test_what_is_printed_of_a_path_with_a_secret_shows_none(
    here: Path, more: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DB_PASSWORD", NAMED["DB_PASSWORD"])
    for secret in (NAMED["DB_PASSWORD"], SHAPED["github classic"]):
        shutil.copy("recipe.yaml", f"{secret}.yaml")
        for arguments in (("validate", f"{secret}.yaml"), ("init", secret), ("run", f"{secret}.yaml", "--dry-run")):
            told = call(*arguments, *more)
            assert told.code == 0
            assert not shown(secret, told), arguments
            assert "***" in told.out or arguments[0] == "run"


# -- ways in that are hidden -------------------------------------------------------------------------------------------


def every() -> Iterator[tuple[str, str]]:
    """(kind, secret), and the passwords in addresses as they are meant and as they are written."""
    yield from KINDS.items()
    yield from ((f"{name}, whole", secret_kinds.address(name)) for name in ADDRESSES)
    yield "GCP_CREDENTIALS, inside", json.loads(NAMED["GCP_CREDENTIALS"])["private_key"]


def test_a_whole_run_with_every_secret_in_its_environment_leaves_none(here: Path) -> None:
    environment = {**os.environ, **secret_kinds.environment()}
    for name in ("https_proxy", "HTTPS_PROXY"):
        environment.pop(name, None)
    environment["HTTPS_PROXY"] = secret_kinds.address("HTTPS_PROXY")
    command = [sys.executable, "-m", "finetune", "run", "recipe.yaml", "--set", "export=[bundle]"]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=200)
    told = Told(done.returncode, done.stdout + done.stderr)
    left = {kind: places(secret, here / "runs") for kind, secret in every()}

    assert told.code in (0, 1), told.out
    assert {kind: files for kind, files in left.items() if files} == {}
    assert [kind for kind, secret in every() if shown(secret, told)] == []
    assert len(left) == 65
    assert len([file for file in (here / "runs").rglob("*") if file.is_file()]) > 40


def test_what_fails_with_every_secret_in_its_words_shows_none(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of a library, a note, a child's last words: they become events, lines on stderr and reports."""
    for name, value in secret_kinds.environment().items():
        monkeypatch.setenv(name, value)
    said = " | ".join(
        form for _, secret in every() for form in (secret, json.dumps(secret), quote(secret, safe=""), repr(secret))
    )

    def fail(self: FakeBackend, job: object) -> None:
        raise RuntimeError(f"401 for {said}")

    monkeypatch.setattr(FakeBackend, "train", fail)
    for debug in ((), ("--debug",)):
        told = call("run", "recipe.yaml", *debug)
        assert told.code == 4
        assert "401 for ***" in told.out
        assert [kind for kind, secret in every() if shown(secret, told)] == []
    assert "401 for ***" in (here / "runs/kept/events.jsonl").read_text(encoding="utf-8")
    assert (here / "runs/kept/report.html").is_file()
    assert {kind: files for kind, secret in every() if (files := places(secret, here / "runs"))} == {}


@pytest.mark.parametrize("way", ["recipe", "set", "variable"])
def test_the_token_is_used_and_stored_nowhere(here: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {}
    for kind, secret in KINDS.items():
        monkeypatch.setattr(secrets, "_known", set())
        arguments = ["prepare", "recipe.yaml"]
        text = RECIPE.replace("{path: model}", f"{{path: model, token: {json.dumps(secret)}}}")
        if way == "variable":
            text = text.replace(json.dumps(secret), "'${MY_HUB_TOKEN}'")
            monkeypatch.setenv("MY_HUB_TOKEN", secret)
        (here / "recipe.yaml").write_text(RECIPE if way == "set" else text, encoding="utf-8")
        told = call(*arguments, *(("--set", f"model.token={json.dumps(secret)}") if way == "set" else ()), "--force")
        if told.code or shown(secret, told) or places(secret, here / "runs"):
            wrong[kind] = (told, places(secret, here / "runs"))
    assert wrong == {}
