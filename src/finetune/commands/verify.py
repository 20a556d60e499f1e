"""`finetune verify`: a stored run, checked again."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import click

from finetune.checks import CHECKS
from finetune.commands.options import FILE, output_options, print_json, stored_recipe, stored_run


def _complete_check(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [check.name for check in CHECKS if check.name.startswith(incomplete)]


_CHECKS_HELP = "\n\n".join(["Checks:", "\b\n" + "\n".join(f"  {check.name:<12}{check.help}" for check in CHECKS)])


@click.command("verify", epilog=_CHECKS_HELP)
@click.argument("run", required=False, type=FILE)
@click.option("--check", "checks", multiple=True, metavar="NAME", shell_complete=_complete_check, help="Only this one.")
@output_options
def command(run: str | None, checks: tuple[str, ...], as_json: bool) -> int:
    """Check a stored run again, from what is on disk alone. Ends with 1 when a check failed.

    RUN is a run directory, or a name under ./runs; the newest run there by default.
    """
    from finetune.checks import as_dict, verify

    found = stored_run(run)
    recipe = stored_recipe(found)
    with found.locked(), redirect_stdout(sys.stderr):
        verdicts = verify(recipe, found, checks or None)
    result = as_dict(verdicts)
    if as_json:
        print_json({"run": str(found.path), **result})
    else:
        from finetune.report.terminal import show_verdicts

        show_verdicts(result["verdicts"])
    return 0 if result["passed"] else 1
