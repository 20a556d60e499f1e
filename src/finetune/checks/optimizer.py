"""Did every step have the learning rate, the optimizer and the clipping that the recipe asks for, and move the weights?"""

from __future__ import annotations

import json
from bisect import bisect_left
from typing import Any

from finetune import evidence
from finetune.checks import Verdict, judge, missing, worst
from finetune.recipe import Recipe
from finetune.recipe.sections import Optimization
from finetune.run import Run
from finetune.schedule import learning_rate

EVENTS = "events.jsonl"
RATE = 1e-6  # of the recipe's rate: the same schedule computed twice differs by the rounding of doubles, at 1e-15
STEP = 0.2  # from Adam's first step, which moves every weight by the learning rate, whatever its gradient
CLIPPED = 0.02  # of max_grad_norm beyond it: bfloat16 rounds the norm, the factor and what it scales, by 0.4 % each
ADAM = ("adamw_torch", "adamw_torch_fused")  # others keep their moments more coarsely
LARGEST_DECAY = 0.01  # above, a large weight's decay adds visibly to its step
OF_NO_WHOLE = ("layerwise", "lomo")  # optimizers that have no parameters of their own to count
SMALLEST_RATE = 1e-6  # below, a weight near 1 in single precision rounds the step itself
LARGEST_EPSILON = 1e-7  # above, it holds small gradients back
DRIFT = 1e-6  # relative, of a setting stored as a double


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    verdicts = []
    for stage, section, prefix in (("train", recipe.train, ""), ("align", recipe.align, "dpo_")):
        if section is not None:
            verdicts += _stage(section, run, stage, prefix)
    return verdicts


def _stage(asked: Optimization, run: Run, stage: str, prefix: str) -> list[Verdict]:
    report, place = run.report(stage), f"{stage}/report.json"
    steps = evidence.steps(run, stage)
    if report is None or not steps:
        return [missing(f"{prefix}steps_move_weights", "==", 0, "steps without effect", place, "no step was logged")]
    facts = report.metrics
    taken = facts.get("steps_watched", facts["steps"] - (facts.get("resumed_from") or 0))
    why = f"a sample of every trained tensor was compared before and after each of {taken} steps"
    return [
        _one_training(facts, place, prefix),
        *_rates(asked, facts, steps, prefix),
        *_settings(asked, facts, run, stage, prefix),
        judge(
            f"{prefix}steps_move_weights",
            facts.get("steps_without_effect"),
            "==",
            0,
            "steps without effect",
            place,
            why,
        ),
        *_size(asked, facts, steps, place, prefix),
        *_clipped(asked, facts, place, prefix),
    ]


def _one_training(facts: dict[str, Any], place: str, prefix: str) -> Verdict:
    """Whether all steps are of the training that the recipe asks for, wherever it was resumed."""
    name, unit = f"{prefix}one_training", "changes on the way"
    resumed, unexamined = facts.get("resumed_from"), facts.get("unexamined", ())
    if unexamined or (resumed and "changed" not in facts):
        step = unexamined[0] if unexamined else resumed
        why = f"it went on from a checkpoint of an earlier version at step {step}, which does not say what it is of"
        return missing(name, "==", 0, unit, place, why)
    changed = facts.get("changed", ())
    why = f"it went on from step {resumed}" if resumed else "it was trained from the first step to the last at once"
    why += "; " + "; ".join(changed) if changed else ", and nothing was another then" if resumed else ""
    return judge(name, len(changed), "==", 0, unit, place, why)


def _rates(asked: Optimization, facts: dict[str, Any], steps: list[dict[str, Any]], prefix: str) -> list[Verdict]:
    """The learning rate of every logged step, against the recipe's schedule. Where steps are skipped, it lags behind."""
    if asked.fp16:
        return []
    total = facts["planned_steps"] if getattr(asked, "early_stopping_patience", None) is not None else facts["steps"]
    peak = asked.learning_rate
    begins, totals = [begin for begin, _ in facts.get("plans") or [(0, total)]], _totals(facts, total)
    wanted = {
        number: learning_rate(
            asked.lr_scheduler_type, peak, asked.warmup_steps, number, totals[max(0, bisect_left(begins, number) - 1)]
        )
        for number in (step["step"] for step in steps)
    }
    off = {step["step"]: abs(step["learning_rate"] - wanted[step["step"]]) / (peak or 1.0) for step in steps}
    first = next((step for step in steps if not off[step["step"]] <= RATE), None)
    planned = ", then ".join(map(str, totals))
    why = f"{len(steps)} logged steps against the recipe's schedule ({asked.lr_scheduler_type}, {peak:g}, {planned} steps)"
    if first:
        why += f"; step {first['step']} had {first['learning_rate']:.3g} instead of {wanted[first['step']]:.3g}"
    return [
        judge(f"{prefix}learning_rate_as_asked", worst(off.values()), "<=", RATE, "of the recipe's rate", EVENTS, why)
    ]


def _totals(facts: dict[str, Any], total: int) -> list[int]:
    """The steps planned in each part of a training that was resumed to go on for longer; the last part's is `total`."""
    return [*(planned for _, planned in (facts.get("plans") or [(0, total)])[:-1]), total]


def _settings(asked: Optimization, facts: dict[str, Any], run: Run, stage: str, prefix: str) -> list[Verdict]:
    """What the optimizer was set to when training ended, and the adapter's dropout while it was trained."""
    wanted = {key: getattr(asked, key) for key in ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")}
    wanted["optimized_parameters"] = facts["trainable_parameters"]
    if not asked.optim.startswith("adamw"):
        wanted = {key: value for key, value in wanted.items() if not key.startswith("adam_")}
    config = run.path / stage / "adapter" / "adapter_config.json"
    if stage == "train" and config.is_file():  # DPO runs without dropout
        wanted["lora_dropout"] = json.loads(config.read_text(encoding="utf-8")).get("lora_dropout")
    known = [key for key in wanted if key in facts]
    if not known or any(word in asked.optim for word in OF_NO_WHOLE):
        return []
    other = [key for key in known if not _same(facts[key], wanted[key])]
    why = ", ".join(f"{key} {facts[key]:g}" + (f" instead of {wanted[key]}" if key in other else "") for key in known)
    place = f"{stage}/report.json"
    return [judge(f"{prefix}settings_as_asked", len(other), "==", 0, "settings off", place, why)]


def _same(found: float, wanted: float | None) -> bool:
    return wanted is not None and abs(found - wanted) <= DRIFT * abs(wanted)


def _size(
    asked: Optimization, facts: dict[str, Any], steps: list[dict[str, Any]], place: str, prefix: str
) -> list[Verdict]:
    """Adam's first step moves a weight by the learning rate, whatever the gradient (https://arxiv.org/abs/1412.6980,
    section 2.1), so its size tells a step that is scaled, doubled or another optimizer's."""
    first = next((step["learning_rate"] for step in steps if step["learning_rate"] > 0), 0.0)
    single = facts["trainable_bytes"] == 4 * (facts["trainable_parameters"] or 0)
    plain = asked.optim in ADAM and asked.adam_epsilon <= LARGEST_EPSILON and asked.weight_decay <= LARGEST_DECAY
    if not (plain and single and first >= SMALLEST_RATE):
        return []
    if "first_move" not in facts:
        return _unseen(f"{prefix}step_size", STEP, "relative distance", facts, place)
    why = f"the first step moved weights by {facts['first_move']:.4g} times the learning rate at most; Adam's by 1"
    return [judge(f"{prefix}step_size", abs(facts["first_move"] - 1), "<=", STEP, "relative distance", place, why)]


def _unseen(name: str, bound: float, unit: str, facts: dict[str, Any], place: str) -> list[Verdict]:
    """What an Adam would have shown before it was resumed: not proven. Nothing to say of optimizers that show none."""
    if "adam_beta1" not in facts or not facts.get("resumed_from"):
        return []
    why = (
        f"the first steps were taken before the checkpoint of step {facts['resumed_from']}, which does not tell of them"
    )
    return [missing(name, "<=", bound, unit, place, why)]


def _clipped(asked: Optimization, facts: dict[str, Any], place: str, prefix: str) -> list[Verdict]:
    if not asked.max_grad_norm:
        return []
    if "clipped_norm" not in facts:
        return _unseen(f"{prefix}gradients_clipped", CLIPPED, "of max_grad_norm beyond it", facts, place)
    why = f"the largest norm of a gradient that the optimizer got in its first steps, of max_grad_norm {asked.max_grad_norm:g}"
    share = facts["clipped_norm"] / asked.max_grad_norm
    beyond = 0.0 if share <= 1 else share - 1  # NaN stays NaN
    return [judge(f"{prefix}gradients_clipped", beyond, "<=", CLIPPED, "of max_grad_norm beyond it", place, why)]
