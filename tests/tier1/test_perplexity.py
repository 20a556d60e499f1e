"""Perplexity: exact, of the completion alone, and never a number where there is none."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune.backends.fake.model import VOCAB_SIZE, Base, FakeTokenizer, save_model
from finetune.cli.app import cli
from finetune.core.errors import MissingError, UsageError
from finetune.testing import perplexity as scoring
from finetune.testing.perplexity import Perplexity, Scorer, measure, perplexity


@pytest.fixture
def fake(tmp_path: Path) -> str:
    """A model by hand: after 'a' comes 'b' with odds of 3 to 1 against any other token; all else is equally likely."""
    return str(save_model(tmp_path / "scorer", Base({"a": {ord("b"): math.log(3)}}), None))


class Words:
    """A tokenizer of words with the spaces before them, and marks; one id a different token."""

    bos_token: str | None = "<s>"

    def __init__(self, *, adds_bos: bool = False) -> None:
        self.adds_bos, self.seen = adds_bos, {"<s>": 0}

    def encode(self, text: str) -> list[int]:
        return [self.seen.setdefault(token, len(self.seen)) for token in re.findall(r"<s>| ?\w+|\s|[^\w\s]", text)]

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        return self.encode(text), [match.span() for match in re.finditer(r"<s>| ?\w+|\s|[^\w\s]", text)]


class Told:
    """A backend whose log-probabilities a test names, and that notes what it was asked."""

    def __init__(self, log_probability: Callable[[int], float] = lambda token: -1.0) -> None:
        self.log_probability, self.asked = log_probability, list[Any]()

    def score(self, handle: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[float]]:
        self.asked += pairs
        return [[self.log_probability(token) for token in targets] for _, targets in pairs]


def told(*, window: int = 8, adds_bos: bool = False, **more: Any) -> Scorer:
    backend: Any = Told(**more)
    return Scorer("told", backend, Words(adds_bos=adds_bos), None, window)


def scored(scorer: Scorer) -> list[int]:
    backend: Any = scorer.backend
    return [token for _, targets in backend.asked for token in targets]


# -- the number --------------------------------------------------------------------------------------------------------


def test_the_perplexity_is_that_computed_by_hand(fake: str) -> None:
    likely, unlikely, even = 3 / (VOCAB_SIZE + 2), 1 / (VOCAB_SIZE + 2), 1 / VOCAB_SIZE  # after 'a', after others

    found = perplexity("bab", "ca", scorer=fake)

    assert found.value == pytest.approx((likely * even * likely) ** (-1 / 3), rel=1e-12)
    assert found.whole == pytest.approx((even * likely * even * likely) ** (-1 / 4), rel=1e-12)
    assert found == Perplexity(
        value=found.value, whole=found.whole, tokens=3, distinct=pytest.approx(2 / 3), scorer=fake
    )
    assert perplexity("aa", "a", scorer=fake).value == pytest.approx(1 / unlikely, rel=1e-12)


def test_the_prompt_is_read_but_not_scored(fake: str) -> None:
    assert perplexity("b", "a", scorer=fake).value == pytest.approx((VOCAB_SIZE + 2) / 3)
    assert perplexity("b", "c", scorer=fake).value == pytest.approx(VOCAB_SIZE)


def test_without_a_prompt_the_first_token_is_not_scored_and_there_is_no_whole(fake: str) -> None:
    found = perplexity("ab", scorer=fake)

    assert (found.tokens, found.whole, found.distinct) == (1, None, 1.0)
    assert found.value == pytest.approx((VOCAB_SIZE + 2) / 3)


def test_a_tokenizer_that_begins_texts_with_a_token_has_the_first_one_scored() -> None:
    scorer = told(adds_bos=True, log_probability=lambda token: -float(token))

    found = measure(scorer, "one two")

    assert (found.tokens, found.value) == (2, pytest.approx(math.exp(1.5)))
    assert measure(scorer, " two", "one").value == pytest.approx(math.exp(2))
    assert scorer.backend.asked[0] == ([0], [1, 2])  # type: ignore[attr-defined]
    assert measure(told(adds_bos=True), "<s> two").tokens == 1  # it is there already, and is not doubled


@pytest.mark.parametrize(
    ("prompt", "completion", "own"),
    [
        ("It is", " Paris.", [" Paris", "."]),
        ("It is ", "Paris.", [" Paris", "."]),  # one token with the prompt's last space, but a word of the completion
        ("It is", "land Paris", [" Paris"]),  # 'island' is a token that the prompt began
        ("It is\n", "\nPa", ["\n", "Pa"]),
        ("It is  ", "  Pa", [" ", " Pa"]),
    ],
)
def test_a_token_belongs_to_the_side_where_its_text_begins(prompt: str, completion: str, own: list[str]) -> None:
    scorer = told(log_probability=lambda token: 0.0)
    expected = [scorer.tokenizer.encode(token)[0] for token in own]
    costly = Scorer("told", Told(lambda token: -7.0 if token in expected else -1.0), scorer.tokenizer, None)  # type: ignore[arg-type]

    found = measure(costly, completion, prompt)

    assert found.tokens == len(own)
    assert found.value == pytest.approx(math.exp(7))
    assert found.whole is not None and found.whole < math.exp(7)


def test_a_text_longer_than_the_window_is_scored_once_a_token_with_half_a_window_before_it() -> None:
    swept = 0
    for window in (2, 7, 8):
        for length in range(2, 40):
            scorer = told(window=window)
            found = measure(scorer, " ".join(f"w{n}" for n in range(length)))
            backend: Any = scorer.backend

            assert scored(scorer) == scorer.tokenizer.encode(" ".join(f"w{n}" for n in range(length)))[1:]
            assert found.tokens == length - 1
            assert max(len(context) + len(targets) for context, targets in backend.asked) <= window
            assert all(len(context) == window // 2 for context, _ in backend.asked[1:])
            swept += 1
    assert swept == 114


@pytest.mark.parametrize(
    ("log", "value"), [(-math.inf, math.inf), (-1000.0, math.inf), (math.nan, math.nan), (0.0, 1.0)]
)
def test_what_is_not_finite_stays_so(log: float, value: float) -> None:
    found = measure(told(log_probability=lambda token: log), "one two three", "zero ")

    assert found.value == pytest.approx(value, nan_ok=True)
    assert found.whole == pytest.approx(value, nan_ok=True)


def test_repetition_has_few_distinct_tokens() -> None:
    assert measure(told(), " no" * 50, "I say").distinct == 1 / 50
    assert measure(told(), " one two three", "I say").distinct == 1.0
    assert measure(told(), "no no no no").distinct == 0.5  # 'no' and ' no'


@pytest.mark.parametrize(
    ("prompt", "completion", "why"),
    [
        ("What?", "", "the completion is empty"),
        ("", "Paris", "nothing comes before its only token"),
        ("unbe", "lievable", "belong to the prompt's last token"),
    ],
)
def test_a_completion_without_a_scored_token_is_refused_with_the_reason(prompt: str, completion: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        measure(told(), completion, prompt)


def test_the_fake_tokenizer_tells_where_its_tokens_are() -> None:
    ids, spans = FakeTokenizer().spans("é<|im_end|>\nx")

    assert ids == FakeTokenizer().encode("é<|im_end|>\nx")
    assert spans == [(0, 1), (0, 1), (1, 11), (11, 12), (12, 13)]


# -- which model -------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the hub says about gpt2: `there`, and the error of getting it."""
    said: dict[str, Any] = {"there": True, "error": None}

    def snapshot(repo: str) -> Path:
        assert repo == "gpt2"
        if said["error"]:
            raise said["error"]
        return Path("gpt2")

    monkeypatch.delenv("FT_SCORER", raising=False)
    monkeypatch.setattr(scoring, "_reachable", lambda repo: said["there"])
    monkeypatch.setattr(scoring.hub, "snapshot", snapshot)
    scoring._usual_or_embedded.cache_clear()
    monkeypatch.setattr(scoring, "_usual_or_embedded", scoring._usual_or_embedded.__wrapped__)
    return said


def test_the_scorer_is_what_is_asked_then_gpt2_then_the_embedded_model(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fake: str
) -> None:
    assert scoring.default_scorer() == "gpt2"
    hub["error"] = MissingError("cut off")
    assert scoring.default_scorer() == "smollm2-135m"
    hub.update(error=None, there=False)
    assert scoring.default_scorer() == "smollm2-135m"
    monkeypatch.setenv("FT_SCORER", fake)
    assert perplexity("ab").scorer == fake


def test_without_a_connection_and_a_cache_gpt2_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert not scoring._reachable("gpt2")


def test_a_scorer_is_loaded_once_a_process(fake: str) -> None:
    assert scoring.load(fake) is scoring.load(fake)


def test_a_scorer_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no model at"):
        perplexity("ab", scorer=str(tmp_path / "nowhere"))


# -- the command -------------------------------------------------------------------------------------------------------


def call(*arguments: str, **more: Any) -> Any:
    return CliRunner().invoke(cli, ["perplexity", *arguments], **more)


def test_the_command_scores_a_file_or_standard_input(fake: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("ab\n")

    for done in (call(str(tmp_path / "text"), "--scorer", fake), call("-", "--scorer", fake, input="ab\n")):
        assert done.exit_code == 0, done.output
        assert done.stdout == f"perplexity 87 by {fake}, 1 tokens, 100% different\n"
    done = call("--scorer", fake, "--prompt", "ca", "--json", input="bab")
    assert json.loads(done.stdout) == {
        **vars(perplexity("bab", "ca", scorer=fake)),
        "random_tokens_from": None,
    }


def test_the_command_says_when_a_text_is_as_bad_as_random_tokens(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.RANDOM_TOKENS_FROM, fake, 200.0)

    assert "as bad as random tokens (200 and more)" in call("--scorer", fake, input="xyz").stdout
    assert "random" not in call("--scorer", fake, input="ab").stdout


def test_the_command_tells_what_it_cannot_score(fake: str, tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"ab\xff")

    assert (call(str(tmp_path / "none")).exit_code, call("--scorer", fake, input="\n").exit_code) == (3, 2)
    done = call(str(tmp_path / "bytes"), "--scorer", fake)
    assert (done.exit_code, "is not UTF-8 text (byte 2)" in done.output) == (2, True)
