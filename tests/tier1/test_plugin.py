"""The pytest plugin, as a user meets it: a repository with a recipe and specs, tested by pytest in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune.recipe import yaml
from finetune.testing import resource_lock
from support import project
from support.project import plain


@pytest.fixture
def repository(tmp_path):
    """A function: a repository with specs of these names and texts."""

    def make(**specs: str) -> Path:
        return project.make(tmp_path / "repository", **specs)

    return make


@pytest.fixture
def pytest_in(tmp_path):
    """A function: pytest in a folder, as a user calls it; the machine's ledger is the test's own."""

    def run(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'temporary'}"]
        own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "FT_"))}
        package = str(Path(resource_lock.__file__).parents[2])
        env = {**own, "TMPDIR": str(tmp_path), "COLUMNS": "200", "PYTHONPATH": package, **environment}
        return subprocess.run(
            [*command, *arguments], cwd=root, env=env, capture_output=True, text=True, check=False, timeout=50
        )

    return run


@pytest.fixture
def finetune_in() -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function: the real command line in a folder."""

    def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(Path(resource_lock.__file__).parents[2])}
        command = [sys.executable, "-m", "finetune", *arguments]
        return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False, timeout=50)

    return run


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """The counts in pytest's closing line."""
    closing = [line for line in done.stdout.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
    return {word.rstrip("s"): int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", closing[-1].split(" in ")[0])}


def test_specs_pass_and_leave_the_repository_as_it_was(repository, pytest_in):
    root = repository(
        first=plain("first", "dynamic_args: {max_steps: 8}\nloss: {final_max: 2.0}\nmin_steps_logged: 8\n"),
        whole=plain("whole", "expect: {resume: true}\nchecks: [loss, resume, artifacts]\n"),
    )
    done = pytest_in(root, "specs", "-v")
    assert done.returncode == 0, done.stdout
    assert outcomes(done) == {"passed": 2}
    assert "specs/first.yaml::first PASSED" in done.stdout and "specs/whole.yaml::whole PASSED" in done.stdout
    assert project.git(root, "status", "--porcelain", "--ignored") == ""


def test_a_bound_that_fails_is_told_with_file_line_measured_value_and_bound(repository, pytest_in):
    root = repository(tight=plain("tight", "loss:\n  final_max: 0.001\nmin_steps_logged: 900\n"))
    done = pytest_in(root, "specs")
    assert done.returncode == 1 and outcomes(done) == {"failed": 1}
    loss = r"specs/tight\.yaml:6: loss\.final_max: the final training loss: measured [\d.]+, bound <= 0\.001 nats"
    assert re.search(loss, done.stdout), done.stdout
    assert "specs/tight.yaml:7: min_steps_logged: steps in trainer_logs.json: measured 12, bound >= 900" in done.stdout
    assert "the command: finetune train " in done.stdout


def test_a_vacuous_bound_passes_and_is_told(repository, pytest_in):
    done = pytest_in(repository(loose=plain("loose", "loss:\n  final_max: 9.0\n")), "specs", "-q")
    assert done.returncode == 0
    assert "vacuous: specs/loose.yaml:6: loss.final_max: 9 is vacuous" in done.stdout
    assert re.search(r"A bound below [\d.]+ would mean something", done.stdout)


def test_a_vacuous_bound_in_a_spec_of_this_project_is_a_failure(repository, pytest_in):
    root = repository(loose=plain("loose", "loss: {final_max: 9.0}\n"), good=plain("good", "loss: {final_max: 2.0}\n"))
    path = os.pathsep.join(
        str(Path(file).parents[depth]) for file, depth in ((resource_lock.__file__, 2), (__file__, 1))
    )
    done = pytest_in(root, "specs", "-p", "support.meaningful", PYTHONPATH=path)
    assert done.returncode == 1 and outcomes(done) == {"failed": 1, "passed": 1}
    assert "specs/loose.yaml:5: loss.final_max: 9 is vacuous" in done.stdout.partition("short test summary")[0]


def test_a_command_that_fails_shows_its_last_words(repository, pytest_in):
    root = repository(broken=plain("broken", "dynamic_args: {data.limit: 1, max_length: 8}\n"))
    done = pytest_in(root, "specs")
    assert done.returncode == 1
    assert "specs/broken.yaml:3: config: `finetune train` ended with exit code 2" in done.stdout
    assert "error: " in done.stdout and "Traceback" not in done.stdout


def test_a_recipe_with_faults_is_a_failure_that_names_them(repository, pytest_in):
    done = pytest_in(repository(wrong=plain("wrong", "dynamic_args: {max_steps: 0}\n")), "specs")
    assert done.returncode == 1
    assert "specs/wrong.yaml:3: config: " in done.stdout and "0 steps train nothing" in done.stdout


def test_a_spec_that_takes_too_long_is_stopped_with_everything_it_started(repository, pytest_in, tmp_path):
    root = repository(slow=plain("slow", "timeout: 1\ndynamic_args: {max_steps: 1000000, save_strategy: 'no'}\n"))
    done = pytest_in(root, "specs")
    assert done.returncode == 1
    assert "specs/slow.yaml:5: timeout: the command was stopped after 1 s" in done.stdout
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "temporary") not in listing


def test_markers_of_specs_select_them_and_need_no_registration(repository, pytest_in):
    root = repository(a=plain("a", "markers: [smoke]\n"), b=plain("b", "markers: [mine, slow]\n"), c=plain("c"))
    done = pytest_in(root, "specs", "--collect-only", "-q", "--strict-markers", "-m", "smoke or mine")
    assert done.returncode == 0, done.stdout
    listed = [line for line in done.stdout.splitlines() if "::" in line]
    assert listed == ["specs/a.yaml::a", "specs/b.yaml::b"]
    assert "1 deselected" in done.stdout
    done = pytest_in(root, "specs", "--collect-only", "-q", "-m", "integration")
    assert [line for line in done.stdout.splitlines() if "::" in line] == ["specs/c.yaml::c"]


def test_specs_are_found_without_being_named_and_cases_are_listed(repository, pytest_in):
    root = repository(many=plain("many", "cases:\n  low: {dynamic_args: {train.lora.r: 2}}\n  high: {}\n"))
    (root / "near.spec.yaml").write_text(plain("near"), encoding="utf-8")
    (root / "other.yaml").write_text("not: a spec\n", encoding="utf-8")
    done = pytest_in(root, "--collect-only", "-q")
    listed = [line for line in done.stdout.splitlines() if "::" in line]
    assert sorted(listed) == ["near.spec.yaml::near", "specs/many.yaml::many[high]", "specs/many.yaml::many[low]"]
    done = pytest_in(root, "-q", "-o", "finetune_specs=other.yaml", "--collect-only")
    assert done.returncode == 2 and "other.yaml:1: not: unknown key" in done.stdout


@pytest.mark.parametrize("named", [True, False])
def test_an_empty_folder_of_specs_is_an_error(repository, pytest_in, named):
    root = repository()
    (root / "specs").mkdir()
    (root / "specs" / "README.md").write_text("none yet", encoding="utf-8")
    done = pytest_in(root, *(["specs"] if named else []))
    assert done.returncode == 2
    assert "has no spec in it" in done.stdout and "finetune spec record" in done.stdout


def test_a_folder_called_specs_that_holds_tests_is_left_alone(repository, pytest_in):
    root = repository()
    (root / "specs").mkdir()
    (root / "specs" / "test_it.py").write_text("def test_it(): pass\n", encoding="utf-8")
    assert outcomes(pytest_in(root)) == {"passed": 1}


def test_faults_and_repeated_ids_stop_the_collection_with_file_and_line(repository, pytest_in):
    done = pytest_in(repository(a=plain("same"), b=plain("same"), c=plain("c", "los: {}\n")), "specs")
    assert done.returncode == 2 and outcomes(done) == {"error": 2}
    assert "specs/b.yaml:1: test_id 'same' is also in" in done.stdout
    assert "specs/c.yaml:5: los: unknown key. Did you mean 'loss'?" in done.stdout


def test_a_spec_that_needs_a_gpu_is_skipped_with_the_reason_unless_told_otherwise(repository, pytest_in):
    text = plain("gpu").replace("gpu_requirement: 0", "gpu_requirement: 1")
    root, nothing = repository(gpu=text), {"CUDA_VISIBLE_DEVICES": "-1"}
    done = pytest_in(root, "specs", "-rs", **nothing)
    assert outcomes(done) == {"skipped": 1}
    assert "warning: no spec was run: 1 skipped" in done.stdout
    assert "specs/gpu.yaml:4: gpu_requirement 1, here: 0. Run it on the CPU with --on-cpu" in done.stdout
    done = pytest_in(root, "specs", "--on-cpu", **nothing)
    assert outcomes(done) == {"passed": 1} and "no spec was run" not in done.stdout
    assert outcomes(pytest_in(root, "specs", "-o", "finetune_on_cpu=true", **nothing)) == {"passed": 1}
    done = pytest_in(root, "specs", "--require", "gpu", **nothing)
    assert done.returncode == 1 and "'gpu' was required, but" in done.stdout


def test_measured_values_reach_the_junit_report(repository, pytest_in, tmp_path):
    report = tmp_path / "report.xml"
    pytest_in(repository(a=plain("a", "loss: {final_max: 2.0}\n")), "specs", f"--junitxml={report}")
    measured = {each.get("name"): each.get("value") for each in ElementTree.parse(report).iter("property")}
    assert set(measured) == {"min_steps_logged", "loss.final_max"} and float(measured["min_steps_logged"]) == 12


def test_a_spec_recorded_from_a_good_run_passes_and_states_its_headroom(repository, pytest_in, finetune_in):
    root = repository()
    done = finetune_in(
        root, "run", "project", "--run", "runs/good", "--set", "train.lora.r=4", "--set", "expect.resume=true"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = finetune_in(root, "spec", "record", "runs/good")
    assert (done.returncode, done.stdout) == (0, "specs/good.yaml\n"), done.stderr
    text = (root / "specs" / "good.yaml").read_text("utf-8")
    assert re.search(r"final_max: [\d.]+  # measured [\d.e-]+, 25% headroom", text)
    recorded, _ = yaml.parse(text, "spec")
    assert recorded["project_dir"] == "project" and recorded["config"] == "recipe.yaml"
    assert recorded["dynamic_args"] == {"train.lora.r": 4}
    assert recorded["expect"]["resume"] is True and recorded["expect"]["loss_reduction_min"] > 0.05
    assert outcomes(pytest_in(root, "specs")) == {"passed": 1}
    done = finetune_in(root, "spec", "record", "runs/good")
    assert done.returncode == 2 and "is there already" in done.stderr
    # A recipe that has changed since is not what was proved: the run's own copy is taken.
    recipe = root / "project" / "recipe.yaml"
    recipe.write_text(recipe.read_text("utf-8").replace("max_steps: 12", "max_steps: 2"), encoding="utf-8")
    done = finetune_in(root, "spec", "record", "runs/good", "--recipe", "project/recipe.yaml", "--force")
    assert done.returncode == 2 and "is not the recipe of" in done.stderr
    assert finetune_in(root, "spec", "record", "runs/good", "--force").returncode == 0
    recorded, _ = yaml.parse((root / "specs" / "good.yaml").read_text("utf-8"), "spec")
    assert recorded["project_dir"] == "specs/recipes" and "dynamic_args" not in recorded
    assert outcomes(pytest_in(root, "specs")) == {"passed": 1}


def test_specs_are_validated_without_being_run(repository, finetune_in):
    root = repository(a=plain("a", "cases: {x: {}, y: {}}\n"), b=plain("b", "dynamic_args: {max_steps: 0}\n"))
    done = finetune_in(root, "spec", "validate", "specs/a.yaml")
    assert (done.returncode, done.stdout) == (0, "specs/a.yaml:1: a[x]\nspecs/a.yaml:1: a[y]\n")
    done = finetune_in(root, "spec", "validate")
    assert done.returncode == 2 and "specs/b.yaml:3: config: " in done.stderr and "0 steps train nothing" in done.stderr


def test_loading_the_plugin_costs_a_foreign_repository_nothing_heavy(tmp_path, pytest_in):
    (tmp_path / "test_light.py").write_text(
        "import sys\ndef test_it():\n"
        "    assert 'finetune.testing.plugin' in sys.modules\n"
        "    assert not {'torch', 'pydantic', 'ruamel.yaml', 'numpy'} & set(sys.modules)\n",
        encoding="utf-8",
    )
    done = pytest_in(tmp_path, "test_light.py", "-p", "no:anyio", "-p", "no:hypothesispytest")
    assert outcomes(done) == {"passed": 1}, done.stdout


def test_heavy_specs_wait_for_each_other_under_xdist(repository, pytest_in):
    """Two workers, and room for one spec at a time: no two of them overlap; with room for all, some do."""
    root = repository(**{name: plain(name, "dynamic_args: {max_steps: 60}\n") for name in ("a", "b", "c")})
    (root / "conftest.py").write_text(SPANS, encoding="utf-8")
    for room, overlapping in (("0.13", False), ("100", True)):
        done = pytest_in(root, "specs", "-n", "2", FT_SPEC_MEMORY_GIB=room)
        assert outcomes(done) == {"passed": 3}, done.stdout
        spans = sorted(tuple(map(float, line.split())) for line in (root / "spans").read_text("utf-8").splitlines())
        (root / "spans").unlink()
        assert len(spans) == 3
        assert any(after[0] < before[1] for before, after in zip(spans, spans[1:], strict=False)) == overlapping, room


SPANS = """
import time, pathlib, pytest
@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    started = time.monotonic()
    yield
    with open(pathlib.Path(__file__).parent / "spans", "a") as file:
        file.write(f"{started} {time.monotonic()}\\n")
"""


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_a_process_that_died_holds_nothing(tmp_path):
    path = tmp_path / "ledger.json"
    code = (
        "import os, sys; from pathlib import Path; from finetune.testing import resource_lock as l\n"
        "with l.reserved('gone', l.Need(memory=10), within=l.Need(memory=10), path=Path(sys.argv[1])): os._exit(9)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(resource_lock.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code, str(path)], env=env, check=False).returncode == 9
    assert "gone" in path.read_text("utf-8")
    need = resource_lock.Need(memory=10)
    with resource_lock.reserved("here", need, within=need, path=path) as waited:
        assert waited < 1
    assert path.read_text("utf-8") == "[]"


def test_what_does_not_fit_beside_others_waits_and_gives_up_in_the_end(tmp_path, monkeypatch):
    path, room = tmp_path / "ledger.json", resource_lock.Need(memory=10, gpus=1)
    monkeypatch.setattr(resource_lock, "PATIENCE_SECONDS", 0.3)
    monkeypatch.setattr(resource_lock, "POLL_SECONDS", 0.05)
    for need, fits in (
        (resource_lock.Need(memory=5), True),
        (resource_lock.Need(memory=6), False),
        (resource_lock.Need(memory=1, gpus=1), False),
    ):
        with resource_lock.reserved("first", resource_lock.Need(memory=5, gpus=1), within=room, path=path):
            started = time.monotonic()
            if fits:
                with resource_lock.reserved("second", need, within=room, path=path):
                    pass
            else:
                with (
                    pytest.raises(resource_lock.ResourceError, match="held by: first"),
                    resource_lock.reserved("second", need, within=room, path=path),
                ):
                    pass
                assert time.monotonic() - started >= 0.3


def test_a_need_beyond_the_whole_machine_runs_alone(tmp_path):
    with resource_lock.reserved(
        "huge", resource_lock.Need(memory=99), within=resource_lock.Need(memory=10), path=tmp_path / "l.json"
    ) as waited:
        assert waited < 1
