"""Conversations to token ids and labels. One walk over a conversation serves training, scoring and inference, so the
prompt at inference is by construction a prefix of what was trained."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any, TypeVar

from finetune.core.errors import DataError, UsageError
from finetune.data.faults import plural, raise_all
from finetune.data.formats import Example, Message
from finetune.data.templates import ChatTemplate, with_system
from finetune.data.tokenizer import Tokenizer

T = TypeVar("T")
IGNORED = -100  # the label of a token that is not trained, as PyTorch's cross entropy has it

_SPLIT = (
    " (it is not prefix-preserving), so a conversation of several turns cannot be trained with it; split it into "
    "single turns, or choose another template.name"
)


@dataclass(frozen=True)
class Encoded:
    """One row as ids. `labels` equal `input_ids` where trained and are -100 elsewhere. `row` counts from 0 over the
    data set; `file` and `line` say where it came from; `lost_answer_tokens` is what truncation cut off."""

    input_ids: list[int]
    labels: list[int]
    row: int
    file: str
    line: int
    lost_answer_tokens: int = 0

    @property
    def trained(self) -> int:
        """How many tokens carry a label."""
        return sum(label != IGNORED for label in self.labels)


class _Walk:
    """Text, ids and trained flags of a conversation so far. `rendered` is how much of the template's text is used."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.text, self.rendered, self.tail = "", "", ""
        self.ids: list[int] = []
        self.trained: list[bool] = []
        self.answer_at = 0  # where the last answer begins

    def render(self, messages: Sequence[Message], *, prompt: bool) -> str:
        return self.template.render(
            messages,
            add_generation_prompt=prompt,
            bos_token=self.tokenizer.bos_token,
            eos_token=self.tokenizer.eos_token,
        )

    def add(self, text: str, *, trained: bool) -> None:
        """Append text. Ids already there never change: at inference they would be the prompt."""
        whole = self.tokenizer.encode(self.text + text)
        kept = len(self.ids)
        new = whole[kept:] if whole[:kept] == self.ids else self.tokenizer.encode(text)
        self.text += text
        self.ids += new
        self.trained += [trained] * len(new)

    def context(self, messages: Sequence[Message]) -> None:
        """Add what the template puts before the next answer to `messages`."""
        text = self.render(messages, prompt=True)
        if not text.startswith(self.rendered):
            raise UsageError(
                f"the template '{self.template.name}' writes earlier turns differently once later ones follow{_SPLIT}"
            )
        self.add_first(self.tail + text[len(self.rendered) :])
        self.rendered, self.tail = text, ""

    def add_first(self, text: str) -> None:
        bos = self.tokenizer.bos_token
        if not self.ids and getattr(self.tokenizer, "adds_bos", False) and bos and not text.startswith(bos):
            text = bos + text
        self.add(text, trained=False)

    def answer(self, messages: Sequence[Message], *, alone: bool) -> None:
        """Add the answer that ends `messages`, trained through its end-of-turn token; keep what follows as `tail`."""
        content = messages[-1]["content"]
        _refuse_end_of_turn(content, self.tokenizer)
        full = self.render(messages, prompt=False)
        if full.startswith(self.rendered):
            new = full[len(self.rendered) :]
            self.rendered = full
        elif alone:  # a template whose generation prompt is more than it writes for a finished turn (opens a thought)
            place, length = _find(full, content, len(commonprefix([full, self.rendered])))
            new = content + full[place + length :] if place >= 0 else content
        else:
            raise UsageError(
                f"the template '{self.template.name}' writes a finished answer unlike the prompt for it{_SPLIT}"
            )
        new, self.tail = self._through_end_of_turn(new, content)
        self.answer_at = len(self.ids)
        self.add(new, trained=True)

    def _through_end_of_turn(self, new: str, content: str) -> tuple[str, str]:
        """The answer's text through its first end-of-turn token (added when the template writes none), and the rest."""
        place, length = _find(new, content, 0)
        after = max(place, 0) + length
        ends = [(at, word) for word in end_of_turn_texts(self.tokenizer) if (at := new.find(word, after)) >= 0]
        if ends:
            at, word = min(ends, key=lambda end: (end[0], -len(end[1])))
            return new[: at + len(word)], new[at + len(word) :]
        kept = new if place < 0 else new[:after] + new[after:].rstrip()
        return kept + self.tokenizer.eos_token, new[len(kept) :]


def end_of_turn_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The text of every token that ends a turn; the tokenizer's own `eos_token` first."""
    words = [tokenizer.eos_token, *(tokenizer.decode([token]) for token in tokenizer.eos_ids)]
    return tuple(dict.fromkeys(word for word in words if word))


def _find(text: str, content: str, start: int) -> tuple[int, int]:
    """Where `content`, as it is or trimmed, begins from `start` on, and how long it is there; (-1, 0) if it is not."""
    for candidate in (content, content.strip()):
        place = text.find(candidate, start)
        if place >= 0:
            return place, len(candidate)
    return -1, 0


def _refuse_end_of_turn(content: str, tokenizer: Tokenizer) -> None:
    for word in end_of_turn_texts(tokenizer):
        if word in content:
            raise UsageError(
                f"the answer holds the end-of-turn token '{word}', which would end it early; take it out of the data "
                "(the template writes it)"
            )


def _walk(messages: Sequence[Message], tokenizer: Tokenizer, template: ChatTemplate, *, prompt: bool) -> _Walk:
    """Walk a conversation. With `prompt`, stop where the model is to answer its last message."""
    walk = _Walk(tokenizer, template)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    alone = len(answers) == 1 and not prompt
    for index in answers:
        walk.context(messages[:index])
        walk.answer(messages[: index + 1], alone=alone)
    if prompt:
        walk.context(messages)
    return walk


def encode_sft(
    example: Example,
    row: int,
    *,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    system: str | None,
    completion_only: bool,
) -> Encoded:
    """Ids and labels of a conversation or a text, not truncated. Raises DataError with file and line.

    Of a conversation every answer is trained, each through its end-of-turn token; what the template writes after the
    last one is left out. A text is trained whole, with the end token after it.
    """
    try:
        if example.kind == "text":
            return _encode_text(example, row, tokenizer)
        if example.kind != "chat":
            raise UsageError("a preference pair cannot be trained by imitation; put it under align.data")
        walk = _walk(with_system(example.messages, system), tokenizer, template, prompt=False)
    except UsageError as error:
        raise _at(example, error) from error
    labels = [
        token if trained or not completion_only else IGNORED
        for token, trained in zip(walk.ids, walk.trained, strict=True)
    ]
    return Encoded(walk.ids, labels, row, example.file, example.line)


def _encode_text(example: Example, row: int, tokenizer: Tokenizer) -> Encoded:
    text, bos = example.text or "", tokenizer.bos_token
    if not text.endswith(tokenizer.eos_token):
        text += tokenizer.eos_token
    if getattr(tokenizer, "adds_bos", False) and bos and not text.startswith(bos):
        text = bos + text
    ids = tokenizer.encode(text)
    return Encoded(ids, list(ids), row, example.file, example.line)


def _at(example: Example, error: UsageError) -> DataError:
    if isinstance(error, DataError):
        return error
    return DataError("the data cannot be used:", [f"{example.file}:{example.line}: {error}"])


def prompt_ids(
    messages: Sequence[Message], *, tokenizer: Tokenizer, template: ChatTemplate, system: str | None
) -> list[int]:
    """The ids a model is given to answer `messages`: exactly the prefix that training used. Raises UsageError."""
    return _walk(with_system(messages, system), tokenizer, template, prompt=True).ids


def answer_ids(
    messages: Sequence[Message], answer: str, *, tokenizer: Tokenizer, template: ChatTemplate, system: str | None
) -> list[int]:
    """The ids of `answer` to `messages`, end-of-turn token included, as training would have them."""
    before = with_system(messages, system)
    conversation = (*before, {"role": "assistant", "content": answer})
    walk = _walk(conversation, tokenizer, template, prompt=False)
    return walk.ids[walk.answer_at :]


def truncate(encoded: Encoded, max_length: int) -> Encoded:
    """The first `max_length` tokens; the trained ones that were cut off are counted."""
    if len(encoded.input_ids) <= max_length:
        return encoded
    lost = sum(label != IGNORED for label in encoded.labels[max_length:])
    return replace(
        encoded,
        input_ids=encoded.input_ids[:max_length],
        labels=encoded.labels[:max_length],
        lost_answer_tokens=encoded.lost_answer_tokens + lost,
    )


def encode_preference(
    example: Example, row: int, *, tokenizer: Tokenizer, template: ChatTemplate, system: str | None, max_length: int
) -> dict[str, Any]:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` (answers with their end-of-turn token), `row`, `file`, `line`.

    Raises DataError with file and line where the prompt and the longer answer have more than `max_length` tokens.
    """
    pair = encode_pair(example, row, tokenizer=tokenizer, template=template, system=system)
    length = pair_length(pair)
    if length > max_length:
        fault = f"{example.file}:{example.line}: {length} tokens, over the limit of {max_length}"
        raise DataError("the data cannot be used:", [f"{fault}; raise align.max_length or shorten the row"])
    return pair


def encode_pair(
    example: Example, row: int, *, tokenizer: Tokenizer, template: ChatTemplate, system: str | None
) -> dict[str, Any]:
    """As `encode_preference`, whatever the length."""
    try:
        if example.kind != "preference" or example.chosen is None or example.rejected is None:
            raise UsageError("not a preference pair (prompt + chosen + rejected)")
        parts = {"tokenizer": tokenizer, "template": template, "system": system}
        return {
            "prompt_ids": prompt_ids(example.messages, **parts),  # type: ignore[arg-type]
            "chosen_ids": answer_ids(example.messages, example.chosen, **parts),  # type: ignore[arg-type]
            "rejected_ids": answer_ids(example.messages, example.rejected, **parts),  # type: ignore[arg-type]
            "row": row,
            "file": example.file,
            "line": example.line,
        }
    except UsageError as error:
        raise _at(example, error) from error


def pair_length(pair: dict[str, Any]) -> int:
    """Tokens of the prompt and the longer answer."""
    return len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"]))


def encode_all(examples: Iterable[Example], encode: Callable[[Example, int], T]) -> list[T]:
    """`encode(example, row)` for every example. Raises one DataError with the faults of all."""
    done: list[T] = []
    faults: list[str] = []
    for row, example in enumerate(examples):
        try:
            done.append(encode(example, row))
        except DataError as error:
            faults += error.faults
    raise_all(f"the data cannot be used ({plural(len(faults), 'fault')}):", faults)
    return done


def preview(encoded: Encoded, tokenizer: Tokenizer, *, lines: int = 40) -> str:
    """One row as plain text, the masked part visible. At most `lines` lines of each stretch are shown."""
    where = f"{encoded.file}:{encoded.line}"
    shown = [f"{where}: {len(encoded.input_ids)} tokens, {encoded.trained} trained, the rest masked"]
    start = 0
    while start < len(encoded.input_ids):
        trained = encoded.labels[start] != IGNORED
        end = start
        while end < len(encoded.input_ids) and (encoded.labels[end] != IGNORED) == trained:
            end += 1
        parts = tokenizer.decode(encoded.input_ids[start:end]).removesuffix("\n").split("\n")
        mark = "trained|" if trained else "masked |"
        shown += [f"{mark} {part}" for part in parts[:lines]]
        if len(parts) > lines:
            shown.append(f"{mark} ... {len(parts) - lines} more lines")
        start = end
    last = encoded.input_ids[-1] if encoded.input_ids else None
    if last in tokenizer.eos_ids:
        state = "trained" if encoded.labels[-1] != IGNORED else "NOT trained"
        shown.append(f"end of turn: {tokenizer.decode([last])} (id {last}), {state}")
    else:
        shown.append("end of turn: none")
    if encoded.lost_answer_tokens:
        shown.append(f"cut off: {plural(encoded.lost_answer_tokens, 'answer token')}")
    return "\n".join(shown)


def unigram_entropy(rows: Sequence[Sequence[int]]) -> float:
    """Entropy (nats) of the trained tokens: the loss of a model that knows only how often each occurs.

    `rows` are labels; -100 is left out. 0 when nothing is trained, which no loss can beat.
    """
    counts = Counter(label for row in rows for label in row if label != IGNORED)
    total = sum(counts.values())
    return sum(-count / total * math.log(count / total) for count in counts.values())
