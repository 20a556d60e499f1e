"""Did the loss fall, far enough, from where it should have started, and is it the loss that was claimed?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from finetune.checks import Verdict, finite, judge, missing
from finetune.checks.parts import SFT, several, single, taken, trains, wholly_skipped
from finetune.core.arithmetic import mean
from finetune.core.errors import StageError
from finetune.core.files import read_object
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.evaluated import RowScore

EVENTS = layout.EVENTS.path
ROWS = layout.ROW_SCORES.path
Scores = Mapping[str, RowScore]
FELL = ("loss_convergence", "loss_beyond_noise")
LEAST = 4  # steps, of which two windows show a fall and a scatter
# Times ln(vocabulary): a guess over all words costs 1.0, and a base that is sure of wrong answers more, at most 1.06 in 47
# honest runs (docs/detection.md); half as much again.
FIRST_CEILING = 1.6
DROPOUT_FACTOR = 4.0  # dropout makes the logged loss noisy; the independent score runs without it
NO_LOSS = 1e100  # nats: NaN, infinity, and what float32 cannot hold; its square is beyond a float
PACKED_TOLERANCE = 0.5  # packing hides which rows a step held, so the first step stands against the mean of all rows


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


def _losses(run: Run) -> list[float]:
    """The losses of the steps that were taken; one that was skipped changed nothing."""
    return [step["loss"] for step in SFT.steps(run) if not wholly_skipped(step)]


def _finite(recipe: Recipe, run: Run) -> Verdict:
    steps = taken(SFT.asked(recipe), SFT.steps(run))
    bad = [step["step"] for step in steps if not math.isfinite(step["loss"])]
    why = f"{len(steps)} logged losses" + (f"; the first bad one is that of step {bad[0]}" if bad else "")
    return judge("loss_finite", len(bad), "==", 0, "NaN or infinite", EVENTS, why)


def _finite_gradients(recipe: Recipe, run: Run) -> Verdict:
    """A step whose gradient is NaN is skipped or ruins the weights, whatever loss is shown."""
    name, unit, steps = "gradients_finite", "NaN", taken(SFT.asked(recipe), SFT.steps(run))
    untold = [step["step"] for step in steps if step["grad_norm"] is None]
    if untold:
        return missing(name, "==", 0, unit, EVENTS, f"step {untold[0]} logged no norm of its gradient")
    bad = [step["step"] for step in steps if math.isnan(step["grad_norm"] or 0.0)]
    why = f"{len(steps)} norms of gradients" + (f"; the first that is NaN is that of step {bad[0]}" if bad else "")
    return judge(name, len(bad), "==", 0, unit, EVENTS, why)


def _fell(recipe: Recipe, run: Run) -> list[Verdict]:
    losses = _losses(run)
    if len(losses) < LEAST:
        why = f"{len(losses)} logged steps, {LEAST} are needed"
        return [missing(name, ">=", LEAST, "steps", EVENTS, why) for name in FELL]
    reduction, sigmas = fall(losses)
    size = window(len(losses))
    return [
        judge(
            FELL[0], reduction, ">", recipe.expect.loss_reduction_min, "relative fall", EVENTS,
            f"mean of the first {size} steps against the last {size}",
        ),
        judge(
            FELL[1], sigmas, ">", 2.0, "standard errors", EVENTS,
            "the fall must be more than the scatter between steps explains",
        ),
    ]  # fmt: skip


def _start(recipe: Recipe, run: Run) -> Verdict:
    first, uniform = _losses(run)[0], evidence.read(run, layout.PREPARED)["metrics"].get("uniform_entropy")
    return judge(
        "loss_start", finite(first) / uniform if uniform else None, "<=", FIRST_CEILING, "of ln(vocabulary)", EVENTS,
        f"the first loss {first:.3f} must not be far above a guess over the whole vocabulary; a broken mask also falls",
    )  # fmt: skip


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


def _end(recipe: Recipe, run: Run) -> Verdict:
    """Where the loss ended, in nats of the answers' likelihood: as logged, or else as scored again."""
    if _plain(recipe):
        losses = _losses(run)
        end, place, what = mean(losses[-window(len(losses)) :]), EVENTS, "the last window"
    else:
        base, trained = _scores(run)
        end, place = nll(trained, list(base), "answer"), ROWS
        what = "the rows scored again after training (what was logged is another loss)"
    unigram = evidence.read(run, layout.PREPARED)["metrics"].get("unigram_entropy")
    if unigram is None:
        return missing("loss_end", "<", math.inf, "nats", layout.PREPARED.path, "no entropy of the answers recorded")
    why = f"{what} must beat a model that only knows how often each answer token occurs"
    return judge("loss_end", finite(end), "<", unigram, "nats", place, why)


def _scores(run: Run) -> tuple[Scores, Scores]:
    scores = evidence.row_scores(run)
    if scores is None:
        raise StageError("the rows were not scored again (stage evaluate)")
    return scores


def _of_answers(recipe: Recipe, run: Run) -> Verdict:
    """The first logged loss, against the same rows scored independently."""
    (base, _), first = _scores(run), SFT.steps(run)[0]
    rows = [str(row) for row in first["rows"] if str(row) in base]
    known = bool(rows) and len(rows) == len(first["rows"])
    chosen = rows if known else list(base)
    logged, answers, everything = first["loss"], nll(base, chosen, "answer"), nll(base, chosen, "all")
    tolerance, because = recipe.expect.loss_first_tolerance, ""
    if not known:
        tolerance, because = max(tolerance, PACKED_TOLERANCE), " (rows of the step unknown: all rows)"
    elif _has_dropout(run):
        tolerance, because = tolerance * DROPOUT_FACTOR, " (the model trains with dropout)"
    distance = abs(logged - answers) / answers if answers else None
    return judge(
        "loss_is_of_answers", distance, "<=", tolerance, "relative distance", ROWS,
        f"first logged loss {logged:.4f}; the same rows scored independently: {answers:.4f} on the answers, "
        f"{everything:.4f} on everything{because}",
    )  # fmt: skip


def _confirmed(recipe: Recipe, run: Run) -> Verdict:
    base, trained = _scores(run)
    before, after = nll(base, list(base), "answer"), nll(trained, list(base), "answer")
    fell = finite(1 - after / finite(before)) if before else None
    return judge(
        "loss_confirmed", fell, ">", recipe.expect.loss_reduction_min,
        "relative fall", ROWS, f"training rows scored afresh from disk: {before:.4f} before, {after:.4f} after",
    )  # fmt: skip


def nll(scores: Scores, rows: Sequence[str], part: Literal["answer", "all"]) -> float:
    """Mean negative log-likelihood over the tokens of some rows; `part` is `answer` or `all`."""
    total = sum(scores[row][part][0] for row in rows)
    count = sum(scores[row][part][1] for row in rows)
    return -total / count if count else math.nan


def _has_dropout(run: Run) -> bool:
    config = read_object(Path(evidence.fetched(run)["base"]) / "config.json")
    return any(isinstance(v, float) and v > 0 for k, v in config.items() if "drop" in k)


PARTS = (
    single("loss_finite", _finite, EVENTS),
    single("gradients_finite", _finite_gradients, EVENTS),
    several(FELL, _fell, EVENTS, lambda recipe: trains(recipe) and not _weighted(recipe)),
    single("loss_start", _start, EVENTS),
    single("loss_end", _end, EVENTS, lambda recipe: trains(recipe) and recipe.expect.loss_below_unigram),
    single("loss_is_of_answers", _of_answers, ROWS, _plain),
    single("loss_confirmed", _confirmed, ROWS),
)
