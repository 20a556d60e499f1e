"""Did alignment take the pairs of the data, start from an honest reference, and move towards the chosen answers?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable

from finetune.checks import Part, Verdict, finite, judge, missing, worst
from finetune.checks.artifacts import DRIFT
from finetune.checks.asked import phases
from finetune.checks.loss import window
from finetune.checks.rows import first_pass, rendering, tokens_of_steps
from finetune.core.arithmetic import mean
from finetune.core.errors import StageError
from finetune.data import checks, formats, sources
from finetune.recipe import Recipe
from finetune.recipe.sections import Align
from finetune.run import Run, evidence, layout
from finetune.run.records.evaluated import PairScore
from finetune.run.records.trained import Account, Pair

Gain = dict[str, float]
Tokens = dict[str, int]

EVENTS, PREPARED, PAIRS, ACCOUNT = (
    row.path for row in (layout.EVENTS, layout.PAIRS, layout.SCORED_PAIRS, layout.REWARDS)
)
CONFIRMED = ("dpo_rewards_confirmed", "dpo_loss_confirmed")


def _section(recipe: Recipe) -> Align:
    assert recipe.align is not None
    return recipe.align


def _pairs(run: Run) -> list[Pair]:
    """The pairs that alignment was given. Raises StageError without any."""
    pairs = evidence.rows(run, layout.PAIRS)
    if not pairs:
        raise StageError("there is no prepared pair")
    return pairs


def _steps(run: Run) -> list[evidence.Step]:
    steps = evidence.steps(run, "align")
    if not steps:
        raise StageError("alignment logged no step")
    return steps


# -- prepared and trained ----------------------------------------------------------------------------------------------


def _as_in_the_data(recipe: Recipe, run: Run) -> list[Verdict]:
    """The pairs that alignment was given, against the data read and rendered again."""
    align, pairs = _section(recipe), _pairs(run)
    tokenizer, template = rendering(recipe, run)
    wanted, _ = checks.preferences(
        formats.to_examples(sources.read(align.pairs), align.pairs), align.pairs, tokenizer=tokenizer, template=template,
        system=recipe.template.system, max_length=align.max_length,
    )  # fmt: skip
    same = [pair for pair, there in zip(wanted, pairs, strict=False) if pair == there]
    off = next((pair for pair, there in zip(wanted, [*pairs, *wanted], strict=False) if pair != there), wanted[-1])
    why = f"{len(same)} of {len(wanted)} pairs of the data are prepared as they stand there"
    if len(same) < len(wanted):
        why += f"; the first that is not: {off['file']}:{off['line']}"
    share = len(same) / max(len(wanted), len(pairs))
    return [judge("pairs_are_data", share, "==", 1.0, "share", PREPARED, why)]


def _different(recipe: Recipe, run: Run) -> list[Verdict]:
    pairs = _pairs(run)
    different = [pair for pair in pairs if pair["chosen_ids"] != pair["rejected_ids"]]
    why = f"{len(different)} of {len(pairs)} pairs have two answers; one answer twice teaches nothing"
    return [judge("pairs_differ", len(different) / len(pairs), "==", 1.0, "share", PREPARED, why)]


def _taken(recipe: Recipe, run: Run) -> list[Verdict]:
    """The pairs of the steps, against those that were prepared."""
    pairs, steps = _pairs(run), _steps(run)
    lengths = {pair["row"]: len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs}
    return [
        first_pass("pairs_trained", run, "align", pairs, steps),
        tokens_of_steps("pair_tokens", lengths, steps),
    ]


# -- logged ------------------------------------------------------------------------------------------------------------


def _logged(recipe: Recipe, run: Run) -> list[Verdict]:
    align, steps = _section(recipe), _steps(run)
    start = LOSSES[align.loss_type](align, {"chosen": 0.0, "rejected": 0.0}, {"chosen": 1, "rejected": 1})
    why = f"the first loss {steps[0]['loss']:.4f} must be {start:.4f}: policy and reference are the same model then"
    logged = [step["rewards/margins"] for step in steps if "rewards/margins" in step]
    size = window(len(logged))
    growth = finite(mean(logged[-size:]) - logged[0]) if len(logged) > 1 else None
    return [
        judge("dpo_start", abs(steps[0]["loss"] - start), "<=", 1e-3, "nats", EVENTS, why),
        judge(
            "dpo_margin_grows", growth, ">", 0.0, "reward", EVENTS, "margin of the last steps less that of the first"
        ),
    ]


# -- scored ------------------------------------------------------------------------------------------------------------


def _gains(recipe: Recipe, run: Run) -> dict[int, Gain]:
    """By pair, what its answers gained in alignment (nats). Raises StageError where a pair was not scored on both sides."""
    after, before = phases(recipe)[-1], phases(recipe)[-2]
    gains = {}
    for pair in evidence.rows(run, layout.SCORED_PAIRS):
        for phase, when in ((after, "after"), (before, "before")):
            if phase not in pair["phases"]:
                raise StageError(f"the pairs were not scored {when} alignment")
        gains[pair["row"]] = _gain(pair["phases"][after], pair["phases"][before])
    if not gains:
        raise StageError("the pairs were not scored")
    return gains


def _gain(after: PairScore, before: PairScore) -> Gain:
    return {"chosen": after["chosen"] - before["chosen"], "rejected": after["rejected"] - before["rejected"]}


def _scored(recipe: Recipe, run: Run) -> list[Verdict]:
    """Pairs scored afresh with the aligned model and with the one before alignment."""
    align, gains = _section(recipe), _gains(recipe, run)
    margins = [align.beta * (gain["chosen"] - gain["rejected"]) for gain in gains.values()]
    won = sum(finite(margin) > 0 for margin in margins) / len(margins)
    return [
        judge(
            "dpo_prefers_chosen", won, ">=", recipe.expect.preference_accuracy_min, "share", PAIRS,
            f"pairs, of {len(gains)}, whose chosen answer gained on the rejected one, scored afresh from disk",
        ),
        judge(
            "dpo_margin", finite(mean(margins)), ">", 0.0, "reward", PAIRS,
            "mean reward margin over the pairs, scored afresh from disk",
        ),
    ]  # fmt: skip


def _all_scored(recipe: Recipe, run: Run) -> list[Verdict]:
    prepared, scored = (
        [pair["row"] for pair in rows] for rows in (_pairs(run), evidence.rows(run, layout.SCORED_PAIRS))
    )
    same = sum(one == other for one, other in zip(prepared, scored, strict=False))
    why = f"{same} of {len(prepared)} pairs were scored, each once, and {len(scored)} in all"
    share = same / max(len(prepared), len(scored))
    return [judge("every_pair_scored", share, "==", 1.0, "share", PAIRS, why)]


def _account(recipe: Recipe, run: Run) -> list[Verdict]:
    """The trainer's own account of the aligned model, against the definition of DPO and scores taken afresh.

    What may differ is rounding: so many nats a token, times the recipe's beta.
    """
    align, bound, unit = _section(recipe), DRIFT[recipe.model.dtype], "nats a token"
    said, gains, pairs = evidence.read(run, layout.REWARDS), _gains(recipe, run), _pairs(run)
    lengths = {
        pair["row"]: {"chosen": len(pair["chosen_ids"]), "rejected": len(pair["rejected_ids"])} for pair in pairs
    }
    rows, claimed = said["rows"], _rewards(said)
    if why := _unknown(said, set(gains) & set(lengths), _steps(run)[-1]["step"]):
        return [missing(name, "<=", bound, unit, ACCOUNT, why) for name in CONFIRMED]
    tokens = {key: statistics.fmean(lengths[row][key] for row in rows) for key in ("chosen", "rejected")}
    rewards = {key: align.beta * mean([gains[row][key] for row in rows]) for key in tokens}
    loss = mean([LOSSES[align.loss_type](align, gains[row], lengths[row]) for row in rows])
    off = worst(abs(claimed[key] - rewards[key]) / (align.beta * tokens[key]) for key in tokens)
    both = ", ".join(f"{key} {claimed[key]:.4f} against {rewards[key]:.4f}" for key in tokens)
    return [
        judge(
            CONFIRMED[0], off, "<=", bound, unit, ACCOUNT,
            f"rewards of {len(rows)} pairs: the trainer's against beta {align.beta} times what they gained, scored afresh: "
            f"{both}",
        ),
        judge(
            CONFIRMED[1], abs(said["loss"] - loss) / (align.beta * sum(tokens.values())), "<=", bound, unit, ACCOUNT,
            f"loss of {len(rows)} pairs: the trainer's {said['loss']:.6f} against {loss:.6f}, the {align.loss_type} loss "
            "of the same pairs scored afresh",
        ),
    ]  # fmt: skip


def _rewards(said: Account) -> Gain:
    values = {"chosen": said["chosen"], "rejected": said["rejected"]}
    return {key: value for key, value in values.items() if value is not None}


def _unknown(said: Account, known: set[int], last: int) -> str:
    """Why the trainer's account is of no use; empty where it is."""
    if not said["rows"] or not set(said["rows"]) <= known or len(_rewards(said)) < 2:
        return "the pairs or the rewards that the trainer spoke of are unknown"
    if said["step"] != last + 1:
        return f"the trainer spoke of step {said['step']}, and the one after the last is step {last + 1}"
    return ""


# -- the losses --------------------------------------------------------------------------------------------------------


def _softplus(value: float) -> float:
    """log(1 + exp(value)), for any value."""
    return max(0.0, value) + math.log1p(math.exp(-abs(value)))


def _margin(align: Align, gain: Gain) -> float:
    return align.beta * (gain["chosen"] - gain["rejected"])


def _robust(align: Align, gain: Gain, tokens: Tokens) -> float:
    margin, noise = _margin(align, gain), align.label_smoothing
    return ((1 - noise) * _softplus(-margin) - noise * _softplus(margin)) / (1 - 2 * noise)


def _ipo(align: Align, gain: Gain, tokens: Tokens) -> float:
    """https://arxiv.org/abs/2310.12036, equation 17; gains are a token's, as TRL has it."""
    apart = gain["chosen"] / max(1, tokens["chosen"]) - gain["rejected"] / max(1, tokens["rejected"])
    off = apart - 1 / (2 * align.beta)
    return off * off


# The loss of one pair: gains are log-probabilities after less before (nats), tokens the answers' lengths.
LOSSES: dict[str, Callable[[Align, Gain, Tokens], float]] = {
    "sigmoid": lambda align, gain, tokens: _softplus(-_margin(align, gain)),
    "hinge": lambda align, gain, tokens: worst((0.0, 1 - _margin(align, gain))),
    "robust": _robust,
    "ipo": _ipo,
}


def _owes_account(recipe: Recipe) -> Iterable[str]:
    """Where no checkpoint of the last step was asked for, the trainer cannot be asked after it."""
    return () if _section(recipe).save_strategy == "no" else CONFIRMED


def _owes(*names: str) -> Callable[[Recipe], Iterable[str]]:
    return lambda recipe: names


PARTS: tuple[Part, ...] = (
    Part(check=_as_in_the_data, owes=_owes("pairs_are_data"), evidence=PREPARED),
    Part(check=_different, owes=_owes("pairs_differ"), evidence=PREPARED),
    Part(check=_taken, owes=_owes("pairs_trained", "pair_tokens"), evidence=EVENTS),
    Part(check=_logged, owes=_owes("dpo_start", "dpo_margin_grows"), evidence=EVENTS),
    Part(check=_all_scored, owes=_owes("every_pair_scored"), evidence=PAIRS),
    Part(check=_scored, owes=_owes("dpo_prefers_chosen", "dpo_margin"), evidence=PAIRS),
    Part(check=_account, owes=_owes_account, evidence=ACCOUNT),
)
