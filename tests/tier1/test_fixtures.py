"""Fixtures and helpers for tests that users write, each used for real in a pytest session of its own."""

from __future__ import annotations

import enum
import importlib
import pkgutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import finetune
import finetune.testing
from finetune.backends import BACKENDS
from finetune.core.errors import UsageError
from finetune.models import tiny
from finetune.recipe import dump
from finetune.run import Run
from finetune.testing import check_convergence, fixtures, helpers, memory_tracker, skip_if_backend_unavailable
from support import records, town

FALLING = [4.0, 3.6, 3.1, 2.8, 2.2, 1.9, 1.5, 1.2]
ABSENT = ("no_such_package",)


@pytest.fixture(scope="module")
def imported():
    """Everything imported that can be here: what a session within this one imports first is forgotten when it ends, but stays
    an attribute of its package, and other tests would patch the one and call the other."""
    for module in pkgutil.walk_packages(finetune.__path__, "finetune."):
        with suppress(ImportError, SystemExit):
            importlib.import_module(module.name)


@pytest.fixture
def inner(pytester, monkeypatch, imported):
    """A function: the result of a pytest session over one file of tests, without PyTorch."""
    monkeypatch.setitem(helpers.NEEDS, "torch", ABSENT)
    monkeypatch.delenv("FT_REQUIRE", raising=False)

    def run(source: str, *options: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess("-q", "-rs", "-p", "no:cacheprovider", *options)

    return run


@pytest.fixture
def recipe_file(pytester) -> Path:
    """A recipe on the fake backend, in a user's folder."""
    folder = town.build(pytester.mkdir("project"))
    file = folder / "recipe.yaml"
    file.write_text(dump(town.only_training(folder, folder / "runs")), encoding="utf-8")
    return file


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# -- runs --------------------------------------------------------------------------------------------------------------


def test_the_tiny_run_is_finished_and_passed_its_checks(inner):
    done = inner(
        """
        import json

        def test_run(tiny_run, check_convergence):
            found = json.loads((tiny_run.path / "verdicts.json").read_text())
            assert found["passed"] and len(found["verdicts"]) >= 10
            assert tiny_run.report("merge") and "backend: fake" in (tiny_run.path / "recipe.yaml").read_text()
            assert check_convergence(tiny_run)
        """
    )
    done.assert_outcomes(passed=1)


def test_equal_input_is_trained_once_and_the_users_folder_is_left_alone(inner, recipe_file):
    before = files(recipe_file.parent)
    done = inner(
        f"""
        from finetune.recipe.load import read_mapping

        RECIPE = {str(recipe_file)!r}

        def trainings(run):
            return len(run.events("stage_started", stage="train"))

        def test_twice(trained_run):
            first = trained_run(RECIPE)
            assert trained_run(RECIPE).path == first.path and trainings(first) == 1
            assert trained_run(read_mapping(RECIPE)[0]).path == first.path

        def test_again_later(trained_run):
            assert trainings(trained_run(RECIPE)) == 1

        def test_another(trained_run):
            run = trained_run(RECIPE, train={{"max_steps": 5, "output_dir": {str(recipe_file.parent / "out")!r}}})
            assert run.path != trained_run(RECIPE).path and run.report("train").metrics["steps"] == 5
            assert (run.path / "verdicts.json").is_file()
        """
    )
    done.assert_outcomes(passed=3)
    assert files(recipe_file.parent) == before


def test_changed_data_are_other_input(recipe_file):
    recipe, data = fixtures._recipe(recipe_file, {}), recipe_file.with_name("train.jsonl")
    before = fixtures._input(recipe)
    assert fixtures._input(fixtures._recipe(recipe_file, {"output_dir": "elsewhere"})) == before
    data.write_text("".join(data.read_text("utf-8").splitlines(keepends=True)[:4]), encoding="utf-8")
    assert fixtures._input(recipe) != before


def test_a_run_that_fails_says_where_and_why_and_is_not_tried_again(inner, recipe_file):
    done = inner(
        f"""
        import pytest
        from finetune.core.errors import RecipeError, StageError

        def test_fails(trained_run, tmp_path):
            for _ in range(2):
                with pytest.raises(StageError, match="(?s)stage 'prepare' of recipe 'town' failed: .*over the limit of 8"):
                    trained_run({str(recipe_file)!r}, train={{"max_length": 8}})

        def test_once(finetune_shared):
            (run,) = (finetune_shared / "runs").glob("town-*")
            assert (run / "events.jsonl").read_text().count("stage_failed") == 1

        def test_a_typo(trained_run):
            with pytest.raises(RecipeError, match="recipe.yaml.*train.max_step.*Did you mean 'max_steps'"):
                trained_run({str(recipe_file)!r}, train={{"max_step": 8}})
        """
    )
    done.assert_outcomes(passed=3)


def test_workers_of_xdist_train_once_between_them(pytester, recipe_file):
    pytest.importorskip("xdist", reason="pytest-xdist is not installed. Install it with: pip install pytest-xdist")
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.parametrize("number", range(4))
        def test_run(trained_run, worker_id, number):
            run = trained_run({str(recipe_file)!r})
            assert len(run.events("stage_started", stage="train")) == 1
            with open({str(pytester.path / "seen.txt")!r}, "a") as seen:
                seen.write(f"{{worker_id}} {{run.path}}\\n")
        """
    )
    done = pytester.runpytest_subprocess("-q", "-n", "2", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=4)
    seen = {line.split()[0]: line.split()[1] for line in (pytester.path / "seen.txt").read_text().splitlines()}
    assert set(seen) == {"gw0", "gw1"} and seen["gw0"] == seen["gw1"]


# -- tiny models -------------------------------------------------------------------------------------------------------


def test_a_tiny_model_is_made_once_for_each_architecture_and_size(inner, monkeypatch):
    made: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(tiny, "make", lambda place, architecture, **more: made.append((architecture, more)))
    monkeypatch.setitem(helpers.NEEDS, "torch", ())
    done = inner(
        """
        def test_models(tiny_model):
            places = {tiny_model(), tiny_model("llama"), tiny_model("gpt2"), tiny_model(hidden_size=8)}
            assert len(places) == 3 and all(place.is_dir() for place in places)
            assert tiny_model(texts=["other"]) not in places
        """,
    )
    done.assert_outcomes(passed=1)
    assert [architecture for architecture, _ in made] == ["llama", "gpt2", "llama", "llama"]
    assert "Quorra" in made[0][1]["texts"][0] and made[2][1]["hidden_size"] == 8


@pytest.mark.parametrize(("options", "outcome"), [((), {"skipped": 1}), (("--require", "torch"), {"failed": 1})])
def test_without_pytorch_a_tiny_model_skips_its_test_unless_it_was_required(inner, options, outcome):
    done = inner("def test_model(tiny_model):\n    tiny_model()\n", *options)
    done.assert_outcomes(**outcome)
    done.stdout.fnmatch_lines(
        ["*'no_such_package' is not installed. Install it with: pip install 'finetune-proof[[]torch[]]'*"]
    )


# -- skipping ----------------------------------------------------------------------------------------------------------

SKIPPING = """
    import unittest
    from finetune.testing import skip_if_backend_unavailable

    @skip_if_backend_unavailable("torch")
    def test_needs_it():
        assert False, "it ran"

    @skip_if_backend_unavailable("torch")
    class TestNeedsIt(unittest.TestCase):
        def test_method(self):
            assert False, "it ran"

    @skip_if_backend_unavailable("fake")
    def test_needs_what_is_there():
        pass
"""


def test_a_test_whose_backend_is_missing_is_skipped_with_the_way_to_get_it(inner):
    done = inner(SKIPPING, "--strict-markers")
    done.assert_outcomes(passed=1, skipped=2)
    done.stdout.fnmatch_lines(["SKIPPED*'no_such_package' is not installed. Install it with: pip install*"])


@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_missing_backend_that_was_required_fails(inner, monkeypatch, way):
    if way == "environment":
        monkeypatch.setenv("FT_REQUIRE", "mlx, torch")
    done = inner(SKIPPING, *(("--require", "torch") if way == "option" else ()))
    done.assert_outcomes(passed=1, errors=2)
    done.stdout.fnmatch_lines(["*'torch' was required, but: the Python package 'no_such_package'*"])


def test_whether_a_backend_is_there_is_found_out_when_the_test_runs(inner, monkeypatch):
    asked = []
    monkeypatch.setattr(helpers, "unavailable", lambda name: asked.append(name))
    assert inner(SKIPPING, "--collect-only").ret == 0
    assert asked == []
    inner(SKIPPING, "-k", "what_is_there").assert_outcomes(passed=1, deselected=2)
    assert asked == ["fake"]


def test_a_backend_may_be_named_by_an_enumeration():
    kinds = enum.Enum("Backend", {"CUDA": "cuda"})
    assert skip_if_backend_unavailable(kinds.CUDA).args == skip_if_backend_unavailable("CUDA").args == ("cuda",)


def test_an_unknown_backend_is_an_error_where_it_is_written():
    with pytest.raises(UsageError, match="unknown backend 'llama.cpp'. Did you mean 'llamacpp'"):
        skip_if_backend_unavailable("llama.cpp")


def test_every_backend_names_a_missing_package_and_its_install_line(monkeypatch):
    assert set(BACKENDS) <= set(helpers.NEEDS)
    monkeypatch.setattr(helpers.importlib.util, "find_spec", lambda package: None)
    reasons = {name: helpers.unavailable(name) or "" for name, packages in helpers.NEEDS.items() if packages}
    assert len(reasons) >= 6
    for name, reason in reasons.items():
        assert f"'{helpers.NEEDS[name][0]}' is not installed" in reason and "pip install 'finetune-proof[" in reason


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_of_a_block_is_measured():
    with memory_tracker() as stats:
        held = bytearray(64 * 2**20)
        inside = stats.total_used_mb
        del held
    assert 60 < inside < 120
    assert inside <= stats.total_used_mb < 120
    assert stats.peak_bytes - stats.start_bytes > 60 * 2**20


def test_a_device_is_measured_where_there_is_one(monkeypatch):
    class Cuda:
        taken = 3 * 2**20
        is_available = staticmethod(lambda: True)
        reset_peak_memory_stats = staticmethod(lambda: None)
        max_memory_allocated = staticmethod(lambda: Cuda.taken)

    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"cuda": Cuda}))
    with memory_tracker() as stats:
        Cuda.taken = 10 * 2**20
    Cuda.taken = 99 * 2**20
    assert (stats.device_start_bytes, stats.device_peak_bytes) == (3 * 2**20, 10 * 2**20)
    assert stats.total_used_mb >= 7


def test_the_fixtures_are_the_helpers(inner):
    done = inner(
        """
        from finetune import testing

        def test_same(memory_tracker, check_convergence):
            assert memory_tracker is testing.memory_tracker and check_convergence is testing.check_convergence
        """
    )
    done.assert_outcomes(passed=1)


# -- convergence -------------------------------------------------------------------------------------------------------


def test_falling_losses_converge():
    assert check_convergence(FALLING) is True
    assert check_convergence(iter(FALLING), max_initial=4.5) is True


@pytest.mark.parametrize(
    ("losses", "limit", "said"),
    [
        ([3.0, 2.0, 1.0], None, "3 losses say nothing; 4 are needed"),
        ([*FALLING[:4], float("nan"), *FALLING[5:]], None, "1 of 8 losses are not finite; the first is number 5: nan"),
        (FALLING, 3.5, "the first loss is 4, and must be at most 3.5"),
        ([4.0] * 8, None, "fell by 0.0% (must be more than 5%), 0 standard errors (must be more than 2)"),
        (FALLING[::-1], None, "from 1.2 to 4 in 8 steps: the window mean fell by -181.5%"),
    ],
)
def test_others_fail_with_what_was_measured_and_its_bound(losses, limit, said):
    with pytest.raises(AssertionError) as caught:
        check_convergence(losses, limit)
    assert str(caught.value).startswith("the training did not converge: ")
    assert said in str(caught.value)


def test_a_runs_own_losses_are_read(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(AssertionError, match="0 losses say nothing"):
        check_convergence(run)
    for step, loss in enumerate(FALLING, 1):
        run.event(
            "step", stage="train", **{key: value for key, value in records.step(step, loss).items() if key != "time"}
        )
    assert check_convergence(run) is True


# -- names -------------------------------------------------------------------------------------------------------------


def test_the_public_names_are_there_and_cost_nothing_until_used():
    assert len(finetune.testing.__all__) == 8
    for name in finetune.testing.__all__:
        assert callable(getattr(finetune.testing, name))
    with pytest.raises(AttributeError, match="no attribute 'tiny_modle'"):
        _ = finetune.testing.tiny_modle
    code = "import sys, finetune.testing, finetune.testing.fixtures; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pytest" in loaded
    assert not {"torch", "pydantic", "psutil", "numpy", "jinja2", "rich", "click"} & set(loaded)
