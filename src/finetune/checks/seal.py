"""Whether everything that the run left is as it was written: the log, the reports, the recipe, every file of a stage."""

from __future__ import annotations

from finetune.checks import Part, Verdict, judge, not_examined
from finetune.recipe import Recipe
from finetune.run import Run, seal
from finetune.run.directory import MANIFEST

NAME = "sealed"


def _sealed(recipe: Recipe, run: Run) -> list[Verdict]:
    if not seal.is_sealed(run):
        why = (
            "this run was made by version 0.1, which sealed nothing; what its stages left is held against their reports"
        )
        remedy = "do the run anew: finetune run RECIPE --force"
        return [not_examined(NAME, "==", 0, "changes", MANIFEST, why, remedy)]
    found = seal.faults(run)
    why = "the log is a whole chain, and recipe, reports, verdicts and manifest are as they were written"
    if found:
        why = f"{found[0]}" + (f"; {len(found)} in all" if len(found) > 1 else "")
    return [judge(NAME, len(found), "==", 0, "changes", found[0].file if found else MANIFEST, why)]


PARTS = (Part(check=_sealed, owes=lambda recipe: [NAME], evidence=MANIFEST),)
