"""Sabotages of the real pipeline that stand for all others: each is caught with every change, not only at night."""

from __future__ import annotations

import pytest

from finetune.testing import questions
from sabotage import baseline, table
from sabotage.bench import Bench, side_by_side

FAST = [each for each in table().values() if each.fast]
# Those that a stage refuses before there is a verdict, and what it says.
REFUSED = {"optimizer state lost at resume": "it holds nothing of any weight"}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Each in turn on one honest run, two at a time."""
    baseline.model()
    with Bench(tmp_path_factory.mktemp("sabotage")) as bench:
        found = side_by_side([lambda each=each: bench.attempt(each) for each in FAST], workers=2)
    return {each.name: each for each in found}


def test_enough_are_swept():
    assert len(FAST) >= 6
    assert len({each.area for each in FAST}) >= 3


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", [each.name for each in FAST])
def test_it_is_caught(outcomes, name):
    if name in REFUSED:
        assert REFUSED[name] in outcomes[name].refused, outcomes[name]
    else:
        assert outcomes[name].failed, outcomes[name]
        assert outcomes[name].refused == ""


@pytest.mark.timeout(400)
def test_new_facts_are_made_of_tokens_that_the_model_has_seen():
    """But one in a hundred; where it was one in five, LoRA learned half of the facts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(baseline.model() / "tokenizer.json"))

    def tokens(rows):
        return [token for row in rows for token in tokenizer.encode(baseline.TRANSCRIPT.format(**row)).tokens]

    seen = set(tokens(baseline.pretrained_on()))
    new = tokens(questions.generate(baseline.KNOWN + baseline.UNSEEN + 5 * baseline.NEW, seed=baseline.KNOWN_SEED))
    assert sum(token not in seen for token in new) < 0.01 * len(new)
