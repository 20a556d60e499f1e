"""Memory and disk that a training needs, from the model's `config.json` and the recipe alone: nothing is loaded.

Weights, gradients and optimizer state are exact counts. Activations count what the autograd graph of a Llama-like or
GPT-2-like block keeps for the backward pass. The loss is TRL's: the head is computed in tiles of at most 4096 tokens by
32768 words, in float32 where there is no Triton. `tests/tier1/test_estimate.py` holds all of it against measured runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.arithmetic import DTYPE_BYTES
from finetune.core.errors import ResourceError, UsageError
from finetune.core.files import read_jsonl, read_object
from finetune.core.memory import available, disk_free, gpus, human
from finetune.models import tiny
from finetune.recipe.quantizers import quantizer
from finetune.run import Run

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.recipe.sections import Lora, Optimization, Train

MIB = 1024**2
RUNTIME = 330 * MIB  # Python with torch, transformers, peft and trl imported, beyond what the tensors take
_TILE_TOKENS, _TILE_WORDS, _TILE_COPIES = 4096, 32768, 10
_UNGATED = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "phi", "bloom", "falcon", "starcoder2")
_TIED_UNLESS_SAID = ("gpt2", "gpt_neo", "opt", "bloom", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text")
EMBEDDED = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    }
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides a model's size. `linears` are the (name, inputs, outputs) of one layer; `copies` how often each is
    there (experts)."""

    hidden: int
    layers: int
    intermediate: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    gated: bool
    positions: int
    biases: bool
    linears: tuple[tuple[str, int, int, int], ...]

    @property
    def parameters(self) -> int:
        linear = sum((inputs * outputs + self.biases * outputs) * copies for _, inputs, outputs, copies in self.linears)
        norms = 2 * self.hidden * (1 + self.biases)
        embeddings = (self.vocab * (1 if self.tied else 2) + self.positions) * self.hidden
        return self.layers * (linear + norms) + embeddings + norms // 2


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes, unless the name says otherwise. `total` is the process at its peak on the device that computes;
    `training_state` is weights + gradients + optimizer; `checkpoint` is one checkpoint on disk."""

    method: str
    tokens_per_step: int
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    runtime: int
    checkpoint: int

    @property
    def training_state(self) -> int:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return self.training_state + self.activations + self.logits + self.runtime

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "training_state": self.training_state, "total": self.total}


def shape(config: Mapping[str, Any]) -> Shape:
    """The shape in a `config.json`, by Llama's key names or GPT-2's. Raises UsageError where a size is missing."""
    config = {**config, **config["text_config"]} if isinstance(config.get("text_config"), Mapping) else config

    def size(*names: str, default: int | None = None) -> int:
        for name in names:
            if isinstance(config.get(name), int):
                return int(config[name])
        if default is None:
            raise UsageError(f"the model's config.json has no '{names[0]}', so its memory cannot be estimated")
        return default

    kind = str(config.get("model_type", ""))
    hidden, layers = size("hidden_size", "n_embd", "d_model"), size("num_hidden_layers", "n_layer", "num_layers")
    heads = size("num_attention_heads", "n_head")
    kv_heads = size("num_key_value_heads", default=heads)
    head_dim = size("head_dim", default=hidden // heads)
    intermediate = size("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
    experts = size("num_local_experts", "num_experts", "n_routed_experts", default=1)
    gated = kind not in _UNGATED
    queries, keys = heads * head_dim, kv_heads * head_dim
    if kind == "gpt2":
        linears = [("c_attn", hidden, 3 * hidden, 1), ("c_proj", hidden, hidden, 1)]
        linears += [("c_fc", hidden, intermediate, 1), ("c_proj", intermediate, hidden, 1)]
    else:
        linears = [("q_proj", hidden, queries, 1), ("k_proj", hidden, keys, 1)]
        linears += [("v_proj", hidden, keys, 1), ("o_proj", queries, hidden, 1)]
        linears += [("gate_proj", hidden, intermediate, experts)] if gated else []
        linears += [("up_proj", hidden, intermediate, experts), ("down_proj", intermediate, hidden, experts)]
    return Shape(
        hidden=hidden,
        layers=layers,
        intermediate=intermediate,
        vocab=size("vocab_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        tied=bool(config.get("tie_word_embeddings", kind in _TIED_UNLESS_SAID)),
        gated=gated,
        positions=size("n_positions", default=0) if kind in ("gpt2", "gpt_neo", "opt") else 0,
        biases=not gated,
        linears=tuple(linears),
    )


def lora_parameters(model: Shape, lora: Lora) -> int:
    """Parameters of the adapter: `r * (inputs + outputs)` for every linear layer that it goes into.

    `target_modules` given as a regular expression is counted as all linear layers.
    """
    chosen = [
        (inputs, outputs, copies)
        for name, inputs, outputs, copies in model.linears
        if isinstance(lora.target_modules, str) or any(name in module for module in lora.target_modules)
    ]
    layers = model.layers if lora.layers_to_transform is None else len(lora.layers_to_transform)
    dora = sum(outputs * copies for _, outputs, copies in chosen) if lora.use_dora else 0
    saved = {"embed_tokens", "wte", "lm_head"} & set(lora.modules_to_save or [])
    return (
        layers * (sum(lora.r * (inputs + outputs) * copies for inputs, outputs, copies in chosen) + dora)
        + len(saved) * model.vocab * model.hidden
    )


def optimizer_bytes(optim: str, trainable: int, hidden: int) -> int:
    """State of the optimizer of that name for `trainable` float32 parameters."""
    if "sgd" in optim:
        return 0
    if "adafactor" in optim:  # a row and a column per matrix instead of a number per weight
        return 2 * 4 * trainable // max(hidden, 1)
    if any(word in optim for word in ("8bit", "int8", "fp8")):
        return 2 * trainable
    if "4bit" in optim:
        return trainable
    if any(word in optim for word in ("lion", "adagrad", "rmsprop")):
        return 4 * trainable
    return 8 * trainable


def estimate(
    config: Mapping[str, Any],
    train: Train | Optimization,
    max_length: int | None = None,
    *,
    method: str | None = None,
    lora: Lora | None = None,
    dtype: str = "float32",
    quantization: str | None = None,
) -> Estimate:
    """What one training step needs at its peak.

    `max_length` is the longest row in tokens (the recipe's own when None). `method` and `lora` override `train`'s, for
    comparing and for DPO, whose section has neither: its rows count twice (chosen and rejected). `quantization` is the
    quantizer that holds the base's linear layers, for LoRA.
    """
    from finetune.recipe.sections import Lora

    model = shape(config)
    preference = getattr(train, "method", "lora") == "dpo"
    method = method or ("lora" if preference else str(getattr(train, "method", "lora")))
    lora = lora or getattr(train, "lora", None) or Lora()
    length = max_length or train.max_length
    tokens = train.per_device_train_batch_size * length * (2 if preference else 1)
    element = DTYPE_BYTES[dtype]
    compute = 2 if train.bf16 or train.fp16 else element

    adapter = lora_parameters(model, lora) if method == "lora" else 0
    trainable = adapter if method == "lora" else model.parameters
    per_token = _kept_per_layer(model) + (_kept_by_lora(model) if method == "lora" else 0)
    if train.gradient_checkpointing:  # the input of every layer, and one layer computed again
        activations = tokens * (model.layers * model.hidden + per_token) * compute
    else:
        activations = tokens * model.layers * per_token * compute
    return Estimate(
        method=method,
        tokens_per_step=tokens,
        parameters=model.parameters,
        trainable=trainable,
        weights=_base_bytes(model, element, quantization if method == "lora" else None) + adapter * 4,
        gradients=trainable * (4 if method == "lora" else element),
        optimizer=optimizer_bytes(train.optim, trainable, model.hidden),
        activations=activations,
        logits=min(tokens, _TILE_TOKENS) * min(model.vocab, _TILE_WORDS) * 4 * _TILE_COPIES,
        runtime=RUNTIME,
        checkpoint=trainable * 4 + optimizer_bytes(train.optim, trainable, model.hidden),
    )


def _base_bytes(model: Shape, element: int, quantization: str | None) -> int:
    """The base's weights; of a quantizer the linear layers, of which embeddings, norms and the output head are none."""
    if quantization is None:
        return model.parameters * element
    held = model.layers * sum(inputs * outputs * copies for _, inputs, outputs, copies in model.linears)
    return (model.parameters - held) * element + int(held * quantizer(quantization).bits / 8)


def _kept_per_layer(model: Shape) -> int:
    """Numbers a token leaves in one layer for the backward pass."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    norms = 2 * 3 * model.hidden
    attention = queries + 2 * keys  # projections
    attention += queries + keys + 2 * queries  # rotated, then keys and values repeated for every head
    attention += 2 * queries  # attention's output, and the input of the output projection
    mlp = (4 if model.gated else 3) * model.intermediate
    return norms + attention + mlp


def _kept_by_lora(model: Shape) -> int:
    """Numbers more that a token leaves in a layer with adapters: the output of every adapted linear layer."""
    return sum(outputs for _, _, outputs, _ in model.linears)


# -- a recipe ----------------------------------------------------------------------------------------------------------


def model_config(recipe: Recipe) -> dict[str, Any] | None:
    """The model's `config.json` where it can be read without a download or a conversion, else None."""
    path = recipe.model.path
    if path in EMBEDDED:
        return dict(EMBEDDED[path])
    if tiny.is_name(path):
        return tiny.parse(path).config
    local = Path(path)
    for place in (local, Path(recipe.model.base_model or "")):
        if str(place) != "." and (place / "config.json").is_file():
            return read_object(place / "config.json")
    adapter = local / "adapter_config.json"
    if adapter.is_file():
        base = read_object(adapter).get("base_model_name_or_path")
        if isinstance(base, str) and base != path:
            return model_config(recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": base})}))
    return None


def of_recipe(
    recipe: Recipe, config: Mapping[str, Any], max_length: int | None = None, *, method: str | None = None
) -> Estimate | None:
    """The estimate of the hungriest training in a recipe (SFT or DPO), or None when it trains nothing."""
    found = by_stage(recipe, config, max_length, method=method)
    return max(found.values(), key=lambda each: each.total, default=None)


def by_stage(
    recipe: Recipe, config: Mapping[str, Any], max_length: int | None = None, *, method: str | None = None
) -> dict[str, Estimate]:
    """The estimates of the recipe's trainings: `train` (SFT), `align` (DPO, trained by `train`'s method)."""
    found, dtype, held, train = {}, recipe.model.dtype, recipe.model.quantization, recipe.train
    method = method or (train.method if train is not None else "lora")
    if train is not None:
        found["train"] = estimate(config, train, max_length, method=method, dtype=dtype, quantization=held)
    if recipe.align is not None:
        lora = train.lora if train is not None else None
        found["align"] = estimate(
            config, recipe.align, max_length, method=method, lora=lora, dtype=dtype, quantization=held
        )
    return found


def disk_needed(recipe: Recipe, need: Estimate) -> int:
    """Bytes that the run's checkpoints, result and merged model take."""
    per_stage = 0
    for section in (recipe.train, recipe.align):
        if section is not None:
            kept = 0 if section.save_strategy == "no" else section.save_total_limit or 10
            per_stage += need.checkpoint * (kept + 1) + need.trainable * 4
    merged = need.parameters * DTYPE_BYTES[recipe.model.dtype] if need.method == "lora" else 0
    return per_stage + merged


def guard(need: Estimate, run_path: str | Path, recipe: Recipe, *, have: int | None = None) -> None:
    """Raise ResourceError when memory (`have`, measured when None) or disk cannot hold what `need` says."""
    have = available() if have is None else have
    if need.total > have:
        raise ResourceError(
            f"too little memory: {need.method} training at {need.tokens_per_step} tokens a step needs about "
            f"{human(need.total)}, {human(have)} is available. {_lower(need, recipe)} "
            "To try anyway, set FT_IGNORE_ESTIMATE=1."
        )
    disk, free = disk_needed(recipe, need), disk_free(run_path)
    if disk > free:
        raise ResourceError(
            f"too little disk: checkpoints and models need about {human(disk)}, {human(free)} is free at {run_path}. "
            "Lower train.save_total_limit, set train.save_strategy to 'no', or choose another disk with --run DIR. "
            "To try anyway, set FT_IGNORE_ESTIMATE=1."
        )


def check_resources(recipe: Recipe, run: Run, *, method: str | None = None) -> None:
    """`guard` for a run that is fetched and prepared: with its own model and the longest row it really has.

    `method` overrides `train.method`, for experiments that train another way. Does nothing for backends without
    weights, and under FT_IGNORE_ESTIMATE=1.
    """
    from finetune.run import evidence

    if ignored(recipe):
        return
    found = Path(evidence.fetched(run)["base"]) / "config.json"
    if not found.is_file():
        return
    config = read_object(found)
    needs = []
    for stage, name in (("train", "train.jsonl"), ("align", "preferences.jsonl")):
        packed = stage == "train" and recipe.train is not None and recipe.train.packing
        longest = None if packed else _longest(run.path / "prepare" / name)
        needs += [need for key, need in by_stage(recipe, config, longest, method=method).items() if key == stage]
    if needs:
        guard(max(needs, key=lambda need: need.total), run.path, recipe, have=room(recipe))


def check_start(recipe: Recipe, run_path: str | Path) -> None:
    """`guard` before anything is fetched or prepared: what the shortest row would need, where the size is known."""
    config = None if ignored(recipe) else model_config(recipe)
    need = of_recipe(recipe, config) if config is not None else None
    if need is not None:
        least = replace(need, tokens_per_step=1, activations=0, logits=0)
        guard(least, run_path, recipe, have=room(recipe))


def ignored(recipe: Recipe) -> bool:
    """Whether nothing is to be held against the machine's size."""
    return recipe.backend != "torch" or os.environ.get("FT_IGNORE_ESTIMATE") == "1"


def room(recipe: Recipe) -> int:
    """Free bytes where this recipe computes: on its GPU if it has one, else in the machine's memory."""
    if recipe.model.device in ("auto", "cuda"):
        found = gpus()
        try:
            has_cuda = bool(found) and not version("torch").endswith("+cpu")
        except PackageNotFoundError:
            has_cuda = False
        if has_cuda:
            return max(gpu.free for gpu in found)
    return available()


def _longest(path: Path) -> int | None:
    """Tokens in the longest prepared row; None where there are no rows."""
    if not path.is_file():
        return None
    longest = 0
    for row in read_jsonl(path):
        if "input_ids" in row:
            longest = max(longest, len(row["input_ids"]))
        else:
            answers = max(len(row.get("chosen_ids", [])), len(row.get("rejected_ids", [])))
            longest = max(longest, len(row.get("prompt_ids", [])) + answers)
    return longest or None


def _lower(need: Estimate, recipe: Recipe) -> str:
    sections = [section for section in (recipe.train, recipe.align) if section is not None]
    ways = []
    if need.method == "full":
        ways.append("use train.method: lora")
    if any(not section.gradient_checkpointing for section in sections):
        ways.append("set train.gradient_checkpointing: true")
    if any(section.per_device_train_batch_size > 1 for section in sections):
        ways.append("lower train.per_device_train_batch_size (and raise train.gradient_accumulation_steps)")
    ways.append("lower train.max_length")
    if recipe.model.dtype == "float32":
        ways.append("set model.dtype: bfloat16")
    return "To lower it: " + ", or ".join(ways) + "."
