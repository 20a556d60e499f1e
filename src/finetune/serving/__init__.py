"""A run's model behind an OpenAI-compatible server: `/health`, `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

The servers are those of transformers, llama.cpp and mlx-lm; one door stands before them all (see `door`).
"""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from finetune.core import processes
from finetune.core.errors import MissingError, StageError, UsageError
from finetune.core.install import install
from finetune.core.lookup import load
from finetune.core.signals import heeded_by
from finetune.serving.fields import EXTRAS, LLAMACPP, MLX

if TYPE_CHECKING:
    import uvicorn

    from finetune.recipe import Recipe
    from finetune.run import Run
    from finetune.serving.access import Access


@dataclass(frozen=True, kw_only=True)
class Server:
    """One row. `start` is `(model, run, recipe, ended) -> context manager of an ASGI application`; `format` the export that
    it runs (None: the model as trained); `ignored` are fields of a request that it would pass over in silence."""

    start: str
    extra: str
    packages: tuple[str, ...]
    format: str | None = None
    ignored: tuple[str, ...] = ()


_OTHERS = {
    "torch": tuple(name for name in EXTRAS if name != "chat_template_kwargs"),
    "llamacpp": tuple(MLX),
    "mlx": tuple(LLAMACPP),
}
_PROXY = ("starlette", "uvicorn", "httpx2")
_UNSUNG = ("n", "best_of", "echo", "response_format", "suffix")
SERVERS: dict[str, Server] = {
    "torch": Server(
        start="finetune.serving.backends:torch",
        extra="torch",
        packages=("torch", "transformers", "fastapi", "uvicorn", "openai"),
        # transformers makes a repetition penalty of `frequency_penalty`, which is something else.
        ignored=(*_UNSUNG, *_OTHERS["torch"], "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty"),
    ),
    "llamacpp": Server(
        start="finetune.serving.backends:llamacpp",
        extra="gguf",
        packages=("xllamacpp", "cyllama", *_PROXY),
        format="gguf",
        ignored=("best_of", "echo", "suffix", *_OTHERS["llamacpp"]),
    ),
    "mlx": Server(
        start="finetune.serving.backends:mlx",
        extra="mlx",
        packages=("mlx", "mlx_lm", *_PROXY),
        format="mlx",
        ignored=(*_UNSUNG, *_OTHERS["mlx"]),
    ),
}


def check_installed(backend: str) -> None:
    """Raise MissingError, with the line that installs them, where a server's packages are not there."""
    server = SERVERS[backend]
    lacking = [name for name in server.packages if importlib.util.find_spec(name) is None]
    if lacking:
        raise MissingError(
            f"serving with '{backend}' needs Python packages that are not installed: {', '.join(lacking)}. "
            f"Install them with: {install(server.extra, 'serve')}"
        )


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds the address, so that a port is known to be free before a model is loaded.

    Raises StageError for a port that cannot be had, UsageError for a host that is not this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"--host {host} is no address: {error}") from None
    held = socket.socket(family, kind, protocol)
    if os.name == "posix":  # a server that has just ended does not block its port; Windows means something else by it
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        held.bind(address)
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(f"--host {host} is not an address of this machine") from None
        why = "is taken" if error.errno == errno.EADDRINUSE else f"cannot be had ({error.strerror})"
        raise StageError(
            f"port {port} on {host} {why}. Choose another with --port, or any free one: --port 0"
        ) from None
    return held


def base_url(held: socket.socket) -> str:
    """Where a client on this machine finds a bound socket."""
    host, port = held.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    backend: str,
    model: Path,
    run: Run,
    recipe: Recipe,
    held: socket.socket,
    asked: Access,
    ready: Callable[[], None],
) -> None:
    """Answer on a bound socket until SIGTERM or SIGINT, which end the process's other work too; `ready` is called once
    the first request can come. A model is loaded from its whole directory or file (see `models.whole`).

    Raises StageError where the model's own server died and could not be kept.
    """
    from finetune.serving import access, connections
    from finetune.serving import app as door

    row = SERVERS[backend]
    told: list[bool] = []
    ends: list[str] = []
    servers: list[uvicorn.Server] = []

    async def tell() -> None:
        if not told:
            told.append(True)
            ready()

    def ended(why: str) -> None:
        ends.append(why)
        for server in servers:
            server.should_exit = True

    with load(row.start)(model, run, recipe, ended) as app:
        guarded = door.application(
            app,
            name=recipe.name,
            system=recipe.template.system,
            ignored=row.ignored,
            stopping=lambda: servers[0].should_exit,
        )
        server = connections.server(access.application(guarded, asked), tell, grace=2 * door.GRACE_SECONDS)
        servers.append(server)
        server.should_exit = bool(ends)
        server.run(sockets=[held])
    if ends:
        raise StageError(f"the server ends, since the model's own cannot be kept:\n{ends[0]}")


class _Stopped(BaseException):
    """A signal that asks to end."""


@contextmanager
def until_stopped() -> Iterator[None]:
    """A block that a signal to end (`interruption.SIGNALS`) ends without an error, whatever it is doing; what it opened is
    closed first."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:  # closing is not to be cut short
            signal.signal(each, signal.SIG_IGN)
        raise _Stopped

    before = heeded_by(stop)
    try:
        yield
    except _Stopped:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def serving(
    run: Run | str | Path,
    *,
    backend: str = "torch",
    checkpoint: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 0,
    timeout: float = 120.0,
    api_key_file: str | Path | None = None,
    proof: bool = False,
    anyway: bool = False,
) -> Iterator[str]:
    """The base URL of `finetune serve RUN`, which runs in a process of its own while the block does.

    `checkpoint` is what --from-checkpoint takes: a directory, its name, or `last`; `api_key_file` holds the
    keys of clients, and is needed where other machines reach `host`. With `proof` the run needs no verdicts:
    what the server answers is to become one; its files have to be as they were made all the same, unless `anyway`. Raises
    StageError, with what the command said, where it is not ready after `timeout` seconds.
    """
    arguments = ["serve", os.fspath(run), "--backend", backend, "--host", host, "--port", str(port)]
    arguments += [] if checkpoint is None else ["--from-checkpoint", str(checkpoint)]
    arguments += [] if api_key_file is None else ["--api-key-file", os.fspath(api_key_file)]
    arguments += [*(["--proof"] if proof else []), *(["--anyway"] if anyway else [])]
    with processes.serving("finetune", arguments, what=f"the server of {os.fspath(run)}", timeout=timeout) as address:
        yield address
