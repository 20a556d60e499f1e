"""A chat template that asks for all of a machine is refused, by what it did; any other renders as jinja2's sandbox does."""

from __future__ import annotations

import random
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.core.errors import RecipeError, StageError, UsageError
from finetune.data import amplifiers, budget, sandbox
from finetune.data.templates import BUILTIN, ChatTemplate, choose
from finetune.recipe.sections import Template
from support.chat_templates import LIKE, REFUSED

SPACE = "{% set ns = namespace(s='ab', l=[], x=3) %}"
LOOP = "{% for i in range(99999) %}"
END = "{% endfor %}"
LONG = "{% set s = 'a' * 7999999 %}"
# name: (template, what the refusal says)
HOSTILE: dict[str, tuple[str, str]] = {
    "times": ("{{ 'a' * 10**9 }}", "1,000,000,000 times"),
    "times, the other way": ("{{ 10**9 * [0] }}", "1,000,000,000 times"),
    "a power": ("{{ 10 ** (10 ** 4) }}", "whole number"),
    "squares": (SPACE + LOOP + "{% set ns.x = ns.x * ns.x %}" + END, "whole number"),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "MAX_RANGE"),
    "loops in loops": (LOOP + LOOP + END + END, "steps|seconds"),
    "loops that leave out everything": (LOOP + "{% for i in range(99999) if false %}x{% endfor %}" + END, "steps|seconds"),
    "a long output": (LOOP + "{{ 'x' * 100000 }}" + END, "128,000,000 characters"),
    "a long text of its own": (LOOP + "x" * 50_000 + END, "128,000,000 characters"),
    "a long text set aside": ("{% set x %}" + LOOP + "x" * 50_000 + END + "{% endset %}", "128,000,000 characters"),
    "doubled by ~": (SPACE + LOOP + "{% set ns.s = ns.s ~ ns.s %}" + END, "the operator ~"),
    "doubled by +": (SPACE + LOOP + "{% set ns.s = ns.s + ns.s %}" + END, "the operator +"),
    "lists in lists": (SPACE + LOOP + "{% set ns.l = [ns.l, ns.l] %}" + END, "a list or mapping|steps|seconds"),
    "tuples in tuples": (SPACE + LOOP + "{% set ns.l = (ns.l, ns.l) %}" + END, "a list or mapping|steps|seconds"),
    "mappings in mappings": (SPACE + LOOP + "{% set ns.l = {1: ns.l, 2: ns.l} %}" + END, "a list or mapping|steps|seconds"),
    "dict()": (SPACE + LOOP + "{% set ns.l = dict(a=ns.l, b=ns.l) %}" + END, "a call|steps|seconds"),
    "namespace()": (SPACE + LOOP + "{% set ns.l = namespace(a=ns.l, b=ns.l) %}" + END, "a call|steps|seconds"),
    "itself in itself": (SPACE + "{% set ns.l = ns %}{{ ns }}", "an output"),
    "lists of long texts": (SPACE + LOOP + "{% set ns.l = ns.l + ['x' * 1000000 ~ i] %}" + END, "the operator +"),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
    "a macro that branches": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "seconds|steps"
    ),
    "a macro that doubles": (
        "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}{{ " + "d(" * 40 + "'abc'" + ")" * 40 + " }}", "a call"
    ),
    "a block in itself": ("{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}", "calls itself without end"),
    "a recursive loop": ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "calls itself without end"),
    "center": ("{{ 'a' | center(10**9) }}", "center"),
    "a filter around": ("{% filter center(10**9) %}a{% endfilter %}", "center"),
    "a filter by name": ("{{ range(99) | map('center', 10**9) | list }}", "center"),
    "indent": ("{{ 'a\nb' | indent(10**9) }}", "indent"),
    "indent by a text": ("{{ ('\n' * 100000) | indent('x' * 100000) }}", "indent"),
    "replace": ("{{ ('a' * 10000) | replace('a', 'b' * 10000) }}", "replace"),
    "format": ("{{ '%1000000000d' | format(1) }}", "a format"),
    "join": ("{{ (['a'] * 1000) | join('b' * 70000) }}", "join"),
    "batch": ("{{ [1] | batch(10**9, 0) | list }}", "batch"),
    "slice": ("{{ [1] | slice(10**9) | list }}", "slice"),
    "wordwrap": ("{{ ('a ' * 1000) | wordwrap(1, wrapstring='b' * 1000000) }}", "wordwrap"),
    "round": ("{{ 1 | round(10**9, 'ceil') }}", "round"),
    "sum": ("{{ ([[1]] * 10000) | sum(start=[]) }}", "sum"),
    "tojson": ("{{ [[1]] | tojson(indent=10**9) }}", "tojson"),
    "tojson, indented again and again": (
        "{% set l = [0] * 5000 %}{{ " + "[" * 30 + "l" + "]" * 30 + " | tojson(indent=1000) }}", "tojson"
    ),
    "tojson, with long separators": ("{{ ([1] * 10000) | tojson(separators=('x' * 7000000, ':')) }}", "tojson"),
    "urlize, with many schemes": ("{{ ('a.b ' * 20000) | urlize(extra_schemes=['http:'] * 90000) }}", "urlize"),
    "indent, at other line ends": ("{{ ('a\\r' * 100000) | indent(70000) }}", "indent"),
    "trim": (LONG + "{{ s | trim(chars='b' * 3000000 ~ 'a') }}", "trim"),
    ".strip()": (LONG + "{{ s.strip('b' * 3000000 ~ 'a') }}", "strip"),
    ".rfind()": (LONG + "{{ s.rfind('ab' ~ 'a' * 2000000) }}", "rfind"),
    ".encode()": (
        "{% set t %}{% for i in range(20000, 30000) %}{{ '%c' % i }}" + END + "{% endset %}{{ t.encode('punycode') }}",
        "encode",
    ),
    ".encode(), as names": ("{{ ('日本' * 1000000).encode('ascii', 'namereplace') }}", "encode"),
    "an attribute of an attribute": ("{{ (['a'] * 99999) | map(attribute='0.' * 100000 ~ '0') | list }}", "attribute"),
    "sorted by an attribute of an attribute": ("{{ (['a'] * 9999) | sort(false, false, '0.' * 99999 ~ '0') }}", "attribute"),
    "many searches in one expression": (
        LONG + "{% set t = s ~ '' %}" + LOOP + "{% if s" + " == t == s" * 900 + " %}{% endif %}" + END, "seconds"
    ),
    "many searches in a round": (LONG + LOOP + "{% if 'aab' in s %}{% endif %}" * 500 + END, "seconds"),
    "many copies in a round": (LONG + LOOP + "{% set t = s[1:] %}" * 1000 + END, "seconds"),
    "many tests in a round": (LONG + LOOP + "{% if s is lower %}{% endif %}" * 500 + END, "seconds"),
    "a loop that leaves out all of a long text": (LONG + "{% for c in s if c.a %}{% endfor %}", "seconds|steps"),
    "many calls in a round": (LONG + LOOP + "{% if s.find('b') %}{% endif %}" * 500 + END, "seconds"),
    "many filters in a round": (LONG + LOOP + "{% if s | wordcount %}{% endif %}" * 500 + END, "seconds"),
    "many differences in a round": (
        "{% set k = dict(range(99998) | batch(2)).keys() %}" + LOOP + "{% if k - k %}{% endif %}" * 500 + END, "seconds"
    ),
    "tests of a filter": (LONG + "{{ (['aab'] * 99999) | select('in', s) | list }}", "seconds"),
    "a field told the width by a text": ("{{ '{:>{}}'.format('a', '1' ~ '0' * 8) }}", "a format"),
    "a field told the width by an entry": ("{{ '{:>{a[0]}}'.format('a', a=[10**8]) }}", "a format"),
    "a field told the width in digits": ("{{ '{:>1{a}{a}{a}{a}{a}{a}{a}{a}}'.format('x', a=0) }}", "a format"),
    "a field told the width by a mapping": ("{{ '{a:>{w}}'.format_map({'a': 1, 'w': 10**8}) }}", "a format"),
    "a field with a bracket in its name": ("{{ '{0[}]:>100000000}'.format({'}': 1}) }}", "a format"),
    "a field of markup": ("{{ ('{:>100000000}' | safe).format('a') }}", "a format"),
    "% with a width after zeros": ("{{ '%0000000000100000000d' % 1 }}", "a format"),
    "% with brackets in a name": ("{{ '%(a())100000000d' % {'a()': 1} }}", "a format"),
    "constants": ("{{ 'a' | center(7999999) }}" * 200, "128,000,000 characters"),
    "int": ("{{ ('f' * 7000000) | int(0, 16) }}", "whole number"),
    "urlize": ("{{ ('http://a.b ' * 100000) | urlize }}", "urlize"),
    "striptags": ("{{ ('<!---->' * 100000) | striptags }}", "striptags"),
    "lipsum": ("{{ lipsum(10**6) }}", "lipsum"),
    "strftime_now": ("{{ strftime_now('%A' * 1000000) }}", "strftime_now"),
    ".center()": ("{{ 'a'.center(10**9) }}", "center"),
    ".ljust()": ("{{ 'a'.ljust(10**9) }}", "ljust"),
    ".rjust()": ("{{ 'a'.rjust(10**9) }}", "rjust"),
    ".zfill()": ("{{ 'a'.zfill(10**9) }}", "zfill"),
    ".zfill, subscribed": ("{{ 'a'['zfill'](10**9) }}", "zfill"),
    ".expandtabs(), as wide as they are": ("{{ ('\t' * 1999999).expandtabs() }}", "expandtabs"),
    ".replace() in bytes": ("{{ ('a' * 10000).encode().replace('a'.encode(), ('b' * 10000).encode()) }}", "replace"),
    "keys": (SPACE + "{% set ns.l = ('a' * 99999, 1) %}{{ [{ns.l: 1}] * 200 }}", r"operator \*"),
    "keys of a mapping": ("{% set d = {'a' * 99999: 1} %}{{ [d.keys()] * 200 }}", r"operator \*"),
    ".expandtabs()": ("{{ '\t'.expandtabs(10**9) }}", "expandtabs"),
    ".replace()": ("{{ ('a' * 10000).replace('', 'b' * 10000) }}", "replace"),
    ".join()": ("{{ ('a' * 70000).join([''] * 1000) }}", "join"),
    ".format()": ("{{ '{:>1000000000}'.format('a') }}", "a format"),
    ".format(), told the width": ("{{ '{:>{w}}'.format('a', w=10**9) }}", "a format"),
    ".format(), again and again": ("{{ ('{0}' * 100000).format('a' * 1000) }}", "a format"),
    ".format_map()": ("{{ ('{a}' * 100000).format_map({'a': 'a' * 1000}) }}", "a format"),
    ".translate()": ("{{ ('a' * 100000).translate({97: 'b' * 100000}) }}", "translate"),
    ".to_bytes()": ("{{ (1).to_bytes(10**9, 'big') }}", "to_bytes"),
    "% with a width": ("{{ '%1000000000d' % 1 }}", "a format"),
    "% told the width": ("{{ '%*d' % (10**9, 1) }}", "a format"),
    "% again and again": ("{{ ('%(a)s' * 100000) % {'a': 'b' * 1000} }}", "a format"),
    "long searches": (LONG + LOOP + "{{ 'aab' in s }}" + END, "seconds"),
    "long copies": (LONG + LOOP + "{{ s[1:] | length }}" + END, "seconds"),
}  # fmt: skip
BROKEN = {
    "lists in its source": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "loops in its source": "".join(f"{{% for a{n} in [1] %}}" for n in range(30)) + END * 30,
    "conditions": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "a long source": "x" * 200_000,
}
NESTED: list[Any] = [0] * 500
for _ in range(50):
    NESTED = [NESTED]
MESSAGES = [{"role": "user", "content": "Hello"}]


def _render(template: ChatTemplate, messages: list[dict[str, str]] = MESSAGES) -> str:
    return template.render(messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_does_too_much_is_refused_by_what_it_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, told = HOSTILE[name]
    # A bound of time comes sooner here; one of sizes must come before that of time, on a slow machine too.
    monkeypatch.setattr(budget, "SECONDS", 0.3 if "seconds" in told else 60.0)
    monkeypatch.setattr(budget, "STEPS", 400_000)
    begin = time.thread_time()
    with pytest.raises(StageError, match=told) as caught:
        _render(ChatTemplate("model", source))
    assert time.thread_time() - begin < 20.0  # without its bound each would take minutes
    message = str(caught.value)
    assert message.startswith("the template 'model' is not rendered: ")
    assert "template.name" in message
    assert len(message) < 1000


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("tojson", (NESTED,), {"indent": 1000}),
        ("tojson", ([1] * 10_000,), {"separators": ("x" * 900, ":")}),
        ("indent", ("a\r" * 1000, 10_000), {}),
        ("join", ([""] * 1000, "b" * 10_000), {}),
    ],
)
def test_what_would_be_too_large_is_refused_before_it_is_made(name: str, arguments: Any, named: Any) -> None:
    with pytest.raises(budget.TooMuch, match=name):
        amplifiers.filtered(name, arguments, named)


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_cannot_be_compiled_is_refused_with_its_place(name: str) -> None:
    with pytest.raises(RecipeError, match="not valid Jinja") as caught:
        choose(Template(name="custom", jinja=BROKEN[name]), None)  # type: ignore[arg-type]
    assert caught.value.faults[0].startswith("template.jinja:1: ")


def test_what_a_template_says_of_a_refusal_is_cut() -> None:
    with pytest.raises(Exception, match="refuses this conversation") as caught:
        _render(ChatTemplate("model", "{{ raise_exception('x' * 1000000) }}"))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "wrong",
    ["1 / 0", "1 + 'a'", "'%d' % 'a'", "'%(a)s' % {}", "'a'.encode('of nobody')", "messages[9].role", "2.0 ** 9999"],
)
def test_what_a_template_computes_wrongly_is_told_in_one_line(wrong: str) -> None:
    with pytest.raises((UsageError, StageError), match="the template 'model' (refuses|is not rendered)"):
        _render(ChatTemplate("model", "{{ " + wrong + " }}"))


def test_a_rendering_leaves_its_budget_to_no_other() -> None:
    for source in ("x", HOSTILE["times"][0]):
        with suppress(StageError):
            _render(ChatTemplate("model", source))
        assert budget.current.get() is None


def test_an_honest_large_conversation_renders() -> None:
    turn = "A sentence of a long conversation, with é and 日本. " * 34 + "End."
    messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n in range(60)]
    assert sum(len(each["content"].encode()) for each in messages) > 100_000
    for name, source in _sources().items():
        if name not in REFUSED:
            assert turn in _render(ChatTemplate(name, source), messages), name


def _sources() -> dict[str, str]:
    return {
        **BUILTIN,
        **{name: each[0] for name, each in LIKE.items()},
        **{name: each[0] for name, each in REFUSED.items()},
    }


ODDS = """{%- set a = [1, 2.5, 'x', none, true, [], (1, 2), {'k': [1]}] -%}{%- set ns = namespace(n=0, t=()) -%}
{%- macro m(x, y=3) -%}{{ x ~ y ~ caller() if caller else x + y }}{%- endmacro -%}
{{ a }}{{ a | tojson }}{{ a | tojson(indent=2) }}{{ 2 ** 10 }}{{ 7 % 3 }}{{ '%s-%5.1f|%-4d|' % ('a', 2.345, 7) }}
{{ '{:>5}{:<{w}}|{a[0]}'.format('x', 'y', w=4, a=[9]) }}{{ ', '.join(['a', 'b']) }}{{ 'a-b-c'.split('-') | join('+') }}
{{ 'x'.center(5) }}{{ 'abc'.replace('b', 'dd') }}{{ 'a\nb' | indent(2) }}{{ 'abc' | center(9) }}{{ m(1) }}{{ undefined_name }}
{%- for x in a if x is not none -%}{{ loop.index }}/{{ loop.length }}:{{ loop.first }}{{ loop.previtem }}{{ x }};
{%- set ns.n = ns.n + 1 -%}{%- set ns.t = ns.t + (x,) -%}{%- else -%}none{%- endfor -%}{{ ns.n }}{{ ns.t }}{{ ns }}
{%- call m(4) -%}inside{%- endcall -%}{%- filter upper -%}shout{%- endfilter -%}{{ range(5) | sum }}{{ [3, 1] | sort }}
{{ messages | map(attribute='content') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ 'x' * 3 ~ 1 ~ none ~ [1] }}{{ [1] * 2 + [3] }}{{ (1,) * 2 }}{{ 3.7 | round(1) }}{{ [1, 2, 3] | batch(2) | list }}
{%- for k, v in {'a': 1, 'b': 2}.items() -%}{{ k }}={{ v }}{{ loop.cycle('x', 'y') }}{%- endfor -%}
{%- for x in [[1, [2]]] recursive -%}{{ loop(x) if x is not number else x }}{%- endfor -%}{{ dict(a=1) }}
{{ '<b>' | escape }}{{ 'a' | string }}{{ ('<i>{}</i>' | safe).format('<b>') }}{{ ('%s' | safe) % '<b>' }}
{{ ('{a}' | safe).format_map({'a': '<'}) }}{{ '<' ~ ('a' | safe) }}
{{ 1000000 * 1000000 }}{{ ('a', 'b') | first }}{{ 'aXb' | lower }}{{ true ~ 'x' }}{{ 1 == 1.0 and 'a' in 'ab' }}"""


def test_everything_else_renders_as_in_the_sandbox_of_jinja2(monkeypatch: pytest.MonkeyPatch) -> None:
    draw, compared, rendered = random.Random(0), 0, 0
    for source in [*_sources().values(), ODDS]:
        templates = [
            _compiled(parent, source) for parent in (ImmutableSandboxedEnvironment, sandbox.BoundedEnvironment)
        ]
        for _ in range(20):
            given = _conversation(draw)
            outcome = _outcome(templates[0], given)
            assert outcome == _outcome(templates[1], given)
            compared += 1
            rendered += "Error: " not in outcome
    assert compared == 20 * (len(_sources()) + 1) > 300
    assert rendered > 0.8 * compared


def _compiled(environment: type[ImmutableSandboxedEnvironment], source: str) -> Any:
    made = environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])

    def refuse(message: str) -> None:
        raise TemplateError(message)

    made.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "today"}
    return made.from_string(source)


def _outcome(template: Any, given: dict[str, Any]) -> str:
    try:
        return str(template.render(**given))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _conversation(draw: random.Random) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be <brief> & é"}] if draw.random() < 0.5 else []
    for _ in range(draw.randint(0, 4)):
        messages.append({"role": "user", "content": "q\n" + "x " * draw.randint(0, 5)})
        messages.append({"role": "assistant", "content": draw.choice(["a", "<think>t</think>\n\nb", " c \n"])})
    more = {"add_generation_prompt": draw.random() < 0.5, "bos_token": draw.choice(["<s>", ""]), "eos_token": "</s>"}
    return {"messages": messages, "tools": None, "documents": None, **more}


def test_a_hostile_template_of_a_recipe_ends_a_run_in_one_line(town: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from finetune.cli.app import cli
    from finetune.recipe import dump
    from support.town import only_training

    hostile = {"name": "custom", "jinja": "{{ 'a' * 10**9 }}"}
    (tmp_path / "r.yaml").write_text(dump(only_training(town, tmp_path / "runs", template=hostile)), encoding="utf-8")
    result = CliRunner().invoke(cli, ["prepare", str(tmp_path / "r.yaml")])
    assert result.exit_code == 4
    assert "error: the template 'custom' is not rendered: a value of 1 entries or characters" in result.stderr
