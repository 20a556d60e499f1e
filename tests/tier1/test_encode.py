"""The prompt at inference is a prefix of what was trained; the answer and its end-of-turn token are trained, and
nothing else; no beginning is doubled. Over odd Unicode, four templates and tokenizers that merge across seams."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.core.errors import DataError, UsageError
from finetune.data.encode import (
    IGNORED,
    Encoded,
    answer_ids,
    encode_all,
    encode_preference,
    encode_sft,
    preview,
    prompt_ids,
    truncate,
    unigram_entropy,
)
from finetune.data.formats import Example
from finetune.data.templates import BUILTIN, ChatTemplate

# Pieces that reach over the seam between prompt and answer, as merges of a real tokenizer can.
MERGES = ("\nThe", ":\n", "\n\n", " [/INST] ", "] A", "is", "\r\n", "\n ")


class ByteTokenizer:
    """Bytes, special tokens, and longest-match merges."""

    vocab_size = 400

    def __init__(
        self,
        specials: Sequence[str] = ("<|im_start|>", "<|im_end|>", "<s>", "</s>"),
        *,
        eos: str = "<|im_end|>",
        bos: str | None = None,
        adds_bos: bool = False,
        merges: Sequence[str] = MERGES,
    ) -> None:
        self.names = [*specials, *merges]
        self.specials = len(specials)
        self.eos_token, self.bos_token, self.adds_bos = eos, bos, adds_bos
        self.eos_ids: tuple[int, ...] = (256 + self.names.index(eos),)
        self.chat_template: str | None = None
        longest = sorted(self.names, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest)))
        self.split = re.compile(f"({'|'.join(map(re.escape, specials))})")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for stretch in self.split.split(text):
            at = 0
            for match in self.pattern.finditer(stretch):
                ids += [*stretch[at : match.start()].encode(), 256 + self.names.index(match.group())]
                at = match.end()
            ids += stretch[at:].encode()
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        parts = [bytes([i]) if i < 256 else self.names[i - 256].encode() for i in ids if not skip_special or i < 256]
        return b"".join(parts).decode("utf-8", "replace")


CHATML = ChatTemplate("chatml", BUILTIN["chatml"])
LLAMA_TOKENS = {"specials": ("<s>", "</s>"), "eos": "</s>", "bos": "<s>", "adds_bos": True}
LLAMA3_TOKENS = {
    "specials": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "eos": "<|eot_id|>",
    "bos": "<|begin_of_text|>",
    "adds_bos": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "alpaca": LLAMA_TOKENS,
    "chatml": {},
    "llama": LLAMA_TOKENS,
    "llama3": LLAMA3_TOKENS,
}
TRIMS = ("llama", "llama3")

SAYING = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30) | st.sampled_from(
    [
        "end",
        "<|im_",
        "assistant",
        "\u2028x\u0085",
        "e\u0301",
        "👩‍👩‍👧",
        "The\r\n ",
        " [/INST] ",
        "{{ x }}",
        "The",
        "|>",
        "Response:\n",
    ]
)
ENDS = ("<|im_end|>", *(kind["eos"] for kind in KINDS.values() if "eos" in kind))  # an answer with one is refused
SAID = SAYING.filter(lambda text: bool(text.strip()) and not any(end in text for end in ENDS))


def chat(*contents: str, line: int = 1) -> Example:
    roles = ("user", "assistant")
    messages = tuple({"role": roles[index % 2], "content": content} for index, content in enumerate(contents))
    return Example("chat", messages, None, None, None, "rows.jsonl", line)


def encode(example: Example, tokenizer: ByteTokenizer, template: ChatTemplate = CHATML, **options: Any) -> Encoded:
    given_options = {"system": None, "completion_only": True, **options}
    return encode_sft(example, 0, tokenizer=tokenizer, template=template, **given_options)


def trained_text(encoded: Encoded, tokenizer: ByteTokenizer) -> list[str]:
    """The text of every stretch of trained tokens."""
    stretches: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORED:
            stretches[-1].append(label)
        elif stretches[-1]:
            stretches.append([])
    return [tokenizer.decode(ids) for ids in stretches if ids]


@pytest.mark.parametrize("name", sorted(KINDS))
@given(contents=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3), system=st.none() | SAID, merge=st.booleans())
def test_masks_and_prefixes_hold_for_any_text(
    name: str, contents: list[tuple[str, str]], system: str | None, merge: bool
) -> None:
    tokenizer = ByteTokenizer(**KINDS[name], merges=MERGES if merge else ())
    template = ChatTemplate(name, BUILTIN[name])
    said = [part for pair in contents for part in pair]
    encoded = encode(chat(*said), tokenizer, template, system=system)
    ask = partial(prompt_ids, tokenizer=tokenizer, template=template, system=system)

    # Every answer, each with its end-of-turn token, and nothing else.
    answers = [answer.strip() if name in TRIMS else answer for _, answer in contents]
    wrap = (" {} " if name == "llama" else "{}") + tokenizer.eos_token
    assert trained_text(encoded, tokenizer) == [wrap.format(answer) for answer in answers]
    assert all(label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))
    assert encoded.labels[-1] in tokenizer.eos_ids

    # The prompt of every turn, as at inference, is a prefix, and the mask ends exactly where it ends.
    messages = chat(*said).messages
    for turn in range(len(contents)):
        prompt = ask(messages[: 2 * turn + 1])
        assert encoded.input_ids[: len(prompt)] == prompt
        assert encoded.labels[len(prompt) - 1] == IGNORED
        assert encoded.labels[len(prompt)] != IGNORED
    answer = answer_ids(messages[:-1], said[-1], tokenizer=tokenizer, template=template, system=system)
    assert encoded.input_ids == ask(messages[:-1]) + answer

    # The text is the template's, and begins once.
    text = template.render(
        ([{"role": "system", "content": system}] if system else []) + list(messages),
        add_generation_prompt=False, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token,
    )  # fmt: skip
    beginning = tokenizer.bos_token if name == "alpaca" else ""
    assert tokenizer.decode(encoded.input_ids) == (beginning or "") + text.removesuffix(
        "\n" if name == "chatml" else ""
    )
    if tokenizer.bos_token:
        bos = tokenizer.encode(tokenizer.bos_token)
        assert encoded.input_ids[:1] == bos
        assert encoded.input_ids[1:2] != bos


def test_the_seams_of_the_property_test_are_really_crossed() -> None:
    tokenizer = ByteTokenizer()
    example = chat("Q", "The end.")
    encoded = encode(example, tokenizer)
    joined = tokenizer.encode("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nThe end.<|im_end|>")
    assert tokenizer.decode(encoded.input_ids) == tokenizer.decode(joined)
    assert encoded.input_ids != joined


@given(text=SAID, adds_bos=st.booleans(), again=st.booleans(), ended=st.booleans())
def test_plain_text_is_trained_whole_with_one_beginning_and_one_end(
    text: str, adds_bos: bool, again: bool, ended: bool
) -> None:
    tokenizer = ByteTokenizer(specials=("<s>", "</s>"), eos="</s>", bos="<s>", adds_bos=adds_bos)
    given_text = ("<s>" if again else "") + text + ("</s>" if ended else "")
    encoded = encode(Example("text", (), given_text, None, None, "rows.jsonl", 1), tokenizer)
    assert tokenizer.decode(encoded.input_ids) == ("<s>" if adds_bos or again else "") + text + "</s>"
    assert encoded.labels == encoded.input_ids


def test_a_tokenizer_that_does_not_say_adds_no_beginning() -> None:
    tokenizer = ByteTokenizer(bos="<s>")
    del tokenizer.adds_bos
    assert tokenizer.decode(encode(chat("Q", "A"), tokenizer).input_ids[:1]) == "<|im_start|>"


def test_without_completion_only_every_token_is_trained() -> None:
    encoded = encode(chat("Q", "A", "R", "B"), ByteTokenizer(), completion_only=False)
    assert encoded.labels == encoded.input_ids == encode(chat("Q", "A", "R", "B"), ByteTokenizer()).input_ids


def test_a_template_without_end_of_turn_gets_one_trained() -> None:
    template = ChatTemplate("bare", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}")
    tokenizer = ByteTokenizer()
    encoded = encode(chat("Q", "end", "R", "B"), tokenizer, template)
    assert tokenizer.decode(encoded.input_ids) == (
        "user: Q\n\nassistant: end<|im_end|>\n\nuser: R\n\nassistant: B<|im_end|>"
    )
    assert trained_text(encoded, tokenizer) == ["assistant: end<|im_end|>", "assistant: B<|im_end|>"]


def test_spelled_out_end_of_turn_is_followed_by_the_real_one() -> None:
    tokenizer = ByteTokenizer(specials=("<|endoftext|>",), eos="<|endoftext|>", merges=())
    assert trained_text(encode(chat("Q", "A"), tokenizer), tokenizer) == ["A<|im_end|><|endoftext|>"]


THINKS = ChatTemplate(
    "thinks",
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}",
)


@pytest.mark.parametrize("content", ["A", "end", "<th", "im"])
def test_one_turn_works_with_a_prompt_that_opens_a_thought(content: str) -> None:
    tokenizer = ByteTokenizer()
    encoded = encode(chat("Q", content), tokenizer, THINKS)
    assert tokenizer.decode(encoded.input_ids) == f"<user>Q<|im_end|>\n<assistant><think>\n{content}<|im_end|>"
    assert trained_text(encoded, tokenizer) == [f"{content}<|im_end|>"]


def test_several_turns_need_a_prefix_preserving_template() -> None:
    forgets = "{% for m in messages %}{{ '' if m.role == 'assistant' and not loop.last else m.content }}{% endfor %}"
    for template, what in (
        (THINKS, "unlike the prompt"),
        (ChatTemplate("forgets", forgets), "earlier turns differently"),
    ):
        with pytest.raises(DataError, match=rf"rows\.jsonl:4: .*{what}.*not prefix-preserving"):
            encode(chat("Q", "A", "R", "B", line=4), ByteTokenizer(), template)


@pytest.mark.parametrize("answer", ["A<|im_end|>", "<|im_end|>A"])
def test_an_answer_that_holds_the_end_of_turn_is_refused(answer: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the answer holds the end-of-turn token '<\|im_end\|>'"):
        encode(chat("Q", answer, line=7), ByteTokenizer())


def test_a_conversation_the_template_refuses_is_named_with_its_line() -> None:
    template = ChatTemplate("strict", "{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*no system role"):
        encode(chat("Q", "A", line=3), ByteTokenizer(), template)
    with pytest.raises(UsageError, match="no system role"):
        prompt_ids(chat("Q").messages, tokenizer=ByteTokenizer(), template=template, system=None)


def test_faults_of_all_rows_are_collected() -> None:
    examples = [chat("Q", "A<|im_end|>", line=1), chat("Q", "A", line=2), chat("Q", "<|im_end|>", line=3)]
    tokenizer = ByteTokenizer()
    with pytest.raises(DataError) as caught:
        encode_all(
            examples, partial(encode_sft, tokenizer=tokenizer, template=CHATML, system=None, completion_only=True)
        )
    assert [fault.split(": ")[0] for fault in caught.value.faults] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_truncation_keeps_the_start_and_counts_lost_answer_tokens() -> None:
    encoded = encode(chat("Q", "abc"), ByteTokenizer(merges=()))
    length = len(encoded.input_ids)
    short = truncate(encoded, length - 2)
    assert (short.input_ids, short.labels) == (encoded.input_ids[:-2], encoded.labels[:-2])
    assert (short.lost_answer_tokens, short.trained) == (2, 2)
    assert truncate(short, length - 3).lost_answer_tokens == 3
    assert truncate(encoded, length) is encoded


PAIR = Example("preference", ({"role": "user", "content": "Q"},), None, "Yes.", "No way.", "pairs.jsonl", 5)


def test_a_pair_shares_its_prompt_and_ends_both_answers() -> None:
    tokenizer = ByteTokenizer()
    options: dict[str, Any] = {"tokenizer": tokenizer, "template": CHATML, "system": "S"}
    pair = encode_preference(PAIR, 3, **options, max_length=100)
    assert pair["prompt_ids"] == prompt_ids(PAIR.messages, **options)
    assert tokenizer.decode(pair["chosen_ids"]) == "Yes.<|im_end|>"
    assert tokenizer.decode(pair["rejected_ids"]) == "No way.<|im_end|>"
    assert (pair["row"], pair["file"], pair["line"]) == (3, "pairs.jsonl", 5)


def test_an_over_long_pair_is_refused_by_its_longer_answer() -> None:
    options: dict[str, Any] = {"tokenizer": ByteTokenizer(), "template": CHATML, "system": None}
    pair = encode_preference(PAIR, 0, **options, max_length=100)
    length = len(pair["prompt_ids"]) + len(pair["rejected_ids"])
    assert encode_preference(PAIR, 0, **options, max_length=length)
    with pytest.raises(DataError, match=rf"pairs\.jsonl:5: {length} tokens, over the limit of {length - 1}"):
        encode_preference(PAIR, 0, **options, max_length=length - 1)


def test_pairs_and_answers_are_not_taken_for_each_other() -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:5: .*put it under align\.data"):
        encode(PAIR, ByteTokenizer())
    with pytest.raises(DataError, match=r"rows\.jsonl:1: not a preference pair"):
        encode_preference(chat("Q", "A"), 0, tokenizer=ByteTokenizer(), template=CHATML, system=None, max_length=99)


def test_the_preview_shows_what_is_masked() -> None:
    tokenizer = ByteTokenizer(merges=())
    assert preview(encode(chat("Q", "one\ntwo", line=2), tokenizer), tokenizer).splitlines() == [
        "rows.jsonl:2: 28 tokens, 8 trained, the rest masked",
        "masked | <|im_start|>user",
        "masked | Q<|im_end|>",
        "masked | <|im_start|>assistant",
        "trained| one",
        "trained| two<|im_end|>",
        "end of turn: <|im_end|> (id 257), trained",
    ]


def test_the_preview_tells_of_a_lost_end_and_stays_short() -> None:
    tokenizer = ByteTokenizer(merges=())
    shown = preview(truncate(encode(chat("Q", "x\n" * 100), tokenizer), 200), tokenizer, lines=5).splitlines()
    assert shown[-2:] == ["end of turn: none", "cut off: 21 answer tokens"]
    assert len([line for line in shown if line.startswith("trained|")]) == 6
    assert "more lines" in shown[-3]


def test_unigram_entropy_is_the_entropy_of_trained_tokens() -> None:
    assert unigram_entropy([[IGNORED, 1, 2], [3, 4]]) == pytest.approx(math.log(4))
    assert unigram_entropy([[5, 5], [5]]) == 0
    assert unigram_entropy([[1, 1, 1, 2]]) == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert unigram_entropy([[IGNORED]]) == 0
