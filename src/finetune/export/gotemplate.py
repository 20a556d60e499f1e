"""A model's Jinja chat template as the Go template that Ollama runs.

The Jinja template is not parsed but asked: rendered with marker words for contents, it shows what it writes before,
between and after them, and which white space it strips. The Go template made of that is then run
(`finetune.export.gotext`) on CONVERSATIONS, and one that writes a single character differently is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finetune.core.errors import UsageError
from finetune.data.templates import ChatTemplate, with_system
from finetune.export import gotext
from finetune.export.gotext import quote

Messages = Sequence[Mapping[str, str]]

SYSTEM, USERS, ANSWERS = "Systemxq0", ("Userxq1", "Userxq2", "Userxq3"), ("Answerxq1", "Answerxq2")
_SPACES = ("\n \u00a0", "\u00a0 \n")  # around a word: shows whether all white space goes, or newlines, or none
REFUSAL = "the model's chat template takes no message of this role here"
_FIX = "Export 'gguf' instead: llama.cpp runs the Jinja template itself"


def _chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": "assistant" if place % 2 else "user", "content": each} for place, each in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


_ODD = (
    "naïve 中文 עברית 👩‍👩‍👧‍👦 𝔘 \u200b\ufeff\u2028\u00a0. {{ .Content }} {% raw %} "
    '"quoted" `code` \\n ${HOME} <b>&amp;</b>'
)
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "a single turn": _chat("What is the capital?"),
    "two turns": _chat("What is the capital?", "It is Brindlewick.", "Who founded it?"),
    "four turns": _chat("One?", "First.", "Two?", "Second.", "Three?", "Third.", "Four?"),
    "a system message": _chat("What is the capital?", system="Be brief."),
    "a system message and three turns": _chat("One?", "First.", "Two?", "Second.", "Three?", system="Be brief."),
    "an empty system message": _chat("What is the capital?", system=""),
    "odd Unicode and markup": _chat(_ODD, _ODD, _ODD, system=_ODD),
    "white space around contents": _chat(" \n\tOne?\u2003\n ", "\n\n First. \u3000", "\r\nTwo?\x0b", system="\n Be brief. \n"),
    "an empty question": _chat(""),
    "a blank question": _chat(" \n ", "\n", "\u00a0"),
    "a blank question after a system message": _chat("\n\n", system="Be brief."),
    "a long run of white space": _chat(" " * 300 + "One?" + "\n" * 300),
    "an answer at the end": _chat("One?", "First."),
}  # fmt: skip
# What an Ollama template cannot do, but a client of its chat API does not send: told, not refused.
TOLERATED = {
    "an answer with its thoughts in it": _chat("One?", "<think>\nHm.\n</think>\n\nFirst.", "Two?"),
    "a system message later on": [*_chat("One?", "First."), {"role": "system", "content": "Be brief."}, *_chat("Two?")],
}


@dataclass(frozen=True)
class GoTemplate:
    """`text` is the Go template; `system` the system message that the Jinja template writes where there is none (or
    that was given); `notes` say what the translation leaves to others, `mended` what it does differently and why."""

    text: str
    system: str | None = None
    notes: tuple[str, ...] = ()
    mended: tuple[str, ...] = ()


def translate(
    template: ChatTemplate, *, bos_token: str | None, eos_token: str, system: str | None = None,
    trained_bos: bool = False, runner_bos: bool = False,
) -> GoTemplate:  # fmt: skip
    """The Go template that writes what `template` writes. Raises UsageError where there is none that does.

    `system` is the system message of a conversation without one; `trained_bos` says that the begin token stood before
    every prompt in training whether the template writes it or not, `runner_bos` that the runtime puts it there itself.
    """
    _refuse_dates(template, bos_token, eos_token)
    writer = Writer(template, bos_token, eos_token, system, bos="always" if trained_bos else "template")
    mended: tuple[str, ...] = ()
    plain = writer(_chat(USERS[0]))  # a template that refuses even this one is refused
    if runner_bos:
        if not bos_token or not plain.startswith(bos_token):
            raise _cannot(template, "the GGUF file asks for a begin token before every prompt, and training had none")
        writer = replace(writer, bos="never")
        mended = (f"the template leaves the begin token '{bos_token}' out: Ollama puts it there itself",)
    try:
        parts = _Parts.probe(replace(writer, system=None))
        text = parts.text()
    except _Impossible as error:
        raise _cannot(template, str(error)) from None
    default = parts.system if system is None else system
    return GoTemplate(text, default, _verify(writer, text, default), mended)


@dataclass(frozen=True)
class Writer:
    """What the Jinja template writes. The begin token at the start is left to the template, always or never there."""

    template: ChatTemplate
    bos_token: str | None
    eos_token: str
    system: str | None
    bos: str

    def __call__(self, messages: Messages, *, prompt: bool = True) -> str:
        given = with_system([dict(message) for message in messages], self.system)
        tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        text = self.template.render(given, add_generation_prompt=prompt, **tokens)  # type: ignore[arg-type]
        if self.bos == "template" or not self.bos_token:
            return text
        return (self.bos_token if self.bos == "always" else "") + text.removeprefix(self.bos_token)


def _cannot(template: ChatTemplate, why: str) -> UsageError:
    return UsageError(f"the chat template '{template.name}' has no equal in Ollama's template language: {why}. {_FIX}")


class _Impossible(Exception):
    """Why no Go template can be made."""


def _refuse_dates(template: ChatTemplate, bos_token: str | None, eos_token: str) -> None:
    """Ollama knows the date in one form only, and a date that stands still is another prompt tomorrow."""
    if "strftime_now" not in template.source:
        return
    stopped = ChatTemplate(template.name, re.sub(r"\bstrftime_now\s*\(", "raise_exception(", template.source))
    try:
        stopped.render(_chat(USERS[0]), add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token)
    except UsageError:
        raise _cannot(template, "it writes today's date into the prompt") from None


def _pieces(text: str, *words: str) -> list[str]:
    """What stands before, between and after the words, which must all be there once and in this order."""
    if any(text.count(word) != 1 for word in words):
        raise _Impossible("it leaves contents out, repeats or rewrites them")
    found = re.fullmatch("(.*)".join(["", *map(re.escape, words), ""]), text, flags=re.DOTALL)
    if not found:
        raise _Impossible("it puts contents in another order")
    return list(found.groups())


@dataclass(frozen=True)
class _Parts:
    """What the template writes around contents.

    `head` opens a conversation without a system message, and `first` is what the first user's content then has before
    it; `open_user` is before a later one's, `after_system` before that of the turn that follows the system message.
    `joint` says that `after_system` is stripped together with that content. `open_system` is None where a system
    message is refused, `late_system` where it is refused later on (else what is before and after one there).
    """

    head: str
    first: str
    open_user: str
    close_user: str
    open_answer: str
    close_answer: str
    end: str
    open_system: str | None
    after_system: str
    late_system: tuple[str, str] | None
    joint: bool
    strips: Mapping[str, str]
    system: str | None

    @classmethod
    def probe(cls, written: Writer) -> _Parts:
        u, a = USERS, ANSWERS
        first, close = _pieces(written(_chat(u[0])), u[0])
        whole = _pieces(written(_chat(u[0], a[0], u[1], a[1], u[2])), u[0], a[0], u[1], a[1], u[2])
        if whole != [first, whole[1], whole[2], whole[1], whole[2], close]:
            raise _Impossible("it writes a turn differently in another place of the conversation")
        to_answer, to_user = whole[1:3]
        close_user, close_answer = _closings(written, close, to_answer, to_user)
        open_user, open_answer = to_user[len(close_answer) :], to_answer[len(close_user) :]
        end = close[len(close_user) :]
        head = first.removesuffix(open_user) if first.endswith(open_user) else ""

        asked = _optional(written, _chat(u[0], system=SYSTEM), SYSTEM, u[0])
        open_system, after_system = asked[:2] if asked else (None, "")
        if asked and asked[2] != close:
            raise _Impossible("it writes a turn differently after a system message")
        late = [*_chat(u[0], a[0]), *_chat(u[1], system=SYSTEM)]
        middle = _optional(written, late, u[0], a[0], SYSTEM, u[1])
        late_system = None
        if middle and middle[2].startswith(close_answer) and middle[3].endswith(open_user) and middle[4] == close:
            late_system = middle[2][len(close_answer) :], middle[3].removesuffix(open_user)
        strips = _strips(written, first, close, to_answer, to_user, open_system, after_system)
        joint = False
        if open_system is not None and "right" in strips["user"]:
            blank = written(_chat("\n", system=SYSTEM))
            joint = blank != f"{open_system}{SYSTEM}{after_system}{close}"
            if joint and not after_system.strip():
                raise _Impossible("it strips white space across contents")
        return cls(
            head, first, open_user, close_user, open_answer, close_answer, end, open_system, after_system,
            late_system, joint, strips, _default(written, first, open_system, after_system),
        )  # fmt: skip

    @property
    def own_turn(self) -> bool:
        """Whether the user's turn after a system message is like any other."""
        return self.open_system is None or (self.after_system.endswith(self.open_user) and not self.joint)

    def text(self) -> str:
        """The Go template."""
        system_head, system, late = self.head, "", self.late_system
        if self.open_system is not None:
            around = self.open_system, self.after_system.removesuffix(self.open_user) if self.own_turn else ""
            system_head, where = "", 'and (eq .Role "system") (eq $place 0)'
            if late and around[0].endswith(late[0]) and around[1] == late[1]:  # the same wherever it stands
                system_head, around, where = around[0].removesuffix(late[0]), late, 'eq .Role "system"'
            system = f"{{{{ else if {where} }}}}{_raw(around[0])}{self._content('system')}{_raw(around[1])}"
        body = (
            _either('eq (index .Messages 0).Role "system"', _raw(system_head), _raw(self.head))
            + "{{ range $place, $_ := .Messages }}"
            + f'{{{{ if eq .Role "user" }}}}{self._user()}'
            + f'{{{{ else if eq .Role "assistant" }}}}{_raw(self.open_answer)}{self._content("answer")}'
            + f"{_raw(self.close_answer)}{system}"
            + f"{{{{ else }}}}{{{{ template {quote(REFUSAL)} . }}}}{{{{ end }}}}{{{{ end }}}}{_raw(self.end)}"
        )
        return _definitions(body) + body

    def _user(self) -> str:
        """What stands for a user's message."""
        content, opening = self._content("user"), _raw(self.open_user)
        if self.first != self.head + self.open_user:
            opening = _either("$place", opening, _raw(self.first))
        usual = opening + content
        if not self.own_turn:
            after = _raw(self.after_system) + content
            if self.joint:
                after = f'{{{{ template "strip right" (print {quote(self.after_system)} .Content) }}}}'
            usual = _either('and (eq $place 1) (eq (index $.Messages 0).Role "system")', after, usual)
        return usual + _raw(self.close_user)

    def _content(self, role: str) -> str:
        mode = self.strips[role]
        return f'{{{{ template "strip {mode}" .Content }}}}' if mode else "{{ .Content }}"


def _either(condition: str, one: str, other: str) -> str:
    """Go text that is `one` where the condition holds, else `other`."""
    if one == other:
        return one
    if not one:
        condition, one, other = f"not ({condition})", other, ""
    otherwise = f"{{{{ else }}}}{other}" if other else ""
    return f"{{{{ if {condition} }}}}{one}{otherwise}{{{{ end }}}}"


def _definitions(body: str) -> str:
    """The stripping templates that `body` calls."""
    both, left, right = (f'template "strip {mode}"' in body for mode in ("left right", "left", "right"))
    return (
        (_strip("strip left right", "left", 'template "strip right"') if both else "")
        + (_strip("strip left", "left", "") if left else "")
        + (_strip("strip right", "right", "") if right or both else "")
    )


def _closings(written: Writer, close: str, to_answer: str, to_user: str) -> tuple[str, str]:
    """What ends a user's turn and an answer, seen where no answer is asked for; empty where that shows no such thing,
    and all of it counts to the beginning of the next turn."""
    user = _pieces(written(_chat(USERS[0]), prompt=False), USERS[0])[1]
    answer = _pieces(written(_chat(USERS[0], ANSWERS[0]), prompt=False), USERS[0], ANSWERS[0])[2]
    for last in ("", written.eos_token):  # some write an end of text after the last turn
        ends = user.removesuffix(last), answer.removesuffix(last)
        if to_answer.startswith(ends[0]) and close.startswith(ends[0]) and to_user.startswith(ends[1]):
            return ends
    return "", ""


def _optional(written: Writer, messages: Messages, *words: str) -> list[str] | None:
    """The pieces, or None where the template refuses the conversation."""
    try:
        text = written(messages)
    except UsageError:
        return None
    return _pieces(text, *words)


def _common(one: str, other: str) -> str:
    length = next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
    return one[: min(len(one), len(other)) if length is None else length]


def _default(written: Writer, first: str, open_system: str | None, after_system: str) -> str | None:
    """The system message that a conversation without one has all the same."""
    if open_system is None or not (first.startswith(open_system) and first.endswith(after_system)):
        return None
    text = first[len(open_system) : len(first) - len(after_system)]
    same = text and written(_chat(USERS[0], system=text)) == written(_chat(USERS[0]))
    return text if same else None


def _strips(
    written: Writer, first: str, close: str, to_answer: str, to_user: str, open_system: str | None, after_system: str
) -> dict[str, str]:
    """Which sides of each role's content are stripped of white space: "", "left", "right" or "left right"."""
    left, right = _SPACES
    u, a = USERS, ANSWERS

    def sides(text: str, before: str, after: str) -> str:
        inner = text.removeprefix(before).removesuffix(after)
        if before + inner + after != text:
            raise _Impossible("it changes what it writes around contents with their white space")
        for mode, kept in {
            "": left + word + right, "left": word + right, "right": left + word, "left right": word,
        }.items():  # fmt: skip
            if inner == kept:
                return mode
        raise _Impossible("it changes contents in another way than by stripping white space")

    word = u[0]
    found = {"user": sides(written(_chat(left + word + right)), first, close), "system": ""}
    word = a[0]
    text = written(_chat(u[0], left + word + right, u[1]))
    found["answer"] = sides(text, first + u[0] + to_answer, to_user + u[1] + close)
    if open_system is not None:
        word = SYSTEM
        text = written(_chat(u[0], system=left + word + right))
        found["system"] = sides(text, open_system, after_system + u[0] + close)
    return found


# What Python's str.strip (Jinja's `trim`) takes for white space, by its length in UTF-8.
_BLANKS = [chr(code) for code in range(0x3001) if chr(code).isspace()]
_BY_LENGTH = {length: [each for each in _BLANKS if len(each.encode()) == length] for length in (1, 2, 3)}


def _strip(name: str, side: str, then: str) -> str:
    """A template that calls itself with its dot one character shorter for as long as that side begins with white
    space. Go's templates have no function for it, nor subtraction: `len (slice . n)` is the length less n."""
    rest = f"{{{{ {then} . }}}}" if then else "{{ . }}"
    steps = ""
    for length, blanks in _BY_LENGTH.items():
        end, cut = (
            (f"slice . 0 {length}", f"slice . {length}")
            if side == "left"
            else (f"slice . (len (slice . {length}))", f"slice . 0 (len (slice . {length}))")
        )
        known = " ".join(map(quote, blanks))
        steps += f"{{{{ {'else ' if steps else ''}if and (ge (len .) {length}) (eq ({end}) {known}) }}}}"
        steps += f"{{{{ template {quote(name)} ({cut}) }}}}"
    return f"{{{{ define {quote(name)} }}}}{steps}{{{{ else }}}}{rest}{{{{ end }}}}{{{{ end }}}}"


def _raw(text: str) -> str:
    """A constant. What Ollama's Modelfile parser would drop or misread, or Go would take for an action, is quoted."""
    if not text:
        return ""
    plain = all(character == "\n" or character.isprintable() for character in text)
    return text if plain and "{{" not in text and '"""' not in text else f"{{{{ {quote(text)} }}}}"


def _verify(written: Writer, text: str, system: str | None) -> tuple[str, ...]:
    """Compare on every conversation; the notes. Raises UsageError with the first difference."""
    notes = []
    for name, messages in {**CONVERSATIONS, **TOLERATED}.items():
        try:
            wanted = written(messages)
        except UsageError:
            continue  # the Jinja template refuses it, so nothing was trained like it
        try:
            got = gotext.render(text, messages, system=system)
        except gotext.GoError as error:
            got = f"({error})"
        if got == wanted:
            continue
        if name in TOLERATED:
            notes.append(
                f"Ollama's template writes {name} differently from the model's own: {_difference(wanted, got)}"
            )
            continue
        raise _cannot(written.template, f"with {name}, {_difference(wanted, got)}")
    return tuple(notes)


def _difference(wanted: str, got: str) -> str:
    place = len(_common(wanted, got))
    start = max(0, place - 10)
    return f"it has {wanted[start : place + 30]!r} where Ollama's would have {got[start : place + 30]!r}"
