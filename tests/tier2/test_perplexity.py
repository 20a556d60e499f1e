"""Perplexity by real models: equal to PyTorch's own cross-entropy, and in the order that docs/perplexity.md says."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from finetune.testing.perplexity import EMBEDDED, RANDOM_TOKENS_FROM, load, measure, perplexity

ENGLISH = Path(__file__).parents[2] / "bench" / "english.jsonl"
TEXT = " The old man walked to the river, and there he met a fox who said: well, é and 🙂 are words too."


def by_hand(scorer: str, text: str, first: int) -> float:
    """exp(cross-entropy) of the tokens of `text` from place `first` on, by transformers and torch alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(scorer, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(scorer)(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = model(ids).logits[0, first - 1 : -1].double()
    return math.exp(torch.nn.functional.cross_entropy(logits, ids[0, first:]).item())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("prompt", ["Once upon a time", ""])
def test_the_perplexity_is_the_exponential_of_torchs_cross_entropy(tiny_model, architecture: str, prompt: str):
    scorer = str(tiny_model(architecture))
    before = len(load(scorer).tokenizer.encode(prompt))

    found = perplexity(TEXT, prompt, scorer=scorer)

    assert found.value == pytest.approx(by_hand(scorer, prompt + TEXT, max(1, before)), rel=1e-5)
    if prompt:
        assert found.whole == pytest.approx(by_hand(scorer, prompt + TEXT, 1), rel=1e-5)
    else:
        assert found.whole is None
    assert found.tokens == len(load(scorer).tokenizer.encode(prompt + TEXT)) - max(1, before)


def test_a_text_longer_than_the_models_positions_is_scored_in_windows(tiny_model):
    scorer = load(str(tiny_model("gpt2")))
    text = TEXT * 40

    found = measure(scorer, text)

    assert scorer.window == 512
    assert found.tokens == len(scorer.tokenizer.encode(text)) - 1 > 1000
    assert math.isfinite(found.value)


def test_half_a_surrogate_pair_is_scored_as_any_other_character(tiny_model):
    half, other = (perplexity(f"walked{sign} to the river", scorer=str(tiny_model())) for sign in ("\ud83d", "?"))

    assert half == other


@pytest.fixture(scope="module")
def embedded() -> Any:
    return load(EMBEDDED)


@pytest.fixture(scope="module")
def english() -> list[str]:
    rows = [json.loads(line) for line in ENGLISH.read_text("utf-8").splitlines()]
    return [row["text"] for row in rows if row["from"] in ("recipe", "letter", "fiction")]


def test_the_bands_of_the_embedded_scorer_are_where_the_docs_say(embedded, english: list[str]):
    draw = random.Random(0)
    words = " ".join(english).split()
    salad = " ".join(draw.sample(words, 38))
    noise = embedded.tokenizer.decode(draw.sample(range(17, embedded.tokenizer.vocab_size), 50))

    read = [measure(embedded, text) for text in english]
    assert len(read) == 3
    assert all(10 < found.value < 150 and found.distinct > 0.6 for found in read)
    assert 600 < measure(embedded, salad).value < 1e4
    assert measure(embedded, noise).value > RANDOM_TOKENS_FROM[EMBEDDED]


def test_repetition_scores_low_and_is_caught_by_the_share_of_distinct_tokens(embedded):
    loop = " He went to the shop." * 8

    found = measure(embedded, loop, "Once upon a time")

    assert found.value < 10
    assert found.distinct < 0.2


def test_a_token_over_the_seam_is_counted_where_its_word_begins(embedded):
    with_space, without = measure(embedded, "Paris.", "It is "), measure(embedded, " Paris.", "It is")

    assert with_space.value == pytest.approx(without.value)
    assert (with_space.tokens, without.tokens) == (2, 2)
