"""A model's own server in a process of its own, behind a socket that only the door can ask; started again when it dies."""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from finetune.core.console import say
from finetune.core.errors import StageError
from finetune.core.processes import Running

RESTARTS, WITHIN_SECONDS = 3, 600.0  # a fourth end within ten minutes is not an accident
LONGEST_PATH = 100  # bytes of a Unix socket's path: 104 on macOS, 108 on Linux
# `(socket, called off) -> a server that runs while the block does`.
Start = Callable[[Path, Callable[[], bool]], AbstractContextManager[Running]]


class Keeper:
    """`socket` is where the server listens, or None while there is none; `why` says, in a sentence, what became of it."""

    def __init__(self, start: Start, what: str, ended: Callable[[str], None]) -> None:
        self.start, self.what, self.ended = start, what, ended
        self.socket: Path | None = None
        self.why = f"{what} is being started"
        self.over = threading.Event()
        self.ends: deque[float] = deque(maxlen=RESTARTS)
        self.block = ExitStack()

    def begin(self) -> None:
        """Start the server. Raises StageError where it does not come up."""
        with ExitStack() as block:
            socket = block.enter_context(private_folder()) / "s.sock"
            self.running = block.enter_context(self.start(socket, self.over.is_set))
            self.block = block.pop_all()
        self.socket = socket

    def watch(self) -> None:
        """Start the server again whenever it ends, until it has ended too often or `over` is set."""
        while self._is_there_again(self.running.process.wait()):
            say(f"{self.what} is there again")

    def _is_there_again(self, code: int) -> bool:
        self.socket = None
        if self.over.is_set():
            return False
        self.why = "\n  ".join([f"{self.what} {_how(code)}", *self.running.last_words()])
        if len(self.ends) == RESTARTS and time.monotonic() - self.ends[0] < WITHIN_SECONDS:
            self.ended(f"{self.why}\nIt had been started again {RESTARTS} times within {WITHIN_SECONDS:.0f} s")
            return False
        self.ends.append(time.monotonic())
        say(f"warning: {self.why}\nIt is started again ({len(self.ends)} of {RESTARTS} times)")
        self.block.close()
        try:
            self.begin()
        except StageError as error:
            if not self.over.is_set():
                self.ended(str(error))
            return False
        return True


@contextmanager
def kept(start: Start, what: str, ended: Callable[[str], None]) -> Iterator[Keeper]:
    """A server that is there while the block runs, and started again when it dies; `ended` is called, from another thread
    and with what happened, once that is given up. Raises StageError where it does not come up at first."""
    keeper = Keeper(start, what, ended)
    keeper.begin()
    watcher = threading.Thread(target=keeper.watch, daemon=True)
    watcher.start()
    try:
        yield keeper
    finally:
        keeper.over.set()
        while watcher.is_alive():  # it may be about to start another server
            keeper.block.close()
            watcher.join(0.1)
        keeper.block.close()


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder of this user's alone, with a path that is short enough for a socket in it."""
    place = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(
        prefix="finetune-", dir=place if len(place) < LONGEST_PATH // 2 else "/tmp"
    ) as name:
        yield Path(name)  # made by mkdtemp, which lets nobody else in


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
