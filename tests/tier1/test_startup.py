"""Help is quick because it imports nothing: what a fresh process has loaded after it is looked at, not timed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from finetune.cli.app import ALIASES, COMMANDS
from finetune.run.plan import STAGES

HEAVY = (
    *(
        "torch",
        "transformers",
        "peft",
        "trl",
        "datasets",
        "accelerate",
        "tokenizers",
        "safetensors",
        "numpy",
        "pyarrow",
    ),
    *(
        "huggingface_hub",
        "mlx",
        "pydantic",
        "ruamel.yaml",
        "rich",
        "jinja2",
        "psutil",
        "filelock",
        "requests",
        "urllib3",
    ),
)
PROBE = """
import contextlib, io, json, sys
from finetune.cli.app import cli
out = {}
for args in json.loads(sys.argv[1]):
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        try:
            cli.main(args, prog_name="finetune")
        except SystemExit as stop:
            code = stop.code
    out[" ".join(args)] = [code, stream.getvalue()]
print(json.dumps({"helps": out, "modules": sorted(sys.modules)}))
"""


def _probe(*commands: list[str]) -> tuple[dict[str, tuple[int, str]], set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(commands)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    return found["helps"], set(found["modules"])


@pytest.fixture(scope="module")
def help_alone() -> tuple[dict[str, tuple[int, str]], set[str]]:
    return _probe(["--help"])


def test_help_imports_nothing_heavy(help_alone: tuple[dict[str, tuple[int, str]], set[str]]) -> None:
    _, modules = help_alone

    assert "click" in modules
    assert sorted(modules & set(HEAVY)) == []


def test_help_imports_no_command(help_alone: tuple[dict[str, tuple[int, str]], set[str]]) -> None:
    _, modules = help_alone

    assert [name for name in modules if name.startswith("finetune.cli.")] == ["finetune.cli.app"]


def test_help_prints_every_command(help_alone: tuple[dict[str, tuple[int, str]], set[str]]) -> None:
    code, text = help_alone[0]["--help"]

    assert code == 0
    for name in [*COMMANDS, *ALIASES]:
        assert f"  {name} " in text or f"(or {name})" in text, name
    assert {stage.name for stage in STAGES} < set(COMMANDS)


def test_help_of_every_command_is_light_and_in_step_with_the_table() -> None:
    names = [name.split() for name in COMMANDS]
    helps, modules = _probe(
        *[[*name, "--help"] for name in names], ["runs", "ls", "--help"], ["runs", "show", "--help"]
    )

    assert len(helps) == len(COMMANDS) + 2
    assert sorted(modules & set(HEAVY)) == []
    for name, (code, text) in helps.items():
        assert code == 0, name
        assert text.startswith(f"Usage: finetune {name.removesuffix(' --help')} "), name
    for stage in STAGES:
        assert stage.help.split(":")[0].split()[0] in helps[f"{stage.name} --help"][1]


def test_version_is_printed() -> None:
    done = subprocess.run([sys.executable, "-m", "finetune", "--version"], capture_output=True, text=True, check=True)

    assert done.stdout.startswith("finetune, version ")
