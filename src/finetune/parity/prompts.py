"""What every hop is asked: the same conversations, texts, rows and questions, rendered once by our own renderer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.backends import tokenizer_of
from finetune.core.errors import UsageError
from finetune.data import encode, templates
from finetune.data.tokenizer import Tokenizer
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records import compared, trained

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


def build(recipe: Recipe, run: Run, model: Path) -> compared.Material:
    """The material as plain data.

    `conversations` (name, messages, ids or None where the template refuses it), `texts` and `odd_texts` (text, ids),
    `vocabulary` (the text of every token, some hundred in one, and its ids), `rows` (ids of training rows), `questions`
    (set, id, prompt, messages, answer, match, ids), `max_new_tokens`, `special` (texts that must not leak into an
    answer), `eos_ids`, `ends` (those that the training taught to end with), `template`. `model` is what the data were
    prepared with: the base.
    """
    tokenizer = tokenizer_of(recipe, model)
    source = evidence.chat_template(run)
    render: dict[str, Any] = {
        "tokenizer": tokenizer,
        "template": templates.ChatTemplate(name="run", source=source),
        "system": recipe.template.system,
    }
    return {
        "conversations": [_conversation(name, messages, recipe, render) for name, messages in CONVERSATIONS.items()],
        "texts": [{"text": text, "ids": with_bos(tokenizer, tokenizer.encode(text))} for text in TEXTS],
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
    last = {row["labels"][-1] for row in _trained(run)} or {pair["chosen_ids"][-1] for pair in _pairs(run)}
    return sorted(last & set(tokenizer.eos_ids)) or list(tokenizer.eos_ids[:1])


def _conversation(
    name: str, messages: tuple[dict[str, str], ...], recipe: Recipe, render: Any
) -> compared.Conversation:
    full = templates.with_system(messages, recipe.template.system)
    try:
        ids = encode.prompt_ids(full, **{**render, "system": None})
    except UsageError:
        ids = None
    return {"name": name, "messages": [dict(message) for message in full], "ids": ids}


def with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Scoring needs one token of context before the first target; a begin token where the model has one."""
    if getattr(tokenizer, "adds_bos", False) and tokenizer.bos_token:
        return [*tokenizer.encode(tokenizer.bos_token), *ids]
    return ids


def _trained(run: Run) -> list[trained.Row]:
    return evidence.maybe_rows(run, layout.TRAIN_ROWS)


def _pairs(run: Run) -> list[trained.Pair]:
    """The pairs of a run that trains nothing before it aligns."""
    return [] if evidence.there(run, layout.TRAIN_ROWS) else evidence.maybe_rows(run, layout.PAIRS)


def _rows(run: Run) -> list[list[int]]:
    """The first training rows (of pairs, their prompts), each cut to ROW_TOKENS."""
    ids = [row["input_ids"] for row in _trained(run)] or [pair["prompt_ids"] for pair in _pairs(run)]
    return [each[:ROW_TOKENS] for each in ids[:ROWS]]


def _questions(run: Run, render: dict[str, Any]) -> list[compared.Inquiry]:
    """What `evaluate` asked; where that is little, the prompts of training rows too, which have no right answer here."""
    asked: list[compared.Inquiry] = []
    for row in evidence.rows(run, layout.ANSWERS)[:QUESTIONS]:
        messages = templates.with_system([{"role": "user", "content": row["prompt"]}], render["system"])
        ids = encode.prompt_ids(messages, **{**render, "system": None})
        asked.append(
            {
                "set": row["set"], "id": row["id"], "prompt": row["prompt"], "answer": row["answer"],
                "match": row["match"], "messages": [dict(message) for message in messages], "ids": ids,
            }
        )  # fmt: skip
    prompts = [(row["row"], row["input_ids"][: _first_trained(row["labels"])]) for row in _trained(run)]
    prompts = prompts or [(pair["row"], pair["prompt_ids"]) for pair in _pairs(run)]
    for number, ids in prompts[: max(0, ENOUGH - len(asked))]:
        if ids:
            prompt = render["tokenizer"].decode(ids)
            known: compared.Inquiry = {
                "set": "rows", "id": str(number), "prompt": prompt, "answer": None, "match": None, "messages": None,
                "ids": ids,
            }  # fmt: skip
            asked.append(known)
    return asked[:QUESTIONS]


def _first_trained(labels: list[int]) -> int:
    return next((place for place, label in enumerate(labels) if label != encode.IGNORED), len(labels))


def special_texts(tokenizer: Tokenizer, template: str) -> list[str]:
    """The texts of tokens that mark turns: they never belong into an answer."""
    found = [*encode.end_of_turn_texts(tokenizer), *templates.special_words(template), tokenizer.bos_token]
    return [word for word in dict.fromkeys(found) if word and len(tokenizer.encode(word)) == 1]
