"""Warm starts: one process imports what every run needs, and forks a copy of itself for each process of a run.

Of a run's ten seconds seven are spent importing torch, transformers and TRL, in three processes. A copy knows nothing of
finetune yet, so that patches of our own modules and of attributes of classes reach it as they reach a process that started
cold. `python -m sabotage.fork_server SOCKET LIBRARY...` serves until its standard input closes.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from finetune.core import processes
from sabotage import starting

LIBRARIES = (
    "numpy", "torch", "safetensors.torch", "tokenizers", "datasets", "accelerate", "peft", "transformers.trainer",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer", "pydantic", "jinja2.sandbox", "click",
)  # fmt: skip
END_SECONDS = 5.0


@contextlib.contextmanager
def serving(socket_file: Path, environment: dict[str, str], libraries: Sequence[str] = LIBRARIES) -> Iterator[None]:
    """A server at `socket_file` while the block runs, with `libraries` imported."""
    command = processes.command("sabotage.fork_server", str(socket_file), *libraries)
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdout.readline()  # it says when it is ready
        yield
    finally:
        process.stdin.close()
        process.wait(END_SECONDS)


def main() -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    for name in sys.argv[2:]:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the copies: they tell their exit codes themselves
    print("ready", flush=True)
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    while True:
        link, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _be(link)
        link.close()


def _end_with_standard_input() -> None:
    while os.read(0, 1):  # not by sys.stdin, whose lock a copy would inherit
        pass
    os._exit(0)


def _be(link: socket.socket) -> None:
    """Become the process that was asked for; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, files, _, _ = socket.recv_fds(link, starting.LENGTH.size, 3)
    (length,) = starting.LENGTH.unpack(head)
    request = json.loads(_exactly(link, length))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    threading.Thread(target=_end_with, args=(link,), daemon=True).start()
    code = _run(request)
    with contextlib.suppress(OSError):
        link.sendall(bytes([code]))
    os._exit(code)


def _exactly(link: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = link.recv(length - len(data))
        if not part:  # whoever asked is gone
            os._exit(1)
        data += part
    return data


def _end_with(link: socket.socket) -> None:
    """End when the process that this one stands for has ended, as it was killed."""
    with contextlib.suppress(OSError):
        if link.recv(1):
            return
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(END_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _run(request: dict[str, Any]) -> int:
    """Run the module as `__main__`; its exit code."""
    os.environ.clear()
    os.environ.update(request["environment"])
    # It numbers a file that the process this one stands for has; here the number is soon another file's. See `_end_with`.
    os.environ.pop(processes.LIFELINE, None)
    os.chdir(request["cwd"])
    sys.path[:] = request["path"]
    sys.argv = [request["module"], *request["arguments"]]
    sys.orig_argv[:] = [sys.executable, "-P", "-m", *sys.argv]
    _forget_finetune()
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    try:
        importlib.import_module("sabotage.starting").patch()
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _forget_finetune() -> None:
    """Ours is imported anew, so that patches find what they look for before anybody else has it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "finetune"]:
        del sys.modules[name]


if __name__ == "__main__":
    main()
