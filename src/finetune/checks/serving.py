"""Does a client of the run's server get the model that was evaluated, and what its request says?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from finetune.checks import Part, Verdict, judge, missing, short, silence
from finetune.checks.asked import base_tokenizer, phases
from finetune.experiments.serving import TOKENS
from finetune.parity.prompts import special_texts
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records.measured import Asked, Expected, Served, Told

MEASURED = layout.SERVING.path
KINDS = QUESTION, CONVERSATION = "question", "conversation"
REQUESTS = (
    "serving_prompts", "serving_conversations", "serving_stops", "serving_max_tokens", "serving_temperature",
    "serving_seed", "serving_top_p", "serving_streaming", "serving_usage",
)  # fmt: skip
TOLD: tuple[Literal["text", "finish", "prompt_tokens", "completion_tokens", "total_tokens"], ...] = (
    "text", "finish", "prompt_tokens", "completion_tokens", "total_tokens",
)  # fmt: skip


def _requests(recipe: Recipe, run: Run) -> list[Verdict]:
    seen = evidence.read(run, layout.SERVING)
    return [
        _prompts(seen),
        _answers(seen, "serving_conversations", CONVERSATION, "conversations are answered as the model does itself"),
        _stops(seen),
        _length(seen),
        *_sampling(seen),
        _streaming(seen),
        _usage(seen),
    ]


def _questions(recipe: Recipe, run: Run) -> list[Verdict]:
    seen = evidence.read(run, layout.SERVING)
    if why := _of_others(recipe, run, seen):
        return [missing("serving_answers", "==", 1.0, "share", MEASURED, why)]
    return [_answers(seen, "serving_answers", QUESTION, "answers are those of 'evaluate'")]


def _prompts(seen: Served) -> Verdict:
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


def _answers(seen: Served, name: str, kind: str, what: str) -> Verdict:
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
            why += ", or puts the turns in another order" if kind == CONVERSATION else ""
    why += silence([each["found"]["text"] or "" for each in asked])
    return judge(name, _share(asked, odd), "==", 1.0, "share", MEASURED, why)


def _of_others(recipe: Recipe, run: Run, seen: Served) -> str:
    """Which question is held against another answer than that of the evaluation; empty where none is."""
    tokenizer, final = base_tokenizer(recipe, run), phases(recipe)[-1]
    said = {asked["prompt"]: asked["phases"].get(final) for asked in evidence.rows(run, layout.ANSWERS)}
    for each in seen["asked"]:
        expected, known = each["expected"], said.get(each["name"])
        held = (expected["text"], expected["tokens"], expected["finish"])
        wanted = None
        if known is not None:
            text = tokenizer.decode(known["ids"], skip_special=True)
            wanted = (text, len(known["ids"]), known["finish"])
        if each["kind"] not in KINDS:
            return f"{short(each['name'])!r} is no {' and no '.join(KINDS)}, but a {each['kind']!r}"
        if each["max_tokens"] != (recipe.evaluate.max_new_tokens if each["kind"] == QUESTION else TOKENS):
            return f"{short(each['name'])!r} was asked for {each['max_tokens']} tokens, other than the model itself was"
        if each["kind"] == QUESTION and held != wanted:
            name, text = short(each["name"]), short(expected["text"])
            return f"{name!r} is held against {text!r}, which is no answer of 'evaluate'"
    return ""


def _same(each: Asked) -> bool:
    expected, found = each["expected"], each["found"]
    if each["kind"] == CONVERSATION and expected["text"] != each["again"]:
        return False  # the model itself answers it with two texts
    if found["text"] not in (expected["text"], each["again"]):
        return False
    at_the_limit = expected["tokens"] + 1 >= each["max_tokens"]  # an end as the last token: servers call it 'length'
    return bool(found["finish"] == expected["finish"] or found["text"] != expected["text"] or at_the_limit)


def _stops(seen: Served) -> Verdict:
    name, stop = "serving_stops", seen["stop"]
    if stop["found"] is None:
        return missing(name, "==", 1.0, "honoured", MEASURED, "the model says nothing that could be stopped at")
    found = stop["found"]
    right = found["text"] == stop["expected"] and found["finish"] == "stop"
    right = right and bool(stop["stop"]) and _begins(seen, stop["name"], stop["expected"] + stop["stop"])
    why = f"asked to stop before {stop['stop']!r}: {_said(found)}"
    if not right:
        why += f" instead of {short(stop['expected'])!r} (stop)"
    return judge(name, float(right), "==", 1.0, "honoured", MEASURED, why)


def _begins(seen: Served, name: str, text: str) -> bool:
    """Whether what the model itself answers to a request begins so."""
    return any(each["name"] == name and each["again"].startswith(text) for each in seen["asked"])


def _length(seen: Served) -> Verdict:
    name, asked, found = "serving_max_tokens", seen["length"], seen["length"]["found"]
    if not asked["expected"] and not found["text"]:
        return missing(name, "==", 1.0, "honoured", MEASURED, "the model says nothing that could be cut off")
    right = (found["text"], found["finish"]) == (asked["expected"], "length")
    right = right and found["completion_tokens"] == asked["max_tokens"]
    right = right and _begins(seen, asked["name"], asked["expected"])
    why = f"asked for {asked['max_tokens']} tokens at most: {found['completion_tokens']}, {_said(found)}"
    if not right:
        why += f" instead of {short(asked['expected'])!r} (length)"
    return judge(name, float(right), "==", 1.0, "honoured", MEASURED, why)


def _sampling(seen: Served) -> list[Verdict]:
    drawn = seen["sampling"]
    texts = drawn["texts"]
    odd = len(texts) != len(set(drawn["seeds"])) or drawn["temperature"] <= 0 or not drawn["likeliest_only"]
    if odd or not any(each["name"] == drawn["name"] for each in seen["asked"]):
        why = "what was drawn is not one answer a seed, at a temperature above 0, to a question that was asked, and once more"
        return [
            missing("serving_temperature", ">", 1, "different answers", MEASURED, why),
            missing("serving_seed", "==", 1.0, "the same", MEASURED, why),
            missing("serving_top_p", "==", 1, "answers", MEASURED, why),
        ]
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


def _streaming(seen: Served) -> Verdict:
    name, unit, found = "serving_streaming", "different", seen["stream"]["found"]
    whole = next((each["found"] for each in seen["asked"] if each["name"] == seen["stream"]["name"]), None)
    if whole is None:
        return missing(name, "==", 0, unit, MEASURED, f"{seen['stream']['name']!r} was not asked in one piece")
    for how, told in (("no stream", found), ("no answer in one piece", whole)):
        if told["text"] is None:
            return missing(name, "==", 0, unit, MEASURED, f"{how}: {_said(told)}")
    keys = [key for key in TOLD if found[key] != whole[key]]
    why = "a stream gives the same text, end and counts as an answer in one piece"
    if keys:
        why = f"as a stream '{keys[0]}' is {short(found[keys[0]])!r}, in one piece {short(whole[keys[0]])!r}"
    return judge(name, len(keys), "==", 0, unit, MEASURED, why)


def _usage(seen: Served) -> Verdict:
    """The tokens of the answer, with or without the one that ends it, and the sum."""
    alike = [each for each in seen["asked"] if each["found"]["text"] == each["expected"]["text"]]
    odd = [each for each in alike if not _counted(each)]
    why = f"{_of(alike, odd)} answers have as many tokens as 'usage' says"
    shorter = [(seen["length"]["name"], seen["length"]["found"]), (seen["stop"]["name"], seen["stop"]["found"])]
    wrong = [asked for asked, found in shorter if found is not None and not _sums(seen, asked, found)]
    if wrong and not odd:
        why = (
            f"the counts of the shortened answer to {short(wrong[0])!r} do not add up, or its prompt has another length"
        )
        return judge("serving_usage", 0.0, "==", 1.0, "share", MEASURED, why)
    if odd:
        found, tokens = odd[0]["found"], odd[0]["expected"]["tokens"]
        why += f"; {short(odd[0]['name'])!r} has {tokens}: {found['completion_tokens']} counted, "
        why += f"{found['total_tokens']} in all with {found['prompt_tokens']} of the prompt"
    return judge("serving_usage", _share(alike, odd), "==", 1.0, "share", MEASURED, why)


def _counted(each: Asked) -> bool:
    found, tokens = each["found"], each["expected"]["tokens"]
    ends = (tokens, tokens + 1) if each["expected"]["finish"] == "stop" else (tokens,)
    made, prompt = found["completion_tokens"], found["prompt_tokens"]
    if made is None or prompt is None or made not in ends:
        return False
    return found["total_tokens"] == prompt + made


def _sums(seen: Served, asked: str, found: Told) -> bool:
    """Whether the counts of an answer add up, for a prompt as long as when the same was asked in full."""
    made, prompt, total = found["completion_tokens"], found["prompt_tokens"], found["total_tokens"]
    prompts = {each["found"]["prompt_tokens"] for each in seen["asked"] if each["name"] == asked}
    return None not in (made, prompt, total) and total == (prompt or 0) + (made or 0) and prompt in prompts


def _special(recipe: Recipe, run: Run) -> list[Verdict]:
    name, unit, seen = "serving_special_tokens", "answers", evidence.read(run, layout.SERVING)
    marks = special_texts(base_tokenizer(recipe, run), evidence.chat_template(run))
    if unsought := [word for word in marks if word not in seen["special"]]:
        why = f"the marks of a turn that were looked for lack {', '.join(map(repr, unsought))}"
        return [missing(name, "==", 0, unit, MEASURED, why)]
    texts = [each["found"]["text"] or "" for each in (*seen["asked"], seen["stream"], seen["length"])]
    if not any(texts):
        return [missing(name, "==", 0, unit, MEASURED, "no answer has a text")]
    leaks = [(word, text) for text in texts for word in _marks(seen, text)]
    why = f"no mark of a turn stands in {len(texts)} answers"
    if leaks:
        why = f"{leaks[0][0]!r} stands in {short(leaks[0][1])!r}: the server does not take it for a special token"
    return [judge(name, len({text for _, text in leaks}), "==", 0, unit, MEASURED, why)]


def _said(found: Told | Expected) -> str:
    """An answer, quoted; or that it was refused, and why."""
    if found["text"] is None:
        return f"refused ({short(found.get('refused'))})"
    return f"{short(found['text'])!r} ({found['finish']})"


def _drawn(text: str | None) -> str:
    return "refused" if text is None else repr(short(text))


def _marks(seen: Served, text: str) -> list[str]:
    return [word for word in seen["special"] if word in text]


def _share(asked: Sequence[Asked], odd: Sequence[Asked]) -> float | None:
    return 1 - len(odd) / len(asked) if asked else None


def _of(asked: Sequence[Asked], odd: Sequence[Asked]) -> str:
    return f"{len(asked) - len(odd)} of {len(asked)}"


PARTS: tuple[Part, ...] = (
    Part(check=_questions, owes=lambda recipe: ["serving_answers"], evidence=MEASURED),
    Part(check=_requests, owes=lambda recipe: REQUESTS, evidence=MEASURED),
    Part(check=_special, owes=lambda recipe: ["serving_special_tokens"], evidence=MEASURED),
)
