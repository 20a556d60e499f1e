"""No test is skipped in silence, none is left out by every session, and no session is called by nothing."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from support import skips
from support.skips import Rule, judge, tier_of

ROOT = Path(__file__).parents[2]
# Sessions that nothing calls, and why.
BY_HAND = {"calibrate": "it takes an hour, and its numbers are read by a person before they become bounds"}
NO_SERVER = Rule(tiers=("tier3",), reason="^no server", most=2, why="elsewhere")
INNER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support import skips

def pytest_configure(config):
    skips.register(config, Path("skips.yaml"))

def pytest_collection_modifyitems(items):
    skips.mark(items)
"""
TESTS = """
import pytest
from finetune.backends.fake import FakeBackend

@pytest.fixture
def backend():
    return FakeBackend()

def make():
    return FakeBackend()

@pytest.mark.parametrize("number", range({skipped}))
def test_of_a_server(number):
    pytest.skip("no server answers")

def test_of_a_fixture(backend): pass
def test_of_a_helper(): make()
def test_of_nothing(): pass

@pytest.mark.emulated
def test_that_says_so(): pass

@pytest.mark.xfail
def test_that_may_fail(): assert False
"""
LISTED = "[{tier: tier3, reason: '^no server', most: 2, why: there is none}]"


# -- the judgement -----------------------------------------------------------------------------------------------------


def faults(*skipped: tuple[str, str], rules: tuple[Rule, ...] = (NO_SERVER,), **more: Any) -> list[str]:
    return judge(skipped, rules, **{"session": None, "platform": "linux", **more})


def test_a_listed_reason_is_allowed_as_often_as_listed() -> None:
    one, two, three = ((f"tests/tier3/test_x.py::test_{name}", "no server answers") for name in "abc")
    assert faults(one, two) == []
    assert faults() == []
    assert faults(one, two, three) == ["3 skipped for '^no server', and skips.yaml allows 2"]


def test_a_reason_that_is_not_listed_is_named_with_its_first_test() -> None:
    (fault,) = faults(("tests/tier3/test_x.py::test_a", "too hot"), ("tests/tier3/test_x.py::test_b", "too hot"))
    assert "2 skipped in tier3" in fault
    assert "'too hot' (first: tests/tier3/test_x.py::test_a)" in fault


def test_a_reason_is_listed_for_its_tier_session_and_platform_alone() -> None:
    skip = ("tests/tier3/test_x.py::test_a", "no server answers")
    assert faults(("tests/tier1/test_x.py::test_a", "no server answers"))
    by_hand = Rule(tiers=("tier3",), reason="^no server", most=None, why="w", session="none")
    assert faults(skip, rules=(by_hand,)) == []
    assert faults(skip, rules=(by_hand,), session="tier3")
    nightly = Rule(tiers=("tier3",), reason="^no server", most=None, why="w", session="^tier3-x$")
    assert faults(skip, rules=(nightly,), session="tier3-x") == []
    assert faults(skip, rules=(nightly,), session="tier3")
    assert faults(skip, rules=(nightly,))
    mac = Rule(tiers=("tier3",), reason="^no server", most=None, why="w", platform="darwin")
    assert faults(skip, rules=(mac,), platform="darwin") == []
    assert faults(skip, rules=(mac,))


def test_the_list_is_whole_and_no_rule_allows_what_another_forbids() -> None:
    found = skips.rules()
    assert len(found) >= 10
    # Skips without a limit are those that somebody asked for.
    unlimited = [rule for rule in found if rule.most is None]
    assert {rule.session == "none" or "FT_REAL_MODEL_ENABLE" in rule.reason for rule in unlimited} == {True}
    # 184, seven more than before: the printed report, in the browser that the workflow requires, and 100 questions to Ollama.
    assert sum(rule.most or 0 for rule in found) <= 184, "more may be skipped than before: is that meant?"


@pytest.mark.parametrize(
    "entry", ["{tier: tier9, reason: x, most: 1, why: y}", "{tier: tier1, reason: x, most: 0, why: y}",
              "{tier: tier1, reason: x, most: 1}", "{tier: tier1, most: 1, why: y}",
              "{tier: tier1, reason: x, most: 1, why: y, wehn: z}"],
)  # fmt: skip
def test_an_entry_that_is_no_rule_is_refused(entry: str, tmp_path: Path) -> None:
    (tmp_path / "skips.yaml").write_text(f"- {entry}\n")
    with pytest.raises(pytest.UsageError, match="entry 1 is no rule"):
        skips.rules(tmp_path / "skips.yaml")


# -- in a session ------------------------------------------------------------------------------------------------------


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("NOX_CURRENT_SESSION", raising=False)
    pytester.makeconftest(INNER.format(tests=str(ROOT / "tests")))
    (pytester.path / "skips.yaml").write_text(LISTED)
    (pytester.mkpydir("tier3") / "test_x.py").write_text(TESTS.format(skipped=2))
    return pytester


def test_a_session_says_what_became_of_every_test(inner: pytest.Pytester) -> None:
    done = inner.runpytest_inprocess()
    assert done.ret == 0
    done.stdout.fnmatch_lines(["accounted for: 2 executed, 3 emulated, 2 skipped (2: no server answers)"])


@pytest.mark.parametrize("processes", [(), ("-n", "2")], ids=["alone", "under xdist"])
def test_a_session_fails_over_one_skip_too_many(inner: pytest.Pytester, processes: tuple[str, ...]) -> None:
    (inner.path / "tier3" / "test_x.py").write_text(TESTS.format(skipped=3))
    done = inner.runpytest_subprocess(*processes) if processes else inner.runpytest_inprocess()
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(
        [
            "accounted for: 2 executed, 3 emulated, 3 skipped (3: no server answers)",
            "not accounted for: 3 skipped for '^no server', and skips.yaml allows 2",
        ]
    )


def test_a_session_fails_over_a_module_that_skips_itself(inner: pytest.Pytester) -> None:
    (inner.path / "tier3" / "test_y.py").write_text("import pytest\npytest.importorskip('no_such_package')\n")
    done = inner.runpytest_inprocess()
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["not accounted for: 1 skipped in tier3 for a reason *no_such_package*"])


def test_a_selection_may_skip_less(inner: pytest.Pytester) -> None:
    done = inner.runpytest_inprocess("-k", "nothing or 1")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["accounted for: 1 executed, 0 emulated, 1 skipped (1: no server answers)"])
    inner.runpytest_inprocess("-m", "emulated").assert_outcomes(passed=3, deselected=4)


def test_this_session_is_judged_too(pytestconfig: pytest.Config) -> None:
    judged = pytestconfig.pluginmanager.has_plugin("accounting") or hasattr(pytestconfig, "workerinput")
    assert judged


# -- cells and files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells() -> dict[str, Any]:
    """The rows of the noxfile."""
    return dict(runpy.run_path(str(ROOT / "noxfile.py"))["CELLS"])


def _targets() -> dict[str, str]:
    """The Makefile's targets and their commands."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9-]+):.*##.*\n((?:\t.*\n)*)", text, flags=re.MULTILINE))


def _named(command: str, cells: dict[str, Any]) -> set[str]:
    """The sessions that a command of nox runs, by name or by tag."""
    names, tags = (set(re.findall(rf"(?:^|\s|['\"]){flag} ([\w.-]+)", command)) for flag in ("-s", "-t"))
    return (names & cells.keys()) | {name for name, cell in cells.items() if tags & set(cell.tags)}


def test_every_session_is_called_by_a_target_or_a_workflow(cells: dict[str, Any]) -> None:
    called = {name for command in _targets().values() for name in _named(command, cells)}
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in YAML(typ="safe").load(path)["jobs"].values():
            for step in job.get("steps", ()):
                called |= _named(step.get("run", ""), cells)
    assert len(cells) >= 16
    assert cells.keys() - called == BY_HAND.keys()


def test_the_workflows_run_every_session_of_tests(cells: dict[str, Any]) -> None:
    """What only a person runs is found broken by that person."""
    commands, targets = "", _targets()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in YAML(typ="safe").load(path)["jobs"].values():
            commands += "\n".join(step.get("run", "") for step in job.get("steps", ())) + "\n"
    for target in re.findall(r"\bmake (?:--\S+ )?([a-z0-9-]+)", commands):
        commands += targets.get(target, "")
    tested = {name for name, cell in cells.items() if cell.paths}
    # Those of one format are parts of the session tier3; `unit` is tier 1 with whatever lies outside of the tiers.
    assert tested - _named(commands, cells) == {"tier3-gguf", "tier3-mlx", "unit"}


def test_every_test_file_is_collected_by_a_session_of_make_test(cells: dict[str, Any]) -> None:
    tests = ROOT / "tests"
    files = [file for tier in skips.TIERS for file in (tests / tier).rglob("*.py") if file.name != "conftest.py"]
    specs = [file for tier in skips.TIERS for file in (tests / tier / "specs").glob("*.yaml")]
    whole = [cell for cell in cells.values() if "check" in cell.tags and "-k" not in cell.paths]
    places = [ROOT / path for cell in whole for path in cell.paths if not path.startswith("-")]
    assert len(files) + len(specs) >= 75
    assert [file for file in files if not file.match("test_*.py")] == []
    assert [file for file in (*files, *specs) if not any(file.is_relative_to(place) for place in places)] == []
    # A test outside of the tiers would have no rules and no marker.
    others = [file for file in tests.rglob("test_*.py") if tier_of(str(file.relative_to(tests))) == "elsewhere"]
    assert others == []
