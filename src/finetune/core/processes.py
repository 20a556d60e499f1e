"""Our modules in processes of their own; and servers: started, waited for until they say their address, and stopped."""

from __future__ import annotations

import json
import os
import signal
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
from typing import IO, Any

from finetune.core.errors import StageError, first_line
from finetune.core.files import write_text

READY_SECONDS = 120.0
STOP_SECONDS = 20.0
LAST_LINES = 5
LOOK_SECONDS = 0.02
LIFELINE = "FT_LIFELINE"  # the number of a pipe's end that closes when the parent is gone
ADDRESS = "FT_ADDRESS_FILE"  # names the file that a server puts its address into


@dataclass(frozen=True, kw_only=True)
class Running:
    """A server that is up: its address (`http://HOST:PORT`, or `unix://PATH` of a socket), and its process."""

    address: str
    process: subprocess.Popen[str]
    said: IO[bytes]

    def last_words(self) -> list[str]:
        """The last lines that it wrote."""
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
    """`python -m module` once it has told its address (see `tell`), while the block runs.

    It tells it in a file: what a library, or a model's own code, prints is not its word. It ends when its standard input
    closes, so it never outlives this process, or at SIGTERM; it is killed where it heeds neither. Raises StageError, with
    the last lines it wrote, where it does not come up in `timeout` seconds, or where it is called off before.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder, tempfile.TemporaryFile() as said:
        told = Path(folder) / "address"
        process = subprocess.Popen(
            command(module, *arguments),
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            encoding="utf-8",
            errors="replace",
            env={**environment(), ADDRESS: str(told)},
            start_new_session=True,  # Ctrl-C on a terminal is for this process, which then stops the other in order
        )
        try:
            address = _address(process, told, said, what, timeout, called_off)
            yield Running(address=address, process=process, said=said)
        finally:
            _stop(process)


def command(module: str, *arguments: str) -> list[str]:
    """`python -m module`, to which files of the folder that it starts in are no modules: a user may have a `random.py`."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment() -> dict[str, str]:
    """This process's, in which a child finds this very package, whatever folder it starts in, and writes UTF-8, whatever
    this process's own terminal takes."""
    root = str(Path(__file__).parents[2])
    found = [] if root == sysconfig.get_path("purelib") else [root]
    others = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    path = os.pathsep.join(dict.fromkeys([*found, *others]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"}


def tell(address: str) -> None:
    """Say that this process answers at an address: on standard output, and to the process that started it for that."""
    print(address, flush=True)
    if file := os.environ.get(ADDRESS):
        write_text(Path(file), address)


def answer(file: str, value: dict[str, Any]) -> None:
    """Leave the answer of this process where `answer_of` looks for it, to the letter: nothing in it is hidden."""
    Path(file).write_text(json.dumps(value), encoding="utf-8")


def answer_of(
    module: str, arguments: Sequence[str], *, what: str, more: dict[str, str] | None = None
) -> dict[str, Any]:
    """What `python -m module ARGUMENTS FILE` writes into FILE, a JSON object; `more` is added to its environment.

    Standard output is anybody's, and there is nobody to answer on standard input. Raises StageError, with the last line
    that the process wrote, where it ends without an answer.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder, _lifeline() as (lifeline, passed):
        file = Path(folder) / "answer.json"
        done = subprocess.run(
            command(module, *arguments, str(file)),
            env={**environment(), **lifeline, **(more or {})},
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        try:
            if done.returncode == 0:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            why = ""
        except (OSError, ValueError) as error:
            why = f"it left no answer: {first_line(error)}"
    written = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    raise StageError(f"{what} (exit code {done.returncode}): {next(iter(written[-1:]), why or 'it said nothing')}")


@contextmanager
def _lifeline() -> Iterator[tuple[dict[str, str], tuple[int, ...]]]:
    """A pipe whose one end a child is given: it closes when this process is gone, however that ended."""
    if os.name != "posix":
        yield {}, ()
        return
    ours, theirs = os.pipe()[::-1]
    try:
        yield {LIFELINE: str(theirs)}, (theirs,)
    finally:
        os.close(ours)
        os.close(theirs)


def end_with_parent() -> None:
    """Have this process told to end, as by SIGTERM, when the one that waits for its answer is gone; it is ended where it does
    not heed that."""
    given = os.environ.pop(LIFELINE, None)
    if given is None:
        return

    def watch() -> None:
        os.read(int(given), 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STOP_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _address(
    process: subprocess.Popen[str],
    told: Path,
    said: IO[bytes],
    what: str,
    timeout: float,
    called_off: Callable[[], bool],
) -> str:
    end = time.monotonic() + timeout
    while not (told.is_file() or called_off()) and process.poll() is None and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
    if told.is_file():
        return told.read_text(encoding="utf-8")
    late = process.poll() is None
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
