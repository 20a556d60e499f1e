"""Did alignment take the pairs of the data, start from an honest reference, and move towards the chosen answers?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

from finetune import evidence
from finetune.checks import Verdict, finite, judge, missing, worst
from finetune.checks.artifacts import DRIFT
from finetune.checks.loss import window
from finetune.checks.rows import first_pass, rendering, tokens_of_steps
from finetune.data import checks, formats, sources
from finetune.errors import FinetuneError, first_line
from finetune.recipe import Recipe
from finetune.recipe.sections import Align
from finetune.run import Run

Gain = dict[str, float]
Tokens = dict[str, int]

EVENTS = "events.jsonl"
PREPARED = "prepare/preferences.jsonl"
PAIRS = "evaluate/preferences.jsonl"
ACCOUNT = "align/rewards.json"


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    assert recipe.align is not None
    return [*_prepared(recipe, run), *_logged(recipe.align, run), *_scored(recipe, run)]


def _prepared(recipe: Recipe, run: Run) -> list[Verdict]:
    """The pairs that alignment was given, against the data read and rendered again."""
    pairs = evidence.read_rows(run, PREPARED, "prepare") if (run.path / PREPARED).is_file() else []
    if not pairs:
        return [missing("pairs_are_data", "==", 1.0, "share", PREPARED, "there is no prepared pair")]
    steps = evidence.steps(run, "align")
    different = [pair for pair in pairs if pair["chosen_ids"] != pair["rejected_ids"]]
    lengths = {pair["row"]: len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in pairs}
    return [
        _as_in_the_data(recipe, run, pairs),
        judge(
            "pairs_differ", len(different) / len(pairs), "==", 1.0, "share", PREPARED,
            f"{len(different)} of {len(pairs)} pairs have two answers; one answer twice teaches nothing",
        ),
        first_pass("pairs_trained", run, "align", pairs, steps),
        tokens_of_steps("pair_tokens", lengths, steps),
    ]  # fmt: skip


def _as_in_the_data(recipe: Recipe, run: Run, pairs: list[dict[str, Any]]) -> Verdict:
    assert recipe.align is not None
    name, data = "pairs_are_data", recipe.align.pairs
    try:
        tokenizer, template = rendering(recipe, run)
        wanted, _ = checks.preferences(
            formats.to_examples(sources.read(data), data), data, tokenizer=tokenizer, template=template,
            system=recipe.template.system, max_length=recipe.align.max_length,
        )  # fmt: skip
    except FinetuneError as error:
        return missing(name, "==", 1.0, "share", PREPARED, f"the data cannot be read again: {first_line(error)}")
    same = [pair for pair, there in zip(wanted, pairs, strict=False) if pair == there]
    off = next((pair for pair, there in zip(wanted, [*pairs, *wanted], strict=False) if pair != there), wanted[-1])
    why = f"{len(same)} of {len(wanted)} pairs of the data are prepared as they stand there"
    if len(same) < len(wanted):
        why += f"; the first that is not: {off['file']}:{off['line']}"
    return judge(name, len(same) / max(len(wanted), len(pairs)), "==", 1.0, "share", PREPARED, why)


def _logged(align: Align, run: Run) -> list[Verdict]:
    steps = evidence.steps(run, "align")
    if not steps:
        return [missing("dpo_start", "<=", 1e-3, "nats", EVENTS, "alignment logged no step")]
    start = LOSSES[align.loss_type](align, {"chosen": 0.0, "rejected": 0.0}, {"chosen": 1, "rejected": 1})
    verdicts = [
        judge(
            "dpo_start", abs(steps[0]["loss"] - start), "<=", 1e-3, "nats", EVENTS,
            f"the first loss {steps[0]['loss']:.4f} must be {start:.4f}: policy and reference are the same model then",
        )
    ]  # fmt: skip
    margins = [step.get("rewards/margins") for step in steps]
    logged = [margin for margin in margins if isinstance(margin, int | float)]
    size = window(len(logged))
    growth = finite(evidence.mean(logged[-size:]) - logged[0]) if len(logged) > 1 else None
    verdicts.append(
        judge("dpo_margin_grows", growth, ">", 0.0, "reward", EVENTS, "margin of the last steps less that of the first")
    )
    return verdicts


def _scored(recipe: Recipe, run: Run) -> list[Verdict]:
    """Pairs scored afresh with the aligned model and with the one before alignment."""
    assert recipe.align is not None
    bound = recipe.expect.preference_accuracy_min
    path = run.path / PAIRS
    pairs = evidence.read_rows(run, PAIRS, "evaluate") if path.is_file() else []
    if not pairs or "aligned" not in pairs[0]["phases"]:
        return [missing("dpo_prefers_chosen", ">=", bound, "share", PAIRS, "the pairs were not scored after alignment")]
    reference = "trained" if "trained" in pairs[0]["phases"] else "base"
    if reference not in pairs[0]["phases"]:
        return [
            missing("dpo_prefers_chosen", ">=", bound, "share", PAIRS, "the pairs were not scored before alignment")
        ]
    gains = {pair["row"]: _gain(pair["phases"]["aligned"], pair["phases"][reference]) for pair in pairs}
    margins = [recipe.align.beta * (gain["chosen"] - gain["rejected"]) for gain in gains.values()]
    won = sum(finite(margin) > 0 for margin in margins) / len(margins)
    return [
        judge(
            "dpo_prefers_chosen", won, ">=", bound, "share", PAIRS,
            f"pairs, of {len(pairs)}, whose chosen answer gained on the rejected one, scored afresh from disk",
        ),
        judge(
            "dpo_margin", finite(evidence.mean(margins)), ">", 0.0, "reward", PAIRS,
            "mean reward margin over the pairs, scored afresh from disk",
        ),
        *_account(recipe, run, gains),
    ]  # fmt: skip


def _gain(after: dict[str, float], before: dict[str, float]) -> Gain:
    return {key: after[key] - before[key] for key in ("chosen", "rejected")}


def _account(recipe: Recipe, run: Run, gains: dict[int, Gain]) -> list[Verdict]:
    """The trainer's own account of the aligned model, against the definition of DPO and scores taken afresh.

    What may differ is rounding: so many nats a token, times the recipe's beta. Nothing to say where no checkpoint of
    the last step was asked for.
    """
    align, bound, unit = recipe.align, DRIFT[recipe.model.dtype], "nats a token"
    assert align is not None
    names = ("dpo_rewards_confirmed", "dpo_loss_confirmed")
    if align.save_strategy == "no":
        return []
    if not (run.path / ACCOUNT).is_file() or not (run.path / PREPARED).is_file():
        why = "the trainer did not say what it makes of the aligned model, or of which pairs"
        return [missing(name, "<=", bound, unit, ACCOUNT, why) for name in names]
    said = evidence.read_json(run, ACCOUNT, "align")
    lengths = {
        pair["row"]: {key: len(pair[f"{key}_ids"]) for key in ("chosen", "rejected")}
        for pair in evidence.read_rows(run, PREPARED, "prepare")
    }
    rows = said["rows"]
    if not rows or not set(rows) <= set(gains) & set(lengths) or said["chosen"] is None or said["rejected"] is None:
        why = "the pairs or the rewards that the trainer spoke of are unknown"
        return [missing(name, "<=", bound, unit, ACCOUNT, why) for name in names]
    tokens = {key: statistics.fmean(lengths[row][key] for row in rows) for key in ("chosen", "rejected")}
    rewards = {key: align.beta * evidence.mean([gains[row][key] for row in rows]) for key in tokens}
    loss = evidence.mean([LOSSES[align.loss_type](align, gains[row], lengths[row]) for row in rows])
    off = worst(abs(said[key] - rewards[key]) / (align.beta * tokens[key]) for key in tokens)
    both = ", ".join(f"{key} {said[key]:.4f} against {rewards[key]:.4f}" for key in tokens)
    return [
        judge(
            names[0], off, "<=", bound, unit, ACCOUNT,
            f"rewards of {len(rows)} pairs: the trainer's against beta {align.beta} times what they gained, scored afresh: "
            f"{both}",
        ),
        judge(
            names[1], abs(said["loss"] - loss) / (align.beta * sum(tokens.values())), "<=", bound, unit, ACCOUNT,
            f"loss of {len(rows)} pairs: the trainer's {said['loss']:.6f} against {loss:.6f}, the {align.loss_type} loss "
            "of the same pairs scored afresh",
        ),
    ]  # fmt: skip


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
