"""Our modules in processes of their own; and servers: started, waited for until they say their address, and stopped."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from finetune.errors import StageError

READY_SECONDS = 120.0
STOP_SECONDS = 20.0
LAST_LINES = 5
LOOK_SECONDS = 0.2
SCHEMES = ("http://", "unix://")


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that is up: its address (`http://HOST:PORT`, or `unix://PATH` of a socket), and its process."""

    address: str
    process: subprocess.Popen[str]
    said: IO[bytes]

    def last_words(self) -> list[str]:
        """The last lines that it wrote on stderr."""
        return _last_lines(self.said)


@contextmanager
def serving(module: str, arguments: Sequence[str], *, what: str, timeout: float = READY_SECONDS) -> Iterator[str]:
    """The address alone; see `running`."""
    with running(module, arguments, what=what, timeout=timeout) as server:
        yield server.address


@contextmanager
def running(
    module: str,
    arguments: Sequence[str],
    *,
    what: str,
    timeout: float = READY_SECONDS,
    called_off: Callable[[], bool] = lambda: False,
) -> Iterator[Running]:
    """`python -m module` once it has printed its address, while the block runs.

    It ends when its standard input closes, so it never outlives this process, or at SIGTERM; it is killed where it heeds
    neither. Raises StageError, with the last lines it wrote, where it does not come up in `timeout` seconds, or where it is
    called off before.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command(module, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env=environment(),
            start_new_session=True,  # Ctrl-C on a terminal is for this process, which then stops the other in order
        )
        try:
            address = _address(process, said, what, timeout, called_off)
            yield Running(address=address, process=process, said=said)
        finally:
            _stop(process)


def command(module: str, *arguments: str) -> list[str]:
    """`python -m module`, to which files of the folder that it starts in are no modules: a user may have a `random.py`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's, in which a child finds this very package, whatever folder it starts in."""
    root = str(Path(__file__).parents[2])
    found = [] if root == sysconfig.get_path("purelib") else [root]
    others = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([*found, *others]))}


def _address(
    process: subprocess.Popen[str], said: IO[bytes], what: str, timeout: float, called_off: Callable[[], bool]
) -> str:
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.strip())
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    end = time.monotonic() + timeout
    late = False
    while not (late or called_off()):
        try:
            line = lines.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            late = time.monotonic() > end
            continue
        if line.startswith(SCHEMES):
            return line
        if not line:
            break
    _stop(process)
    why = f"it was not ready after {timeout:.0f} s" if late else f"it ended with exit code {process.returncode}"
    raise StageError("\n  ".join([f"{what} does not start: {why}", *_last_lines(said)]))


def _last_lines(said: IO[bytes]) -> list[str]:
    said.seek(0)
    written = [line.strip() for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return written[-LAST_LINES:]


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
