"""`finetune verify`: a stored run, checked again."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import click

from finetune.checks import CHECKS
from finetune.cli.options import (
    FILE,
    attempt,
    echo,
    finite,
    held,
    not_stored,
    output_options,
    print_json,
    stored_recipe,
    stored_run,
)
from finetune.core.errors import UsageError


def _complete_check(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [check.name for check in CHECKS if check.name.startswith(incomplete)]


_CHECKS_HELP = "\n\n".join(["Checks:", "\b\n" + "\n".join(f"  {check.name:<12}{check.help}" for check in CHECKS)])


@click.command("verify", epilog=_CHECKS_HELP)
@click.argument("run", required=False, metavar="[RUN|RECIPE|BUNDLE]", type=FILE)
@click.option(
    "--check",
    "checks",
    multiple=True,
    metavar="NAME",
    shell_complete=_complete_check,
    help="Only this one, shown and not stored.",
)
@click.option("--out", metavar="FILE", type=FILE, help="Write the verdicts there as JSON, and nothing into the run.")
@output_options
def command(run: str | None, checks: tuple[str, ...], out: str | None, as_json: bool) -> int:
    """Check a stored run again, from what is on disk alone. Ends with 1 when a check is refuted, or nothing is proved. Of a
    bundle, whether its files are those that were put out.

    RUN is a run directory, or a name under ./runs; RECIPE a file whose run is meant; BUNDLE a directory that an export left;
    the newest run in ./runs by default. The verdicts are stored in the run; where it cannot be written into they are shown
    all the same. Those of some checks alone never take the place of the whole.
    """
    from finetune.checks import judged, results, store
    from finetune.core.files import write_json
    from finetune.core.secrets import redacted
    from finetune.export.bundle import is_bundle
    from finetune.report.stored import Stored

    if out is not None and Path(out).is_dir():
        raise UsageError(f"{out} is a directory; name a file with --out FILE")
    if run is not None and is_bundle(Path(run)):
        if out is not None or checks:
            raise UsageError(f"{run} is a bundle, which has no checks of its own: leave out --check and --out")
        return _bundle(Path(run), as_json)
    found = stored_run(run)
    recipe = stored_recipe(found)
    kept = out is None and not checks
    with held(found) if kept else nullcontext("") as why, redirect_stdout(sys.stderr):
        result = judged(recipe, found, results(recipe, found, checks or None))
        if kept:
            why = why or attempt(lambda: store(found, result))
    marks = Stored(found).marks()
    document = {"run": str(found.path), **result, "marks": marks}
    if out is not None:
        write_json(Path(out), redacted(finite(document)))
    if as_json:
        print_json(document)
    else:
        from finetune.report.terminal import show_verdicts

        show_verdicts(result, marks)
    if why:
        not_stored(found, "what was verified", why, f"finetune verify {found.path} --out FILE")
    return 0 if result["passed"] else 1


def _bundle(directory: Path, as_json: bool) -> int:
    from finetune.export.bundle import verify_manifest

    faults = verify_manifest(directory)
    if as_json:
        print_json({"bundle": str(directory.resolve()), "passed": not faults, "faults": faults})
    else:
        echo("\n".join(faults) or f"{directory}: every file is as it was put out")
    return 1 if faults else 0
