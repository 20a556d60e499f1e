"""The one door to stdout and stderr. Whatever is printed while `doors` are open goes through them:

- characters that a terminal obeys are shown (`core.text.visible`), whoever printed them;
- what the stream's encoding has no character for is escaped;
- a stdout that takes nothing any more is one error of ours; a stderr that does not never ends the work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from finetune.core.errors import OutputError
from finetune.core.text import visible


class Door:
    """Stands before a text stream; what it does not know of itself is the stream's own."""

    # Click takes escape sequences out of what goes into a pipe, unless the stream decides: here they are shown.
    color = None

    def __init__(self, stream: TextIO, *, needed: bool, styled: bool = False) -> None:
        """`needed`: an error to write is raised; `styled`: what is written has been through `visible`, then coloured."""
        self.stream, self.needed, self.styled = stream, needed, styled
        self._failure = ""  # once told, told again: whoever writes may try first whether it can, and pass over an error

    def write(self, text: str) -> int:
        shown = text if self.styled else self._visible(text)
        self._raise()
        try:
            self.stream.write(shown)
        except OSError as error:
            self._broken(error)
        return len(text)

    def _visible(self, text: str) -> str:
        # Progress bars of libraries begin each line anew; a carriage return elsewhere would hide what stands before it.
        kept = "\r" if not self.needed and text.startswith("\r") else ""
        return kept + visible(text[len(kept) :])

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._raise()
        try:
            self.stream.flush()
        except OSError as error:
            self._broken(error)

    def _broken(self, error: OSError) -> None:
        _lead_nowhere(self.stream)
        if self.needed:
            self._failure = (
                "whoever read it has closed it" if isinstance(error, BrokenPipeError) else str(error.strerror)
            )
        self._raise()

    def _raise(self) -> None:
        if self._failure:
            raise OutputError(f"standard output could not be written to the end: {self._failure}")

    def __getattr__(self, name: str) -> Any:
        # Click writes UTF-8 into the buffer of a stream that is ASCII, past this door.
        if name == "buffer" and "utf" not in str(self.stream.encoding).lower():
            raise AttributeError(name)
        return getattr(self.stream, name)


@contextmanager
def doors() -> Iterator[None]:
    """Put doors before stdout and stderr while the block runs. Raises OutputError where stdout is closed from the start."""
    _hold_descriptors()
    out, err = sys.stdout, sys.stderr
    nowhere: list[TextIO] = []
    if err is None:
        nowhere.append(open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (closed below)
    try:
        for stream in (out, err):
            _escape_unknown(stream)
        sys.stderr = _as_text(Door(err or nowhere[0], needed=False))
        if out is None:
            raise OutputError("standard output is closed. Send it somewhere, to /dev/null where nobody reads it")
        sys.stdout = _as_text(Door(out, needed=True))
        yield
    finally:
        sys.stdout, sys.stderr = out, err
        for stream in nowhere:
            stream.close()


def styled(stream: TextIO) -> TextIO:
    """The stream for a writer that has made its text visible itself and adds colours and cursor movements of its own."""
    if isinstance(stream, Door):
        return _as_text(Door(stream.stream, needed=stream.needed, styled=True))
    return stream


def is_unicode(stream: TextIO) -> bool:
    """Whether a stream has every character."""
    return "utf" in str(getattr(stream, "encoding", None) or "utf-8").lower()


def _as_text(door: Door) -> TextIO:
    return cast(TextIO, door)


def _escape_unknown(stream: TextIO | None) -> None:
    if stream is not None and (reconfigure := getattr(stream, "reconfigure", None)):
        with suppress(OSError):  # a stream whose descriptor became a pipe since cannot tell where it is
            reconfigure(errors="backslashreplace")


def _hold_descriptors() -> None:
    """A standard stream that is closed leaves its number to the next file that is opened, which then gets what others
    print; so the number is given to the null device."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _lead_nowhere(stream: TextIO) -> None:
    """What a broken stream still holds goes to the null device, or Python writes it, and fails again, when it ends."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
