"""How far an export may be from the merged model, by format. docs/architecture.md says how they were found."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetune.recipe import Recipe
from finetune.recipe.exports import parse


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """`kl_mean` and `kl_max` in nats; `tie` (nats): an answer that parts where the other token is no further than this
    behind is not counted against an export; the others are least shares of the answers compared."""

    kl_mean: float
    kl_max: float
    tie: float
    greedy: float
    stopped: float
    learned: float


# By what is stored of a weight; a merge in float32 and a bundle count as exact. From bench/parity.py over ten seeds:
# twice the worst, ten times and more for what only rounds.
_EXACT = Bounds(kl_mean=1e-7, kl_max=1e-5, tie=1e-3, greedy=0.95, stopped=0.95, learned=0.95)
_TABLE: dict[str, Bounds] = {
    "f32": replace(_EXACT, kl_mean=1e-5, kl_max=1e-3),
    "f16": replace(_EXACT, kl_mean=1e-4, kl_max=1e-2, tie=0.02),
    "bf16": replace(_EXACT, kl_mean=1e-2, kl_max=2e-1, tie=0.2),
    "q8": Bounds(kl_mean=2e-2, kl_max=0.7, tie=1.0, greedy=0.9, stopped=0.95, learned=0.95),
    "q6": Bounds(kl_mean=4e-2, kl_max=0.8, tie=1.0, greedy=0.9, stopped=0.9, learned=0.95),
    "q5": Bounds(kl_mean=3e-1, kl_max=8.0, tie=2.0, greedy=0.6, stopped=0.9, learned=0.9),
    "q4": Bounds(kl_mean=3e-1, kl_max=8.0, tie=2.0, greedy=0.6, stopped=0.9, learned=0.8),
    "q3": Bounds(kl_mean=8e-1, kl_max=10.0, tie=3.0, greedy=0.4, stopped=0.75, learned=0.6),
    "q2": Bounds(kl_mean=2.0, kl_max=15.0, tie=4.0, greedy=0.2, stopped=0.5, learned=0.3),
}
# Bits that a weight takes at least, by what an export calls itself: llama.cpp's block formats, MLX's groups of 64.
_BITS = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.5625, "q5_k_m": 5.5, "q5_k_s": 5.5, "q5_1": 6.0,
    "q5_0": 5.5, "q4_k_m": 4.5, "q4_k_s": 4.5, "q4_1": 5.0, "q4_0": 4.5, "q3_k_m": 3.4375, "q2_k": 2.5625, "q8": 8.5,
    "q4": 4.5,
}  # fmt: skip
_KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def bounds(hop: str, recipe: Recipe, computed: str = "float32") -> Bounds:
    """The bounds of a hop (`merged`, or an export's name), with what the recipe's `expect` says instead.

    `computed` is the type that the model before was run in; a coarser one than float32 widens every bound.
    """
    found = _of_format(hop, recipe)
    if computed != "float32":
        coarse = _TABLE[_KINDS[computed]]
        found = Bounds(
            kl_mean=max(found.kl_mean, coarse.kl_mean),
            kl_max=max(found.kl_max, coarse.kl_max),
            tie=max(found.tie, coarse.tie),
            greedy=min(found.greedy, coarse.greedy),
            stopped=min(found.stopped, coarse.stopped),
            learned=min(found.learned, coarse.learned),
        )
    expect = recipe.expect
    return replace(
        found,
        kl_mean=expect.export_kl_mean_max.get(hop, found.kl_mean),
        greedy=expect.export_greedy_min.get(hop, found.greedy),
        learned=min(found.learned, expect.export_learned_min),
    )


def told(bound: str) -> str:
    """One of the bounds by what is stored of a weight, in words: `0.95 as q8, 0.9 as q6`. Alike ones are told together."""
    kinds: dict[float, list[str]] = {}
    for kind, each in {"merged": _EXACT, "bundle": _EXACT, **_TABLE}.items():
        kinds.setdefault(getattr(each, bound), []).append(kind)
    listed = ", ".join(f"{value:g} as {' '.join(names)}" for value, names in kinds.items())
    return f"{listed}; wider where model.dtype is coarser"


def _of_format(hop: str, recipe: Recipe) -> Bounds:
    if hop == "merged":  # stored in the training's type, what is added rounded to it
        return _EXACT if recipe.model.dtype == "float32" else _TABLE[_KINDS[recipe.model.dtype]]
    target = parse(hop)
    if target.format.name == "bundle":
        return _EXACT
    return _TABLE[target.variant.partition("_")[0] or _KINDS[recipe.model.dtype]]


def bits(hop: str, recipe: Recipe) -> float:
    """The bits that a weight takes at least in what a hop's name promises; the training's own type without a variant."""
    variant = "" if hop == "merged" else parse(hop).variant
    return _BITS[variant or _KINDS[recipe.model.dtype]]
