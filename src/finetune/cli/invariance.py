"""`finetune invariance`: what no correct trainer changes, measured for a recipe without its training."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout

import click

from finetune.cli.options import (
    echo,
    load_recipe,
    output_options,
    print_json,
    recipe_options,
    run_options,
    show_plan,
    working,
)
from finetune.core import console

NEEDED = ["prepare"]


@click.command("invariance")
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
    """Check what no correct trainer changes, on a tiny copy of the model. Ends with 1 when something does.

    Accumulating gradients, gradient checkpointing, packing and padding must leave the losses as they are, the seed alone
    must decide the order of the rows, and the merged weights must be the base with its adapter. A tiny copy of the
    recipe's model is trained with the recipe's options, in float32 on the CPU: half a minute. The recipe's own training
    is not run; its model and data are fetched and prepared first where they are not.

    RECIPE is a file, or a directory that holds a recipe.yaml; ./recipe.yaml by default. With 'expect.invariance: true'
    in it, 'finetune run' does the same.
    """
    from finetune.core.errors import UsageError
    from finetune.stages.pipeline import run_directory

    loaded = load_recipe(recipe, config, example, overrides)
    if loaded.train is None:
        raise UsageError("the invariances are those of a training, and the recipe has no 'train' section")
    run = run_directory(loaded, run_path)
    if dry_run:
        show_plan(loaded, run, NEEDED, force=force, retrain=retrain, as_json=as_json)
        return 0
    working(loaded, run, NEEDED, force=force, retrain=retrain)
    from finetune.checks import judged, results
    from finetune.checks.invariance import not_applicable
    from finetune.experiments.invariance.measure import write

    console.say("== invariance")
    with run.locked(), redirect_stdout(sys.stderr):
        left_out = not_applicable(write(loaded, run))
        found = judged(loaded, run, results(loaded, run, ["invariance"]))
    if as_json:
        print_json({"run": str(run.path), **found, "not_applicable": left_out})
    else:
        from finetune.report.terminal import show_verdicts

        show_verdicts(found)
        for name, why in left_out.items():
            echo(f"not applicable: {name}: {why}")
    return 0 if found["passed"] else 1
