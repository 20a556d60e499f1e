"""Does a client of the run's server get the model that was evaluated, and what its request says?"""

from __future__ import annotations

import json
from typing import Any

from finetune.checks import Verdict, judge, missing, short, silence
from finetune.recipe import Recipe
from finetune.run import Run

MEASURED = "measure/serving.json"


def check(recipe: Recipe, run: Run) -> list[Verdict]:
    path = run.path / MEASURED
    if not path.is_file():
        return [missing("serving_answers", "==", 1.0, "share", MEASURED, "the server was not asked")]
    seen = json.loads(path.read_text(encoding="utf-8"))
    return [
        _prompts(seen),
        _answers(seen, "serving_answers", "question", "answers are those of 'evaluate'"),
        _answers(seen, "serving_conversations", "conversation", "conversations are answered as the model does itself"),
        _stops(seen),
        _length(seen),
        *_sampling(seen),
        _streaming(seen),
        _usage(seen),
        _special(seen),
    ]


def _prompts(seen: dict[str, Any]) -> Verdict:
    """As many tokens as the training's template makes of the same messages."""
    odd = [each for each in seen["asked"] if each["found"]["prompt_tokens"] != each["expected"]["prompt_tokens"]]
    why = f"{_of(seen['asked'], odd)} prompts have the tokens that the training's template gives them"
    if odd:
        wanted, found = odd[0]["expected"]["prompt_tokens"], odd[0]["found"]["prompt_tokens"]
        why += f"; {short(odd[0]['name'])!r} has {found} instead of {wanted}. Likely cause: "
        if refused := odd[0]["found"].get("refused"):
            why += f"the server refuses the request: {short(refused)}"
        elif found is None:
            why += "the server does not count"
        elif found == wanted + 1:
            why += "a begin token is there twice"
        elif len(odd) < len(seen["asked"]):
            why += "a system message or earlier turns are left out, or there are those of another request"
        else:
            why += "the server renders with another chat template than the training"
    return judge("serving_prompts", _share(seen["asked"], odd), "==", 1.0, "share", MEASURED, why)


def _answers(seen: dict[str, Any], name: str, kind: str, what: str) -> Verdict:
    """Text and end. Where the merged model alone says something else than in `evaluate` (a tie), that counts as well."""
    asked = [each for each in seen["asked"] if each["kind"] == kind]
    odd = [each for each in asked if not _same(each)]
    ties = sum(_same(each) and each["found"]["text"] != each["expected"]["text"] for each in asked)
    why = f"{_of(asked, odd)} {what}" + (f", {ties} of them part at a tie" if ties else "")
    if odd:
        expected, found = odd[0]["expected"], odd[0]["found"]
        why += f"; {short(odd[0]['name'])!r}: {_said(found)} instead of {_said(expected)}"
        if found["text"] is None:
            why += ". Likely cause: the server cannot run this model (see weights_finite)"
        elif found["text"].startswith(expected["text"]) and found["finish"] == "length":
            why += ". Likely cause: the server does not know the end-of-turn token"
        elif found["prompt_tokens"] == expected["prompt_tokens"] and not _marks(seen, found["text"]):
            why += ". Likely cause: it serves another model, or draws where it should take the likeliest token"
            why += ", or puts the turns in another order" if kind == "conversation" else ""
    why += silence([each["found"]["text"] or "" for each in asked])
    return judge(name, _share(asked, odd), "==", 1.0, "share", MEASURED, why)


def _same(each: dict[str, Any]) -> bool:
    expected, found = each["expected"], each["found"]
    if found["text"] not in (expected["text"], each["again"]):
        return False
    at_the_limit = expected["tokens"] + 1 >= each["max_tokens"]  # an end as the last token: servers call it 'length'
    return bool(found["finish"] == expected["finish"] or found["text"] != expected["text"] or at_the_limit)


def _stops(seen: dict[str, Any]) -> Verdict:
    name, stop = "serving_stops", seen["stop"]
    if stop["found"] is None:
        return missing(name, "==", 1.0, "honoured", MEASURED, "the model says nothing that could be stopped at")
    found = stop["found"]
    right = found["text"] == stop["expected"] and found["finish"] == "stop"
    why = f"asked to stop before {stop['stop']!r}: {_said(found)}"
    if not right:
        why += f" instead of {short(stop['expected'])!r} (stop)"
    return judge(name, float(right), "==", 1.0, "honoured", MEASURED, why)


def _length(seen: dict[str, Any]) -> Verdict:
    name, asked, found = "serving_max_tokens", seen["length"], seen["length"]["found"]
    if not asked["expected"] and not found["text"]:
        return missing(name, "==", 1.0, "honoured", MEASURED, "the model says nothing that could be cut off")
    right = (found["text"], found["finish"]) == (asked["expected"], "length")
    right = right and found["completion_tokens"] == asked["max_tokens"]
    why = f"asked for {asked['max_tokens']} tokens at most: {found['completion_tokens']}, {_said(found)}"
    if not right:
        why += f" instead of {short(asked['expected'])!r} (length)"
    return judge(name, float(right), "==", 1.0, "honoured", MEASURED, why)


def _sampling(seen: dict[str, Any]) -> list[Verdict]:
    drawn = seen["sampling"]
    texts = drawn["texts"]
    count = len({text for text in texts if text is not None})
    likeliest = sum(text is not None and text == drawn["greedy"] for text in drawn["likeliest_only"])
    same = texts[0] is not None and drawn["again"] == texts[0]
    why = f"{count} different answers of {len(texts)} drawn at temperature {drawn['temperature']:g}, each with its own seed"
    if not any(texts):
        why += f": the model answers nothing, or the server refuses to draw ({texts.count(None)} refused)"
    elif count == 1:
        cause = "temperature" if texts[0] == drawn["greedy"] else "seed"
        why += f": {short(texts[0])!r}. Likely cause: the server does not heed a request's {cause}"
    return [
        judge("serving_temperature", count, ">", 1, "different answers", MEASURED, why),
        judge(
            "serving_seed", float(same), "==", 1.0, "the same", MEASURED,
            f"the same seed twice: {_drawn(texts[0])} and {_drawn(drawn['again'])}",
        ),
        judge(
            "serving_top_p", likeliest, "==", len(drawn["likeliest_only"]), "answers", MEASURED,
            f"with a top_p that leaves one token to draw from, {likeliest} of {len(drawn['likeliest_only'])} are the "
            f"likeliest answer",
        ),
    ]  # fmt: skip


def _streaming(seen: dict[str, Any]) -> Verdict:
    found = seen["stream"]["found"]
    whole = next(each["found"] for each in seen["asked"] if each["name"] == seen["stream"]["name"])
    if found["text"] is None:
        return missing("serving_streaming", "==", 0, "different", MEASURED, f"no stream: {_said(found)}")
    if whole["text"] is None:
        return missing("serving_streaming", "==", 0, "different", MEASURED, f"no answer in one piece: {_said(whole)}")
    keys = [key for key in whole if found[key] != whole[key]]
    why = "a stream gives the same text, end and counts as an answer in one piece"
    if keys:
        why = f"as a stream '{keys[0]}' is {short(found[keys[0]])!r}, in one piece {short(whole[keys[0]])!r}"
    return judge("serving_streaming", len(keys), "==", 0, "different", MEASURED, why)


def _usage(seen: dict[str, Any]) -> Verdict:
    """The tokens of the answer, with or without the one that ends it, and the sum."""
    alike = [each for each in seen["asked"] if each["found"]["text"] == each["expected"]["text"]]
    odd = [each for each in alike if not _counted(each)]
    why = f"{_of(alike, odd)} answers have as many tokens as 'usage' says"
    if odd:
        found, tokens = odd[0]["found"], odd[0]["expected"]["tokens"]
        why += f"; {short(odd[0]['name'])!r} has {tokens}: {found['completion_tokens']} counted, "
        why += f"{found['total_tokens']} in all with {found['prompt_tokens']} of the prompt"
    return judge("serving_usage", _share(alike, odd), "==", 1.0, "share", MEASURED, why)


def _counted(each: dict[str, Any]) -> bool:
    found, tokens = each["found"], each["expected"]["tokens"]
    ends = (tokens, tokens + 1) if each["expected"]["finish"] == "stop" else (tokens,)
    if found["completion_tokens"] not in ends or found["prompt_tokens"] is None:
        return False
    return bool(found["total_tokens"] == found["prompt_tokens"] + found["completion_tokens"])


def _special(seen: dict[str, Any]) -> Verdict:
    name = "serving_special_tokens"
    texts = [each["found"]["text"] or "" for each in (*seen["asked"], seen["stream"], seen["length"])]
    if not any(texts):
        return missing(name, "==", 0, "answers", MEASURED, "no answer has a text")
    leaks = [(word, text) for text in texts for word in _marks(seen, text)]
    why = f"no mark of a turn stands in {len(texts)} answers"
    if leaks:
        why = f"{leaks[0][0]!r} stands in {short(leaks[0][1])!r}: the server does not take it for a special token"
    return judge(name, len({text for _, text in leaks}), "==", 0, "answers", MEASURED, why)


def _said(found: dict[str, Any]) -> str:
    """An answer, quoted; or that it was refused, and why."""
    if found["text"] is None:
        return f"refused ({short(found['refused'])})"
    return f"{short(found['text'])!r} ({found['finish']})"


def _drawn(text: str | None) -> str:
    return "refused" if text is None else repr(short(text))


def _marks(seen: dict[str, Any], text: str) -> list[str]:
    return [word for word in seen["special"] if word in text]


def _share(asked: list[Any], odd: list[Any]) -> float | None:
    return 1 - len(odd) / len(asked) if asked else None


def _of(asked: list[Any], odd: list[Any]) -> str:
    return f"{len(asked) - len(odd)} of {len(asked)}"
