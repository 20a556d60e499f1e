"""Conversations to text: Jinja chat templates, rendered as transformers renders them, in a sandbox."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser

from finetune.core.errors import RecipeError, StageError, UsageError
from finetune.data.budget import TooMuch
from finetune.data.sandbox import BoundedEnvironment
from finetune.data.sources import resolve

if TYPE_CHECKING:
    from jinja2 import Template as JinjaTemplate

    from finetune.data.tokenizer import Tokenizer
    from finetune.recipe.sections import Template

_FOLDER = Path(__file__).parent / "templates_jinja"
BUILTIN: dict[str, str] = {
    name: (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    for name in ("alpaca", "chatml", "llama", "llama3")
}
_TOLD = 500  # characters of what a template says, which may be as long as it likes
_SPECIAL = re.compile(r"<\|[a-z0-9_]+\|>|<(?:start|end)_of_turn>")


class _GenerationBlocks(Extension):
    """`{% generation %}` marks the answer for other tools; here it changes nothing but the scope of its names."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML characters, transformers' does not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=32)
def _compile(source: str) -> JinjaTemplate:
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template: its name, its Jinja `source`, and a `note` for the user where the choice needs one."""

    name: str
    source: str
    note: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the source."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def render(
        self,
        messages: Sequence[dict[str, str]],
        *,
        add_generation_prompt: bool,
        bos_token: str | None,
        eos_token: str,
    ) -> str:
        """The conversation as text. Raises UsageError where the template refuses it (or fails on it), StageError where it
        does more than a chat template has to: it would do so for the next conversation too."""
        try:
            return _compile(self.source).render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                bos_token=bos_token or "",
                eos_token=eos_token,
            )
        except TooMuch as error:
            hint = "choose another with template.name"
            raise StageError(f"the template '{self.name}' is not rendered: {error.message}; {hint}") from None
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UsageError(f"the template '{self.name}' refuses this conversation: {str(error)[:_TOLD]}") from error


def choose(template: Template, tokenizer: Tokenizer) -> ChatTemplate:
    """The template that the recipe names. Raises RecipeError for broken Jinja (with its line), MissingError for a
    file that is not there."""
    if template.name == "custom":
        where = template.path or "template.jinja"
        source = template.jinja if template.path is None else resolve(template.path).read_text(encoding="utf-8")
        return _checked(ChatTemplate("custom", (source or "").rstrip("\n")), where)
    if template.name == "model":
        if tokenizer.chat_template:
            return _checked(ChatTemplate("model", tokenizer.chat_template), "the model's chat template")
        note = "the model has no chat template of its own, so Alpaca's is used; choose another with template.name"
        return ChatTemplate("alpaca", _builtin("alpaca", tokenizer), note)
    source = _builtin(template.name, tokenizer)
    spelled = [word for word in special_words(source) if len(tokenizer.encode(word)) != 1]
    if not spelled:
        return ChatTemplate(template.name, source)
    better = "model" if tokenizer.chat_template else "alpaca"
    note = (
        f"the tokenizer has no token for {', '.join(spelled)} and spells each with several; "
        f"template.name: {better} fits this model better"
    )
    return ChatTemplate(template.name, source, note)


def _builtin(name: str, tokenizer: Tokenizer) -> str:
    """A template of ours. It writes the begin token where the tokenizer adds one to plain text: some runtimes add it to
    rendered text too and some do not, but none doubles one that the template wrote."""
    source = BUILTIN[name]
    begins = getattr(tokenizer, "adds_bos", False) and tokenizer.bos_token and "bos_token" not in source
    return "{{ bos_token }}" + source if begins else source


def special_words(source: str) -> list[str]:
    """The marks that a template writes around turns, such as `<|im_start|>`."""
    return list(dict.fromkeys(_SPECIAL.findall(source)))


def _checked(chosen: ChatTemplate, where: str) -> ChatTemplate:
    try:
        _compile(chosen.source)
    except TemplateSyntaxError as error:
        fault = f"{where}:{error.lineno}: {error.message}"
        raise RecipeError(f"the template '{chosen.name}' is not valid Jinja:", [fault]) from error
    if not chosen.source.strip():
        raise RecipeError(f"the template '{chosen.name}' cannot be used:", [f"{where}: it is empty"])
    return chosen


def with_system(messages: Sequence[dict[str, str]], system: str | None) -> tuple[dict[str, str], ...]:
    """The messages, with `system` put first where they have no system message of their own."""
    if system and not (messages and messages[0]["role"] == "system"):
        return ({"role": "system", "content": system}, *messages)
    return tuple(messages)
