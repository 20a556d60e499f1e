"""The fake backend's model, adapter and tokenizer: a small learner in pure Python.

The next token's logits are a row of bigram weights for the last token, plus rows of a context table. A context is
(topic, tail): the words of the last line before the answer, and the last tokens of the answer so far. Topics that
share most of their words share their rows, so a paraphrase profits from what its original learned. Every number that
comes out (loss, gradient norm, log-probability, DPO reward) is computed from the weights as they are.

LoRA adds `scale * A[slot, bucket] * B[context, slot]`, where a context has `r` slots, each bound to one token: B starts
at zero, A at random. The optimizer is SGD with momentum whose gradient is averaged per context, so that, as with Adam,
the step does not depend on the batch's size.
"""

from __future__ import annotations

import json
import math
import random
import re
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.core.errors import MissingError
from finetune.core.files import aside

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
VOCAB_SIZE = 256 + len(SPECIALS)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
BUCKETS = 8  # width of lora_A
TAIL = 6  # tokens of the answer so far that a context holds
SIMILAR = 0.65  # share of common words (Jaccard) from which topics share their rows
GAIN = 4000.0  # makes the usual learning rates move logits by whole units
MOMENTUM = 0.5

Key = tuple[str, str]
Rows = dict[Key, dict[int, float]]
Tensors = dict[str, tuple[tuple[int, ...], "array[float]"]]
_SPECIAL_IDS = {text: 256 + index for index, text in enumerate(SPECIALS)}
_SPECIAL_TEXT = re.compile("|".join(map(re.escape, SPECIALS)))
_BOUNDARY = re.compile(r"[\n\ue000-\ue0ff]|\[/?INST\]|<\|[a-z_]+\|>")
_WORD = re.compile(r"[0-9A-Za-z_\u0080-\u00ff]+")
_NO_TOPIC = set(
    re.findall(
        r"\w+",
        "a an and are as at by call called can did do does for from had has have how i if in is it its me name of on or "
        "please s say tell that the this to was what when where which who whom whose with would you your "
        "user assistant system instruction input response sys",
    )
)
_PROSE = (
    "\nThe people of the town walked to the river in the morning and came home in the evening."
    "\nThere was a small house on the hill, and in it lived an old man who had seen many winters."
    "\nWhat is the name of the place? It is called the green valley, and the answer is known to all."
)


def _char(token: int) -> str:
    return chr(token) if token < 256 else chr(0xE000 + token - 256)


class FakeTokenizer:
    """One token a byte, and the three special tokens."""

    eos_token = "<|im_end|>"
    bos_token: str | None = None
    eos_ids: tuple[int, ...] = (_SPECIAL_IDS["<|im_end|>"],)
    adds_bos = False
    vocab_size = VOCAB_SIZE

    def __init__(self, chat_template: str | None = CHATML) -> None:
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in _SPECIAL_TEXT.finditer(text):
            ids += text[at : match.start()].encode("utf-8", "replace")
            ids.append(_SPECIAL_IDS[match.group()])
            at = match.end()
        return ids + list(text[at:].encode("utf-8", "replace"))

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, and where in the text (characters) each token begins and ends."""
        spans: list[tuple[int, int]] = []
        for piece in re.finditer(rf"{_SPECIAL_TEXT.pattern}|.", text, re.DOTALL):
            spans += [piece.span()] * len(self.encode(piece.group()))
        return self.encode(text), spans

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        out = b""
        for token in ids:
            out += bytes([token]) if token < 256 else b"" if skip_special else SPECIALS[token - 256].encode()
        return out.decode("utf-8", "replace")


class Reading:
    """A token sequence, and the context of every position in it."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.text = "".join(map(_char, ids))
        self.ends = [0, *(match.end() for match in _BOUNDARY.finditer(self.text))]
        self.topics: dict[int, str] = {}

    def context(self, at: int) -> tuple[Key, str]:
        """(topic, tail) and the last token's character, for predicting position `at`."""
        head = self.ends[bisect_right(self.ends, at) - 1]
        if head not in self.topics:
            self.topics[head] = topic(self.text[:head])
        return (self.topics[head], self.text[head:at][-TAIL:]), self.text[at - 1 : at]


def topic(head: str) -> str:
    """The words, sorted, of the last line that says anything; function words and role names left out."""
    for line in reversed(_BOUNDARY.split(head)):
        words = {word for word in _WORD.findall(line.lower()) if word not in _NO_TOPIC}
        if words:
            return " ".join(sorted(words))
    return ""


@dataclass
class Base:
    """The model's own weights: `bigram[last][next]`, and the context table."""

    bigram: dict[str, dict[int, float]] = field(default_factory=dict)
    table: Rows = field(default_factory=dict)

    def tensors(self) -> Tensors:
        rows = [self.bigram.get(_char(token), {}) for token in range(VOCAB_SIZE)]
        named: Tensors = {"model.embed_tokens.weight": ((VOCAB_SIZE, VOCAB_SIZE), _dense(rows))}
        for index, module in enumerate(MODULES):
            part = list(self.table.values())[index :: len(MODULES)]
            named[f"model.layers.0.{module}.weight"] = ((len(part), VOCAB_SIZE), _dense(part))
        return named

    @property
    def parameters(self) -> int:
        return VOCAB_SIZE * (VOCAB_SIZE + len(self.table))

    def to_json(self) -> str:
        table = [[*key, {str(token): value for token, value in row.items()}] for key, row in self.table.items()]
        return json.dumps({"bigram": self.bigram, "table": table})

    @classmethod
    def read(cls, directory: Path) -> Base:
        file = directory / "fake_model.json"
        if not file.is_file():
            raise MissingError(f"{directory} holds no model of the fake backend (no fake_model.json)")
        value = json.loads(file.read_text(encoding="utf-8"))
        bigram = {last: _row(row) for last, row in value["bigram"].items()}
        return cls(bigram, {(head, tail): _row(row) for head, tail, row in value["table"]})


@dataclass
class Adapter:
    """LoRA weights. `slots[key]` are the tokens that a context's slots stand for; a module holds every 4th context."""

    r: int
    alpha: float
    a: list[list[list[float]]]  # module, slot, bucket
    b: dict[Key, list[float]] = field(default_factory=dict)
    slots: dict[Key, list[int]] = field(default_factory=dict)
    home: dict[Key, int] = field(default_factory=dict)

    @classmethod
    def fresh(cls, lora: Mapping[str, Any], seed: int) -> Adapter:
        r = int(lora.get("r", 16))
        draw = random.Random(f"lora_A/{seed}")
        a = [[[0.75 + draw.random() / 2 for _ in range(BUCKETS)] for _ in range(r)] for _ in MODULES]
        return cls(r, float(lora.get("lora_alpha", 32)), a)

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    @property
    def parameters(self) -> int:
        return self.r * (len(self.b) + BUCKETS * len(MODULES))

    def allocate(self, key: Key, token: int) -> None:
        """Make room for a token in a context; a new slot is zero, so what the model says stays the same."""
        if key not in self.b:
            self.home[key] = len(self.b) % len(MODULES)
            self.b[key] = [0.0] * self.r
            self.slots[key] = []
        slots = self.slots[key]
        if token not in slots and len(slots) < self.r:
            slots.append(token)

    def row(self, key: Key) -> dict[int, float]:
        a, b, column, scale = self.a[self.home[key]], self.b[key], bucket(key), self.scale
        return {token: scale * a[slot][column] * b[slot] for slot, token in enumerate(self.slots[key])}

    def tensors(self) -> Tensors:
        named: Tensors = {}
        for index, module in enumerate(MODULES):
            prefix = f"base_model.model.layers.0.{module}"
            gates = array("d", (value for row in self.a[index] for value in row))
            named[f"{prefix}.lora_A.weight"] = ((self.r, BUCKETS), gates)
            part = [row for key, row in self.b.items() if self.home[key] == index]
            named[f"{prefix}.lora_B.weight"] = ((len(part), self.r), array("d", (v for row in part for v in row)))
        return named

    def to_json(self) -> str:
        contexts = [[*key, self.slots[key], row] for key, row in self.b.items()]
        return json.dumps({"r": self.r, "lora_alpha": self.alpha, "lora_A": self.a, "contexts": contexts})

    @classmethod
    def read(cls, directory: Path) -> Adapter:
        file = directory / "adapter.json"
        if not file.is_file():
            raise MissingError(f"{directory} holds no adapter of the fake backend (no adapter.json)")
        value = json.loads(file.read_text(encoding="utf-8"))
        adapter = cls(value["r"], value["lora_alpha"], value["lora_A"])
        for index, (head, tail, slots, row) in enumerate(value["contexts"]):
            adapter.b[head, tail], adapter.slots[head, tail] = row, slots
            adapter.home[head, tail] = index % len(MODULES)
        return adapter


class FakeModel:
    """The handle of `load`: base weights, and perhaps an adapter on them."""

    def __init__(self, base: Base, adapter: Adapter | None = None) -> None:
        self.base, self.adapter = base, adapter
        self.forget()

    def forget(self) -> None:
        """Look the known topics up again, after contexts were added."""
        known = {head for head, _ in self.base.table} | {head for head, _ in (self.adapter.b if self.adapter else ())}
        self._words = {head: frozenset(head.split()) for head in known}
        self._near: dict[str, list[tuple[str, float]]] = {}

    def near(self, head: str) -> list[tuple[str, float]]:
        """The known topics like this one, and how like (1: the same words)."""
        if head not in self._near:
            words = frozenset(head.split())
            found = [(known, len(words & other) / (len(words | other) or 1)) for known, other in self._words.items()]
            self._near[head] = [(k, s) for k, s in found if s >= SIMILAR and k != head] + [(head, 1.0)]
        return self._near[head]

    def logits(self, key: Key, last: str) -> tuple[dict[int, float], float]:
        """The logits that are not zero, and the logarithm of the normaliser over the whole vocabulary."""
        out = dict(self.base.bigram.get(last, {}))
        for head, likeness in self.near(key[0]):
            here = (head, key[1])
            for row in (
                self.base.table.get(here),
                self.adapter.row(here) if self.adapter and here in self.adapter.b else None,
            ):
                for token, value in (row or {}).items():
                    out[token] = out.get(token, 0.0) + likeness * value
        top = max(0.0, *out.values()) if out else 0.0
        total = sum(math.exp(value - top) for value in out.values()) + (VOCAB_SIZE - len(out)) * math.exp(-top)
        return out, top + math.log(total)

    def log_probability(self, place: Place) -> float:
        out, norm = self.logits(place.key, place.last)
        return out.get(place.target, 0.0) - norm


@dataclass(frozen=True)
class Place:
    """One token to predict."""

    key: Key
    last: str
    target: int


def places(ids: Sequence[int], wanted: Iterable[int]) -> list[Place]:
    """The places of the wanted positions in a sequence."""
    reading = Reading(ids)
    return [Place(*reading.context(at), ids[at]) for at in wanted]


def make_model(directory: Path, knows: Mapping[str, str] | None = None, *, strength: float = 9.0) -> Path:
    """Write a fake model that already answers the questions in `knows`, and return its directory."""
    base = Base()
    for last, following in zip(_PROSE, _PROSE[1:], strict=False):
        row = base.bigram.setdefault(last, {})
        row[ord(following)] = min(2.0, row.get(ord(following), 0.0) + 0.5)
    for question, answer in (knows or {}).items():
        ids = FakeTokenizer().encode(f"{question}\n{answer}<|im_end|>")
        start = len(FakeTokenizer().encode(question)) + 1
        for place in places(ids, range(start, len(ids))):
            base.table.setdefault(place.key, {})[place.target] = strength
    return save_model(directory, base, CHATML)


def merged(base: Base, adapter: Adapter) -> Base:
    """The base with the adapter's rows added into its table."""
    table = {key: dict(row) for key, row in base.table.items()}
    for key in adapter.b:
        row = table.setdefault(key, {})
        for token, value in adapter.row(key).items():
            row[token] = row.get(token, 0.0) + value
    return Base(base.bigram, table)


def save_model(directory: Path, base: Base, chat_template: str | None, **more: str) -> Path:
    """Write a model directory; `more` holds further files, as name and text."""
    config = {
        "model_type": "fake",
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": 1,
        "num_parameters": base.parameters,
    }
    files = {"config.json": json.dumps(config), "fake_model.json": base.to_json()}
    return _publish(directory, {**files, **_tokenizer_files(chat_template), **more})


def save_adapter(directory: Path, adapter: Adapter, model: Path, chat_template: str | None, **more: str) -> Path:
    """Write an adapter directory; `more` holds further files, as name and text."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": adapter.r,
        "lora_alpha": adapter.alpha,
        "target_modules": list(MODULES),
    }
    files = {"adapter_config.json": json.dumps(config), "adapter.json": adapter.to_json()}
    return _publish(directory, {**files, **_tokenizer_files(chat_template), **more})


def _tokenizer_files(chat_template: str | None) -> dict[str, str]:
    return {"tokenizer_config.json": json.dumps({"chat_template": chat_template, "eos_token": "<|im_end|>"})}


def _publish(directory: Path, files: Mapping[str, str]) -> Path:
    """Write a directory whole or not at all."""
    with aside(directory) as partial:
        partial.mkdir(parents=True)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")
    return directory


def _dense(rows: Sequence[Mapping[int, float]]) -> array[float]:
    values = array("d", bytes(8 * VOCAB_SIZE * len(rows)))
    for index, row in enumerate(rows):
        for token, value in row.items():
            values[index * VOCAB_SIZE + token] = value
    return values


def _row(row: Mapping[str, float]) -> dict[int, float]:
    return {int(token): value for token, value in row.items()}


def bucket(key: Key) -> int:
    return zlib.crc32("\0".join(key).encode("utf-8")) % BUCKETS
