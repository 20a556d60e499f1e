"""Does every export behave as the model it was made from? Where not: the first place where they differ, and why."""

from __future__ import annotations

import json
import math
from typing import Any

from finetune.checks import Verdict, judge, missing, short, silence
from finetune.parity.bounds import Bounds, bits, bounds
from finetune.recipe import Recipe
from finetune.run import Run

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


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    verdicts = []
    adapter = (run.path / "compare" / "merged.json").is_file() or (run.path / "align" / "adapter").is_dir()
    hops = ["merged"] if adapter or (run.path / "train" / "adapter").is_dir() else []
    for name in (*hops, *recipe.export):
        path = f"compare/{name.replace(':', '-')}.json"
        file = run.path / path
        if not file.is_file():
            why = f"'{name}' was not compared with the model it was made from"
            verdicts.append(missing(f"prompt_parity[{name}]", "==", 1.0, "share", path, why))
            continue
        seen = json.loads(file.read_text(encoding="utf-8"))
        if "bits" not in seen:
            why = f"'{name}' was compared by an earlier version; compare it again with: finetune compare RECIPE"
            verdicts.append(missing(f"prompt_parity[{name}]", "==", 1.0, "share", path, why))
            continue
        seen |= {"bits_promised": bits(name, recipe), "probes": recipe.evaluate.probes is not None}
        verdicts += _hop(name, seen, bounds(name, recipe, seen["dtype"]), path)
    return verdicts


def _hop(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> list[Verdict]:
    verdicts = [_prompts(name, seen, path), _vocabulary(name, seen, path), _template(name, seen, path)]
    if seen["distributions"] is not None:
        verdicts += _distributions(name, seen, bound, path)
    verdicts += [_greedy(name, seen, bound, path), _stop(name, seen, bound, path), _leaks(name, seen, path)]
    verdicts.append(_stops_at(name, seen, path))
    if seen["learned"]["known"] or seen["probes"]:
        verdicts.append(_learned(name, seen, bound, path))
    if seen["served"] is not None:
        verdicts.append(_served(name, seen, bound, path))
    verdicts.append(_constants(name, seen, path))
    if seen["merge_factor"] is not None:
        verdicts.append(_factor(name, seen, path))
    if seen["merge"] is not None:
        verdicts.append(_exact(name, seen, path))
    if seen["adapter"] is not None:
        verdicts.append(_adapter(name, seen, path))
    if seen["bits"] is not None:
        verdicts.append(_bits(name, seen, path))
    return verdicts


def _prompts(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found = seen["prompts"]
    why = f"{found['equal']} of {found['compared']} conversations and texts become the same token ids"
    if first := found["first"]:
        why += f"; {first['name']!r} differs from token {first['position']} on"
        why += f": {_difference(first)}. Likely cause: {_CAUSES[_kind(first, seen)]}"
    return judge(f"prompt_parity[{name}]", _share(found), "==", 1.0, "share", path, why)


def _difference(first: dict[str, Any]) -> str:
    if first["kind"] == "refused":
        return short(first["found"])
    expected = f"expected {first['expected_text']!r} {first['expected']}"
    return f"{expected}, found {first['found_text']!r} {first['found']}"


def _kind(first: dict[str, Any], seen: dict[str, Any]) -> str:
    """The kind of a difference, told apart by what else differs: a text that is no conversation has no template."""
    kind: str = first["kind"]
    if kind == "refused" and not seen["same_template"]:
        return "text"
    if kind != "text" or not seen["same_template"]:
        return kind
    other = seen["vocabulary"]["first"] is not None or first["name"].startswith(PLAIN)
    return "tokens" if other else "rendered"


def _vocabulary(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found = seen["vocabulary"]
    why = f"{found['equal']} of {found['compared']} tokens in a text of the whole vocabulary come out as in training"
    if first := found["first"]:
        cause = first["kind"] if first["kind"] in ("same_text", "spaces") else "tokens"
        why += f"; {_difference(first)}. Likely cause: {_CAUSES[cause]}"
    return judge(f"vocabulary_parity[{name}]", _share(found), "==", 1.0, "share", path, why)


def _template(name: str, seen: dict[str, Any], path: str) -> Verdict:
    same = seen["same_template"]
    why = "the chat template of the training is in it, to the letter"
    if not same:
        why = "it has no chat template, or another than that of the training, which other tools will prompt it with"
    return judge(f"template_carried[{name}]", float(same), "==", 1.0, "yes", path, why)


def _distributions(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> list[Verdict]:
    found = seen["distributions"]
    why = f"KL divergence from '{seen['reference']}' over {found['positions']} positions; same likeliest token at "
    why += f"{found['top1']:.1%}"
    mean = judge(f"distribution_parity[{name}]", found["mean"], "<=", bound.kl_mean, "nats mean", path, why)
    worst = found["worst"]
    why = (
        f"worst after {worst['after']!r}: expected {_tops(worst['expected_top5'])}, found {_tops(worst['found_top5'])}"
    )
    most = judge(f"distribution_worst[{name}]", found["max"], "<=", bound.kl_max, "nats max", path, why)
    return [_explained(verdict, seen) for verdict in (mean, most)]


def _greedy(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> Verdict:
    found = seen["greedy"]
    if found["compared"] and not found["tokens"]:
        why = f"all {found['compared']} answers of '{seen['reference']}' are empty: the model answers nothing"
        return missing(f"greedy_parity[{name}]", ">=", bound.greedy, "share", path, why)
    ties = sum(gap is not None and gap <= bound.tie for gap in found["gaps"])
    why = f"{found['equal']} of {found['compared']} greedy answers are the same token by token"
    why += f" ({found['tokens_agreed']} of {found['tokens']} tokens)"
    if ties:
        why += f", {ties} part at a tie (within {bound.tie:g} nats)"
    if first := found["first"]:
        why += f"; first divergence at token {first['position']} of the answer to {short(first['prompt'])!r}: "
        why += f"expected {first['expected_next']!r}, found {first['found_next']!r}"
        if "expected_top5" in first:
            why += f"; {_tops(first['expected_top5'])} against {_tops(first['found_top5'])}"
    why += silence([each["text"] for each in seen["answers"]])
    share = (found["equal"] + ties) / found["compared"] if found["compared"] else None
    return _explained(judge(f"greedy_parity[{name}]", share, ">=", bound.greedy, "share", path, why), seen)


def _stop(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> Verdict:
    found = seen["stop"]
    if not found["compared"]:
        why = f"no answer of '{seen['reference']}' ends by itself within evaluate.max_new_tokens"
        return missing(f"stop_parity[{name}]", ">=", bound.stopped, "share", path, why)
    why = f"{found['stopped']} of {found['compared']} answers that ended by themselves still do"
    if first := found["first_unstopped"]:
        why += f"; not the one to {short(first['prompt'])!r}: {short(first['text'])!r}"
    verdict = judge(
        f"stop_parity[{name}]", found["stopped"] / found["compared"], ">=", bound.stopped, "share", path, why
    )
    weights = seen["distributions"] is not None and not seen["distributions"]["mean"] <= bound.kl_mean
    return _explained(verdict, seen, of=None if weights and not seen["stops"]["missing"] else "eos_token_id")


def _stops_at(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found = seen["stops"]
    why = f"left to itself the runtime ends an answer at the ids {found['at']}"
    if found["missing"]:
        why += f", and the training taught to end it with {found['missing']} (eos_token_id)"
    return judge(f"stop_tokens[{name}]", float(len(found["missing"])), "==", 0.0, "tokens missing", path, why)


def _leaks(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found = seen["stop"]
    why = "no mark of a turn stands in the text of an answer"
    if leak := found["first_leak"]:
        why = f"{leak['token']!r} stands in the answer to {short(leak['prompt'])!r}: {short(leak['text'])!r}. Likely "
        why += "cause: the runtime does not take it for a special token, or does not stop at it"
    return judge(f"no_special_tokens[{name}]", float(found["leaks"]), "==", 0.0, "answers", path, why)


def _learned(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> Verdict:
    found = seen["learned"]
    known, kept = found["known"], found["kept"]
    if not known:
        why = f"'{seen['reference']}' answers none of the probes"
        return missing(f"learned_parity[{name}]", ">=", bound.learned, "share", path, why)
    why = f"{kept} of the {known} probes that '{seen['reference']}' answers are answered"
    if found["lost"]:
        lost = found["lost"][0]
        why += f"; lost: {short(lost['prompt'])!r} -> {short(lost['found'])!r}"
    # Of a few probes one may fall to rounding alone, where the weights were rounded.
    least = min(bound.learned, (known - 1) / known) if ":q" in name else bound.learned
    return _explained(judge(f"learned_parity[{name}]", kept / known, ">=", least, "share", path, why), seen)


def _served(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> Verdict:
    found = seen["served"]
    why = f"{found['equal']} of {found['compared']} answers of the runtime's own server are those of the runtime"
    if first := found["first"]:
        why += f"; {short(first['prompt'])!r}: expected {short(first['expected'])!r}, found {short(first['found'])!r}. "
        cause = "the server renders the conversation otherwise, or changes it"
        why += f"Likely cause: {NO_NUMBERS if _of_nan(seen) else cause}"
    return judge(f"served_parity[{name}]", _share(found), ">=", bound.greedy, "share", path, why)


def _constants(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found, different = seen["constants"], _different(seen)
    why = f"{found['compared'] - len(found['different']) + len(different)} constants are read alike"
    if different:
        why = _named(different)
    if seen["mended"]:
        why += f"; mended: {' '.join(seen['mended'])}"
    return judge(f"constants_parity[{name}]", float(len(different)), "==", 0.0, "constants", path, why)


def _different(seen: dict[str, Any]) -> list[dict[str, Any]]:
    """The constants read otherwise. An embedding that was trained alone unties the head, which then is as it was."""
    exact = seen["merge"] is not None and not seen["merge"]["off"]
    found: list[dict[str, Any]] = seen["constants"]["different"]
    return [each for each in found if not (exact and each["name"] == "tie_word_embeddings")]


def _factor(name: str, seen: dict[str, Any], path: str) -> Verdict:
    why = f"the adapter is {seen['merge_factor']:.3f} times in the merged weights (1: merged once)"
    distance = abs(seen["merge_factor"] - 1)
    return judge(f"merged_once[{name}]", distance, "<=", FACTOR_TOLERANCE, "distance from 1", path, why)


def _exact(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found = seen["merge"]
    why = f"{found['compared'] - len(found['off'])} of {found['compared']} weights are base + adapter, but for rounding"
    if found["off"]:
        why += f"; {_off(found)}"
    return judge(f"merge_exact[{name}]", float(len(found["off"])), "==", 0.0, "weights off", path, why)


def _off(found: dict[str, Any]) -> str:
    names = [each["name"] + (" (NaN)" if _is_nan(each["roundings"]) else "") for each in found["off"]]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"not base + adapter: {', '.join(names[:SHOWN])}{more}"


def _adapter(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found = seen["adapter"]
    why = f"{found['compared']} tensors of the adapter inside it"
    why += f"; not those that were trained: {found['other'][0]}" if found["other"] else " are those that were trained"
    return judge(f"adapter_carried[{name}]", float(len(found["other"])), "==", 0.0, "tensors off", path, why)


def _bits(name: str, seen: dict[str, Any], path: str) -> Verdict:
    promised = seen["bits_promised"]
    why = f"a weight takes {seen['bits']:.2f} bits in its files, and at least {promised:g} in what it is called"
    return judge(f"stored_bits[{name}]", seen["bits"], ">=", promised, "bits a weight", path, why)


def _explained(verdict: Verdict, seen: dict[str, Any], of: str | None = None) -> Verdict:
    """The verdict; where it failed, with the likely cause that the rest of the evidence points to."""
    if verdict.passed:
        return verdict
    from dataclasses import replace

    return replace(verdict, why=f"{verdict.why}. Likely cause: {_cause(seen, of)}")


def _cause(seen: dict[str, Any], of: str | None) -> str:
    if _of_nan(seen):
        return NO_NUMBERS
    different = _different(seen)
    if chosen := [each for each in different if of is None or each["name"] == of] or different:
        return _named(chosen)
    factor = seen["merge_factor"]
    if factor is not None and abs(factor - 1) > FACTOR_TOLERANCE:
        return f"the adapter is {factor:.2f} times in the merged weights; merge again from the base model"
    if seen["merge"] is not None and seen["merge"]["off"]:
        return _off(seen["merge"])
    if seen["bits"] is not None and seen["bits"] < seen["bits_promised"]:
        return f"a weight takes {seen['bits']:.1f} bits, not the {seen['bits_promised']:g} of what it is called"
    if seen["stops"]["missing"] and of == "eos_token_id":
        return f"the runtime does not stop at the ids {seen['stops']['missing']} (eos_token_id)"
    if of == "eos_token_id":
        return "the runtime does not know the end-of-turn token, or the weights are too coarse"
    if ":q" in seen["hop"]:
        return "the quantization is too coarse for this model; try one with more bits (q8_0)"
    return (
        "other weights than those of the model it is made from (an export of an older run, or tensors put elsewhere?)"
    )


def _of_nan(seen: dict[str, Any]) -> bool:
    """Whether the probabilities themselves are none."""
    return seen["distributions"] is not None and _is_nan(seen["distributions"]["mean"])


def _is_nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)


def _named(different: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{each['name']} is {each['expected']} in the model, {each['found']} in the export" for each in different
    )


def _share(found: dict[str, Any]) -> float | None:
    return found["equal"] / found["compared"] if found["compared"] else None


def _tops(tokens: list[list[Any]]) -> str:
    return "[" + ", ".join(f"{text!r} {probability:.3f}" for text, probability in tokens) + "]"
