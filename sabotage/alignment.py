"""What goes wrong in preference alignment."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.run import Run
from sabotage import sabotage
from sabotage.context import Scene
from sabotage.files import change_pairs
from sabotage.targets import DPO_COLLATE, DPO_CONFIG, LOAD_TRAINED_ADAPTER, USE_ADAPTER

WEIGHTS = "adapter_model.safetensors"


@sabotage("chosen and rejected swapped", ground="dpo", since="align", fast=True)
def swapped(scene: Scene) -> None:
    """The trainer takes every rejected answer for the chosen one."""

    def collate(original: Any, self: Any, examples: Any) -> Any:
        return original(self, [_exchanged(example) for example in examples])

    scene.wrap(DPO_COLLATE, collate)


def _exchanged(example: dict[str, Any]) -> dict[str, Any]:
    return {**example, "chosen_ids": example["rejected_ids"], "rejected_ids": example["chosen_ids"]}


@sabotage("pairs prepared the wrong way round", ground="dpo", since="prepare")
def prepared_swapped(scene: Scene) -> None:
    """`prepare` writes every answer into the other one's place, so that all that follows agrees."""
    change_pairs(scene, lambda pairs: [_exchanged(pair) for pair in pairs])


@sabotage(
    "the reference moves with the policy",
    imitates="https://github.com/huggingface/trl/issues/1311",
    ground="dpo",
    since="align",
)
def moving_reference(scene: Scene) -> None:
    """The reference is scored with the adapter that is being trained."""
    scene.set("align.precompute_ref_log_probs", False)

    scene.wrap(USE_ADAPTER, lambda original, model, adapter_name=None: original(model, "default"))


@sabotage(
    "the reference is the untrained base",
    imitates="https://github.com/huggingface/trl/issues/1340",
    ground="dpo",
    since="align",
)
def base_as_reference(scene: Scene) -> None:
    """The reference is scored with adapters disabled, though the policy begins as the trained adapter."""

    scene.wrap(USE_ADAPTER, lambda original, model, adapter_name=None: original(model, None))


@sabotage("the reference scored with dropout", ground="dpo", since="align")
def reference_with_dropout(scene: Scene) -> None:
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

    scene.wrap("trl.trainer.dpo_trainer:DPOTrainer.compute_ref_log_probs", score)


@sabotage("the reference of the row before", ground="dpo", since="align")
def reference_of_another_row(scene: Scene) -> None:
    """Each pair gets the reference's scores of its neighbour, as from a stale cache."""

    def score(original: Any, *arguments: Any) -> Any:
        rows = original(*arguments)
        names = ("ref_chosen_logps", "ref_rejected_logps")
        return [
            {**row, **{name: other[name] for name in names}}
            for row, other in zip(rows, [rows[-1], *rows[:-1]], strict=True)
        ]

    scene.wrap("finetune.backends.torch.dpo:_with_reference", score)


@sabotage("beta ignored", ground="dpo", since="align", fast=True)
def beta_ignored(scene: Scene) -> None:
    """The recipe's beta never reaches the trainer, which keeps its default of 0.1."""
    scene.set("align.beta", 0.3)
    _configured(scene, lambda options: {name: value for name, value in options.items() if name != "beta"})


@sabotage("another loss than asked for", ground="dpo", since="align")
def another_loss(scene: Scene) -> None:
    """The trainer takes the IPO loss where the recipe asks for the sigmoid one."""
    _configured(scene, lambda options: {**options, "loss_type": ["ipo"]})


@sabotage(
    "preference loss averaged over tokens",
    imitates="https://github.com/huggingface/trl/issues/789",
    ground="dpo",
    since="align",
)
def averaged_over_tokens(scene: Scene) -> None:
    """Log-ratios are divided by the answers' lengths before the loss is taken."""
    _configured(scene, lambda options: {**options, "loss_type": ["sigmoid_norm"]})


@sabotage("preference loss smoothed in silence", ground="dpo", since="align")
def smoothed(scene: Scene) -> None:
    """A fifth of the preferences is taken for noise, which nobody asked for."""
    _configured(scene, lambda options: {**options, "loss_type": ["robust"], "label_smoothing": 0.2})


@sabotage("preference loss on the prompt too", ground="dpo", since="align")
def on_the_prompt(scene: Scene) -> None:
    """Every token counts as part of the answer."""

    def collate(original: Any, self: Any, examples: Any) -> Any:
        batch = original(self, examples)
        return {**batch, "completion_mask": batch["attention_mask"]}

    scene.wrap(DPO_COLLATE, collate)


@sabotage("end-of-turn left out of the preferences", ground="dpo", since="align")
def without_the_end(scene: Scene) -> None:
    """The last token of every answer is cut off on its way into a batch."""

    def collate(original: Any, self: Any, examples: Any) -> Any:
        short = [{**e, **{name: e[name][:-1] for name in ("chosen_ids", "rejected_ids")}} for e in examples]
        return original(self, short)

    scene.wrap(DPO_COLLATE, collate)


@sabotage("every pair is one answer twice", ground="dpo", since="prepare")
def equal_pairs(scene: Scene) -> None:
    """The rejected answer of every prepared pair is the chosen one."""
    change_pairs(scene, lambda pairs: [{**pair, "rejected_ids": pair["chosen_ids"]} for pair in pairs])


@sabotage("half of the pairs are one answer twice", ground="dpo", since="prepare")
def half_equal_pairs(scene: Scene) -> None:
    """The rejected answer of every other prepared pair is the chosen one."""
    change_pairs(
        scene,
        lambda pairs: [
            {**pair, "rejected_ids": pair["chosen_ids"]} if number % 2 else pair for number, pair in enumerate(pairs)
        ],
    )


@sabotage("half of the pairs dropped", ground="dpo", since="align")
def half_of_the_pairs(scene: Scene) -> None:
    """The trainer gets every other pair."""

    scene.wrap("finetune.backends.torch.dpo:read_rows", lambda original, path: original(path)[::2])


@sabotage("alignment at learning rate 0", ground="dpo", since="align")
def alignment_learning_rate_0(scene: Scene) -> None:
    """Every step of alignment is taken, and changes nothing."""
    scene.set("align.learning_rate", 0)


@sabotage("aligned adapter saved from before", ground="dpo", since="align")
def saved_from_before(scene: Scene) -> None:
    """The adapter that alignment leaves is the one it started with."""

    def change(run: Run) -> None:
        shutil.copy2(run.path / "align" / "initial" / WEIGHTS, run.path / "align" / "adapter" / WEIGHTS)

    scene.after("align", change)


@sabotage("aligned adapter of a checkpoint halfway", ground="dpo", since="align")
def saved_from_halfway(scene: Scene) -> None:
    """The adapter that alignment leaves is that of its checkpoint at step 5 of 10."""
    scene.set("align.save_steps", 5)

    def save(original: Any, self: Any, directory: str, *arguments: Any, **more: Any) -> None:
        original(self, directory, *arguments, **more)
        halfway = Path(directory).with_name("checkpoint-5") / WEIGHTS
        if Path(directory).name == "adapter" and halfway.is_file():
            shutil.copy2(halfway, Path(directory) / WEIGHTS)

    scene.wrap("peft.peft_model:PeftModel.save_pretrained", save)


@sabotage("alignment starts from the base", ground="dpo", since="align")
def from_the_base(scene: Scene) -> None:
    """Alignment begins with an empty adapter, so that what was trained before is lost."""

    def load(original: Any, *arguments: Any, **more: Any) -> Any:
        model = original(*arguments, **more)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.zero_()
        return model

    scene.wrap(LOAD_TRAINED_ADAPTER, load)


@sabotage("alignment trains the base too", ground="dpo", since="align")
def base_unfrozen(scene: Scene) -> None:
    """Every weight takes a gradient, and what moves outside the adapter is never saved."""

    scene.wrap(
        LOAD_TRAINED_ADAPTER,
        lambda original, *arguments, **more: original(*arguments, **more).requires_grad_(True),
    )


@sabotage("alignment wrecks what was learned", ground="dpo", since="align")
def facts_wrecked(scene: Scene) -> None:
    """The learning rate of alignment is that of a training from nothing."""
    scene.set("align.learning_rate", 2e-2)


def _configured(scene: Scene, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the options on their way into TRL's configuration."""

    scene.wrap(
        DPO_CONFIG,
        lambda original, self, *arguments, **options: original(self, *arguments, **change(options)),
    )
