"""Did every step have the learning rate, the optimizer and the clipping that the recipe asks for, and move the weights?"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.checks import Verdict, judge, missing, not_examined, worst
from finetune.checks.parts import Training, fake_of_0_1, is_lora, lora, of_trainings, tells
from finetune.core.files import read_object
from finetune.recipe import Recipe
from finetune.recipe.schedule import learning_rate
from finetune.recipe.sections import Optimization
from finetune.run import Run, evidence, layout
from finetune.run.records.trained import Step
from finetune.run.records.whole import TrainMetrics

EVENTS = layout.EVENTS.path
RATE = 1e-6  # of the recipe's rate: the same schedule computed twice differs by the rounding of doubles, at 1e-15
SKIPPED = (
    0.05  # of the steps; where more than one in twenty cannot be taken, what was trained is not what was asked for
)
STEP = 0.2  # from Adam's first step, which moves every weight by the learning rate, whatever its gradient
CLIPPED = 0.02  # of max_grad_norm beyond it: bfloat16 rounds the norm, the factor and what it scales, by 0.4 % each
ADAM = ("adamw_torch", "adamw_torch_fused")  # others keep their moments more coarsely
LARGEST_DECAY = 0.01  # above, a large weight's decay adds visibly to its step
OF_NO_WHOLE = ("layerwise", "lomo")  # optimizers that have no parameters of their own to count
SMALLEST_RATE = 1e-6  # below, a weight near 1 in single precision rounds the step itself
LARGEST_EPSILON = 1e-7  # above, it holds small gradients back
DRIFT = 1e-6  # relative, of a setting stored as a double
UNTOLD = "version 0.1 made it with a fake backend that did not tell", "train it anew: finetune run RECIPE --retrain"
UNINTERRUPTED = "train it in one go to have it examined: finetune {stage} RECIPE --force"


# -- one training ------------------------------------------------------------------------------------------------------


def _one_training(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """Whether all steps are of the training that the recipe asks for, wherever it was resumed."""
    name, unit, facts = f"{training.prefix}one_training", "changes on the way", training.facts(run)
    resumed, unexamined = facts["resumed_from"], facts.get("unexamined", [])
    if unexamined or (resumed and "changed" not in facts):
        step = unexamined[0] if unexamined else resumed
        why = f"it went on from a checkpoint of an earlier version at step {step}, which does not say what it is of"
        return not_examined(name, "==", 0, unit, training.report, why, UNINTERRUPTED.format(stage=training.stage))
    changed = facts.get("changed", [])
    why = f"it went on from step {resumed}" if resumed else "it was trained from the first step to the last at once"
    why += "; " + "; ".join(changed) if changed else ", and nothing was another then" if resumed else ""
    return judge(name, len(changed), "==", 0, unit, training.report, why)


# -- the learning rate -------------------------------------------------------------------------------------------------


def _rates(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """The learning rate of every logged step, against the recipe's schedule."""
    asked, facts, steps = training.asked(recipe), training.facts(run), training.steps(run)
    total = facts["planned_steps"] if getattr(asked, "early_stopping_patience", None) is not None else facts["steps"]
    peak = asked.learning_rate
    begins, totals = [begin for begin, _ in facts.get("plans") or [[0, total]]], _totals(facts, total)
    wanted = {
        number: learning_rate(
            asked.lr_scheduler_type, peak * _share(asked, facts, number), asked.warmup_steps, number,
            totals[max(0, bisect_left(begins, number) - 1)],
        )
        for number in (step["step"] for step in steps)
    }  # fmt: skip
    off = {step["step"]: abs(step["learning_rate"] - wanted[step["step"]]) / (peak or 1.0) for step in steps}
    first = next((step for step in steps if not off[step["step"]] <= RATE), None)
    planned = ", then ".join(map(str, totals))
    why = f"{len(steps)} logged steps against the recipe's schedule ({asked.lr_scheduler_type}, {peak:g}, {planned} steps)"
    if first:
        why += f"; step {first['step']} had {first['learning_rate']:.3g} instead of {wanted[first['step']]:.3g}"
    name = f"{training.prefix}learning_rate_as_asked"
    return judge(name, worst(off.values()), "<=", RATE, "of the recipe's rate", EVENTS, why)


def _share(asked: Optimization, facts: TrainMetrics, number: int) -> float:
    """The share of the recipe's rate that a step is taken with: less where the recipe has it roll back, and it did."""
    if asked.on_nan != "rollback":
        return 1.0
    back = [each["learning_rate_share"] for each in facts.get("adaptations", []) if each["step"] < number]
    return back[-1] if back else 1.0


def _totals(facts: TrainMetrics, total: int) -> list[int]:
    """The steps planned in each part of a training that was resumed to go on for longer; the last part's is `total`."""
    return [*(planned for _, planned in (facts.get("plans") or [[0, total]])[:-1]), total]


def _has_rates(recipe: Recipe, training: Training) -> bool:
    """Where steps are skipped, as by fp16's scaler of gradients, the schedule lags behind."""
    return not training.asked(recipe).fp16


# -- its settings ------------------------------------------------------------------------------------------------------


def _settings(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """What the optimizer was set to when training ended, and the adapter's dropout while it was trained. What was not told
    is not as asked."""
    name, wanted, found = f"{training.prefix}settings_as_asked", _wanted(recipe, run, training), training.facts(run)
    if fake_of_0_1(recipe, run, training):
        return not_examined(name, "==", 0, "settings off", training.report, *UNTOLD)
    other = [key for key, value in wanted.items() if not _same(found.get(key), value)]
    why = ", ".join(_told(key, found) + (f" instead of {wanted[key]}" if key in other else "") for key in wanted)
    return judge(name, len(other), "==", 0, "settings off", training.report, why)


def _wanted(recipe: Recipe, run: Run, training: Training) -> dict[str, float | None]:
    asked = training.asked(recipe)
    keys = ["weight_decay"]
    if asked.optim.startswith("adamw"):
        keys += ["adam_beta1", "adam_beta2", "adam_epsilon"]
    wanted = {key: getattr(asked, key) for key in keys}
    facts = training.facts(run)
    wanted["optimized_parameters"] = facts["trainable_parameters"]
    if is_lora(recipe) and not _took_none(facts):  # DPO runs without dropout
        wanted["lora_dropout"] = _dropout(recipe, run) if training.stage == "train" else 0.0
    return wanted


def _dropout(recipe: Recipe, run: Run) -> float:
    """The recipe's, or that of the adapter which the training went on from, where there is one."""
    before = evidence.fetched(run)["adapter"]
    if before is None:
        return lora(recipe).lora_dropout
    return float(read_object(Path(before) / "adapter_config.json").get("lora_dropout") or 0.0)


def _told(key: str, found: Mapping[str, Any]) -> str:
    return f"{key} {found[key]:g}" if found.get(key) is not None else f"no {key} told"


def _same(found: Any, wanted: float | None) -> bool:
    return found is not None and wanted is not None and abs(found - wanted) <= DRIFT * abs(wanted)


def _has_settings(recipe: Recipe, training: Training) -> bool:
    return not any(word in training.asked(recipe).optim for word in OF_NO_WHOLE)


# -- what its steps do -------------------------------------------------------------------------------------------------


def _moved(recipe: Recipe, run: Run, training: Training) -> Verdict:
    facts = training.facts(run)
    taken = facts.get("steps_watched", facts["steps"] - (facts["resumed_from"] or 0))
    why = f"a sample of every trained tensor was compared before and after each of {taken} steps"
    found, name = facts["steps_without_effect"], f"{training.prefix}steps_move_weights"
    return judge(name, found, "==", 0, "steps without effect", training.report, why)


def _skipped(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """How many steps were left out because their loss or gradient was no finite number (`on_nan: skip`)."""
    steps = training.steps(run)
    skipped, last = sum(step.get("skipped", 0) for step in steps), steps[-1]["step"]
    why = f"{skipped} of {last} steps changed nothing, since their loss or gradient was NaN or infinite"
    if first := next((step for step in steps if step.get("skipped")), None):
        why += f"; first that of step {first['step']}"
    return judge(f"{training.prefix}steps_skipped", skipped / last, "<=", SKIPPED, "share", EVENTS, why)


def _skips(recipe: Recipe, training: Training) -> bool:
    return training.asked(recipe).on_nan == "skip"


def _took_none(facts: TrainMetrics) -> bool:
    """Whether it was resumed after its last step, having been killed before its result was stored."""
    return facts["resumed_from"] == facts["steps"]


def _size(recipe: Recipe, run: Run, training: Training) -> Verdict:
    """Adam's first step moves a weight by the learning rate, whatever the gradient (https://arxiv.org/abs/1412.6980,
    section 2.1), so its size tells a step that is scaled, doubled or another optimizer's."""
    name, unit, place = f"{training.prefix}step_size", "relative distance", training.report
    facts, steps = training.facts(run), training.steps(run)
    move = facts.get("first_move")
    if excuse := _not_seen(recipe, run, training, facts, steps):
        return not_examined(name, "<=", STEP, unit, place, *excuse)
    if move is None:
        return missing(name, "<=", STEP, unit, place, "the size of the first step was not told (first_move)")
    if facts["trainable_bytes"] != 4 * facts["trainable_parameters"]:
        why = (
            f"{facts['trainable_parameters']:,} weights were trained in {facts['trainable_bytes']:,} bytes, not 4 each"
        )
        return missing(name, "<=", STEP, unit, place, why)
    why = f"the first step moved weights by {move:.4g} times the learning rate at most; Adam's by 1"
    return judge(name, abs(move - 1), "<=", STEP, unit, place, why)


def _not_seen(
    recipe: Recipe, run: Run, training: Training, facts: TrainMetrics, steps: list[Step]
) -> tuple[str, str] | None:
    """Why an honest training may show no first step of Adam's, and what to do about it."""
    if facts.get("first_move") is None and facts["resumed_from"] is not None:
        begun = run.events("training", stage=training.stage)
        if begun and begun[-1].get("resumed_from") == facts["resumed_from"]:
            why = f"the training was resumed at step {facts['resumed_from']}, and an optimizer with a past has no first step"
            return why, UNINTERRUPTED.format(stage=training.stage)
    rate = next((step["learning_rate"] for step in steps if step["learning_rate"] > 0), 0.0)
    if 0 < rate < SMALLEST_RATE:
        why = f"the warm-up begins with a learning rate of {rate:.3g}, whose step single precision rounds"
        return why, f"{training.stage}.warmup_steps: fewer, so that the first rate is {SMALLEST_RATE:g} or more"
    if recipe.model.dtype != "float32" and _trains_more(evidence.fetched(run)["adapter"]):
        why = f"the adapter that was trained further trains parts of the model as well, in {recipe.model.dtype}"
        return why, "model.dtype: float32"
    return None


def _trains_more(adapter: str | None) -> bool:
    config = read_object(Path(adapter) / "adapter_config.json") if adapter else {}
    return bool(config.get("modules_to_save")) or config.get("bias", "none") != "none"


def _is_adam(recipe: Recipe, training: Training) -> bool:
    """Whether the recipe asks for a plain Adam in single precision, with a rate that single precision can take."""
    asked, adapter = training.asked(recipe), lora(recipe)
    plain = asked.optim in ADAM and asked.adam_epsilon <= LARGEST_EPSILON and asked.weight_decay <= LARGEST_DECAY
    # An adapter's matrices are trained in single precision whatever the model is in; parts of the model are not.
    own = is_lora(recipe) and not adapter.modules_to_save and adapter.bias == "none"
    in_single = own or recipe.model.dtype == "float32"
    return tells(recipe, "step_size") and plain and in_single and asked.learning_rate >= SMALLEST_RATE


def _clipped(recipe: Recipe, run: Run, training: Training) -> Verdict:
    name, unit = f"{training.prefix}gradients_clipped", "of max_grad_norm beyond it"
    most, facts = training.asked(recipe).max_grad_norm, training.facts(run)
    norm = facts.get("clipped_norm")
    if norm is None and fake_of_0_1(recipe, run, training):
        return not_examined(name, "<=", CLIPPED, unit, training.report, *UNTOLD)
    if norm is None and _took_none(facts):
        why = f"the training was resumed after its last step, {facts['steps']}, and took none since"
        remedy = UNINTERRUPTED.format(stage=training.stage)
        return not_examined(name, "<=", CLIPPED, unit, training.report, why, remedy)
    if norm is None:
        return missing(name, "<=", CLIPPED, unit, training.report, "no norm of a gradient was told (clipped_norm)")
    why = f"the largest norm of a gradient that the optimizer got in its first steps, of max_grad_norm {most:g}"
    beyond = 0.0 if norm <= most else norm / most - 1  # NaN stays NaN
    return judge(name, beyond, "<=", CLIPPED, unit, training.report, why)


def _clips(recipe: Recipe, training: Training) -> bool:
    return training.asked(recipe).max_grad_norm > 0


PARTS = (
    *of_trainings("one_training", _one_training),
    *of_trainings("learning_rate_as_asked", _rates, EVENTS, _has_rates),
    *of_trainings("settings_as_asked", _settings, when=_has_settings),
    *of_trainings("steps_move_weights", _moved),
    *of_trainings("steps_skipped", _skipped, EVENTS, _skips),
    *of_trainings("step_size", _size, when=_is_adam),
    *of_trainings("gradients_clipped", _clipped, when=_clips),
)
