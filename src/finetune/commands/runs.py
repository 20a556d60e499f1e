"""`finetune runs`: what was run here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.commands.options import FILE, output_options, print_json, stored_run
from finetune.errors import MissingError

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
    from finetune.run import Run

    if not Path(directory).is_dir():
        raise MissingError(f"no directory {directory}. Make a run with: finetune run RECIPE")
    found = [_facts(Run(path.parent)) for path in Path(directory).glob("*/recipe.yaml")]
    found.sort(key=lambda facts: facts["when"], reverse=True)
    if as_json:
        print_json(found)
    elif not found:
        click.echo(f"no runs in {directory}")
    else:
        from finetune.memory import human
        from finetune.report.terminal import show_table

        rows = [
            [facts["name"], str(len(facts["stages"])), _passed(facts), facts["when"][:16], human(facts["bytes"])]
            for facts in found
        ]
        show_table(["name", ">stages done", "checks", "when (UTC)", ">size"], rows)


@command.command("show")
@click.argument("run", required=False, type=FILE)
@output_options
def show(run: str | None, as_json: bool) -> None:
    """Show one run: its state, its machine, its files. 'finetune report' shows what came out of it."""
    found = stored_run(run)
    facts = {**_facts(found), "manifest": found.manifest()}
    if as_json:
        print_json(facts)
        return
    from finetune.memory import human

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
        ("checks", _passed(facts)),
        ("size", human(facts["bytes"])),
        ("command", manifest.get("command")),
        ("failed", ", ".join(facts["failed"])),
        ("machine", machine),
        ("python", python),
        ("packages", packages),
        ("git", f"{git.get('sha', '')[:12]}{' with changes' if git.get('dirty') else ''}"),
    ):
        if value:
            click.echo(f"{label + ':':<13}{value}")


def _facts(run: Run) -> dict[str, Any]:
    """What `runs ls` shows of a run. A run whose files are damaged is listed with what can be read."""
    from finetune.report.summary import reports, size, verdicts

    try:
        done = [report.stage for report in reports(run)]
        stored = verdicts(run)
        last = run.events()[-1:]
    except (ValueError, TypeError, KeyError):
        done, stored, last = [], None, []
    changed = (run.path / "recipe.yaml").stat().st_mtime
    written = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(changed))
    return {
        "name": run.path.name,
        "path": str(run.path),
        "stages": done,
        "passed": stored["passed"] if stored else None,
        "checks": len(stored["verdicts"]) if stored else 0,
        "failed": [verdict["name"] for verdict in stored["verdicts"] if not verdict["passed"]] if stored else [],
        "when": last[0]["time"] if last else written,
        "ended": _ended(last[0]) if last else "",
        "bytes": size(run),
    }


def _ended(event: dict[str, Any]) -> str:
    if event["event"] in ("stage_failed", "stage_interrupted"):
        return f"{event['event'].removeprefix('stage_')} in {event['stage']}: {event['message']}"
    return ""


def _passed(facts: dict[str, Any]) -> str:
    if facts["passed"] is None:
        return "not verified"
    return f"all {facts['checks']} passed" if facts["passed"] else f"{len(facts['failed'])} of {facts['checks']} FAILED"
