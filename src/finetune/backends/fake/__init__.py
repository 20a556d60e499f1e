"""The fake backend: deterministic, without weights to download. Tier 1 drives the whole pipeline with it."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from finetune.backends import Constant, Generation, Job, Step, TensorFacts
from finetune.backends.fake.model import (
    VOCAB_SIZE,
    Adapter,
    Base,
    FakeModel,
    FakeTokenizer,
    Reading,
    merged,
    places,
    save_model,
)
from finetune.backends.fake.training import Training
from finetune.core.errors import MissingError, UsageError
from finetune.data.templates import ChatTemplate


class FakeBackend:
    """See fake_model for what it computes."""

    name = "fake"
    trains = True
    scores = True
    checkpoint_files = ("optimizer.json",)

    def tokenizer(self, model: Path, *, trust_remote_code: bool = False) -> FakeTokenizer:
        config = model / "tokenizer_config.json"
        if not config.is_file():
            raise MissingError(f"{model} holds no tokenizer of the fake backend (no tokenizer_config.json)")
        return FakeTokenizer(json.loads(config.read_text(encoding="utf-8"))["chat_template"])

    def load(self, model: Path, adapter: Path | None = None, **settings: Any) -> FakeModel:
        return FakeModel(Base.read(model), Adapter.read(adapter) if adapter else None)

    def train(self, job: Job) -> Generator[Step, None, dict[str, Any]]:
        return (yield from Training(job).steps())

    def score(self, handle: FakeModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        return [
            [handle.log_probability(p) for p in places([*given, *target], range(len(given), len(given) + len(target)))]
            for given, target in pairs
        ]

    def distributions(self, handle: FakeModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], out: Path) -> None:
        import numpy

        rows = []
        for given, target in pairs:
            for place in places([*given, *target], range(len(given), len(given) + len(target))):
                logits, norm = handle.logits(place.key, place.last)
                rows.append([logits.get(token, 0.0) - norm for token in range(VOCAB_SIZE)])
        numpy.save(out, numpy.array(rows, dtype=numpy.float32).reshape(-1, VOCAB_SIZE))

    def render(
        self, model: Path, conversations: Sequence[Sequence[Mapping[str, str]]], *, trust_remote_code: bool = False
    ) -> list[list[int] | str]:
        tokenizer = self.tokenizer(model)
        template = ChatTemplate(name="own", source=tokenizer.chat_template or "")
        return [self._render(template, tokenizer, messages) for messages in conversations]

    def _render(
        self, template: ChatTemplate, tokenizer: FakeTokenizer, messages: Sequence[Mapping[str, str]]
    ) -> list[int] | str:
        try:
            text = template.render(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=tokenizer.bos_token,
                eos_token=tokenizer.eos_token,
            )
        except UsageError as error:
            return str(error)
        return tokenizer.encode(text)

    def constants(self, model: Path, *, trust_remote_code: bool = False) -> dict[str, Constant]:
        tokenizer = self.tokenizer(model)
        return {"model_type": "fake", "vocab_size": VOCAB_SIZE, "eos_token_id": tokenizer.eos_ids[0]}

    def generate(self, handle: FakeModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[Generation]:
        return [self._generate(handle, list(prompt), max_new_tokens) for prompt in prompts]

    def _generate(self, handle: FakeModel, ids: list[int], max_new_tokens: int) -> Generation:
        start, finish = len(ids), "length"
        for _ in range(max_new_tokens):
            out, _ = handle.logits(*Reading(ids).context(len(ids)))
            best = _likeliest(out)
            if best in FakeTokenizer.eos_ids:
                finish = "stop"
                break
            ids.append(best)
        answer = tuple(ids[start:])
        return Generation(ids=answer, text=FakeTokenizer().decode(answer, skip_special=True), finish=finish)

    def merge(self, model: Path, adapter: Path, out: Path, **settings: Any) -> Path:
        template = self.tokenizer(adapter if (adapter / "tokenizer_config.json").is_file() else model).chat_template
        return save_model(out, merged(Base.read(model), Adapter.read(adapter)), template)

    def tensors(self, directory: Path) -> dict[str, TensorFacts]:
        stored = Adapter if (directory / "adapter.json").is_file() else Base
        return {
            name: TensorFacts(
                sha256=sha256(values.tobytes()).hexdigest(), shape=shape, norm=math.sqrt(sum(v * v for v in values))
            )
            for name, (shape, values) in stored.read(directory).tensors().items()
        }


def _likeliest(logits: Mapping[int, float]) -> int:
    """The lowest of the tokens with the highest logit; those that are not named have 0."""
    top = max(logits.values(), default=0.0)
    if top > 0:
        return min(token for token, logit in logits.items() if logit == top)
    return max(range(VOCAB_SIZE), key=lambda token: logits.get(token, 0.0))
