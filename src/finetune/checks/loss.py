"""Did the loss fall, far enough, from where it should have started, and is it the loss that was claimed?"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import evidence
from finetune.checks import Verdict, finite, judge, missing
from finetune.recipe import Recipe
from finetune.run import Run

EVENTS = "events.jsonl"
ROWS = "evaluate/rows.json"
# Times ln(vocabulary): a guess over all words costs 1.0, and a base that is sure of wrong answers more, at most 1.06 in 47
# honest runs (docs/detection.md); half as much again.
FIRST_CEILING = 1.6
DROPOUT_FACTOR = 4.0  # dropout makes the logged loss noisy; the independent score runs without it
NO_LOSS = 1e100  # nats: NaN, infinity, and what float32 cannot hold; its square is beyond a float
PACKED_TOLERANCE = 0.5  # packing hides which rows a step held, so the first step stands against the mean of all rows


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    steps = evidence.steps(run, "train")
    losses = [step["loss"] for step in steps]
    if len(losses) < 4:
        return [missing("loss_convergence", ">=", 4, "steps", EVENTS, f"{len(losses)} logged steps, 4 are needed")]
    report = run.report("prepare")
    metrics = report.metrics if report else {}
    verdicts = [_finite(losses), *_finite_gradients(steps)]
    if not _weighted(recipe):
        verdicts += _fall(recipe, losses)
    uniform = metrics.get("uniform_entropy")
    verdicts.append(
        judge(
            "loss_start", losses[0] / uniform if uniform else None, "<=", FIRST_CEILING, "of ln(vocabulary)", EVENTS,
            f"the first loss {losses[0]:.3f} must not be far above a guess over the whole vocabulary; a broken mask also falls",
        )
    )  # fmt: skip
    if recipe.expect.loss_below_unigram:
        unigram = metrics.get("unigram_entropy")
        end, place, what = _end(recipe, run, losses)
        why = f"{what} must beat a model that only knows how often each answer token occurs"
        verdicts.append(
            judge("loss_end", end, "<", unigram, "nats", place, why)
            if unigram is not None
            else missing("loss_end", "<", math.inf, "nats", "prepare/report.json", "no entropy of the answers recorded")
        )
    return verdicts + _scored_again(recipe, run, steps)


def window(count: int) -> int:
    """How many steps a window holds: a quarter of all, at most 20, and 2 at least, since one step shows no scatter."""
    return max(2, min(20, count // 4))


def fall(losses: Sequence[float]) -> tuple[float, float]:
    """(relative fall of the window mean from first to last, the fall in standard errors of the two means).

    The second is what tells learning from noise: windows of n steps, error sqrt(var1/n + var2/n).
    """
    size = window(len(losses))
    first, last = losses[:size], losses[-size:]
    if not all(abs(loss) < NO_LOSS for loss in (*first, *last)):
        return math.nan, math.nan
    before, after = statistics.fmean(first), statistics.fmean(last)
    if not before > 0:
        return math.nan, math.nan
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / size)
    drop = before - after
    return drop / before, drop / error if error > 0 else math.copysign(math.inf, drop) if drop else 0.0


def _finite(losses: list[float]) -> Verdict:
    bad = [number for number, loss in enumerate(losses, 1) if not math.isfinite(loss)]
    why = f"{len(losses)} logged losses" + (f"; the first bad one is number {bad[0]}" if bad else "")
    return judge("loss_finite", len(bad), "==", 0, "NaN or infinite", EVENTS, why)


def _finite_gradients(steps: list[dict[str, Any]]) -> list[Verdict]:
    """A step whose gradient is NaN is skipped or ruins the weights, whatever loss is shown. None told, nothing to say."""
    norms = [(step["step"], step["grad_norm"]) for step in steps if step["grad_norm"] is not None]
    if not norms:
        return []
    bad = [number for number, norm in norms if math.isnan(norm)]
    why = f"{len(norms)} norms of gradients" + (f"; the first that is NaN is that of step {bad[0]}" if bad else "")
    return [judge("gradients_finite", len(bad), "==", 0, "NaN", EVENTS, why)]


def _fall(recipe: Recipe, losses: list[float]) -> list[Verdict]:
    reduction, sigmas = fall(losses)
    size = window(len(losses))
    return [
        judge(
            "loss_convergence", reduction, ">", recipe.expect.loss_reduction_min, "relative fall", EVENTS,
            f"mean of the first {size} steps against the last {size}",
        ),
        judge(
            "loss_beyond_noise", sigmas, ">", 2.0, "standard errors", EVENTS,
            "the fall must be more than the scatter between steps explains",
        ),
    ]  # fmt: skip


def _weighted(recipe: Recipe) -> bool:
    """Whether the logged loss weighs tokens by their own probability: it may rise while the model learns."""
    return recipe.train is not None and recipe.train.loss_type == "dft"


def _plain(recipe: Recipe) -> bool:
    """Whether the logged loss is the mean negative log-likelihood of a model that starts as the base."""
    train = recipe.train
    return (
        train is not None
        and train.loss_type == "nll"
        and not train.label_smoothing_factor
        and not train.neftune_noise_alpha
        and (train.method == "full" or train.lora.init_lora_weights is not False)
    )


def _end(recipe: Recipe, run: Run, losses: list[float]) -> tuple[float | None, str, str]:
    """Where the loss ended, in nats of the answers' likelihood: as logged, or else as scored again; from where; what."""
    if _plain(recipe):
        return statistics.fmean(losses[-window(len(losses)) :]), EVENTS, "the last window"
    scores = evidence.row_scores(run)
    end = nll(scores[1], list(scores[0]), "answer") if scores else None
    return end, ROWS, "the rows scored again after training (what was logged is another loss)"


def _scored_again(recipe: Recipe, run: Run, steps: list[dict[str, Any]]) -> list[Verdict]:
    names = ("loss_is_of_answers", "loss_confirmed")
    scores = evidence.row_scores(run)
    if scores is None:
        return [missing(name, "<=", 0, "", ROWS, "the rows were not scored again (stage evaluate)") for name in names]
    base, trained = scores
    rows = [str(row) for row in steps[0]["rows"] if str(row) in base]
    known = bool(rows) and len(rows) == len(steps[0]["rows"])
    chosen = rows if known else list(base)
    logged, answers, everything = steps[0]["loss"], nll(base, chosen, "answer"), nll(base, chosen, "all")
    tolerance, because = recipe.expect.loss_first_tolerance, ""
    if not known:
        tolerance, because = max(tolerance, PACKED_TOLERANCE), " (rows of the step unknown: all rows)"
    elif _has_dropout(run):
        tolerance, because = tolerance * DROPOUT_FACTOR, " (the model trains with dropout)"
    distance = abs(logged - answers) / answers if answers else None
    before, after = nll(base, list(base), "answer"), nll(trained, list(base), "answer")
    verdicts = [
        judge(
            names[0], distance, "<=", tolerance, "relative distance", ROWS,
            f"first logged loss {logged:.4f}; the same rows scored independently: {answers:.4f} on the answers, "
            f"{everything:.4f} on everything{because}",
        ),
        judge(
            names[1], finite(1 - after / finite(before)) if before else None, ">", recipe.expect.loss_reduction_min,
            "relative fall", ROWS, f"training rows scored afresh from disk: {before:.4f} before, {after:.4f} after",
        ),
    ]  # fmt: skip
    return verdicts if _plain(recipe) else verdicts[1:]


def nll(scores: dict[str, Any], rows: Sequence[str], part: str) -> float:
    """Mean negative log-likelihood over the tokens of some rows; `part` is `answer` or `all`."""
    total = sum(scores[row][part][0] for row in rows)
    count = sum(scores[row][part][1] for row in rows)
    return -total / count if count else math.nan


def _has_dropout(run: Run) -> bool:
    config = Path(evidence.fetched(run)["base"]) / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    return any(isinstance(v, float) and v > 0 for k, v in values.items() if "drop" in k)
