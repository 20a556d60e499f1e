"""`finetune doctor`: what this machine has."""

from __future__ import annotations

from dataclasses import asdict

import click

from finetune.cli.options import output_options, print_json
from finetune.core.errors import MissingError, UsageError
from finetune.core.lookup import did_you_mean


@click.command("doctor")
@click.option("--require", "required", multiple=True, metavar="NAME", help="End with 3 when this is missing.")
@output_options
def command(required: tuple[str, ...], as_json: bool) -> None:
    """Show what this machine has, what is missing, and the command that gets it.

    Ends with 0 unless finetune itself cannot work, or something named with --require is missing (3).
    """
    from finetune.cli.machine import examine

    findings = examine()
    names = [finding.name for finding in findings]
    for name in required:
        if name not in names:
            raise UsageError(f"nothing called '{name}'.{did_you_mean(name, names)} Known: {', '.join(names)}.")
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        from finetune.report.terminal import show_table

        rows = [[each.name, each.state, each.found, "" if each.ok else each.fix] for each in findings]
        show_table(["what", "", "found", "get it with"], rows)
    missing = [each for each in findings if not each.ok and (each.core or each.name in required)]
    if missing:
        raise MissingError("\n".join(f"{each.name}: {each.found}. Get it with: {each.fix}" for each in missing))
