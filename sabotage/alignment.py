"""What goes wrong in preference alignment."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.run import Run
from sabotage import sabotage
from sabotage.context import Context
from sabotage.files import change_pairs
from sabotage.targets import DPO_COLLATE, DPO_CONFIG, LOAD_TRAINED_ADAPTER, USE_ADAPTER

WEIGHTS = "adapter_model.safetensors"


@sabotage("chosen and rejected swapped", baseline="dpo", since="align", fast=True)
def swapped(context: Context) -> None:
    """The trainer takes every rejected answer for the chosen one."""

    def collate(original: Any, self: Any, examples: Any) -> Any:
        return original(self, [_exchanged(example) for example in examples])

    context.wrap(DPO_COLLATE, collate)


def _exchanged(example: dict[str, Any]) -> dict[str, Any]:
    return {**example, "chosen_ids": example["rejected_ids"], "rejected_ids": example["chosen_ids"]}


@sabotage("pairs prepared the wrong way round", baseline="dpo", since="prepare")
def prepared_swapped(context: Context) -> None:
    """`prepare` writes every answer into the other one's place, so that all that follows agrees."""
    change_pairs(context, lambda pairs: [_exchanged(pair) for pair in pairs])


@sabotage(
    "the reference moves with the policy",
    imitates="https://github.com/huggingface/trl/issues/1311",
    baseline="dpo",
    since="align",
)
def moving_reference(context: Context) -> None:
    """The reference is scored with the adapter that is being trained."""
    context.set("align.precompute_ref_log_probs", False)

    context.wrap(USE_ADAPTER, lambda original, model, adapter_name=None: original(model, "default"))


@sabotage(
    "the reference is the untrained base",
    imitates="https://github.com/huggingface/trl/issues/1340",
    baseline="dpo",
    since="align",
)
def base_as_reference(context: Context) -> None:
    """The reference is scored with adapters disabled, though the policy begins as the trained adapter."""

    context.wrap(USE_ADAPTER, lambda original, model, adapter_name=None: original(model, None))


@sabotage("the reference scored with dropout", baseline="dpo", since="align")
def reference_with_dropout(context: Context) -> None:
    """Dropout is on while the reference is scored, as where nobody put the model into evaluation mode."""

    def score(original: Any, self: Any, model: Any, inputs: Any) -> Any:
        import torch

        def drop(module: Any, arguments: Any, output: Any) -> Any:
            return torch.nn.functional.dropout(output, 0.1)

        layers = [module for name, module in model.named_modules() if name.endswith("mlp")]
        hooks = [layer.register_forward_hook(drop) for layer in layers]
        try:
            return original(self, model, inputs)
        finally:
            for hook in hooks:
                hook.remove()

    context.wrap("trl.trainer.dpo_trainer:DPOTrainer.compute_ref_log_probs", score)


@sabotage("the reference of the row before", baseline="dpo", since="align")
def reference_of_another_row(context: Context) -> None:
    """Each pair gets the reference's scores of its neighbour, as from a stale cache."""

    def score(original: Any, *arguments: Any) -> Any:
        rows = original(*arguments)
        names = ("ref_chosen_logps", "ref_rejected_logps")
        return [
            {**row, **{name: other[name] for name in names}}
            for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True)
        ]

    context.wrap("finetune.backends.torch.dpo:_with_reference", score)


@sabotage("beta ignored", baseline="dpo", since="align", fast=True)
def beta_ignored(context: Context) -> None:
    """The recipe's beta never reaches the trainer, which keeps its default of 0.1."""
    context.set("align.beta", 0.3)
    _configured(context, lambda options: {name: value for name, value in options.items() if name != "beta"})


@sabotage("another loss than asked for", baseline="dpo", since="align")
def another_loss(context: Context) -> None:
    """The trainer takes the IPO loss where the recipe asks for the sigmoid one."""
    _configured(context, lambda options: {**options, "loss_type": ["ipo"]})


@sabotage(
    "preference loss averaged over tokens",
    imitates="https://github.com/huggingface/trl/issues/789",
    baseline="dpo",
    since="align",
)
def averaged_over_tokens(context: Context) -> None:
    """Log-ratios are divided by the answers' lengths before the loss is taken."""
    _configured(context, lambda options: {**options, "loss_type": ["sigmoid_norm"]})


@sabotage("preference loss smoothed in silence", baseline="dpo", since="align")
def smoothed(context: Context) -> None:
    """A fifth of the preferences is taken for noise, which nobody asked for."""
    _configured(context, lambda options: {**options, "loss_type": ["robust"], "label_smoothing": 0.2})


@sabotage("preference loss on the prompt too", baseline="dpo", since="align")
def on_the_prompt(context: Context) -> None:
    """Every token counts as part of the answer."""

    def collate(original: Any, self: Any, examples: Any) -> Any:
        batch = original(self, examples)
        return {**batch, "completion_mask": batch["attention_mask"]}

    context.wrap(DPO_COLLATE, collate)


@sabotage("end-of-turn left out of the preferences", baseline="dpo", since="align")
def without_the_end(context: Context) -> None:
    """The last token of every answer is cut off on its way into a batch."""

    def collate(original: Any, self: Any, examples: Any) -> Any:
        short = [{**e, **{name: e[name][:-1] for name in ("chosen_ids", "rejected_ids")}} for e in examples]
        return original(self, short)

    context.wrap(DPO_COLLATE, collate)


@sabotage("every pair is one answer twice", baseline="dpo", since="prepare")
def equal_pairs(context: Context) -> None:
    """The rejected answer of every prepared pair is the chosen one."""
    change_pairs(context, lambda pairs: [{**pair, "rejected_ids": pair["chosen_ids"]} for pair in pairs])


@sabotage("half of the pairs are one answer twice", baseline="dpo", since="prepare")
def half_equal_pairs(context: Context) -> None:
    """The rejected answer of every other prepared pair is the chosen one."""
    change_pairs(
        context,
        lambda pairs: [
            {**pair, "rejected_ids": pair["chosen_ids"]} if number % 2 else pair for number, pair in enumerate(pairs)
        ],
    )


@sabotage("half of the pairs dropped", baseline="dpo", since="align")
def half_of_the_pairs(context: Context) -> None:
    """The trainer gets every other pair."""

    context.wrap("finetune.backends.torch.dpo:read_rows", lambda original, path: original(path)[::2])


@sabotage("alignment at learning rate 0", baseline="dpo", since="align")
def alignment_learning_rate_0(context: Context) -> None:
    """Every step of alignment is taken, and changes nothing."""
    context.set("align.learning_rate", 0)


@sabotage("aligned adapter saved from before", baseline="dpo", since="align")
def saved_from_before(context: Context) -> None:
    """The adapter that alignment leaves is the one it started with."""

    def change(run: Run) -> None:
        shutil.copy2(run.path / "align" / "initial" / WEIGHTS, run.path / "align" / "adapter" / WEIGHTS)

    context.after("align", change)


@sabotage("aligned adapter of a checkpoint halfway", baseline="dpo", since="align")
def saved_from_halfway(context: Context) -> None:
    """The adapter that alignment leaves is that of its checkpoint at step 5 of 10."""
    context.set("align.save_steps", 5)

    def save(original: Any, self: Any, directory: str, *arguments: Any, **more: Any) -> None:
        original(self, directory, *arguments, **more)
        halfway = Path(directory).with_name("checkpoint-5") / WEIGHTS
        if Path(directory).name == "adapter" and halfway.is_file():
            shutil.copy2(halfway, Path(directory) / WEIGHTS)

    context.wrap("peft.peft_model:PeftModel.save_pretrained", save)


@sabotage("alignment starts from the base", baseline="dpo", since="align")
def from_the_base(context: Context) -> None:
    """Alignment begins with an empty adapter, so that what was trained before is lost."""

    def load(original: Any, *arguments: Any, **more: Any) -> Any:
        model = original(*arguments, **more)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return model

    context.wrap(LOAD_TRAINED_ADAPTER, load)


@sabotage("alignment trains the base too", baseline="dpo", since="align")
def base_unfrozen(context: Context) -> None:
    """Every weight takes a gradient, and what moves outside the adapter is never saved."""

    context.wrap(
        LOAD_TRAINED_ADAPTER,
        lambda original, *arguments, **more: original(*arguments, **more).requires_grad_(True),
    )


@sabotage("alignment wrecks what was learned", baseline="dpo", since="align")
def facts_wrecked(context: Context) -> None:
    """The learning rate of alignment is that of a training from nothing."""
    context.set("align.learning_rate", 2e-2)


def _configured(context: Context, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the options on their way into TRL's configuration."""

    context.wrap(
        DPO_CONFIG,
        lambda original, self, *arguments, **options: original(self, *arguments, **change(options)),
    )
