"""Does every export behave as the model it was made from? Where not: the first place where they differ, and why."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from finetune.backends import Serves, adapters, get
from finetune.checks import Part, Verdict, carried_out, compared, judge, missing, not_examined, short, silence
from finetune.checks.asked import sets
from finetune.checks.compared import MERGED, hops, is_adapter
from finetune.core.files import read_object
from finetune.parity import stored
from finetune.parity.tolerances import Bounds, bits, bounds
from finetune.recipe import Recipe
from finetune.recipe.exports import parse
from finetune.run import Run, evidence, layout
from finetune.run.records.compared import Constant, Difference, Exactness, Hop, Same, ServedAnswers

FACTOR_TOLERANCE = 0.02
SHOWN = 3
PLAIN = "plain text"
NO_NUMBERS = "weights that hold NaN or infinity, which make probabilities NaN (see weights_finite)"
_CAUSES = {
    "doubled_begin": "the begin token is there twice: the template writes it and the runtime adds it",
    "added_begin": "the runtime puts a token before the prompt that training did not have (add_bos_token)",
    "missing_begin": "the begin token that training had is missing (add_bos_token, or the template)",
    "added_end": "the runtime puts a token after the prompt that training did not have (add_eos_token)",
    "spaces": "the export's tokenizer puts spaces where training had none, or takes some away (add_prefix_space)",
    "same_text": "the text is the same, its tokens are not: the export's tokenizer splits differently "
    "(pre-tokenizer, merges or added tokens)",
    "text": "the chat template in the export is not that of the training",
    "rendered": "the export carries the training's chat template, and the runtime renders another one, or changes it",
    "tokens": "the export's tokenizer is not that of the training: its tokens are others, or have other numbers",
    "refused": "one of the two templates refuses this conversation",
}


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What was seen of one model of the chain, and what it is held to."""

    name: str
    path: str
    hop: Hop
    bound: Bounds
    promised: float  # bits of a weight

    def named(self, kind: str) -> str:
        return f"{kind}[{self.name}]"


# -- what is owed ------------------------------------------------------------------------------------------------------


def owed(recipe: Recipe, name: str) -> list[str]:
    """The verdicts on one model of the chain: its format and its runtime decide."""
    runtime = get(compared.runtime(recipe, name))
    plain = recipe.train is None or adapters.is_plain(recipe.train.lora.model_dump())
    merge = name == MERGED and recipe.backend == "torch" and plain
    carries = name != MERGED and parse(name).format.name == "bundle" and is_adapter(recipe)
    kinds = {
        "prompt_parity": True,
        "vocabulary_parity": True,
        "template_carried": True,
        "distribution_parity": runtime.scores,
        "distribution_worst": runtime.scores,
        "greedy_parity": True,
        "stop_parity": True,
        "no_special_tokens": True,
        "stop_tokens": True,
        "learned_parity": recipe.evaluate.probes is not None,
        "served_parity": isinstance(runtime, Serves) and bool(sets(recipe)),
        "constants_parity": True,
        "merged_once": merge,
        "merge_exact": merge,
        "adapter_carried": carries,
        "stored_bits": recipe.backend != "fake",  # whose models are no tensors
        "compared_as_listed": True,
    }
    return [f"{kind}[{name}]" for kind, wanted in kinds.items() if wanted]


def _owes(recipe: Recipe) -> Iterable[str]:
    return [verdict for name in hops(recipe) for verdict in owed(recipe, name)]


# -- the verdicts ------------------------------------------------------------------------------------------------------


def _check(recipe: Recipe, run: Run) -> list[Verdict]:
    """Every model of the chain is a part of its own: a damaged file costs the verdicts on that one alone."""
    parts = [
        Part(check=partial(do, name), owes=partial(names, name=name), evidence=layout.comparison(name).path)
        for name in hops(recipe)
        for do, names in ((_hop, _of_hop), (compared.as_listed, _of_list))
    ]
    return [verdict for part in parts for verdict in carried_out(part, recipe, run)]


def _of_hop(recipe: Recipe, name: str) -> list[str]:
    return [verdict for verdict in owed(recipe, name) if verdict not in _of_list(recipe, name)]


def _of_list(recipe: Recipe, name: str) -> list[str]:
    return [f"compared_as_listed[{name}]"]


def _hop(name: str, recipe: Recipe, run: Run) -> list[Verdict]:
    row = layout.comparison(name)
    hop = evidence.read(run, row)
    bound = bounds(name, recipe, hop["dtype"])
    one = _Seen(name=name, path=row.path, hop=hop, bound=bound, promised=bits(name, recipe))
    wanted = set(_of_hop(recipe, name))
    verdicts = [
        _prompts(one), _vocabulary(one), _template(one), *_distributions(one), _greedy(one), _stop(one), _leaks(one),
        _stops_at(one), _learned(one), _served(one), _constants(one), _factor(one, recipe, run), _exact(one, recipe, run),
        _adapter(one), _bits(one),
    ]  # fmt: skip
    return [verdict for verdict in verdicts if verdict.name in wanted]


def _prompts(one: _Seen) -> Verdict:
    found = one.hop["prompts"]
    why = f"{found['equal']} of {found['compared']} conversations and texts become the same token ids"
    if first := found["first"]:
        why += f"; {first['name']!r} differs from token {first['position']} on"
        why += f": {_difference(first)}. Likely cause: {_CAUSES[_kind(first, one.hop)]}"
    return judge(one.named("prompt_parity"), _share(found), "==", 1.0, "share", one.path, why)


def _difference(first: Difference) -> str:
    if first["kind"] == "refused":
        return short(first["found"])
    expected = f"expected {first['expected_text']!r} {first['expected']}"
    return f"{expected}, found {first['found_text']!r} {first['found']}"


def _kind(first: Difference, hop: Hop) -> str:
    """The kind of a difference, told apart by what else differs: a text that is no conversation has no template."""
    kind: str = first["kind"]
    if kind == "refused" and not hop["same_template"]:
        return "text"
    if kind != "text" or not hop["same_template"]:
        return kind
    other = hop["vocabulary"]["first"] is not None or first["name"].startswith(PLAIN)
    return "tokens" if other else "rendered"


def _vocabulary(one: _Seen) -> Verdict:
    found = one.hop["vocabulary"]
    why = f"{found['equal']} of {found['compared']} tokens in a text of the whole vocabulary come out as in training"
    if first := found["first"]:
        cause = first["kind"] if first["kind"] in ("same_text", "spaces") else "tokens"
        why += f"; {_difference(first)}. Likely cause: {_CAUSES[cause]}"
    return judge(one.named("vocabulary_parity"), _share(found), "==", 1.0, "share", one.path, why)


def _template(one: _Seen) -> Verdict:
    same = one.hop["same_template"]
    why = "the chat template of the training is in it, to the letter"
    if not same:
        why = "it has no chat template, or another than that of the training, which other tools will prompt it with"
    return judge(one.named("template_carried"), float(same), "==", 1.0, "yes", one.path, why)


def _distributions(one: _Seen) -> list[Verdict]:
    found, bound = one.hop["distributions"], one.bound
    if found is None:
        why = "what its runtime takes for likely was not compared, and it can tell"
        return [
            missing(one.named("distribution_parity"), "<=", bound.kl_mean, "nats mean", one.path, why),
            missing(one.named("distribution_worst"), "<=", bound.kl_max, "nats max", one.path, why),
        ]
    why = f"KL divergence from '{one.hop['reference']}' over {found['positions']} positions; same likeliest token at "
    why += f"{found['top1']:.1%}"
    mean = judge(one.named("distribution_parity"), found["mean"], "<=", one.bound.kl_mean, "nats mean", one.path, why)
    worst = found["worst"]
    why = (
        f"worst after {worst['after']!r}: expected {_tops(worst['expected_top5'])}, found {_tops(worst['found_top5'])}"
    )
    most = judge(one.named("distribution_worst"), found["max"], "<=", one.bound.kl_max, "nats max", one.path, why)
    return [_explained(verdict, one) for verdict in (mean, most)]


def _greedy(one: _Seen) -> Verdict:
    found, name = one.hop["greedy"], one.named("greedy_parity")
    if found["compared"] and not found["tokens"]:
        why = f"all {found['compared']} answers of '{one.hop['reference']}' are empty: the model answers nothing"
        return missing(name, ">=", one.bound.greedy, "share", one.path, why)
    ties = sum(gap is not None and gap <= one.bound.tie for gap in found["gaps"])
    why = f"{found['equal']} of {found['compared']} greedy answers are the same token by token"
    why += f" ({found['tokens_agreed']} of {found['tokens']} tokens)"
    if ties:
        why += f", {ties} part at a tie (within {one.bound.tie:g} nats)"
    if first := found["first"]:
        why += f"; first divergence at token {first['position']} of the answer to {short(first['prompt'])!r}: "
        why += f"expected {first['expected_next']!r}, found {first['found_next']!r}"
        if "expected_top5" in first:
            why += f"; {_tops(first['expected_top5'])} against {_tops(first['found_top5'])}"
    why += silence([each["text"] for each in one.hop["answers"]])
    share = (found["equal"] + ties) / found["compared"] if found["compared"] else None
    return _explained(judge(name, share, ">=", one.bound.greedy, "share", one.path, why), one)


def _stop(one: _Seen) -> Verdict:
    found = one.hop["stop"]
    if not found["compared"]:
        why = f"no answer of '{one.hop['reference']}' ends by itself within evaluate.max_new_tokens"
        return missing(one.named("stop_parity"), ">=", one.bound.stopped, "share", one.path, why)
    why = f"{found['stopped']} of {found['compared']} answers that ended by themselves still do"
    if first := found["first_unstopped"]:
        why += f"; not the one to {short(first['prompt'])!r}: {short(first['text'])!r}"
    verdict = judge(
        one.named("stop_parity"), found["stopped"] / found["compared"], ">=", one.bound.stopped, "share", one.path, why
    )
    weights = one.hop["distributions"] is not None and not one.hop["distributions"]["mean"] <= one.bound.kl_mean
    return _explained(verdict, one, of=None if weights and not one.hop["stops"]["missing"] else "eos_token_id")


def _stops_at(one: _Seen) -> Verdict:
    found = one.hop["stops"]
    why = f"left to itself the runtime ends an answer at the ids {found['at']}"
    if found["missing"]:
        why += f", and the training taught to end it with {found['missing']} (eos_token_id)"
    return judge(one.named("stop_tokens"), float(len(found["missing"])), "==", 0.0, "tokens missing", one.path, why)


def _leaks(one: _Seen) -> Verdict:
    found = one.hop["stop"]
    why = "no mark of a turn stands in the text of an answer"
    if leak := found["first_leak"]:
        why = f"{leak['token']!r} stands in the answer to {short(leak['prompt'])!r}: {short(leak['text'])!r}. Likely "
        why += "cause: the runtime does not take it for a special token, or does not stop at it"
    return judge(one.named("no_special_tokens"), float(found["leaks"]), "==", 0.0, "answers", one.path, why)


def _learned(one: _Seen) -> Verdict:
    found = one.hop["learned"]
    known, kept = found["known"], found["kept"]
    if not known:
        why = f"'{one.hop['reference']}' answers none of the probes"
        return missing(one.named("learned_parity"), ">=", one.bound.learned, "share", one.path, why)
    why = f"{kept} of the {known} probes that '{one.hop['reference']}' answers are answered"
    if found["lost"]:
        lost = found["lost"][0]
        why += f"; lost: {short(lost['prompt'])!r} -> {short(lost['found'])!r}"
    # Of a few probes one may fall to rounding alone, where the weights were rounded.
    least = min(one.bound.learned, (known - 1) / known) if ":q" in one.name else one.bound.learned
    return _explained(judge(one.named("learned_parity"), kept / known, ">=", least, "share", one.path, why), one)


def _served(one: _Seen) -> Verdict:
    found = one.hop["served"]
    if found is None:
        why = "the runtime's own server was not asked"
        return missing(one.named("served_parity"), ">=", one.bound.greedy, "share", one.path, why)
    why = f"{found['equal']} of {found['compared']} answers of the runtime's own server are those of the runtime"
    if first := found["first"]:
        why += f"; {short(first['prompt'])!r}: expected {short(first['expected'])!r}, found {short(first['found'])!r}. "
        cause = "the server renders the conversation otherwise, or changes it"
        why += f"Likely cause: {NO_NUMBERS if _of_nan(one) else cause}"
    return judge(one.named("served_parity"), _share(found), ">=", one.bound.greedy, "share", one.path, why)


def _constants(one: _Seen) -> Verdict:
    found, different = one.hop["constants"], _different(one.hop)
    why = f"{found['compared'] - len(found['different']) + len(different)} constants are read alike"
    if different:
        why = _named(different)
    if one.hop["mended"]:
        why += f"; mended: {' '.join(one.hop['mended'])}"
    return judge(one.named("constants_parity"), float(len(different)), "==", 0.0, "constants", one.path, why)


def _different(hop: Hop) -> list[Constant]:
    """The constants read otherwise. An embedding that was trained alone unties the head, which then is as it was."""
    exact = hop["merge"] is not None and not hop["merge"]["off"]
    return [each for each in hop["constants"]["different"] if not (exact and each["name"] == "tie_word_embeddings")]


def _factor(one: _Seen, recipe: Recipe, run: Run) -> Verdict:
    factor, name = one.hop["merge_factor"], one.named("merged_once")
    if factor is None:
        return _untold(name, FACTOR_TOLERANCE, "distance from 1", one, recipe, run)
    why = f"the adapter is {factor:.3f} times in the merged weights (1: merged once)"
    return judge(name, abs(factor - 1), "<=", FACTOR_TOLERANCE, "distance from 1", one.path, why)


def _exact(one: _Seen, recipe: Recipe, run: Run) -> Verdict:
    found, name = one.hop["merge"], one.named("merge_exact")
    if found is None:
        return _untold(name, 0.0, "weights off", one, recipe, run)
    why = f"{found['compared'] - len(found['off'])} of {found['compared']} weights are base + adapter, but for rounding"
    if found["off"]:
        why += f"; {_off(found)}"
    return judge(name, float(len(found["off"])), "==", 0.0, "weights off", one.path, why)


def _untold(name: str, bound: float, unit: str, one: _Seen, recipe: Recipe, run: Run) -> Verdict:
    """Where the merged weights were not held against base and adapter: whether they can be."""
    if why := _no_sum(recipe, run):
        remedy = "nothing: the answers and distributions of the merged model are compared all the same"
        return not_examined(name, "<=", bound, unit, one.path, why, remedy)
    why = "the merged weights were not held against base and adapter, and they can be"
    return missing(name, "<=", bound, unit, one.path, why)


def _no_sum(recipe: Recipe, run: Run) -> str:
    """Why the files on disk do not say what base and adapter come to; empty where they do."""
    base, adapter = evidence.final(run, recipe)
    if adapter is None:
        return ""
    added = adapters.weights(stored.names(adapter))
    if added is None or not adapters.is_plain(read_object(adapter / "adapter_config.json")):
        return "the adapter is no plain LoRA, whose weights are base + scale * B A"
    if not added <= set(stored.names(base)):
        return "the base's files have other names for the weights that the adapter adds to, or are no safetensors"
    return ""


def _off(found: Exactness) -> str:
    names = [each["name"] + (" (NaN)" if math.isnan(each["roundings"] or 0.0) else "") for each in found["off"]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"not base + adapter: {', '.join(names[:SHOWN])}{more}"


def _adapter(one: _Seen) -> Verdict:
    found, name = one.hop["adapter"], one.named("adapter_carried")
    if found is None:
        return missing(name, "==", 0.0, "tensors off", one.path, "there is no adapter inside it")
    why = f"{found['compared']} tensors of the adapter inside it"
    why += f"; not those that were trained: {found['other'][0]}" if found["other"] else " are those that were trained"
    return judge(name, float(len(found["other"])), "==", 0.0, "tensors off", one.path, why)


def _bits(one: _Seen) -> Verdict:
    found, name, unit = one.hop["bits"], one.named("stored_bits"), "bits a weight"
    if found is None:
        return missing(name, ">=", one.promised, unit, one.path, "nobody looked how much room its weights take")
    why = f"a weight takes {found:.2f} bits in its files, and at least {one.promised:g} in what it is called"
    return judge(name, found, ">=", one.promised, unit, one.path, why)


def _explained(verdict: Verdict, one: _Seen, of: str | None = None) -> Verdict:
    """The verdict; where it failed, with the likely cause that the rest of the evidence points to."""
    if verdict.passed:
        return verdict
    return replace(verdict, why=f"{verdict.why}. Likely cause: {_cause(one, of)}")


def _cause(one: _Seen, of: str | None) -> str:
    if _of_nan(one):
        return NO_NUMBERS
    different = _different(one.hop)
    if chosen := [each for each in different if of is None or each["name"] == of] or different:
        return _named(chosen)
    factor = one.hop["merge_factor"]
    if factor is not None and abs(factor - 1) > FACTOR_TOLERANCE:
        return f"the adapter is {factor:.2f} times in the merged weights; merge again from the base model"
    if one.hop["merge"] is not None and one.hop["merge"]["off"]:
        return _off(one.hop["merge"])
    if one.hop["bits"] is not None and one.hop["bits"] < one.promised:
        return f"a weight takes {one.hop['bits']:.1f} bits, not the {one.promised:g} of what it is called"
    if one.hop["stops"]["missing"] and of == "eos_token_id":
        return f"the runtime does not stop at the ids {one.hop['stops']['missing']} (eos_token_id)"
    if of == "eos_token_id":
        return "the runtime does not know the end-of-turn token, or the weights are too coarse"
    if ":q" in one.hop["hop"]:
        return "the quantization is too coarse for this model; try one with more bits (q8_0)"
    return (
        "other weights than those of the model it is made from (an export of an older run, or tensors put elsewhere?)"
    )


def _of_nan(one: _Seen) -> bool:
    """Whether the probabilities themselves are none."""
    found = one.hop["distributions"]
    return found is not None and math.isnan(found["mean"])


def _named(different: list[Constant]) -> str:
    return "; ".join(
        f"{each['name']} is {each['expected']} in the model, {each['found']} in the export" for each in different
    )


def _share(found: Same | ServedAnswers) -> float | None:
    return found["equal"] / found["compared"] if found["compared"] else None


def _tops(tokens: list[list[Any]]) -> str:
    return "[" + ", ".join(f"{text!r} {probability:.3f}" for text, probability in tokens) + "]"


PARTS: tuple[Part, ...] = (*compared.PARTS, Part(check=_check, owes=_owes, evidence=layout.MATERIAL.path))
