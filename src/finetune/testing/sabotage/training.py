"""What goes wrong in supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finetune.run import Run, read_jsonl, write_jsonl
from finetune.testing.sabotage import sabotage
from finetune.testing.sabotage.scene import Scene

ADAMW_STEP = "torch.optim.adamw:AdamW.step"
MASKED = -100


@sabotage("learning rate 0", fast=True)
def learning_rate_0(scene: Scene) -> None:
    """The learning rate is 0: every step is taken, and changes nothing."""
    scene.set("train.learning_rate", 0)


@sabotage("optimizer never steps", fast=True)
def optimizer_never_steps(scene: Scene) -> None:
    """The optimizer's step does nothing, while losses are logged as ever."""
    scene.wrap(ADAMW_STEP, lambda original: lambda self, *_, **__: None)


@sabotage("sign flipped")
def sign_flipped(scene: Scene) -> None:
    """The gradient is climbed instead of descended."""

    def wrapper(original: Any) -> Any:
        def step(self: Any, *arguments: Any, **more: Any) -> Any:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.neg_()
            return original(self, *arguments, **more)

        return step

    scene.wrap(ADAMW_STEP, wrapper)


@sabotage("adapter attached but frozen", imitates="https://github.com/unslothai/unsloth/issues/2142")
def adapter_frozen(scene: Scene) -> None:
    """The adapter is there, and its B matrices take no gradient."""

    def freeze(model: Any) -> Any:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.requires_grad_(False)
        return model

    scene.wrap("peft:get_peft_model", lambda original: lambda *a, **more: freeze(original(*a, **more)))


@sabotage("only one of the layers attached")
def one_of_the_layers(scene: Scene) -> None:
    """LoRA reaches the first layer only, though the recipe asks for all."""

    def wrapper(original: Any) -> Any:
        def attach(model: Any, config: Any, *arguments: Any, **more: Any) -> Any:
            config.layers_to_transform = [0]
            return original(model, config, *arguments, **more)

        return attach

    scene.wrap("peft:get_peft_model", wrapper)


@sabotage("lora_alpha ignored")
def lora_alpha_ignored(scene: Scene) -> None:
    """The adapter is trained with another scale than its configuration says."""

    def rescale(model: Any) -> Any:
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = dict.fromkeys(module.scaling, 0.25)
        return model

    scene.wrap("peft:get_peft_model", lambda original: lambda *a, **more: rescale(original(*a, **more)))


@sabotage("loss on the prompt too", imitates="https://github.com/MakazhanAlpamys/Soup/issues/683", fast=True)
def loss_on_the_prompt(scene: Scene) -> None:
    """The trainer takes every token for a label, though the prepared rows mask the prompts."""
    _collated(scene, lambda row: {**row, "labels": list(row["input_ids"])})


@sabotage("labels shifted once too often", fast=True)
def labels_shifted(scene: Scene) -> None:
    """Every label stands one place too far to the left, as where both the data and the model shift."""
    _collated(scene, lambda row: {**row, "labels": [*list(row["labels"])[1:], MASKED]})


@sabotage("end-of-turn token masked", imitates="https://github.com/huggingface/trl/issues/1623", fast=True)
def end_of_turn_masked(scene: Scene) -> None:
    """The token that ends an answer carries no label, as where it is also the padding."""

    def masked(row: dict[str, Any]) -> dict[str, Any]:
        last = max(place for place, label in enumerate(row["labels"]) if label != MASKED)
        return {**row, "labels": [*row["labels"][:last], MASKED, *row["labels"][last + 1 :]]}

    _prepared(scene, lambda rows: [masked(row) for row in rows])


@sabotage("nothing left to train", imitates="https://github.com/huggingface/trl/issues/6668")
def nothing_left_to_train(scene: Scene) -> None:
    """Every label of every row is masked."""
    _prepared(scene, lambda rows: [{**row, "labels": [MASKED] * len(row["labels"])} for row in rows])


@sabotage("answers cut off", imitates="https://github.com/huggingface/transformers/issues/30998")
def answers_cut_off(scene: Scene) -> None:
    """Rows are truncated so that half of each answer is gone."""

    def cut(row: dict[str, Any]) -> dict[str, Any]:
        first = next(place for place, label in enumerate(row["labels"]) if label != MASKED)
        most = first + (len(row["labels"]) - first) // 2
        return {**row, "input_ids": row["input_ids"][:most], "labels": row["labels"][:most]}

    _prepared(scene, lambda rows: [cut(row) for row in rows])


@sabotage("answers of other questions")
def answers_shuffled(scene: Scene) -> None:
    """The trainer gets each prompt with the answer of the row before it."""

    def rotated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        parts = [_parts(row) for row in rows]
        return [
            {**row, "input_ids": prompt + answer, "labels": [MASKED] * len(prompt) + answer}
            for row, (prompt, _), (_, answer) in zip(rows, parts, [parts[-1], *parts[:-1]], strict=True)
        ]

    _prepared(scene, rotated)


@sabotage("one example again and again")
def one_example(scene: Scene) -> None:
    """Every prepared row is the first one."""
    _prepared(scene, lambda rows: [{**rows[0], "row": row["row"]} for row in rows])


@sabotage("half of the data dropped")
def half_of_the_data(scene: Scene) -> None:
    """Every other prepared row is missing."""
    _prepared(scene, lambda rows: rows[::2])


def _parts(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The prompt's ids and the answer's."""
    first = next(place for place, label in enumerate(row["labels"]) if label != MASKED)
    return row["input_ids"][:first], row["input_ids"][first:]


def _collated(scene: Scene, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change every row on its way into a batch."""

    def wrapper(original: Any) -> Any:
        return lambda self, examples, *a, **more: original(self, [change(row) for row in examples], *a, **more)

    scene.wrap("trl.trainer.sft_trainer:DataCollatorForLanguageModeling.torch_call", wrapper)


def _prepared(scene: Scene, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Change the rows that `prepare` leaves for the training."""

    def rewrite(run: Run) -> None:
        file = run.path / "prepare" / "train.jsonl"
        write_jsonl(file, change(read_jsonl(file)))

    scene.after("prepare", rewrite)
