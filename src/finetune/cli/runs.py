"""`finetune runs`: what was run here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import FILE, echo, last_change, output_options, print_json, runs_in, stored_run
from finetune.core.errors import MissingError

if TYPE_CHECKING:
    from finetune.run import Run


@click.group("runs")
def command() -> None:
    """List runs (ls) or show one (show)."""


@command.command("ls")
@click.argument("directory", required=False, default="runs", type=FILE)
@output_options
def ls(directory: str, as_json: bool) -> None:
    """List the runs in DIRECTORY (./runs by default), newest first."""
    if not Path(directory).is_dir():
        raise MissingError(f"no directory {directory}. Make a run with: finetune run RECIPE")
    found = [_facts(run) for run in runs_in(Path(directory))]
    found.sort(key=lambda facts: facts["when"], reverse=True)
    if as_json:
        print_json([{key: value for key, value in facts.items() if key != "manifest"} for facts in found])
    elif not found:
        echo(f"no runs in {directory}")
    else:
        from finetune.core.memory import human
        from finetune.report.terminal import show_table

        rows = [
            [facts["name"], str(len(facts["stages"])), _told(facts), facts["when"][:16], human(facts["bytes"])]
            for facts in found
        ]
        show_table(["name", ">stages done", "checks", "when (UTC)", ">size"], rows)


@command.command("show")
@click.argument("run", required=False, type=FILE)
@output_options
def show(run: str | None, as_json: bool) -> None:
    """Show one run: its state, its machine, its files. 'finetune report' shows what came out of it."""
    found = stored_run(run)
    facts = _facts(found)
    if as_json:
        print_json(facts)
        return
    from finetune.core.memory import human

    manifest = facts["manifest"]
    packages = " ".join(f"{name} {version}" for name, version in manifest.get("packages", {}).items())
    machine, python = "", ""
    if manifest:
        machine = f"{manifest.get('cpu')}, {manifest.get('cores')} cores, {human(manifest.get('memory_bytes', 0))}"
        machine += "".join(f", {gpu['name']}" for gpu in manifest.get("gpus", []))
        python = f"{manifest.get('python')} on {manifest.get('platform')}"
    git = manifest.get("git") or {}
    for label, value in (
        ("run", facts["path"]),
        ("when (UTC)", facts["when"]),
        ("stages done", " ".join(facts["stages"]) or "none"),
        ("ended", facts["ended"]),
        ("checks", facts["outcome"]),
        ("size", human(facts["bytes"])),
        ("command", manifest.get("command")),
        ("cause", facts["cause"]),
        ("refuted", ", ".join(facts["refuted"])),
        ("not examined", ", ".join(facts["not_examined"])),
        ("damaged", "; ".join(facts["damaged"])),
        ("machine", machine),
        ("python", python),
        ("packages", packages),
        ("git", f"{git.get('sha', '')[:12]}{' with changes' if git.get('dirty') else ''}"),
    ):
        if value:
            echo(f"{label + ':':<14}{value}")


def _facts(run: Run) -> dict[str, Any]:
    """What `runs ls` shows of a run. A run whose files are damaged is listed with what can be read."""
    from finetune.report.stored import Stored
    from finetune.report.summary import size
    from finetune.run import outcome

    stored = Stored(run)
    verified, last = stored.verdicts(), stored.events()[-1:]
    listed = verified["verdicts"] if verified else []
    written = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(last_change(run)))
    return {
        "name": run.path.name,
        "path": str(run.path),
        "stages": [report.stage for report in stored.reports()],
        "passed": verified["passed"] if verified else None,
        "checks": len(listed),
        "outcome": outcome.count(listed) if verified else "not verified",
        "cause": (verified["cause"] or None) if verified else None,
        "refuted": [verdict["name"] for verdict in outcome.of(listed, outcome.REFUTED)],
        "not_examined": [verdict["name"] for verdict in outcome.of(listed, outcome.NOT_EXAMINED)],
        "when": last[0]["time"] if last else written,
        "ended": _ended(last[0]) if last else "",
        "bytes": size(run),
        "manifest": stored.manifest(),
        "damaged": stored.damaged,
    }


def _told(facts: dict[str, Any]) -> str:
    return f"{facts['outcome']} (damaged)" if facts["damaged"] else str(facts["outcome"])


def _ended(event: dict[str, Any]) -> str:
    if event["event"] in ("stage_failed", "stage_interrupted"):
        return f"{event['event'].removeprefix('stage_')} in {event['stage']}: {event['message']}"
    return ""
