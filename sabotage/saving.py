"""What goes wrong in saving and resuming."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune.core.files import write_json
from finetune.run import Run
from sabotage import sabotage
from sabotage.context import Context
from sabotage.files import ADAPTER, MODEL, change_adapter_config, change_tensors
from sabotage.targets import LOAD_TRAINED_MODEL, RESUME_OPTIMIZER, RESUME_WEIGHTS, TRAINER

TENSORS = "base_model.model.model.layers.{}.self_attn.{}.lora_{}.weight"


# -- what a training leaves --------------------------------------------------------------------------------------------


@sabotage("weights saved from before training", since="train", fast=True)
def saved_from_before(context: Context) -> None:
    """The adapter that training leaves is the one that it started with."""
    context.after("train", lambda run: _copied(run, "initial"))


@sabotage("a checkpoint taken for the result", since="train")
def saved_from_halfway(context: Context) -> None:
    """The adapter that training leaves is that of an earlier checkpoint, three quarters through."""
    context.after("train", lambda run: _copied(run, "checkpoint-232"))


@sabotage("adapter of another base", since="train")
def adapter_of_another_base(context: Context) -> None:
    """The trainer loads other weights of the same shape than everything after it."""

    def load(original: Any, *arguments: Any, **more: Any) -> Any:
        model = original(*arguments, **more)
        layers = model.model.layers
        first, last = layers[0].state_dict(), layers[-1].state_dict()
        kept = {name: tensor.clone() for name, tensor in first.items()}
        layers[0].load_state_dict(last)
        layers[-1].load_state_dict(kept)
        return model

    context.wrap(LOAD_TRAINED_MODEL, load)


@sabotage("another base named in the adapter", since="train")
def another_base_named(context: Context) -> None:
    """The adapter's configuration names a base that it was not trained on."""
    change_adapter_config(context, base_model_name_or_path="somebody/another-model")


@sabotage("lora_alpha saved wrong", imitates="https://github.com/huggingface/diffusers/issues/6087", since="train")
def lora_alpha_saved_wrong(context: Context) -> None:
    """The adapter's configuration names a third less lora_alpha than it was trained with."""
    change_adapter_config(context, lora_alpha=48)


@sabotage("rank scaling lost in saving", imitates="https://github.com/vllm-project/vllm/issues/10798", since="train")
def rank_scaling_lost(context: Context) -> None:
    """The adapter's configuration forgets `use_rslora`, and with it the scale."""
    context.set("train.lora.use_rslora", True)
    context.set("train.lora.lora_alpha", 11.3)

    def save(original: Any, self: Any, directory: str, *arguments: Any, **more: Any) -> None:
        original(self, directory, *arguments, **more)
        file = Path(directory) / "adapter_config.json"
        write_json(file, {**json.loads(file.read_text(encoding="utf-8")), "use_rslora": False})

    context.wrap("peft.config:PeftConfigMixin.save_pretrained", save)


@sabotage("a tensor zeroed", since="train", fast=True)
def tensor_zeroed(context: Context) -> None:
    """One B matrix of the saved adapter is all zeros."""
    name = TENSORS.format(1, "v_proj", "B")
    change_tensors(context, ADAPTER, lambda tensors: {**tensors, name: tensors[name] * 0})


@sabotage("an A matrix zeroed", since="train")
def a_matrix_zeroed(context: Context) -> None:
    """One A matrix of the saved adapter is all zeros, so that its B counts for nothing."""
    name = TENSORS.format(1, "v_proj", "A")
    change_tensors(context, ADAPTER, lambda tensors: {**tensors, name: tensors[name] * 0})


@sabotage("two tensors exchanged", since="train")
def tensors_exchanged(context: Context) -> None:
    """Two matrices of the same shape are saved under each other's name."""
    _exchanged(context, "k_proj", "v_proj")


@sabotage("a tensor in another shape's place", since="train")
def tensors_of_two_shapes(context: Context) -> None:
    """Two matrices of different shapes are saved under each other's name."""
    _exchanged(context, "k_proj", "q_proj")


@sabotage("a tensor transposed", baseline="full", since="train")
def tensor_transposed(context: Context) -> None:
    """One square matrix of the saved model lies on its side."""
    name = "model.layers.1.self_attn.o_proj.weight"
    change_tensors(context, MODEL, lambda tensors: {**tensors, name: tensors[name].T.contiguous()})


@sabotage("half of the layers not saved", since="train")
def half_of_the_layers(context: Context) -> None:
    """The saved adapter lacks every layer but the first."""
    change_tensors(context, ADAPTER, lambda tensors: {n: t for n, t in tensors.items() if ".layers.0." in n})


@sabotage(
    "adapter saved under foreign names",
    imitates="https://github.com/huggingface/sentence-transformers/pull/3865",
    since="train",
)
def foreign_names(context: Context) -> None:
    """The saved tensors carry the name of a wrapper, so that a loader finds none of them and goes on with the base."""
    change_tensors(
        context, ADAPTER, lambda tensors: {n.replace(".self_attn.", ".inner.self_attn."): t for n, t in tensors.items()}
    )


@sabotage(
    "fully trained modules not saved",
    imitates="https://github.com/huggingface/sentence-transformers/issues/3980",
    since="train",
)
def modules_to_save_lost(context: Context) -> None:
    """The saved adapter lacks what `modules_to_save` asked for, and loaders take the base's."""
    context.set("train.lora.modules_to_save", ["norm"])
    _saved(context, lambda tensors: {name: tensor for name, tensor in tensors.items() if "lora_" in name})


@sabotage("adapter saved in half precision", since="train")
def half_precision(context: Context) -> None:
    """Every tensor of an adapter is rounded to float16 when it is saved."""

    _saved(context, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})


@sabotage("model saved in bfloat16", baseline="full", since="train")
def saved_in_bfloat16(context: Context) -> None:
    """The saved model is rounded to bfloat16, which its configuration does not say."""

    def rounded(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name: tensor.bfloat16() for name, tensor in tensors.items()}

    change_tensors(context, MODEL, rounded)


@sabotage("rounded through bfloat16 in saving", baseline="resume", since="train")
def rounded_in_saving(context: Context) -> None:
    """Every tensor of an adapter passes through bfloat16 on its way to the disk, and is stored as float32."""

    _saved(context, lambda tensors: {name: tensor.bfloat16().to(tensor.dtype) for name, tensor in tensors.items()})


@sabotage(
    "trained embedding not saved",
    imitates="https://github.com/huggingface/transformers/issues/45127",
    baseline="full",
    since="train",
)
def embedding_lost(context: Context) -> None:
    """The saved model carries the base's embedding, wherever it is saved."""

    def save(original: Any, self: Any, *arguments: Any, **more: Any) -> Any:
        import torch
        from safetensors.torch import load_file

        weight = self.get_input_embeddings().weight
        kept = weight.detach().clone()
        stored = load_file(Path(self.name_or_path) / "model.safetensors")
        with torch.no_grad():
            weight.copy_(stored["model.embed_tokens.weight"])
            saved = original(self, *arguments, **more)
            weight.copy_(kept)
        return saved

    context.wrap("transformers.modeling_utils:PreTrainedModel.save_pretrained", save)


@sabotage(
    "saved without a chat template",
    imitates="https://github.com/hiyouga/LlamaFactory/issues/8399",
    since="train",
    fast=True,
)
def without_a_template(context: Context) -> None:
    """The tokenizer that is saved with the adapter has no chat template."""

    def change(run: Run) -> None:
        (run.path / "train" / "adapter" / "chat_template.jinja").unlink()

    context.after("train", change)


@sabotage("saved with another tokenizer", since="train")
def another_tokenizer(context: Context) -> None:
    """The tokenizer that is saved with the adapter numbers two of its tokens the other way round."""

    def change(run: Run) -> None:
        file = run.path / "train" / "adapter" / "tokenizer.json"
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        words = tokenizer["model"]["vocab"]
        words["a"], words["e"] = words["e"], words["a"]
        write_json(file, tokenizer)

    context.after("train", change)


# -- what a resumed training takes up ----------------------------------------------------------------------------------


@sabotage(
    "optimizer state lost at resume",
    imitates="https://github.com/ace-step/ACE-Step-1.5/issues/742",
    baseline="resume",
    since="measure",
    fast=True,
)
def optimizer_lost(context: Context) -> None:
    """A resumed training begins with an empty optimizer."""

    def load(original: Any, self: Any, checkpoint: str | None) -> None:
        import torch

        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True)
            self.lr_scheduler.load_state_dict(state)

    context.wrap(RESUME_OPTIMIZER, load)


@sabotage(
    "scheduler restarted at resume",
    imitates="https://github.com/huggingface/transformers/issues/23099",
    baseline="resume",
    since="measure",
)
def scheduler_restarted(context: Context) -> None:
    """A resumed training goes through the learning rate's schedule from its beginning."""

    def load(original: Any, self: Any, checkpoint: str | None) -> None:
        original(self, checkpoint)
        if checkpoint is not None:
            self.lr_scheduler.last_epoch = 0

    context.wrap(RESUME_OPTIMIZER, load)


@sabotage("data order restarted at resume", baseline="resume", since="measure")
def data_restarted(context: Context) -> None:
    """A resumed training begins with the first batch of the epoch."""
    context.wrap("transformers.trainer:skip_first_batches", lambda original, dataloader, count=0: dataloader)


@sabotage("random state lost at resume", baseline="resume", since="measure")
def random_state_lost(context: Context) -> None:
    """A resumed training with dropout draws other masks than the one that was interrupted."""
    context.set("train.lora.lora_dropout", 0.1)
    context.wrap(f"{TRAINER}._load_rng_state", lambda original, self, checkpoint: None)


@sabotage(
    "resume trains every parameter",
    imitates="https://github.com/Blaizzy/mlx-vlm/issues/2178",
    baseline="resume",
    since="measure",
)
def resume_unfreezes(context: Context) -> None:
    """A resumed training lets gradients into the base, too."""

    def load(original: Any, self: Any, checkpoint: str | None) -> None:
        original(self, checkpoint)
        if checkpoint is not None:
            self.model.requires_grad_(True)

    context.wrap(RESUME_OPTIMIZER, load)


@sabotage(
    "resume starts anew",
    imitates="https://github.com/oobabooga/textgen/issues/1459",
    baseline="resume",
    since="measure",
)
def resume_starts_anew(context: Context) -> None:
    """The checkpoint is passed over in silence, and training begins at step 1."""
    context.wrap(f"{TRAINER}.train", lambda original, self, **more: original(self))


@sabotage("resume from an older checkpoint", baseline="resume", since="measure")
def resume_from_an_older(context: Context) -> None:
    """The weights are those of an earlier checkpoint than the steps are counted from."""
    context.set("train.save_total_limit", 3)

    def load(original: Any, self: Any, checkpoint: str, model: Any = None) -> None:
        original(self, str(Path(checkpoint).with_name("checkpoint-116")), model)

    context.wrap(RESUME_WEIGHTS, load)


@sabotage("resume without the trained weights", baseline="resume", since="measure")
def resume_without_weights(context: Context) -> None:
    """Optimizer and step count are taken up, the weights are not."""
    context.wrap(RESUME_WEIGHTS, lambda original, self, *a, **more: None)


def _exchanged(context: Context, *modules: str) -> None:
    one, other = (TENSORS.format(1, module, "B") for module in modules)
    change_tensors(context, ADAPTER, lambda tensors: {**tensors, one: tensors[other], other: tensors[one]})


def _saved(context: Context, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Change the tensors of every adapter on their way to the disk, checkpoints' too."""

    context.wrap(
        "peft.peft_model:safe_save_file",
        lambda original, tensors, *arguments, **more: original(change(tensors), *arguments, **more),
    )


def _copied(run: Run, source: str) -> None:
    shutil.copy2(run.path / "train" / source / Path(ADAPTER).name, run.path / ADAPTER)
