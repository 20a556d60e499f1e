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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from finetune.errors import StageError

READY_SECONDS = 120.0
STOP_SECONDS = 20.0
LAST_LINES = 5


@contextmanager
def serving(module: str, arguments: Sequence[str], *, what: str, timeout: float = READY_SECONDS) -> Iterator[str]:
    """The base URL that `python -m module` prints once it is ready; the process runs while the block does.

    It ends when its standard input closes, so it never outlives this process, or at SIGTERM; it is killed where it heeds
    neither. Raises StageError, with the last lines it wrote, where it does not come up in `timeout` seconds.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command(module, *arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            encoding="utf-8",
            errors="replace",
            env=environment(),
            start_new_session=True,  # Ctrl-C on a terminal is for this process, which then stops the other in order
        )
        try:
            yield _address(process, said, what, timeout)
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


def _address(process: subprocess.Popen[str], said: IO[bytes], what: str, timeout: float) -> str:
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.strip())
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    end = time.monotonic() + timeout
    late = False
    try:
        while line := lines.get(timeout=max(0.0, end - time.monotonic())):
            if line.startswith("http://"):
                return line
    except queue.Empty:
        late = True
    _stop(process)
    said.seek(0)
    written = [line.strip() for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    why = f"it was not ready after {timeout:.0f} s" if late else f"it ended with exit code {process.returncode}"
    raise StageError("\n  ".join([f"{what} does not start: {why}", *written[-LAST_LINES:]]))


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
