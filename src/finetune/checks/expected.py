"""What a recipe expects by name, and the verdict where it gives nothing to examine."""

from __future__ import annotations

from dataclasses import replace

from finetune.checks import Verdict, missing, not_examined
from finetune.recipe import Recipe

# Verdicts that say by which key of `expect` they can be moved.
EXPECT_KEYS = {
    "loss_convergence": "loss_reduction_min",
    "loss_confirmed": "loss_reduction_min",
    "loss_is_of_answers": "loss_first_tolerance",
    "loss_end": "loss_below_unigram",
    "learned_as_trained": "learned_min",
    "learned_paraphrased": "learned_min",
    "learned_net": "unseen_margin_min",
    "stops_by_itself": "stopped_min",
    "controls_kept": "controls_kept_min",
    "heldout_perplexity": "heldout_ratio_max",
    "parameters_changed": "lora_changed_min",
    "memory_efficiency": "memory_reduction_min",
    "dpo_prefers_chosen": "preference_accuracy_min",
}


def is_expected(recipe: Recipe, name: str) -> bool:
    """Whether the recipe itself sets the key of `expect` that a verdict answers to; a default asks for nothing."""
    return EXPECT_KEYS.get(name) in recipe.expect.model_fields_set


def not_given(
    recipe: Recipe, name: str, compare: str, bound: float, unit: str, evidence: str, why: str, remedy: str
) -> Verdict:
    """Not examined, as the recipe gives nothing to examine; refuted where it expects the verdict by name."""
    if is_expected(recipe, name):
        why = f"{why}, and the recipe sets expect.{EXPECT_KEYS[name]}"
        return replace(missing(name, compare, bound, unit, evidence, why), remedy=remedy)
    return not_examined(name, compare, bound, unit, evidence, why, remedy)
