"""`mlx_lm.server` with one model, in a process of its own.

    python -m finetune.backends.mlx.server MODEL SOCKET [--trust-remote-code]

It prints its address once the model is loaded, and ends when its standard input closes. It listens on a Unix socket: only
who may open the folder that it lies in can ask it. By itself that server is open to every program on this machine and to
any web page, loads whatever model, adapter or draft a request names, and computes on beyond the end of the context.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

from finetune.backends.mlx import MlxBackend
from finetune.backends.mlx.runtime import mx  # noqa: F401 - first, since mlx-lm imports MLX too
from finetune.core import processes
from finetune.core.errors import FinetuneError, StageError

# isort: split
from mlx_lm import server


class OneModel(server.ModelProvider):
    """The model that the server was started with, whatever a request names."""

    def load(self, *_: Any) -> Any:
        return super().load("default_model", None, "default_model")


class Generator(server.ResponseGenerator):
    """Refuses a prompt that leaves no room in the context, and ends with the context."""

    def __init__(self, provider: OneModel) -> None:
        super().__init__(provider, server.LRUPromptCache(provider.cli_args.prompt_cache_size))
        model, trust = Path(provider.cli_args.model), provider.cli_args.trust_remote_code
        constants = MlxBackend().constants(model, trust_remote_code=trust)
        self.context, self.vocab_size = constants.get("max_position_embeddings"), constants.get("vocab_size")

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> Any:
        found = super()._tokenize(tokenizer, request, args)
        if self.context is not None:
            room = int(self.context) - len(found[0])
            if room < 1:
                raise StageError(
                    f"the prompt has {len(found[0])} tokens, which exceeds the context size of {self.context}"
                )
            args.max_tokens = min(args.max_tokens, room)
        return found

    def generate(self, request: Any, arguments: Any, *more: Any, **named: Any) -> Any:
        context, responses = super().generate(request, arguments, *more, **named)
        return context, _until_stop(context, responses, arguments.stop_words)


def _until_stop(context: Any, responses: Iterable[Any], stops: Sequence[str]) -> Iterator[Any]:
    """The responses up to a stop string in their text. By itself mlx-lm ends at its tokens, which are others at the
    beginning of a text than within it, and else only leaves the stop string out."""
    text = ""
    for response in responses:
        text += response.text
        ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
        if ends and response.finish_reason != "stop":
            beyond = len(text) - min(ends)
            yield replace(response, text=response.text[: len(response.text) - beyond], finish_reason=None)
            context.stop()
            return
        yield response


class Handler(server.APIHandler):
    def validate_model_parameters(self) -> None:
        """mlx-lm's own, and that a bias is of a token: of another it fails while it answers."""
        super().validate_model_parameters()
        size, beyond = self.response_generator.vocab_size, max(self.logit_bias or [0])
        if size is not None and beyond >= int(size):
            raise ValueError(f"'logit_bias' names token {beyond}; the model has {size} of them, from 0")

    def _set_completion_headers(self, status_code: int = 200) -> None:
        # The server says 404 to whatever its generator refuses, and there is no other model to be asked for.
        refused = status_code == 404 and self.command == "POST"
        super()._set_completion_headers(400 if refused else status_code)

    def log_message(self, *_: Any) -> None:
        """No line for every request."""


class Server(ThreadingMixIn, UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128  # five would leave the rest of a crowd waiting for a second

    def serve_forever(self, *arguments: Any) -> None:
        processes.tell(f"unix://{self.server_address}")
        threading.Thread(target=self._until_left, daemon=True).start()
        super().serve_forever(*arguments)

    def _until_left(self) -> None:
        sys.stdin.read()
        self.shutdown()


def run(host: str, port: int, provider: OneModel) -> None:
    """In place of mlx-lm's own, with the classes above; `host` is the socket's path. Ready means that the model is loaded."""
    generator = Generator(provider)
    while provider.model is None:
        if not generator.generation_available():
            raise StageError(f"mlx-lm's server cannot load the model in {provider.cli_args.model}")
        time.sleep(0.02)
    fingerprint = server.get_system_fingerprint()

    def handle(*arguments: Any) -> Handler:
        return Handler(generator, *arguments, system_fingerprint=fingerprint)

    try:
        Server(host, handle).serve_forever()
    finally:
        generator.stop_and_join()


def main() -> int:
    server.ModelProvider, server.run = OneModel, run
    model, socket, *trusted = sys.argv[1:]
    sys.argv[1:] = ["--model", model, "--host", socket, "--log-level", "ERROR", *trusted]
    try:
        server.main()
    except FinetuneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
