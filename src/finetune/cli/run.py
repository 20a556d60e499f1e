"""`finetune run`: all stages, the checks, the report."""

from __future__ import annotations

import click

from finetune.cli.options import load_recipe, output_options, recipe_options, run_options, show_plan, working
from finetune.core import console


@click.command("run")
@recipe_options
@run_options
@output_options
def command(
    recipe: str | None,
    config: str | None,
    example: str | None,
    overrides: tuple[str, ...],
    run_path: str | None,
    force: bool,
    retrain: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Run all stages of a recipe, verify what came out, and report it. Ends with 1 when a check is refuted.

    The report is printed, and written into the run: report.html to look at, report.json, report.md, junit.xml.

    RECIPE is a file, or a directory that holds a recipe.yaml; ./recipe.yaml by default. Stages whose inputs have not
    changed are not run again. To try it without a recipe: finetune run --example quickstart
    """
    from finetune.stages.pipeline import run_directory

    loaded = load_recipe(recipe, config, example, overrides)
    run = run_directory(loaded, run_path)
    if dry_run:
        show_plan(loaded, run, None, force=force, retrain=retrain, as_json=as_json)
        return 0
    from contextlib import redirect_stdout
    from sys import stderr

    from finetune.checks import passed, verify
    from finetune.cli.report import leave_behind, show_and_write

    try:
        working(loaded, run, None, force=force, retrain=retrain)
    except BaseException:
        leave_behind(run)
        raise

    console.say("== verify")
    with run.locked(), redirect_stdout(stderr):
        verdicts = verify(loaded, run)
    show_and_write(run, as_json=as_json)
    return 0 if passed(verdicts) else 1
