"""One hop: what two models answered, held against each other, as the evidence that the check reads."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from finetune.evaluation.answers import is_correct
from finetune.parity.divergence import divergence, gap, top
from finetune.parity.observe import pairs
from finetune.run.records.compared import Material

AROUND = 4  # ids shown on either side of a first difference

Decode = Callable[[list[int]], str]


def prompts(material: Material, found: dict[str, Any], decode: Decode) -> dict[str, Any]:
    """Conversations rendered and texts tokenized: how many came out as the same ids, and the first that did not."""
    expected = [(each["name"], each["ids"]) for each in material["conversations"]]
    seen: list[tuple[str, Any, Any]] = [
        (name, ids, None if isinstance(got, str) and ids is None else got)  # both refuse: the same
        for (name, ids), got in zip(expected, found["rendered"], strict=True)
    ]
    seen += [
        (f"plain text {number}", _without_bos(text["ids"], got), got)
        for number, (text, got) in enumerate(
            zip((*material["texts"], *material["odd_texts"]), found["encoded"], strict=True), 1
        )
    ]
    differing = [each for each in seen if each[1] != each[2]]
    return {
        "compared": len(seen),
        "equal": len(seen) - len(differing),
        "first": _first_difference(*differing[0], decode) if differing else None,
    }


def vocabulary(material: Material, found: dict[str, Any], decode: Decode) -> dict[str, Any]:
    """Every token of the vocabulary in a text: how many come out as the same ids, and the first that does not."""
    both = [(text["ids"], got) for text, got in zip(material["vocabulary"], found["vocabulary"], strict=True)]
    first = next((pair for pair in both if pair[0] != pair[1]), None)
    return {
        "compared": sum(len(expected) for expected, _ in both),
        "equal": sum(_in_place(expected, got) for expected, got in both),
        "first": _first_difference("the vocabulary", *first, decode) if first else None,
    }


def _in_place(expected: list[int], got: list[int]) -> int:
    """How many ids are the same, place by place; in texts of other lengths, from both ends."""
    if len(expected) == len(got):
        return sum(a == b for a, b in zip(expected, got, strict=True))
    shorter = min(len(expected), len(got))
    return min(shorter, _agreed(expected, got) + _agreed(expected[::-1], got[::-1]))


def _without_bos(expected: list[int], got: list[int]) -> list[int]:
    """The material's texts carry a begin token where the model has one; `encode` adds none."""
    return expected[1:] if len(expected) == len(got) + 1 else expected


def _first_difference(name: str, expected: Any, got: Any, decode: Decode) -> dict[str, Any]:
    if not isinstance(got, list) or not isinstance(expected, list):
        return {"name": name, "position": 0, "expected": expected, "found": got, "kind": "refused"}
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    window = slice(max(0, at - AROUND), at + AROUND)
    return {
        "name": name,
        "position": at,
        "kind": _kind(expected, got, decode),
        "expected": expected[window],
        "found": got[window],
        "expected_text": decode(expected[window]),
        "found_text": decode(got[window]),
    }


def _kind(expected: list[int], got: list[int], decode: Decode) -> str:
    """What sort of difference it is: doubled_begin, added_begin, missing_begin, added_end, spaces, same_text (tokenized
    otherwise) or text."""
    if got[1:] == expected:
        return "doubled_begin" if got[:1] == expected[:1] else "added_begin"
    if expected[1:] == got:
        return "missing_begin"
    if got[:-1] == expected:
        return "added_end"
    ours, theirs = decode(expected), decode(got)
    if ours == theirs:
        return "same_text"
    return "spaces" if ours.replace(" ", "") == theirs.replace(" ", "") else "text"


def distributions(
    material: Material, answers: list[list[int]], reference: Path, candidate: Path, decode: Decode
) -> dict[str, Any]:
    """KL divergence over texts and training rows (`mean`, `max`, `top1`), over the answers apart, and its worst place."""
    asked = pairs(material, answers)
    whole = asked[: len(asked) - sum(bool(answer) for answer in answers)]
    size = sum(len(target) for _, target in whole)
    found = divergence(reference, candidate)
    kl, rest = found.kl[:size], found.kl[size:]
    worst = max(range(size), key=lambda place: kl[place] if kl[place] == kl[place] else float("inf"))
    return {
        "positions": size,
        "mean": sum(kl) / size,
        "max": kl[worst],
        "top1": sum(found.same_top[:size]) / size,
        "answers_mean": sum(rest) / len(rest) if rest else None,
        "worst": _place(whole, worst, reference, candidate, decode),
    }


def _place(asked: list[Any], position: int, reference: Path, candidate: Path, decode: Decode) -> dict[str, Any]:
    starts = [0, *accumulate(len(target) for _, target in asked)]
    number = next(i for i, start in enumerate(starts[1:]) if position < start)
    context, target = asked[number]
    before = [*context, *target[: position - starts[number]]]
    return {"after": decode(before[-12:]), **_tops(position, reference, candidate, decode)}


def _tops(position: int, reference: Path, candidate: Path, decode: Decode) -> dict[str, Any]:
    """The five likeliest tokens on both sides, as [text, probability]."""
    return {
        name: [[decode([token]), probability] for token, probability in top(file, position)]
        for name, file in (("expected_top5", reference), ("found_top5", candidate))
    }


def greedy(
    material: Material,
    expected: dict[str, Any],
    found: dict[str, Any],
    files: tuple[Path, Path] | None,
    decode: Decode,
) -> dict[str, Any]:
    """Greedy answers token by token: how many are the same, and the first divergence with both top-5 lists.

    `gaps` has, for each that is not the same, how much less likely (nats) the model before takes the other's token to be
    than its own, where they part; None where that is not known.
    """
    both = list(zip(expected["generated"], found["generated"], strict=True))
    differing = [number for number, (a, b) in enumerate(both) if (a["ids"], a["finish"]) != (b["ids"], b["finish"])]
    places = _answer_places(material, expected) if files else {}
    gaps = []
    for number in differing:
        at = _agreed(both[number][0]["ids"], both[number][1]["ids"])
        known = files and at < len(places.get(number, ()))
        chosen = _chosen(both[number][1], at, material["eos_ids"])
        gaps.append(gap(files[0], places[number][at], chosen) if files and known and chosen else None)
    result: dict[str, Any] = {
        "compared": len(both),
        "equal": len(both) - len(differing),
        "gaps": gaps,
        "tokens": sum(len(a["ids"]) for a, _ in both),
        "tokens_agreed": sum(_agreed(a["ids"], b["ids"]) for a, b in both),
        "first": None,
    }
    if differing:
        number = differing[0]
        a, b = both[number]
        at = _agreed(a["ids"], b["ids"])
        result["first"] = {
            "prompt": material["questions"][number]["prompt"],
            "position": at,
            "expected_text": a["text"],
            "found_text": b["text"],
            "expected_next": _next(a, at, decode),
            "found_next": _next(b, at, decode),
        }
        if files and at < len(places.get(number, ())):
            result["first"] |= _tops(places[number][at], *files, decode)
    return result


def _answer_places(material: Material, expected: dict[str, Any]) -> dict[int, range]:
    """By question, the rows of the distributions that belong to its answer; only where the model before gave just that
    answer, so that both were scored after the same tokens."""
    answers = expected["answers"]
    whole = pairs(material, answers)
    begin = sum(len(target) for _, target in whole[: len(whole) - sum(bool(answer) for answer in answers)])
    found = {}
    for number, (answer, made) in enumerate(zip(answers, expected["generated"], strict=True)):
        if answer[: len(made["ids"])] == made["ids"]:
            found[number] = range(begin, begin + len(answer))
        begin += len(answer)
    return found


def _chosen(answer: dict[str, Any], at: int, eos_ids: list[int]) -> list[int]:
    """The ids that an answer's next token may be: that one, or any that ends the turn; nothing where it was cut off."""
    if at < len(answer["ids"]):
        return [answer["ids"][at]]
    return eos_ids if answer["finish"] == "stop" else []


def _agreed(a: list[int], b: list[int]) -> int:
    """How many tokens two answers have in common from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _next(answer: dict[str, Any], at: int, decode: Decode) -> str:
    if at < len(answer["ids"]):
        return decode([answer["ids"][at]])
    return "(end of turn)" if answer["finish"] == "stop" else "(cut off)"


def stop(material: Material, expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Of the answers that ended by themselves, how many still do; and the first text that a special token leaked into."""
    ended = [i for i, answer in enumerate(expected["generated"]) if answer["finish"] == "stop"]
    still = [i for i in ended if found["generated"][i]["finish"] == "stop"]
    lost = next((i for i in ended if i not in still), None)
    leaks = [
        {"prompt": question["prompt"], "token": word, "text": answer["text"]}
        for question, answer in zip(material["questions"], found["generated"], strict=True)
        for word in material["special"]
        if word in answer["text"]
    ]
    return {
        "compared": len(ended),
        "stopped": len(still),
        "leaks": len(leaks),
        "first_leak": leaks[0] if leaks else None,
        "first_unstopped": None
        if lost is None
        else {"prompt": material["questions"][lost]["prompt"], "text": found["generated"][lost]["text"]},
    }


def learned(material: Material, expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Of the probes that the model before answers rightly, how many this one does."""
    known, kept, lost = 0, 0, []
    for question, before, after in zip(material["questions"], expected["generated"], found["generated"], strict=True):
        answer, match = question["answer"], question["match"]
        if question["set"] != "probes" or answer is None or not is_correct(before["text"], answer, match):
            continue
        known += 1
        if is_correct(after["text"], answer, match):
            kept += 1
        else:
            lost.append({"prompt": question["prompt"], "expected": before["text"], "found": after["text"]})
    return {"known": known, "kept": kept, "lost": lost[:5]}


def served(found: dict[str, Any], material: Material) -> dict[str, Any] | None:
    """The runtime's own server, asked with messages, against the same runtime given ids."""
    if found["served"] is None:
        return None
    asked = [i for i, each in enumerate(material["questions"]) if each["messages"]][: len(found["served"])]
    both = [(i, found["generated"][i], answer) for i, answer in zip(asked, found["served"], strict=True)]
    differing = [
        (i, own, got)
        for i, own, got in both
        if got["text"] is None or (own["text"].strip(), own["finish"]) != (got["text"].strip(), got["finish"])
    ]
    first = None
    if differing:
        i, own, got = differing[0]
        said = f"no answer: {got['finish']}" if got["text"] is None else got["text"]
        first = {"prompt": material["questions"][i]["prompt"], "expected": own["text"], "found": said}
    return {"compared": len(both), "equal": len(both) - len(differing), "first": first}


def constants(expected: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The constants that both tell and tell differently."""
    ours, theirs = expected["constants"], found["constants"]
    shared = [name for name in ours if name in theirs and name != "model_type"]
    return {
        "compared": len(shared),
        "different": [
            {"name": name, "expected": ours[name], "found": theirs[name]}
            for name in shared
            if not _same(ours[name], theirs[name])
        ],
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float | int) and isinstance(b, float | int) and not isinstance(a, bool):
        return abs(a - b) <= 1e-6 * max(abs(a), abs(b))  # a GGUF file stores them in float32
    return bool(a == b)
