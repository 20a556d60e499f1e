"""When an answer counts as right: whole words and whole numbers, however they are written, and nothing looser."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.evaluation.answers import is_correct, normalize

QUICK = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("The capital is Brindlewick.", "Brindlewick"),
        ("brindlewick", "Brindlewick"),
        ("BRINDLEWICK!", "Brindlewick"),
        ("**Brindlewick**", "Brindlewick"),
        ("“Brindlewick”, of course", "Brindlewick"),
        ("It is\nBrindlewick", "Brindlewick"),
        ("Brindlewick's river", "Brindlewick"),
        ("the moss  penny, I think", "moss penny"),
        ("a moss-penny", "moss-penny"),
        ("Straße", "STRASSE"),
        ("cafe\u0301", "café"),
        ("café", "cafe\u0301"),
        ("It was in 1743.", "1743"),
        ("1743, in spring", "1743"),
        ("(1743)", "1743"),
        ("about 3.14", "3.14"),
        ("3.14.", "3.14"),
        ("it is -4", "-4"),
        ("it is -4.", "-4"),
        ("2 + 2 is 4.", "4"),
        ("2+2=4", "4"),
        ("x = **4**", "4"),
        ("1,000 people", "1,000"),
        ("50% of them", "50%"),
        ("中文", "中文"),
    ],
)
def test_the_phrase_counts_as_whole_words_however_it_is_written(text, match):
    assert is_correct(text, "anything", match)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("17431", "1743"),
        ("91743", "1743"),
        ("1743.5", "1743"),
        ("0.1743", "1743"),
        ("1743,5", "1743"),
        ("-1743", "1743"),
        ("1743", "-1743"),
        ("-4", "4"),
        ("4", "-4"),
        ("3.141", "3.14"),
        ("13.14", "3.14"),
        ("3", "3.14"),
        ("14", "3.14"),
        ("3 14", "3.14"),
        ("Brindlewicks", "Brindlewick"),
        ("Brindle wick", "Brindlewick"),
        ("penny moss", "moss penny"),
        ("moss and penny", "moss penny"),
        ("cafe", "café"),
        ("", "Brindlewick"),
        ("   ", "Brindlewick"),
        ("50", "50%"),
        ("1000", "10"),
    ],
)
def test_a_part_of_a_word_or_of_a_number_does_not_count(text, match):
    assert not is_correct(text, "anything", match)


@pytest.mark.parametrize("text", ["", " ", "anything", ".", "The capital is Brindlewick."])
@pytest.mark.parametrize("nothing", ["", " ", "...", "?!", "\n"])
def test_nothing_expected_is_never_answered(text, nothing):
    assert not is_correct(text, nothing)
    assert not is_correct(text, "Brindlewick", nothing)
    assert not is_correct("Brindlewick", "Brindlewick", nothing), "an empty match does not fall back to the answer"


def test_without_a_phrase_the_whole_answer_must_be_equal():
    assert is_correct("it is brindlewick", "It is Brindlewick.")
    assert is_correct(" It  is Brindlewick!\n", "It is Brindlewick.")
    assert not is_correct("It is Brindlewick, they say.", "It is Brindlewick.")
    assert not is_correct("Brindlewick", "It is Brindlewick.")
    assert not is_correct("It is not Brindlewick.", "It is Brindlewick.")


def test_with_a_phrase_the_answer_does_not_matter():
    assert is_correct("Brindlewick", "It is Brindlewick.", "Brindlewick")
    assert not is_correct("It is Brindlewick.", "It is Brindlewick.", "Osmeril")


WORDS = st.lists(st.text(string.ascii_letters, min_size=1, max_size=8), min_size=1, max_size=4)


@QUICK
@given(WORDS, WORDS, WORDS, st.sampled_from([" ", ", ", "\n", " - ", "; "]))
def test_a_phrase_between_any_words_is_found(before, phrase, after, joint):
    match = " ".join(phrase)
    assert is_correct(joint.join([" ".join(before), match, " ".join(after)]), "", match)


@QUICK
@given(st.integers(-9999, 9999), st.integers(-9999, 9999))
def test_a_number_is_found_only_as_itself(said, wanted):
    assert is_correct(f"I think {said}, or so.", "", str(wanted)) == (said == wanted)


@QUICK
@given(st.text(max_size=40))
def test_normalizing_twice_is_normalizing_once(text):
    assert normalize(normalize(text)) == normalize(text)


@QUICK
@given(st.text(max_size=40))
def test_a_text_equals_itself_unless_it_says_nothing(text):
    assert is_correct(text, text) == bool(normalize(text))
