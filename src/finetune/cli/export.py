"""`finetune export`: a trained run in other formats, each held against the model it was made from."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from finetune.cli.options import (
    FILE,
    echo,
    load_recipe,
    output_options,
    print_json,
    recipe_at,
    show_plan,
    stored_recipe,
    stored_run,
    working,
)
from finetune.core import console
from finetune.core.errors import FinetuneError, MissingError, StageError, UsageError
from finetune.run import outcome

if TYPE_CHECKING:
    from finetune.export import Target
    from finetune.recipe import Recipe
    from finetune.run import Run
    from finetune.run.records.compared import Export
    from finetune.run.records.whole import StoredVerdict, StoredVerdicts

UNCOMPARED = "the exports were not compared with the model that they were made from"
# Written out, as the table itself lies behind pydantic, which help does not load; a test holds the two together.
_FORMATS_HELP = """\b
Formats, and their variants:
  gguf    One file for llama.cpp and what is built on it. Variants: f32, f16
          (the default), bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_1, q5_0,
          q4_k_m, q4_k_s, q4_1, q4_0, q3_k_m, q2_k.
  mlx     A directory for Apple's MLX: as trained, or f32, f16, bf16, q8, q4.
  ollama  A Modelfile beside its GGUF file, for 'ollama create'. Variants as
          for gguf, q8_0 by default.
  bundle  Weights, adapter, tokenizer, model card and checksums, ready for
          'hf upload'.
"""


def _known() -> list[str]:
    """Every way to write a target, the default variant of a format as its bare name."""
    from finetune.export import FORMATS

    return [each for name, row in FORMATS.items() for each in (name, *(f"{name}:{kind}" for kind in row.variants))]


def _complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [name for name in _known() if name.startswith(incomplete)]


@click.command("export", epilog=_FORMATS_HELP)
@click.argument("run", required=False, metavar="[RUN|RECIPE]", type=FILE)
@click.option(
    "--to", "formats", multiple=True, metavar="FORMAT[:VARIANT]", shell_complete=_complete,
    help="What to write, beside what a run has; repeat it for more [default: the recipe's 'export'].",
)  # fmt: skip
@click.option("--out", metavar="DIR", type=FILE, help="Put the finished exports into DIR too, a folder each.")
@click.option("--no-parity", is_flag=True, help="Do not compare the exports with the model they were made from.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option("--run", "run_path", metavar="DIR", type=FILE, help="For RECIPE: the run directory.")
@click.option("--force", is_flag=True, help="Export again what is up to date, and replace what is in --out.")
@click.option("--anyway", is_flag=True, help="Put exports out though the run was not proved, or is not as it was made.")
@click.option("--dry-run", is_flag=True, help="Show which stages would run and why; run nothing.")
@output_options
def command(
    run: str | None,
    formats: tuple[str, ...],
    out: str | None,
    no_parity: bool,
    overrides: tuple[str, ...],
    run_path: str | None,
    force: bool,
    anyway: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Write a trained model in other formats, and prove in each format's own runtime that it is still that model.

    RUN is a run directory, or a name under ./runs; RECIPE a file, whose stages run first where they have not yet.
    Without either: ./recipe.yaml, else the newest run. Ends with 1 when an export is not like the model. Nothing is put
    into --out, which ends with 1 too, where a verdict on the run is refuted or missing, or a file of it is not the one that
    was made; --anyway does it all the same, and the card says so.
    """
    from finetune.export import FORMATS, targets
    from finetune.lifecycle import handout

    named = targets(formats)
    recipe, found, stored = _meant(run, run_path, overrides)
    if named:  # a run keeps the exports that it has
        kept = recipe.export if stored else []
        both = [target.name for target in targets([*kept, *(target.name for target in named)])]
        recipe = recipe.model_copy(update={"export": both})
    wanted = named or targets(recipe.export)
    if not wanted:
        raise UsageError(
            f"no format given. Known: {', '.join(FORMATS)}. Name one with --to, as in --to gguf:q4_k_m (finetune export "
            "--help lists the variants), or list them under 'export' in the recipe"
        )
    if out is not None:
        _check_out(Path(out), wanted, found, force=force)
    elif anyway:
        raise UsageError("--anyway goes with --out DIR: nothing else is refused")
    stages = ["export"] if no_parity else ["export", "compare"]
    spoilt = [] if out is None or dry_run else _damage(found, force=force)
    if spoilt:  # what is damaged is not made again behind the back of who wants it
        if not anyway:
            handout.refuse(found, f"nothing was put into {out}", spoilt)
        _check_made(found, wanted)
    else:
        if stored:
            _check_trained(recipe, found, stages)
        if dry_run:
            show_plan(recipe, found, stages, force=force, as_json=as_json)
            return 0
        working(recipe, found, stages, force=force)
    parity = None if no_parity or spoilt else _of_exports(_verify(recipe, found)["verdicts"], wanted)
    passed = None if parity is None else outcome.holds(map(outcome.outcome, parity))
    refused = [] if out is None else _refused(recipe, found, wanted, [*spoilt, *([UNCOMPARED] if parity == [] else [])])
    published = [] if out is None or refused and not anyway else _deliver(found, wanted, Path(out), refused)
    if as_json:
        print_json(_as_dict(found, parity, passed, published))
    else:
        _show(found, parity, published)
    if not published:
        handout.refuse(found, f"nothing was put into {out}", refused)
    return 1 if passed is False and not published else 0


# -- what is meant -----------------------------------------------------------------------------------------------------


def _meant(text: str | None, run_path: str | None, overrides: tuple[str, ...]) -> tuple[Recipe, Run, bool]:
    """The recipe, its run, and whether a run was meant (which is never trained here) rather than a recipe."""
    from finetune.stages.pipeline import run_directory

    if text is None and run_path is not None:
        text, run_path = run_path, None
    given = recipe_at(Path("." if text is None else text))
    if given is not None:
        recipe = load_recipe(str(given), overrides=overrides)
        return recipe, run_directory(recipe, run_path), False
    if run_path is not None:
        raise UsageError(f"{text} is a run already; --run {run_path} goes with a recipe")
    found = stored_run(text)
    stored_recipe(found)
    return load_recipe(str(found.path / "recipe.yaml"), overrides=overrides), found, True


def _check_trained(recipe: Recipe, run: Run, stages: list[str]) -> None:
    """Raise MissingError where the run's training has not finished, StageError where it would be done again."""
    from finetune.stages.pipeline import preview

    again = f"finetune run {run.path / 'recipe.yaml'} --run {run.path}"
    for step in preview(recipe, run, stages):
        if step.stage not in ("train", "align") or not step.runs:
            continue
        if run.report(step.stage) is None:
            raise MissingError(
                f"{run.path} has nothing to export: its stage '{step.stage}' has not finished. Go on with: {again}"
            )
        raise StageError(f"{run.path} would have to be trained again ({step.why}). Do that with: {again}")


# -- proof -------------------------------------------------------------------------------------------------------------


def _verify(recipe: Recipe, run: Run) -> StoredVerdicts:
    from finetune.checks import judged, results, store

    console.say("== verify")
    with run.locked(), redirect_stdout(sys.stderr):
        found = judged(recipe, run, results(recipe, run))
        store(run, found)
    return found


def _of_exports(verdicts: list[StoredVerdict], wanted: list[Target]) -> list[StoredVerdict]:
    """The verdicts on the merged model and the exports: those named `check[export]`."""
    ends = tuple(f"[{name}]" for name in ("merged", *(target.name for target in wanted)))
    return [verdict for verdict in verdicts if verdict["name"].endswith(ends)]


def _damage(run: Run, *, force: bool) -> list[str]:
    """What is not as it was made; with `force`, but for what is to be made again."""
    from finetune.lifecycle import handout

    return [str(each) for each in handout.damage(run, but=("export", "compare") if force else ())] if run.exists else []


def _check_made(run: Run, wanted: list[Target]) -> None:
    """Raise MissingError for an export that is not there, EvidenceError where the list of them cannot be read."""
    there = {entry["name"] for entry in _made(run)}
    for target in wanted:
        if target.name not in there:
            raise MissingError(
                f"{run.path} has no export {target.name}, and none is made of what is damaged. Make it whole first with: "
                f"finetune run {run.path / 'recipe.yaml'} --run {run.path}"
            )


def _refused(recipe: Recipe, run: Run, wanted: list[Target], known: list[str]) -> list[str]:
    """Why these exports are not to be handed out, with what is known already."""
    from finetune.lifecycle import delivery, handout

    changed = map(str, handout.changed(run, delivery.places(run, wanted)))
    return list(dict.fromkeys([*known, *handout.unproved(run, recipe), *changed]))


def _deliver(run: Run, wanted: list[Target], out: Path, although: list[str]) -> list[Path]:
    from finetune.lifecycle import delivery, handout
    from finetune.report.stored import Stored

    for reason in although:
        echo(f"warning: exported although: {reason}", err=True)
    try:
        verdicts, marks = handout.verdicts(run)["verdicts"], Stored(run).marks()
    except FinetuneError:  # one of the reasons: the card keeps what it had
        verdicts, marks = None, []
    return delivery.deliver(run, wanted, out, verdicts=verdicts, marks=marks, although=although)


# -- what came out -----------------------------------------------------------------------------------------------------


def _made(run: Run) -> list[Export]:
    from finetune.run import evidence, layout

    return evidence.read(run, layout.EXPORTS)


def _as_dict(
    run: Run, parity: list[StoredVerdict] | None, passed: bool | None, published: list[Path]
) -> dict[str, Any]:
    from finetune.report import summary

    return {
        "run": str(run.path),
        "passed": passed,
        "exports": [{**each, "path": str(run.path / each["path"])} for each in _made(run)],
        "compared": [] if parity is None else summary.exports(run, parity),
        "verdicts": parity or [],
        "published": [str(path) for path in published],
    }


def _show(run: Run, parity: list[StoredVerdict] | None, published: list[Path]) -> None:
    from finetune.core.memory import human
    from finetune.report import summary
    from finetune.report.terminal import show_exports, show_table, show_verdicts

    made = _made(run)
    if parity is not None:
        show_exports(summary.exports(run, parity))
    else:
        rows = [
            [each["name"], human(each["bytes"]), console.duration(each["seconds"]), "not compared"] for each in made
        ]
        show_table(["format", ">size", ">time", "verdict"], rows)
    if told := [each for each in parity or [] if outcome.outcome(each) != outcome.PROVED]:
        show_verdicts({"verdicts": told})
    for each in made:
        for note in (*each["mended"], *each["notes"]):
            echo(f"{each['name']}: {note}")
    for path in published or [run.path / each["path"] for each in made]:
        echo(f"  {path}")


# -- --out -------------------------------------------------------------------------------------------------------------


def _check_out(out: Path, wanted: list[Target], run: Run, *, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is not a directory")
    if out.resolve().is_relative_to(run.path):
        raise UsageError(f"--out {out} lies inside the run {run.path}; choose another directory")
    taken = [str(place) for target in wanted if _taken(place := out / target.folder)]
    if taken and not force:
        raise UsageError(f"{', '.join(taken)} exists already. Choose another --out, or replace it with --force")


def _taken(place: Path) -> bool:
    return place.is_symlink() or (any(place.iterdir()) if place.is_dir() else place.exists())
