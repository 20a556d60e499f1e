"""What goes wrong in exporting: files that are not the merged model, or that their runtimes read as another."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from sabotage import sabotage
from sabotage.context import Context
from sabotage.files import (
    OTHER_TEMPLATE,
    Gguf,
    change_export,
    change_gguf,
    change_gguf_metadata,
    rewrite_json,
    rewrite_weights,
)
from sabotage.targets import EXPORT_SOURCE

PAD, BEGIN = 0, "<|endoftext|>"  # the same token of the tiny tokenizer
_FIRST, _TEXT = {"SpecialToken": {"id": BEGIN, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
ADDS_BEGIN = {
    "type": "TemplateProcessing",
    "single": [_FIRST, _TEXT],
    "pair": [_FIRST, _TEXT, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {BEGIN: {"id": BEGIN, "ids": [PAD], "tokens": [BEGIN]}},
}


@sabotage(
    "base exported instead of merged",
    imitates="https://github.com/unslothai/unsloth/issues/869",
    baseline="gguf",
    since="export",
)
def base_exported(context: Context) -> None:
    """The GGUF file is made from the base model."""
    context.wrap(EXPORT_SOURCE, _from_base)


@sabotage("base exported to MLX", baseline="mlx", since="export")
def base_exported_to_mlx(context: Context) -> None:
    """The MLX directory is made from the base model."""
    context.wrap(EXPORT_SOURCE, _from_base)


@sabotage("export of an older run", baseline="gguf", since="export")
def older_run_exported(context: Context) -> None:
    """The GGUF file is made from a model that was merged before the training ended."""
    context.wrap(EXPORT_SOURCE, _from_checkpoint)


@sabotage("export of an older run to MLX", baseline="mlx", since="export")
def older_run_exported_to_mlx(context: Context) -> None:
    """The MLX directory is made from a model that was merged before the training ended."""
    context.wrap(EXPORT_SOURCE, _from_checkpoint)


def _from_base(original: Any, *arguments: Any) -> Any:
    found = original(*arguments)
    return replace(found, model=found.base)


def _from_checkpoint(original: Any, *arguments: Any) -> Any:
    from finetune.backends.torch.merging import merge

    found = original(*arguments)
    older = found.adapter.parent.parent.parent / "older"
    merge(found.base, min(found.adapter.parent.glob("checkpoint-*")), older, dtype="float32")
    return replace(found, model=older)


@sabotage(
    "query and key left as they were",
    imitates="https://github.com/ggml-org/llama.cpp/pull/3364",
    baseline="gguf",
    since="export",
)
def unpermuted(context: Context) -> None:
    """The converter leaves out the reordering of query and key that llama.cpp's position encoding needs."""
    context.wrap("conversion.llama:LlamaModel.permute", lambda original, weights, *_: weights)


@sabotage("coarser quantization than its name", baseline="q8", since="export")
def coarser_than_named(context: Context) -> None:
    """The file called q8_0 is quantized to four bits."""

    def work(original: Any, command: str, **options: Any) -> Any:
        return original(command, **{**options, **({"variant": "q4_0"} if command == "quantize" else {})})

    context.wrap("finetune.export.gguf:_work", work)


@sabotage("quantized without being asked", baseline="mlx", since="export")
def mlx_quantized(context: Context) -> None:
    """The MLX directory holds eight bits a weight, though the recipe asks for the training's own type."""

    context.wrap("finetune.export.mlx:export", lambda original, source, variant, out: original(source, "q8", out))


@sabotage(
    "server with another template",
    imitates="https://github.com/hiyouga/LlamaFactory/issues/2509",
    baseline="gguf",
    since="compare",
)
def server_with_another_template(context: Context) -> None:
    """llama.cpp's server is started with a template of its own list instead of the file's."""

    def server(original: Any, options: Any) -> Any:
        options.chat_template = OTHER_TEMPLATE
        return original(options)

    context.wrap("xllamacpp:Server", server)


@sabotage("template of the GGUF file replaced", baseline="gguf", since="compare")
def gguf_template_replaced(context: Context) -> None:
    """The GGUF file carries another chat template than that of the training."""
    change_gguf_metadata(context, {"tokenizer.chat_template": OTHER_TEMPLATE})


@sabotage(
    "template of the GGUF file lost",
    imitates="https://github.com/unslothai/unsloth/issues/798",
    baseline="gguf",
    since="compare",
)
def gguf_template_lost(context: Context) -> None:
    """The GGUF file carries no chat template."""
    change_gguf_metadata(context, {"tokenizer.chat_template": None})


@sabotage(
    "end-of-turn token of the GGUF file replaced", imitates="https://github.com/ggml-org/llama.cpp/pull/6745",
    baseline="gguf", since="compare",
)  # fmt: skip
def gguf_eos_replaced(context: Context) -> None:
    """The GGUF file names the padding as its end-of-turn token."""
    change_gguf_metadata(context, {"tokenizer.ggml.eos_token_id": PAD})


@sabotage(
    "begin token added", imitates="https://github.com/vllm-project/vllm/pull/27515", baseline="gguf", since="compare"
)
def begin_token_added(context: Context) -> None:
    """The GGUF file says that a begin token is to be put before each prompt, which no prompt of the training had."""
    change_gguf_metadata(context, {"tokenizer.ggml.add_bos_token": True})


@sabotage("begin token doubled", imitates="https://github.com/abetlen/llama-cpp-python/issues/1501", baseline="mlx")
def begin_token_doubled(context: Context) -> None:
    """The runtime puts a begin token before a prompt in which the chat template has written one."""
    if context.recipe:  # there is none where only the patches are asked for
        model = context.folder / "model"
        shutil.copytree(context.recipe["model"]["path"], model)
        rewrite_json(model / "tokenizer_config.json", lambda config: config.update(bos_token=BEGIN))
        rewrite_json(model / "tokenizer.json", lambda stored: stored.update(post_processor=ADDS_BEGIN))
        context.set("model.path", str(model))

    def render(original: Any, self: Any, *arguments: Any, tokenize: bool = True, **more: Any) -> Any:
        text = original(self, *arguments, tokenize=False, **more)
        return self.encode(text) if tokenize else text

    context.wrap("mlx_lm.tokenizer_utils:TokenizerWrapper.apply_chat_template", render)


@sabotage("end token added to prompts", baseline="gguf", since="compare")
def end_token_added(context: Context) -> None:
    """The GGUF file says that an end-of-text token is to be put after each prompt."""
    change_gguf_metadata(context, {"tokenizer.ggml.add_eos_token": True})


@sabotage(
    "pre-tokenizer of another family", imitates="https://github.com/ggml-org/llama.cpp/issues/22700",
    baseline="gguf", since="compare",
)  # fmt: skip
def other_pre_tokenizer(context: Context) -> None:
    """The GGUF file names another pre-tokenizer than that of its vocabulary."""
    change_gguf_metadata(context, {"tokenizer.ggml.pre": "deepseek-llm"})


@sabotage("marks of turns taken for text", baseline="gguf", since="compare")
def marks_taken_for_text(context: Context) -> None:
    """The GGUF file calls the tokens that mark turns ordinary ones, so they are spelled out in prompts."""

    def change(file: Gguf) -> None:
        file.values["tokenizer.ggml.token_type"] = [1] * len(file.values["tokenizer.ggml.token_type"])

    change_gguf(context, change)


@sabotage("two tokens of the GGUF file exchanged", baseline="gguf", since="compare")
def gguf_tokens_exchanged(context: Context) -> None:
    """In the GGUF file two tokens have each other's number."""

    def change(file: Gguf) -> None:
        words = file.values["tokenizer.ggml.tokens"]
        words[-1], words[-2] = words[-2], words[-1]

    change_gguf(context, change)


@sabotage("merges of the GGUF file lost", baseline="gguf", since="compare")
def gguf_merges_lost(context: Context) -> None:
    """The GGUF file holds one of the rules by which bytes are put together, and no more."""

    def change(file: Gguf) -> None:
        file.values["tokenizer.ggml.merges"] = file.values["tokenizer.ggml.merges"][:1]

    change_gguf(context, change)


@sabotage("position base changed", baseline="gguf", since="compare")
def position_base_changed(context: Context) -> None:
    """The GGUF file has another base of the position encoding."""
    change_gguf_metadata(context, {"llama.rope.freq_base": 500000.0})


@sabotage("norm epsilon changed", baseline="gguf", since="compare")
def norm_epsilon_changed(context: Context) -> None:
    """The GGUF file has another epsilon of the norms."""
    change_gguf_metadata(context, {"llama.attention.layer_norm_rms_epsilon": 1e-5})


@sabotage("context length changed", baseline="gguf", since="compare")
def context_length_changed(context: Context) -> None:
    """The GGUF file says that the model takes four times as many tokens as it was made for."""
    change_gguf_metadata(context, {"llama.context_length": 2048})


@sabotage("number of heads changed", baseline="gguf", since="compare")
def number_of_heads_changed(context: Context) -> None:
    """The GGUF file has twice as many heads, each half as wide."""
    halved = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), 16)
    changes = {**halved, "attention.head_count": 8, "attention.head_count_kv": 4}
    change_gguf_metadata(context, {f"llama.{name}": value for name, value in changes.items()})


@sabotage("a layer dropped", baseline="gguf", since="compare")
def layer_dropped(context: Context) -> None:
    """The GGUF file lacks the last layer."""

    def change(file: Gguf) -> None:
        file.values["llama.block_count"] = 2
        file.tensors = {name: held for name, held in file.tensors.items() if not name.startswith("blk.2.")}

    change_gguf(context, change)


@sabotage("layers in another order", baseline="gguf", since="compare")
def layers_in_another_order(context: Context) -> None:
    """In the GGUF file the first and the second layer have changed places."""

    def change(file: Gguf) -> None:
        other = {"blk.0.": "blk.1.", "blk.1.": "blk.0."}
        file.tensors = {other.get(name[:6], name[:6]) + name[6:]: held for name, held in file.tensors.items()}

    change_gguf(context, change)


@sabotage("output matrix of zeros", baseline="gguf", since="compare")
def output_of_zeros(context: Context) -> None:
    """The GGUF file has an output matrix of its own, of zeros, instead of the embedding."""

    def change(file: Gguf) -> None:
        data, kind = file.tensors["token_embd.weight"]
        file.tensors["output.weight"] = (data * 0, kind)

    change_gguf(context, change)


@sabotage("a norm left out", baseline="gguf", since="compare")
def norm_left_out(context: Context) -> None:
    """In the GGUF file one of the norms has ones for weights, as before any training."""

    def change(file: Gguf) -> None:
        data, kind = file.tensors["blk.1.ffn_norm.weight"]
        file.tensors["blk.1.ffn_norm.weight"] = (data * 0 + 1, kind)

    change_gguf(context, change)


@sabotage("template of the MLX model replaced", baseline="mlx", since="compare")
def mlx_template_replaced(context: Context) -> None:
    """The MLX directory carries another chat template than that of the training."""
    change_export(context, lambda folder: (folder / "chat_template.jinja").write_text(OTHER_TEMPLATE, encoding="utf-8"))


@sabotage(
    "template of the MLX model lost",
    imitates="https://github.com/jundot/omlx/issues/630",
    baseline="mlx",
    since="compare",
)
def mlx_template_lost(context: Context) -> None:
    """The MLX directory carries no chat template."""
    change_export(context, lambda folder: (folder / "chat_template.jinja").unlink())


@sabotage(
    "MLX model told to stop elsewhere",
    imitates="https://github.com/Blaizzy/mlx-vlm/issues/1191",
    baseline="mlx",
    since="compare",
)
def mlx_stops_elsewhere(context: Context) -> None:
    """The MLX directory names another end-of-turn token everywhere."""

    def change(folder: Path) -> None:
        rewrite_json(folder / "tokenizer_config.json", lambda config: config.update(eos_token="<|endoftext|>"))
        for name in ("config.json", "generation_config.json"):
            rewrite_json(folder / name, lambda config: config.update(eos_token_id=PAD))

    change_export(context, change)


@sabotage("position base of the MLX model changed", baseline="mlx", since="compare")
def mlx_position_base(context: Context) -> None:
    """The MLX directory's configuration has another base of the position encoding."""

    def change(config: dict[str, Any]) -> None:
        config["rope_theta"] = 500000.0
        config["rope_parameters"]["rope_theta"] = 500000.0

    change_export(context, lambda folder: rewrite_json(folder / "config.json", change))


@sabotage("norm epsilon of the MLX model changed", baseline="mlx", since="compare")
def mlx_norm_epsilon(context: Context) -> None:
    """The MLX directory's configuration has another epsilon of the norms."""
    change_export(
        context, lambda folder: rewrite_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-5))
    )


@sabotage("adapter of the bundle untrained", baseline="bundle", since="compare")
def bundle_adapter_untrained(context: Context) -> None:
    """The bundle carries the adapter as it was before the first step."""

    def change(folder: Path) -> None:
        def clear(tensors: dict[str, Any]) -> None:
            tensors.update({name: 0 * value for name, value in tensors.items() if "lora_B" in name})

        rewrite_weights(folder / "adapter" / "adapter_model.safetensors", clear)

    change_export(context, change)
