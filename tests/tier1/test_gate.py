"""The workflow of pull requests and main: what it runs."""

from __future__ import annotations

from pathlib import Path

from ruamel.yaml import YAML

WORKFLOW = YAML(typ="safe").load(Path(__file__).parents[2] / ".github" / "workflows" / "ci.yml")
JOBS = WORKFLOW["jobs"]


def test_every_job_runs_for_every_pull_request_and_every_push_to_main() -> None:
    assert WORKFLOW["on"] == {"pull_request": None, "push": {"branches": ["main"]}, "workflow_dispatch": None}
    assert {"lint", "tier1", "tier2", "tier3", "browser", "faults"} <= JOBS.keys()
    assert [name for name, job in JOBS.items() if "if" in job] == ["required"]
