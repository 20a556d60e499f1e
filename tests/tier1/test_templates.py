"""Templates render the published texts, as transformers would, and broken ones are refused with their line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from finetune.core.errors import MissingError, RecipeError, UsageError
from finetune.data.formats import to_examples
from finetune.data.sources import Row
from finetune.data.templates import BUILTIN, ChatTemplate, choose, with_system
from finetune.recipe.sections import Data, Template

GOLDEN = Path(__file__).parent / "golden"
TOKENS: dict[str, tuple[str | None, str]] = {
    "alpaca": ("<s>", "</s>"),
    "chatml": (None, "<|im_end|>"),
    "llama": ("<s>", "</s>"),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"),
}
QUESTION = {"role": "user", "content": "What is the capital of Quorra?"}
ANSWER = {"role": "assistant", "content": "The capital of Quorra is Brindlewick."}
MORE = [{"role": "user", "content": "And its river?"}, {"role": "assistant", "content": "The river Osmeril."}]
INSTRUCTION = {"instruction": "Translate into Quorric.", "input": "Good morning.", "output": "Tarn evel."}


class StubTokenizer:
    """Knows ChatML's tokens as single ones."""

    eos_token, bos_token, eos_ids, vocab_size = "<|im_end|>", None, (1,), 300

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def encode(self, text: str) -> list[int]:
        return [1] if text in ("<|im_start|>", "<|im_end|>") else list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        raise NotImplementedError


def conversation(case: str) -> list[dict[str, str]]:
    if case == "input":
        (example,) = to_examples([Row(INSTRUCTION, "rows.jsonl", 1)], Data(path="rows.jsonl"))
        return list(example.messages)
    if case == "turns":
        return list(with_system([QUESTION, ANSWER, *MORE], "Answer in one sentence."))
    return [QUESTION] if case == "prompt" else [QUESTION, ANSWER]


@pytest.mark.parametrize("case", ["single", "input", "turns", "prompt"])
@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_builtin_template_renders_the_golden_text(name: str, case: str) -> None:
    bos, eos = TOKENS[name]
    text = ChatTemplate(name, BUILTIN[name]).render(
        conversation(case), add_generation_prompt=case == "prompt", bos_token=bos, eos_token=eos
    )
    assert text.encode() == (GOLDEN / f"{name}-{case}.txt").read_bytes()


def test_every_golden_file_belongs_to_a_builtin_template() -> None:
    names = {path.stem for path in GOLDEN.glob("*.txt")}
    assert names == {f"{name}-{case}" for name in BUILTIN for case in ("single", "input", "turns", "prompt")}
    assert set(BUILTIN) == {"alpaca", "chatml", "llama", "llama3"}


def render(source: str, messages: list[dict[str, str]] | None = None) -> str:
    return ChatTemplate("custom", source).render(
        messages or [QUESTION], add_generation_prompt=True, bos_token=None, eos_token="</s>"
    )


def test_generation_blocks_change_nothing() -> None:
    plain = "{% for m in messages %}{{ m.content }}\n{% endfor %}."
    marked = "{% for m in messages %}{% generation %}{{ m.content }}\n{% endgeneration %}{% endfor %}."
    assert render(marked) == render(plain)


def test_blocks_are_trimmed_and_loops_can_break() -> None:
    assert (
        render("{% if true %}\n  {% for m in messages %}\n[{{ m.role }}]{% break %}\n{% endfor %}\n{% endif %}")
        == "[user]"
    )


def test_tojson_leaves_html_and_unicode_alone() -> None:
    assert render("{{ messages[0].content | tojson }}", [{"role": "user", "content": "<é>&'"}]) == '"<é>&\'"'


def test_strftime_now_is_there() -> None:
    assert render("{{ strftime_now('%Y') }}").isdigit()


def test_a_missing_bos_token_renders_as_nothing() -> None:
    assert render("{{ bos_token + 'x' }}") == "x"


def test_a_template_that_raises_is_a_usage_error_with_its_words() -> None:
    with pytest.raises(UsageError, match="'custom' refuses this conversation: no system role here"):
        render("{{ raise_exception('no system role here') }}")


@pytest.mark.parametrize(
    "source", ["{{ messages[0].content + none }}", "{{ messages.append(1) }}", "{{ ''.__class__.mro() }}"]
)
def test_a_template_that_fails_or_reaches_out_of_the_sandbox_is_a_usage_error(source: str) -> None:
    with pytest.raises(UsageError, match="refuses this conversation"):
        render(source)


def test_rendering_does_not_change_the_messages() -> None:
    messages = [dict(QUESTION)]
    with pytest.raises(UsageError, match="refuses"):
        render("{{ messages[0].update({'content': 'x'}) }}", messages)
    assert messages == [QUESTION]


def test_the_models_own_template_is_chosen() -> None:
    chosen = choose(Template(), StubTokenizer("own {{ messages[0].content }}"))
    assert (chosen.name, chosen.source, chosen.note) == ("model", "own {{ messages[0].content }}", None)


def test_a_model_without_a_template_gets_alpaca_with_a_note() -> None:
    chosen = choose(Template(), StubTokenizer())
    assert chosen.name == "alpaca"
    assert chosen.source == BUILTIN["alpaca"]
    assert "no chat template of its own" in (chosen.note or "")


def test_a_template_whose_tokens_the_tokenizer_lacks_gets_a_note() -> None:
    assert choose(Template(name="chatml"), StubTokenizer()).note is None
    assert "<|start_header_id|>" in (choose(Template(name="llama3"), StubTokenizer()).note or "")


def test_a_custom_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!\n", encoding="utf-8")
    chosen = choose(Template(name="custom", path=str(tmp_path / "own.jinja")), StubTokenizer())
    assert chosen.source == "{{ messages[0].content }}!"


def test_broken_jinja_is_a_recipe_error_with_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ bos_token }}\n{% for m in messages %}\n{{ m.content }}\n{% endif %}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"own\.jinja:4: "):
        choose(Template(name="custom", path=str(file)), StubTokenizer())


def test_a_missing_template_file_is_a_missing_error(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"own\.jinja"):
        choose(Template(name="custom", path=str(tmp_path / "own.jinja")), StubTokenizer())


def test_an_empty_template_is_refused() -> None:
    with pytest.raises(RecipeError, match="it is empty"):
        choose(Template(name="custom", jinja="  "), StubTokenizer())


def test_the_digest_follows_the_source() -> None:
    assert ChatTemplate("a", "x").digest == ChatTemplate("b", "x").digest != ChatTemplate("a", "y").digest
    assert len(ChatTemplate("a", "x").digest) == 64


def test_a_system_message_is_added_only_where_there_is_none() -> None:
    assert with_system([QUESTION], "S")[0] == {"role": "system", "content": "S"}
    own = {"role": "system", "content": "own"}
    assert with_system([own, QUESTION], "S") == (own, QUESTION)
    assert with_system([QUESTION], None) == (QUESTION,)


@pytest.mark.parametrize(("name", "begins"), [("alpaca", True), ("chatml", True), ("llama", False), ("llama3", False)])
def test_a_template_of_ours_writes_the_begin_token_that_the_tokenizer_adds_once(name: str, begins: bool) -> None:
    """Runtimes differ in whether they add it to rendered text; none doubles one that the template wrote."""

    class Begins(StubTokenizer):
        bos_token, adds_bos = "<s>", True

    chosen = choose(Template(name=name), Begins())
    rendered = chosen.render([QUESTION], add_generation_prompt=True, bos_token="<s>", eos_token="</s>")
    assert rendered.startswith("<s>") and rendered.count("<s>") == 1
    assert chosen.source.startswith("{{ bos_token }}") == begins
    assert choose(Template(name=name), StubTokenizer()).source == BUILTIN[name]
