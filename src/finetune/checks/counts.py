"""Whether there is as much of everything as the recipe asks for, and as the reports say."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from finetune.checks import Verdict
from finetune.checks.asked import phases
from finetune.checks.parts import SFT, single
from finetune.checks.reports import Numbers
from finetune.checks.rows import labelled
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.whole import CountMetrics

MEASURED = (layout.FRESH, layout.MEMORY, layout.RESUME, layout.INVARIANCE, layout.SERVING)


def _rows_scored(recipe: Recipe, run: Run) -> Verdict:
    """As many training rows as asked were scored, the same in every phase, and of those that were prepared.

    At least those of the first step are; where none was logged, which other verdicts say, as many as the recipe asks for.
    """
    scores, numbers = evidence.read(run, layout.ROW_SCORES), Numbers()
    prepared = {str(row["row"]): row for row in evidence.rows(run, layout.TRAIN_ROWS)}
    first = [len(step["rows"]) for step in evidence.steps(run, SFT.stage)[:1]]
    numbers.same("the phases", list(scores), phases(recipe))
    count = min(len(prepared), max(recipe.evaluate.score_rows, *first, 0))
    for phase, scored in scores.items():
        numbers.same(f"rows scored in '{phase}'", len(scored), count)
        numbers.same(f"rows scored in '{phase}' that were not prepared", sorted(scored.keys() - prepared.keys()), [])
        for name in scored.keys() & prepared.keys():
            tokens = (labelled(prepared[name]), len(prepared[name]["input_ids"]) - 1)
            told = (scored[name]["answer"][1], scored[name]["all"][1])
            numbers.within(f"tokens of row {name} in '{phase}'", told, tokens, told == tokens)
    return numbers.verdict("rows_scored", layout.ROW_SCORES.path, f"{count} rows in {len(scores)} phases, as prepared")


def _counts(recipe: Recipe, run: Run) -> Verdict:
    """What the reports say that there is, against the files: experiments, exports and their bytes, comparisons."""
    numbers = Numbers()
    done = [Path(file.path).stem for file in MEASURED if evidence.there(run, file)]
    numbers.same("experiments", sorted(_metrics(run, "measure").get("experiments", [])), sorted(done))
    if recipe.export:
        exports = evidence.read(run, layout.EXPORTS)
        numbers.same("exports", _metrics(run, "export").get("exports"), len(exports))
        numbers.same("bytes of exports", _metrics(run, "export").get("bytes"), sum(each["bytes"] for each in exports))
        names = [each["name"] for each in exports]
        tried = evidence.read(run, layout.REHEARSED)
        numbers.same("exports tried before", _metrics(run, "rehearse").get("exports"), len(tried))
        numbers.same(
            "exports tried",
            sorted(each["name"] for each in tried if each["ok"]),
            sorted(names),
        )
        hops = [name for name in ("merged", *names) if evidence.there(run, layout.comparison(name))]
        numbers.same("hops", _metrics(run, "compare").get("hops"), len(hops))
    return numbers.verdict("counts_as_reported", layout.REPORTS["measure"].path, "experiments, exports and comparisons")


def _metrics(run: Run, stage: str) -> CountMetrics:
    return cast(CountMetrics, evidence.read(run, layout.REPORTS[stage])["metrics"])


PARTS = (
    single("rows_scored", _rows_scored, layout.ROW_SCORES.path),
    single("counts_as_reported", _counts, layout.REPORTS["measure"].path, lambda recipe: True),
)
