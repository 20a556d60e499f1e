"""Does every export behave as the model it was made from? Where not: the first place where they differ, and why."""

from __future__ import annotations

import json
from typing import Any

from finetune.checks import Verdict, judge, missing
from finetune.parity.bounds import Bounds, bounds
from finetune.recipe import Recipe
from finetune.run import Run

FACTOR_TOLERANCE = 0.02
_CAUSES = {
    "doubled_begin": "the begin token is there twice: the template writes it and the runtime adds it",
    "added_begin": "the runtime puts a token before the prompt that training did not have (add_bos_token)",
    "missing_begin": "the begin token that training had is missing (add_bos_token, or the template)",
    "same_text": "the text is the same, its tokens are not: the export's tokenizer splits differently "
    "(pre-tokenizer, merges or added tokens)",
    "text": "the chat template in the export is not that of the training",
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
        verdicts += _hop(name, seen, bounds(name, recipe, seen["dtype"]), path)
    return verdicts


def _hop(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> list[Verdict]:
    verdicts = [_prompts(name, seen, path)]
    if seen["distributions"] is not None:
        verdicts += _distributions(name, seen, bound, path)
    verdicts += [_greedy(name, seen, bound, path), _stop(name, seen, bound, path), _leaks(name, seen, path)]
    if seen["learned"]["known"]:
        verdicts.append(_learned(name, seen, bound, path))
    if seen["served"] is not None:
        verdicts.append(_served(name, seen, bound, path))
    verdicts.append(_constants(name, seen, path))
    if seen["merge_factor"] is not None:
        verdicts.append(_factor(name, seen, path))
    return verdicts


def _prompts(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found = seen["prompts"]
    why = f"{found['equal']} of {found['compared']} conversations and texts become the same token ids"
    if first := found["first"]:
        why += f"; {first['name']!r} differs from token {first['position']} on"
        if first["kind"] == "refused":
            why += f": {_short(first['found'])}"
        else:
            why += f": expected {first['expected_text']!r} {first['expected']}, found {first['found_text']!r} "
            why += f"{first['found']}"
        why += f". Likely cause: {_CAUSES[first['kind']]}"
    return judge(f"prompt_parity[{name}]", _share(found), "==", 1.0, "share", path, why)


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
    ties = sum(gap is not None and gap <= bound.tie for gap in found["gaps"])
    why = f"{found['equal']} of {found['compared']} greedy answers are the same token by token"
    why += f" ({found['tokens_agreed']} of {found['tokens']} tokens)"
    if ties:
        why += f", {ties} part at a tie (within {bound.tie:g} nats)"
    if first := found["first"]:
        why += f"; first divergence at token {first['position']} of the answer to {_short(first['prompt'])!r}: "
        why += f"expected {first['expected_next']!r}, found {first['found_next']!r}"
        if "expected_top5" in first:
            why += f"; {_tops(first['expected_top5'])} against {_tops(first['found_top5'])}"
    share = (found["equal"] + ties) / found["compared"] if found["compared"] else None
    return _explained(judge(f"greedy_parity[{name}]", share, ">=", bound.greedy, "share", path, why), seen)


def _stop(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> Verdict:
    found = seen["stop"]
    if not found["compared"]:
        why = f"no answer of '{seen['reference']}' ends by itself within evaluate.max_new_tokens"
        return missing(f"stop_parity[{name}]", ">=", bound.stopped, "share", path, why)
    why = f"{found['stopped']} of {found['compared']} answers that ended by themselves still do"
    if first := found["first_unstopped"]:
        why += f"; not the one to {_short(first['prompt'])!r}: {_short(first['text'])!r}"
    verdict = judge(
        f"stop_parity[{name}]", found["stopped"] / found["compared"], ">=", bound.stopped, "share", path, why
    )
    return _explained(verdict, seen, of="eos_token_id")


def _leaks(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found = seen["stop"]
    why = "no mark of a turn stands in the text of an answer"
    if leak := found["first_leak"]:
        why = f"{leak['token']!r} stands in the answer to {_short(leak['prompt'])!r}: {_short(leak['text'])!r}. Likely "
        why += "cause: the runtime does not take it for a special token, or does not stop at it"
    return judge(f"no_special_tokens[{name}]", float(found["leaks"]), "==", 0.0, "answers", path, why)


def _learned(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> Verdict:
    found = seen["learned"]
    known, kept = found["known"], found["kept"]
    why = f"{kept} of the {known} probes that '{seen['reference']}' answers are answered"
    if found["lost"]:
        lost = found["lost"][0]
        why += f"; lost: {_short(lost['prompt'])!r} -> {_short(lost['found'])!r}"
    # Of a few probes one may fall to rounding alone, where the weights were rounded.
    least = min(bound.learned, (known - 1) / known) if ":q" in name else bound.learned
    return _explained(judge(f"learned_parity[{name}]", kept / known, ">=", least, "share", path, why), seen)


def _served(name: str, seen: dict[str, Any], bound: Bounds, path: str) -> Verdict:
    found = seen["served"]
    why = f"{found['equal']} of {found['compared']} answers of the runtime's own server are those of the runtime"
    if first := found["first"]:
        why += (
            f"; {_short(first['prompt'])!r}: expected {_short(first['expected'])!r}, found {_short(first['found'])!r}. "
        )
        why += "Likely cause: the server renders the conversation otherwise, or changes it"
    return judge(f"served_parity[{name}]", _share(found), ">=", bound.greedy, "share", path, why)


def _constants(name: str, seen: dict[str, Any], path: str) -> Verdict:
    found = seen["constants"]
    why = f"{found['compared']} constants are read alike"
    if found["different"]:
        why = _named(found["different"])
    if seen["mended"]:
        why += f"; mended: {' '.join(seen['mended'])}"
    return judge(f"constants_parity[{name}]", float(len(found["different"])), "==", 0.0, "constants", path, why)


def _factor(name: str, seen: dict[str, Any], path: str) -> Verdict:
    why = f"the adapter is {seen['merge_factor']:.3f} times in the merged weights (1: merged once)"
    distance = abs(seen["merge_factor"] - 1)
    return judge(f"merged_once[{name}]", distance, "<=", FACTOR_TOLERANCE, "distance from 1", path, why)


def _explained(verdict: Verdict, seen: dict[str, Any], of: str | None = None) -> Verdict:
    """The verdict; where it failed, with the likely cause that the rest of the evidence points to."""
    if verdict.passed:
        return verdict
    from dataclasses import replace

    return replace(verdict, why=f"{verdict.why}. Likely cause: {_cause(seen, of)}")


def _cause(seen: dict[str, Any], of: str | None) -> str:
    different = seen["constants"]["different"]
    if chosen := [each for each in different if of is None or each["name"] == of] or different:
        return _named(chosen)
    factor = seen["merge_factor"]
    if factor is not None and abs(factor - 1) > FACTOR_TOLERANCE:
        return f"the adapter is {factor:.2f} times in the merged weights; merge again from the base model"
    if of == "eos_token_id":
        return "the runtime does not know the end-of-turn token, or the weights are too coarse"
    if ":q" in seen["hop"]:
        return "the quantization is too coarse for this model; try one with more bits (q8_0)"
    return "other weights than those of the model it should be made from (an export of an older run?)"


def _named(different: list[dict[str, Any]]) -> str:
    return "; ".join(
        f"{each['name']} is {each['expected']} in the model, {each['found']} in the export" for each in different
    )


def _share(found: dict[str, Any]) -> float | None:
    return found["equal"] / found["compared"] if found["compared"] else None


def _tops(tokens: list[list[Any]]) -> str:
    return "[" + ", ".join(f"{text!r} {probability:.3f}" for text, probability in tokens) + "]"


def _short(text: Any) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= 70 else line[:67] + "..."
