"""llama.cpp's OpenAI-compatible server on a GGUF file, in a process of its own.

    python -m finetune.backends.llamacpp.server MODEL [--port 0] [--n-ctx N] [--threads N] [--parallel N]

It prints its address once it is ready, and ends when its standard input closes: so it never outlives who started it.
A process of its own, since `xllamacpp` cannot be imported where another library has made its C++ symbols everybody's.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from finetune.backends.llamacpp.loading import default_threads, load_model
from finetune.errors import FinetuneError, MissingError, StageError

HOST = "127.0.0.1"
READY_SECONDS = 120.0
STOP_SECONDS = 10.0


def start(gguf: Path, *, n_ctx: int = 0, threads: int | None = None, parallel: int = 1, port: int = 0) -> Any:
    """A running server inside this process; it has `listening_address`, and stops when it is deleted. `n_ctx` is the
    context of each of the `parallel` requests (0: the model's own), `port` 0 any free one."""
    try:
        import xllamacpp
    except ImportError as error:
        raise MissingError(
            f"the Python package 'xllamacpp' (llama.cpp's server) is not there: {error}. "
            "Install it with: pip install 'finetune[gguf]'"
        ) from None
    options = xllamacpp.CommonParams()
    options.model.path = str(gguf)
    options.hostnames, options.port = [HOST], port
    options.n_ctx, options.n_parallel = n_ctx * parallel, parallel
    options.warmup, options.ui = False, False
    options.verbosity = -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads or default_threads()
    try:
        return xllamacpp.Server(options)
    except (RuntimeError, ValueError) as error:
        load_model(gguf)  # says why, which the server does not
        raise StageError(f"llama.cpp's server refuses {gguf}: {error}") from None


@contextmanager
def serve(gguf: Path, *, n_ctx: int = 0, threads: int | None = None, parallel: int = 1, port: int = 0) -> Iterator[str]:
    """The base URL (`http://127.0.0.1:PORT`) of an OpenAI-compatible server that runs while the block does.

    Raises StageError, with the last line the server wrote, where it does not come up.
    """
    if not gguf.is_file():
        raise MissingError(f"no GGUF file at {gguf}")
    command = [sys.executable, "-m", "finetune.backends.llamacpp.server", str(gguf), "--port", str(port)]
    command += ["--n-ctx", str(n_ctx), "--parallel", str(parallel)]
    command += ["--threads", str(threads)] if threads else []
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=_environment()
        )
        try:
            yield _address(process, said, gguf)
        finally:
            _stop(process)


def _environment() -> dict[str, str]:
    """This process's, in which the child finds this very package."""
    root = str(Path(__file__).parents[3])
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != root]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *others])}


def _address(process: subprocess.Popen[str], said: IO[bytes], gguf: Path) -> str:
    lines: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.strip())
        lines.put("")

    threading.Thread(target=listen, daemon=True).start()
    with suppress(queue.Empty):
        while line := lines.get(timeout=READY_SECONDS):
            if line.startswith("http://"):
                return line
    _stop(process)
    said.seek(0)
    written = [line for line in said.read().decode("utf-8", "replace").splitlines() if line.strip()]
    why = written[-1].strip() if written else f"nothing for {READY_SECONDS:.0f} s"
    raise StageError(f"llama.cpp's server does not start on {gguf}; it says: {why}")


def _stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with suppress(OSError):
        process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune.backends.llamacpp.server", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--n-ctx", type=int, default=0, help="context of each request; 0: the model's own")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--parallel", type=int, default=1, help="requests answered at the same time")
    chosen = parser.parse_args(arguments)
    try:
        if not chosen.model.is_file():
            raise MissingError(f"no GGUF file at {chosen.model}")
        server = start(
            chosen.model, n_ctx=chosen.n_ctx, threads=chosen.threads, parallel=chosen.parallel, port=chosen.port
        )
    except FinetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(server.listening_address, flush=True)
    with suppress(KeyboardInterrupt):
        sys.stdin.read()
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main())
