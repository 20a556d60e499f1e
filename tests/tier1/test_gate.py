"""The workflow of pull requests and main: what it runs, and the one job that a branch protection asks for."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

WORKFLOW = YAML(typ="safe").load(Path(__file__).parents[2] / ".github" / "workflows" / "ci.yml")
JOBS = WORKFLOW["jobs"]
REQUIRED = JOBS["required"]
RESULTS = ("success", "failure", "cancelled", "skipped")  # all that GitHub knows


def step() -> dict[str, Any]:
    """The only step of `required`: it is what is carried out here."""
    (only,) = REQUIRED["steps"]
    assert only["env"] == {"NEEDS": "${{ toJSON(needs) }}"}
    return dict(only)


def needs(results: dict[str, str]) -> str:
    """`toJSON(needs)`, as GitHub writes it."""
    return json.dumps({name: {"result": result, "outputs": {}} for name, result in results.items()}, indent=2)


def test_every_job_runs_for_every_pull_request_and_every_push_to_main() -> None:
    assert WORKFLOW["on"] == {"pull_request": None, "push": {"branches": ["main"]}, "workflow_dispatch": None}
    assert {"lint", "tier1", "tier2", "tier3", "browser", "faults"} <= JOBS.keys()
    assert [name for name, job in JOBS.items() if "if" in job] == ["required"]


def test_the_required_job_waits_for_all_others_and_runs_whatever_became_of_them() -> None:
    assert set(REQUIRED["needs"]) == JOBS.keys() - {"required"}
    assert REQUIRED["if"] == "${{ always() }}"
    assert [name for name, job in JOBS.items() if job.get("continue-on-error")] == []
    assert "if" not in step() and "continue-on-error" not in step()


def test_the_required_job_fails_unless_every_job_succeeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every combination of results of the jobs that it waits for, through the workflow's own script."""
    script = compile(step()["run"], "ci.yml", "exec")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", os.devnull)
    swept, passed = 0, []
    for results in itertools.product(RESULTS, repeat=len(REQUIRED["needs"])):
        told = dict(zip(REQUIRED["needs"], results, strict=True))
        monkeypatch.setenv("NEEDS", needs(told))
        with pytest.raises(SystemExit) as ended:
            exec(script, {"__name__": "__main__"})
        swept += 1
        if not ended.value.code:
            passed.append(set(results))
        else:
            assert all(
                (f"{name}: {result}" in ended.value.code) == (result != "success") for name, result in told.items()
            )
    assert swept == 4 ** (len(JOBS) - 1) > 4**6
    assert passed == [{"success"}]


@pytest.mark.parametrize(
    ("results", "code", "said"),
    [
        ({"lint": "success", "tier2": "success"}, 0, ""),
        ({"lint": "success", "tier2": "skipped"}, 1, "tier2: skipped"),
        ({"lint": "cancelled", "tier2": "failure"}, 1, "lint: cancelled, tier2: failure"),
        ({}, 1, "no job was waited for"),
    ],
)
def test_the_script_as_a_process_tells_what_failed_and_writes_a_summary(
    tmp_path: Path, results: dict[str, str], code: int, said: str
) -> None:
    script, summary = tmp_path / "script", tmp_path / "summary.md"
    script.write_text(step()["run"], encoding="utf-8")
    python, *arguments = shlex.split(step()["shell"].replace("{0}", str(script)))
    assert python == "python3"
    environment = {**os.environ, "NEEDS": needs(results), "GITHUB_STEP_SUMMARY": str(summary)}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout, done.stderr.strip()) == (code, "", said)
    rows = [f"| {name} | {result} |" for name, result in results.items()]
    assert summary.read_text(encoding="utf-8").split("\n")[2 : 2 + len(rows)] == rows
