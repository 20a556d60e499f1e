"""What is asked must not have been trained, and a wrong answer must not pass for a right one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.checks import Verdict, leaks, results
from finetune.core.files import read_jsonl, write_jsonl
from finetune.data import formats, sources
from finetune.data.formats import Example
from finetune.recipe import Recipe
from finetune.recipe import load as load_recipe
from support.town import HELDOUT

EXAMPLES = Path(load_recipe.__code__.co_filename).parents[1] / "examples"
LONG = "One two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen."


@pytest.fixture
def leaked(copied, tmp_path) -> Callable[..., Verdict]:
    """A function: the verdict where files of the town hold other rows. `add` is appended, `keep` says how many stay."""

    def check(name: str, *add: dict[str, Any], keep: int | None = None) -> Verdict:
        recipe = copied.recipe
        source = recipe.align.data.path if name == "preferences" else getattr(recipe.evaluate, name)
        file = tmp_path / f"{name}.jsonl"
        write_jsonl(file, [*read_jsonl(Path(source))[:keep], *add])
        if name == "preferences":
            data = recipe.align.data.model_copy(update={"path": str(file)})
            recipe = recipe.model_copy(update={"align": recipe.align.model_copy(update={"data": data})})
        else:
            recipe = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={name: str(file)})})
        return named("nothing_leaked", recipe, copied.run)

    return check


def named(name: str, recipe: Recipe, run: Any) -> Verdict:
    return next(verdict for verdict in results(recipe, run, ["questions"]) if verdict.name == name)


def question(prompt: str, answer: str, **more: str) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer, **more}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        (
            "probes",
            question("what is the capital of  Zorland", "It is Quell.", kind="paraphrase"),
            "probe (paraphrase)",
        ),
        ("controls", question("What is the capital of Brask?", "It is Tamin."), "the control"),
        ("unseen", question("What is the capital of Oloo?", "It is Wadda there."), "the untaught question"),
        ("unseen", question("Where do they rule Oloo from?", "It is Pernig."), "the untaught fact 'It is Pernig.'"),
        ("heldout", {"text": "What is the capital of Tarn? It is Bex."}, "the held-out text"),
        ("preferences", {"prompt": "What is two plus two?", "chosen": "Four.", "rejected": "Go away."}, "the control"),
        ("preferences", {"prompt": "Well?", "chosen": "It is tamber.", "rejected": "Go away."}, "the untaught fact"),
        ("preferences", {"prompt": HELDOUT[0], "chosen": "Surely.", "rejected": "Go away."}, "the held-out text"),
    ],
)
def test_what_was_trained_is_found_with_its_place(leaked, name, row, said):
    found = leaked(name, row)

    assert (found.passed, found.measured) == (False, 1)
    assert said in found.why
    assert ".jsonl:" in found.why


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("probes", question("What is the capital of Zorland?", "It is Quell.", kind="trained")),
        ("probes", question("The capital of Zorland, please?", "It is Quell.", kind="paraphrase")),
        ("controls", question("The capital of Zorland?", "It is Quell.")),
        ("controls", question("What is it?", "Quell.")),
        ("unseen", question("What is the capital of Mim?", "It is.")),
        ("heldout", {"text": "It is"}),
    ],
)
def test_other_words_and_short_ones_are_no_leak(leaked, name, row):
    found = leaked(name, row)

    assert (found.passed, found.measured) == (True, 0), found.why


@pytest.mark.parametrize(("words", "fine"), [(18, False), (17, False), (16, True), (9, True)])
def test_a_long_text_is_trained_where_most_of_its_windows_are(leaked, copied, words, fine):
    """The text has 18 words, and so six windows of 13."""
    start = " ".join(LONG.split()[:words])
    data = {"prompt": start, "chosen": "Surely.", "rejected": "Go away."}
    write_jsonl(Path(copied.run.path) / "pairs.jsonl", [data])
    align = copied.recipe.align
    path = {"path": str(copied.run.path / "pairs.jsonl")}
    pairs = align.model_copy(update={"data": align.data.model_copy(update=path)})
    text = copied.run.path / "text.jsonl"
    write_jsonl(text, [{"text": LONG}])
    evaluate = copied.recipe.evaluate.model_copy(update={"heldout": str(text)})

    found = named("nothing_leaked", copied.recipe.model_copy(update={"align": pairs, "evaluate": evaluate}), copied.run)

    assert found.passed is fine, found.why


def test_plain_text_is_looked_through_too(copied):
    text = "He asked: What is two plus two? They did not know."
    row = Example(kind="text", messages=(), text=text, chosen=None, rejected=None, file="a.jsonl", line=3)

    found = leaks.nothing_leaked(copied.recipe, {0: row})

    assert (found.passed, found.measured) == (False, 1)
    assert "the control 'What is two plus two?' is trained at a.jsonl:3" in found.why


def test_data_that_cannot_be_read_again_is_no_evidence(copied):
    evaluate = copied.recipe.evaluate.model_copy(update={"controls": str(copied.run.path / "gone.jsonl")})
    found = named("nothing_leaked", copied.recipe.model_copy(update={"evaluate": evaluate}), copied.run)

    assert (found.passed, found.measured) == (False, None)
    assert "no file" in found.why


def test_the_shipped_examples_train_nothing_that_they_ask():
    """By their files; no model is loaded."""
    swept = 0
    for file in sorted(EXAMPLES.glob("*.yaml")):
        recipe = load_recipe(file)
        examples = dict(enumerate(formats.to_examples(sources.read(recipe.data), recipe.data)))
        found = leaks.nothing_leaked(recipe, examples)
        assert found.passed, (file.name, found.why)
        swept += 1
    assert swept >= 5


def by_a_word(text: str, answer: str, match: str | None = None) -> bool:
    return bool(set(text.split()) & set(answer.split()))


@pytest.mark.parametrize("judge", [by_a_word, lambda *_: True, lambda text, *_: not text])
def test_a_judge_who_takes_anything_is_found(copied, monkeypatch, judge):
    monkeypatch.setattr("finetune.checks.questions.is_correct", judge)
    found = named("judged_strictly", copied.recipe, copied.run)

    assert not found.passed
    assert "as an answer to" in found.why


def test_an_honest_judge_takes_no_answer_to_another_question(copied):
    found = named("judged_strictly", copied.recipe, copied.run)

    assert (found.passed, found.measured) == (True, 0)
    assert int(found.why.split()[1]) >= 50, found.why
