"""llama.cpp's OpenAI-compatible server on a GGUF file, in a process of its own.

    python -m finetune.backends.llamacpp.server MODEL [--port 0 | --socket PATH] [--n-ctx N] [--threads N] [--parallel N]
        [--name NAME]

It prints its address once it is ready, and ends when its standard input closes: so it never outlives who started it.
A process of its own, since `xllamacpp` cannot be imported where another library has made its C++ symbols everybody's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune.backends.llamacpp.loading import default_threads, load_model
from finetune.core import processes
from finetune.core.errors import FinetuneError, MissingError, StageError
from finetune.core.install import install

HOST = "127.0.0.1"


def start(
    gguf: Path,
    *,
    n_ctx: int = 0,
    threads: int | None = None,
    parallel: int = 1,
    port: int = 0,
    socket: Path | None = None,
    name: str | None = None,
) -> Any:
    """A running server inside this process; it has `listening_address`, and stops when it is deleted. `n_ctx` is the
    context of each of the `parallel` requests (0: the model's own), `port` 0 any free one, `socket` a Unix socket in its
    place (its name ends with `.sock`), `name` what it calls the model (the file's path without one)."""
    try:
        import xllamacpp
    except ImportError as error:
        raise MissingError(
            f"the Python package 'xllamacpp' (llama.cpp's server) is not there: {error}. "
            f"Install it with: {install('gguf')}"
        ) from None
    options = xllamacpp.CommonParams()
    options.model.path = str(gguf)
    options.hostnames, options.port = [HOST if socket is None else str(socket)], port
    options.endpoint_slots = False  # what others are asking is nobody's business
    options.n_ctx, options.n_parallel = n_ctx * parallel, parallel
    options.warmup, options.ui = False, False
    options.verbosity = -1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads or default_threads()
    if name is not None:
        options.model_alias = {name}
    try:
        return xllamacpp.Server(options)
    except (RuntimeError, ValueError) as error:
        load_model(gguf)  # says why, which the server does not
        raise StageError(f"llama.cpp's server refuses {gguf}: {error}") from None


@contextmanager
def serve(
    gguf: Path, *, n_ctx: int = 0, threads: int | None = None, parallel: int = 1, port: int = 0, name: str | None = None
) -> Iterator[str]:
    """The base URL (`http://127.0.0.1:PORT`) of an OpenAI-compatible server that runs while the block does.

    Raises StageError, with the last lines the server wrote, where it does not come up.
    """
    arguments = [str(gguf), "--port", str(port), "--n-ctx", str(n_ctx), "--parallel", str(parallel)]
    arguments += ["--threads", str(threads)] if threads else []
    arguments += ["--name", name] if name is not None else []
    with _running(gguf, arguments) as server:
        yield server.address


@contextmanager
def behind_a_door(
    gguf: Path, socket: Path, *, n_ctx: int, parallel: int, name: str, called_off: Callable[[], bool]
) -> Iterator[processes.Running]:
    """The server on a Unix socket, and on no port: whoever may open the folder that the socket lies in can ask it, and
    nobody else. By itself it tells any program on this machine, and any web page, what it is being asked."""
    arguments = [str(gguf), "--socket", str(socket), "--n-ctx", str(n_ctx), "--parallel", str(parallel), "--name", name]
    with _running(gguf, arguments, called_off=called_off) as server:
        yield server


def _running(gguf: Path, arguments: Sequence[str], **more: Any) -> AbstractContextManager[processes.Running]:
    if not gguf.is_file():
        raise MissingError(f"no GGUF file at {gguf}")
    module = "finetune.backends.llamacpp.server"
    return processes.running(module, arguments, what=f"llama.cpp's server on {gguf}", **more)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m finetune.backends.llamacpp.server", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--socket", type=Path, help="a Unix socket to listen on, and no port")
    parser.add_argument("--n-ctx", type=int, default=0, help="context of each request; 0: the model's own")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--parallel", type=int, default=1, help="requests answered at the same time")
    parser.add_argument("--name", help="what the server calls the model; the file's path without it")
    chosen = parser.parse_args(arguments)
    try:
        if not chosen.model.is_file():
            raise MissingError(f"no GGUF file at {chosen.model}")
        server = start(
            chosen.model,
            n_ctx=chosen.n_ctx,
            threads=chosen.threads,
            parallel=chosen.parallel,
            port=chosen.port,
            socket=chosen.socket,
            name=chosen.name,
        )
    except FinetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    processes.tell(server.listening_address)
    with suppress(KeyboardInterrupt):
        sys.stdin.read()
    del server
    return 0


if __name__ == "__main__":
    sys.exit(main())
