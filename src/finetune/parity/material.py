"""What every hop is asked: the same conversations, texts, rows and questions, rendered once by our own renderer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.backends import Tokenizer, get
from finetune.data import encode, templates
from finetune.errors import UsageError
from finetune.recipe import Recipe
from finetune.run import Run, evidence

FILE = "compare/material.json"
QUESTIONS = 48
ROWS = 6
ROW_TOKENS = 96
WORDS = 512  # tokens of the vocabulary in one text
WORDS = 512  # tokens of the vocabulary in one text
ENOUGH = 8
SERVED = 6
# Prose, numbers and code, about 130 tokens that no training saw in this form: what distributions are compared over.
TEXTS = (
    "The ferry leaves the north quay at 7:45 and needs 38 minutes for the 12.6 km to the island; on Sundays, when "
    "fewer people travel, it leaves an hour later.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n\nprint(area(2.5))  # 19.6",
    "Water boils at a lower temperature on a mountain than at the sea, because the air presses less on it. Cooks who "
    "live high up therefore boil potatoes longer.",
)
# Tokenized only: what a small model predicts after these is noise, and so is any divergence there.
ODD_TEXTS = (
    "Le café coûte 3 €, naïve Straße, Ελλάδα, Русский текст, 日本語のテスト, 👩‍🔬🇪🇺.",
    "  two  spaces,\ttabs\r\n\n\nand 1234567890.5e-10 %%% ++i; // \u00a0\u200b\ufeffend",
)
CONVERSATIONS: dict[str, tuple[dict[str, str], ...]] = {
    "single turn": ({"role": "user", "content": "What is the capital of France?"},),
    "with a system message": (
        {"role": "system", "content": "Answer in one short sentence."},
        {"role": "user", "content": "Who wrote Hamlet?"},
    ),
    "several turns": (
        {"role": "user", "content": "Name a river."},
        {"role": "assistant", "content": "The Danube."},
        {"role": "user", "content": "And another one?"},
    ),
    "several turns with a system message": (
        {"role": "system", "content": "You are a guide."},
        {"role": "user", "content": "Where is Mount Etna?"},
        {"role": "assistant", "content": "On Sicily, in Italy."},
        {"role": "user", "content": "How high is it?"},
    ),
    "odd Unicode": (
        {"role": "user", "content": "Ünï 👩‍👩‍👧‍👦 𝔘𝔫𝔦 ﷺ e\u0301 中文字 עברית \u00a0\u200bend?"},
        {"role": "assistant", "content": "日本語 🇪🇺."},
        {"role": "user", "content": "{{ braces }} <b>&amp;</b> \\n 1,000.50"},
    ),
    "white space and lines": ({"role": "user", "content": "  Two\n\nparagraphs,\ta tab,  two spaces. "},),
}


def build(recipe: Recipe, run: Run, model: Path) -> dict[str, Any]:
    """The material as plain data.

    `conversations` (name, messages, ids or None where the template refuses it), `texts` and `odd_texts` (text, ids),
    `vocabulary` (the text of every token, some hundred in one, and its ids), `rows` (ids of training rows), `questions`
    (set, id, prompt, messages, answer, match, ids), `max_new_tokens`, `special` (texts that must not leak into an
    answer), `eos_ids`, `ends` (those that the training taught to end with), `template`. `model` is what the data were
    prepared with: the base.
    """
    tokenizer = get(recipe.backend).tokenizer(model)
    source = evidence.required(run, "prepare/chat_template.jinja", "prepare").read_text(encoding="utf-8")
    render: dict[str, Any] = {
        "tokenizer": tokenizer,
        "template": templates.ChatTemplate(name="run", source=source),
        "system": recipe.template.system,
    }
    return {
        "conversations": [_conversation(name, messages, recipe, render) for name, messages in CONVERSATIONS.items()],
        "texts": [{"text": text, "ids": _with_bos(tokenizer, tokenizer.encode(text))} for text in TEXTS],
        "odd_texts": [{"text": text, "ids": tokenizer.encode(text)} for text in ODD_TEXTS],
        "vocabulary": [{"text": text, "ids": tokenizer.encode(text)} for text in _words(tokenizer)],
        "rows": _rows(run),
        "questions": _questions(run, render),
        "max_new_tokens": recipe.evaluate.max_new_tokens,
        "special": special_texts(tokenizer, source),
        "eos_ids": list(tokenizer.eos_ids),
        "ends": _ends(run, tokenizer),
        "template": source,
    }


def _words(tokenizer: Tokenizer) -> list[str]:
    """Every token's text, on a line of its own; special ones apart, since some runtimes put a space after them. A token
    that is a part of a character has none."""
    special: list[str] = []
    plain: list[str] = []
    for token in range(tokenizer.vocab_size):
        word = tokenizer.decode([token])
        if word and "\ufffd" not in word:
            (plain if tokenizer.decode([token], skip_special=True) else special).append(word)
    lines = ["\n".join(["words", *plain[begin : begin + WORDS]]) for begin in range(0, len(plain), WORDS)]
    return [*special, *lines]


def _ends(run: Run, tokenizer: Tokenizer) -> list[int]:
    """The end-of-turn ids that stand last in what was trained."""
    last = {row["labels"][-1] if "labels" in row else row["chosen_ids"][-1] for row in _stored_rows(run)}
    return sorted(last & set(tokenizer.eos_ids)) or list(tokenizer.eos_ids[:1])


def _conversation(name: str, messages: tuple[dict[str, str], ...], recipe: Recipe, render: Any) -> dict[str, Any]:
    full = templates.with_system(messages, recipe.template.system)
    try:
        ids = encode.prompt_ids(full, **{**render, "system": None})
    except UsageError:
        ids = None
    return {"name": name, "messages": [dict(message) for message in full], "ids": ids}


def _with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Scoring needs one token of context before the first target; a begin token where the model has one."""
    if getattr(tokenizer, "adds_bos", False) and tokenizer.bos_token:
        return [*tokenizer.encode(tokenizer.bos_token), *ids]
    return ids


def _stored_rows(run: Run) -> list[dict[str, Any]]:
    for name in ("prepare/train.jsonl", "prepare/preferences.jsonl"):
        if (run.path / name).is_file():
            return evidence.read_rows(run, name, "prepare")
    return []


def _rows(run: Run) -> list[list[int]]:
    """The first training rows (of pairs, their prompts), each cut to ROW_TOKENS."""
    return [(row.get("input_ids") or row["prompt_ids"])[:ROW_TOKENS] for row in _stored_rows(run)[:ROWS]]


def _questions(run: Run, render: dict[str, Any]) -> list[dict[str, Any]]:
    """What `evaluate` asked; where that is little, the prompts of training rows too, which have no right answer here."""
    keys = ("set", "id", "prompt", "answer", "match")
    asked = [{key: row[key] for key in keys} for row in evidence.read_rows(run, "evaluate/answers.jsonl", "evaluate")]
    for question in asked[:QUESTIONS]:
        messages = templates.with_system([{"role": "user", "content": question["prompt"]}], render["system"])
        question |= {"messages": list(messages), "ids": encode.prompt_ids(messages, **{**render, "system": None})}
    for row in _stored_rows(run)[: max(0, ENOUGH - len(asked))]:
        ids = row.get("prompt_ids") or row["input_ids"][: _first_trained(row["labels"])]
        if ids:
            prompt = render["tokenizer"].decode(ids)
            asked.append(
                {"set": "rows", "id": str(row["row"]), "prompt": prompt, "answer": None, "match": None}
                | {"messages": None, "ids": ids}
            )
    return asked[:QUESTIONS]


def _first_trained(labels: list[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != encode.IGNORED), len(labels))


def special_texts(tokenizer: Tokenizer, template: str) -> list[str]:
    """The texts of tokens that mark turns: they never belong into an answer."""
    found = [*encode.end_of_turn_texts(tokenizer), *templates.special_words(template), tokenizer.bos_token]
    return [word for word in dict.fromkeys(found) if word and len(tokenizer.encode(word)) == 1]
