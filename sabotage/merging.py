"""What goes wrong in merging: weights, tokenizer and configuration of the merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sabotage import sabotage
from sabotage.context import Context
from sabotage.files import OTHER_TEMPLATE, change_merged, rewrite_json, rewrite_weights, write
from sabotage.targets import LORA_DELTA, MERGE

BUNDLE = "bundle"  # the baseline whose merged model is compared with the adapter, and exported as it is


@sabotage(
    "base saved as merged", imitates="https://github.com/huggingface/peft/issues/2764", baseline=BUNDLE, since="merge"
)
def base_saved_as_merged(context: Context) -> None:
    """The adapter is taken off again without being added to the weights."""
    context.wrap("peft.tuners.lora.layer:Linear.merge", lambda original, self, *_, **__: None)


@sabotage("adapter merged twice", baseline=BUNDLE, since="merge")
def merged_twice(context: Context) -> None:
    """The adapter is merged into weights that hold it already."""

    def merge(original: Any, model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
        once: Path = original(model, adapter, out.with_name("once"), **settings)
        twice: Path = original(once, adapter, out, **settings)
        return twice

    context.wrap(MERGE, merge)


@sabotage("adapter merged with another scale", baseline=BUNDLE, since="merge")
def another_scale(context: Context) -> None:
    """What is added is scaled by lora_alpha over the root of the rank, though training scaled it by the rank."""
    context.wrap(LORA_DELTA, lambda original, self, name: original(self, name) * self.r[name] ** 0.5)


@sabotage("adapter added the other way round", baseline=BUNDLE, since="merge")
def delta_transposed(context: Context) -> None:
    """What is added to square weights is transposed, as where fan_in_fan_out is taken for another."""

    def delta(original: Any, self: Any, name: str) -> Any:
        found = original(self, name)
        return found.T.contiguous() if found.shape[0] == found.shape[1] else found

    context.wrap(LORA_DELTA, delta)


@sabotage("only some of the layers merged", baseline=BUNDLE, since="merge")
def some_layers_merged(context: Context) -> None:
    """The adapter of the last layer is left out."""

    def read(original: Any, *arguments: Any, **more: Any) -> Any:
        found = original(*arguments, **more)
        for name, module in found.named_modules():
            if ".layers.2." in name and hasattr(module, "get_delta_weight"):
                module.get_delta_weight = lambda adapter, module=module: 0 * module.base_layer.weight
        return found

    context.wrap("finetune.backends.torch.merging:load_adapter", read)


@sabotage(
    "merged into a rounded base",
    imitates="https://github.com/huggingface/peft/issues/2321",
    baseline=BUNDLE,
    since="merge",
)
def merged_into_rounded(context: Context) -> None:
    """The base is rounded to bfloat16 before the adapter is added."""
    load = "finetune.backends.torch.merging:load_model"
    context.wrap(load, lambda original, *a, **more: original(*a, **more).bfloat16().float())


@sabotage("an older checkpoint merged", baseline=BUNDLE, since="merge")
def older_checkpoint_merged(context: Context) -> None:
    """The adapter of the first checkpoint is merged instead of the last."""

    def merge(original: Any, model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
        merged: Path = original(model, min(adapter.parent.glob("checkpoint-*")), out, **settings)
        return merged

    context.wrap(MERGE, merge)


@sabotage("merged weights halved in precision", baseline=BUNDLE, since="merge")
def half_precision(context: Context) -> None:
    """The merged model is saved in float16, though the recipe says float32."""
    unload = "peft.tuners.tuners_utils:BaseTuner.merge_and_unload"
    context.wrap(unload, lambda original, *a, **more: original(*a, **more).half())


@sabotage(
    "tied output head lost", imitates="https://github.com/huggingface/transformers/issues/45127", baseline=BUNDLE, since="merge"
)  # fmt: skip
def tied_head_lost(context: Context) -> None:
    """The merged model has an output head of its own, which nobody trained."""

    def untie(model: Path) -> None:
        def change(tensors: dict[str, Any]) -> None:
            import numpy

            embedding = tensors["model.embed_tokens.weight"]
            random = numpy.random.default_rng(0).normal(0, 0.02, embedding.shape)
            tensors["lm_head.weight"] = random.astype(embedding.dtype)

        rewrite_weights(model / "model.safetensors", change)
        rewrite_json(model / "config.json", lambda config: config.update(tie_word_embeddings=False))

    change_merged(context, untie)


@sabotage("merged layers in another order", baseline=BUNDLE, since="merge")
def layers_swapped(context: Context) -> None:
    """The second and the third layer have changed places."""

    def swap(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            other = name.replace(".layers.1.", ".layers.2.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    change_merged(context, lambda model: rewrite_weights(model / "model.safetensors", swap))


@sabotage("a merged tensor zeroed", baseline=BUNDLE, since="merge")
def tensor_zeroed(context: Context) -> None:
    """One of the merged model's weights is all zeros."""

    def zero(tensors: dict[str, Any]) -> None:
        name = "model.layers.1.mlp.down_proj.weight"
        tensors[name] = tensors[name] * 0

    change_merged(context, lambda model: rewrite_weights(model / "model.safetensors", zero))


@sabotage(
    "template of the merged model replaced", imitates="https://github.com/hiyouga/LlamaFactory/issues/2509",
    baseline=BUNDLE, since="merge",
)  # fmt: skip
def merged_template_replaced(context: Context) -> None:
    """The merged model carries another chat template than that of the training."""
    change_merged(context, lambda model: write(model / "chat_template.jinja", OTHER_TEMPLATE))


@sabotage(
    "template of the merged model lost",
    imitates="https://github.com/jundot/omlx/issues/630",
    baseline=BUNDLE,
    since="merge",
)
def merged_template_lost(context: Context) -> None:
    """The merged model carries no chat template."""
    change_merged(context, lambda model: (model / "chat_template.jinja").unlink())


@sabotage(
    "merged model told to stop elsewhere",
    imitates="https://github.com/ollama/ollama/issues/3759",
    baseline=BUNDLE,
    since="merge",
)
def merged_stops_elsewhere(context: Context) -> None:
    """The merged model's generation settings name another end-of-turn token than the training."""

    def change(model: Path) -> None:
        for name in ("generation_config.json", "config.json"):
            rewrite_json(model / name, lambda config: config.update(eos_token_id=0))

    change_merged(context, change)


@sabotage("end-of-turn token of the merged tokenizer replaced", baseline=BUNDLE, since="merge")
def merged_eos_replaced(context: Context) -> None:
    """The merged tokenizer's end-of-text token is the padding, as many base models have it."""

    def change(model: Path) -> None:
        rewrite_json(model / "tokenizer_config.json", lambda config: config.update(eos_token="<|endoftext|>"))

    change_merged(context, change)


@sabotage("two tokens of the vocabulary exchanged", baseline=BUNDLE, since="merge")
def tokens_exchanged(context: Context) -> None:
    """In the merged tokenizer two tokens have each other's number."""

    def swap(stored: dict[str, Any]) -> None:
        vocabulary = stored["model"]["vocab"]
        one, other = sorted(vocabulary, key=vocabulary.get)[-2:]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    change_merged(context, lambda model: rewrite_json(model / "tokenizer.json", swap))


@sabotage("merges of the tokenizer lost", baseline=BUNDLE, since="merge")
def merges_lost(context: Context) -> None:
    """The merged tokenizer puts no bytes together."""

    def clear(stored: dict[str, Any]) -> None:
        stored["model"]["merges"] = []

    change_merged(context, lambda model: rewrite_json(model / "tokenizer.json", clear))


@sabotage("an added token of the tokenizer missing", baseline=BUNDLE, since="merge")
def added_token_missing(context: Context) -> None:
    """The token that begins a turn is no token in the merged tokenizer: it is spelled out."""

    def drop(stored: dict[str, Any]) -> None:
        stored["added_tokens"] = [token for token in stored["added_tokens"] if token["content"] != "<|im_start|>"]
        stored["model"]["vocab"]["<unused>"] = stored["model"]["vocab"].pop("<|im_start|>")

    def change(model: Path) -> None:
        rewrite_json(model / "tokenizer.json", drop)
        rewrite_json(model / "tokenizer_config.json", lambda config: config.update(extra_special_tokens=[]))

    change_merged(context, change)


@sabotage("a space before the first word", baseline=BUNDLE, since="merge")
def space_before_the_first_word(context: Context) -> None:
    """The merged tokenizer puts a space before each text (add_prefix_space)."""

    def change(stored: dict[str, Any]) -> None:
        stored["pre_tokenizer"]["add_prefix_space"] = True

    change_merged(context, lambda model: rewrite_json(model / "tokenizer.json", change))


@sabotage("position base of the merged model changed", baseline=BUNDLE, since="merge")
def merged_position_base(context: Context) -> None:
    """The merged model's configuration has another base of the position encoding."""

    def change(config: dict[str, Any]) -> None:
        config["rope_parameters"]["rope_theta"] = 500000.0

    change_merged(context, lambda model: rewrite_json(model / "config.json", change))


@sabotage("norm epsilon of the merged model changed", baseline=BUNDLE, since="merge")
def merged_norm_epsilon(context: Context) -> None:
    """The merged model's configuration has another epsilon of the norms."""
    change_merged(
        context, lambda model: rewrite_json(model / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    )
