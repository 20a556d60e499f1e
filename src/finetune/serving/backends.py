"""The servers themselves, one function each: a context manager of an ASGI application that answers with one model.

`ended` is called, with what happened, where a server in a process of its own has died for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.core import processes
from finetune.core.lookup import load
from finetune.models import gguf_header
from finetune.run import evidence
from finetune.serving import keeper, proxy

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.run import Run
    from finetune.serving.app import App

    Ended = Callable[[str], None]

# llama.cpp sets memory aside for every request it answers at a time: 4 of 4,096 tokens are 360 MiB on the embedded model.
PARALLEL, CONTEXT = 4, 4096


@contextmanager
def torch(model: Path, run: Run, recipe: Recipe, ended: Ended) -> Iterator[App]:
    """transformers' application, in this process, with the chat template of the training."""
    template = run.path / "prepare" / "chat_template.jinja"
    with load("finetune.backends.torch.server:application")(
        model,
        recipe.name,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        **evidence.model_settings(recipe, merged=True),
    ) as app:
        yield app


@contextmanager
def llamacpp(model: Path, run: Run, recipe: Recipe, ended: Ended) -> Iterator[App]:
    """llama.cpp's server on a GGUF file, in a process of its own."""
    header = gguf_header.read(model, before="tokenizer.")
    known = header.get(f"{header.get('general.architecture')}.context_length")
    n_ctx = min(CONTEXT, known) if isinstance(known, int) else CONTEXT
    serve = load("finetune.backends.llamacpp.server:behind_a_door")

    def start(socket: Path, called_off: Callable[[], bool]) -> AbstractContextManager[processes.Running]:
        found: AbstractContextManager[processes.Running] = serve(
            model, socket, n_ctx=n_ctx, parallel=PARALLEL, name=recipe.name, called_off=called_off
        )
        return found

    with keeper.kept(start, "llama.cpp's server", ended) as server:
        yield proxy.application(server)


@contextmanager
def mlx(model: Path, run: Run, recipe: Recipe, ended: Ended) -> Iterator[App]:
    """mlx-lm's server on an MLX directory, in a process of its own."""

    def start(socket: Path, called_off: Callable[[], bool]) -> AbstractContextManager[processes.Running]:
        trusted = ["--trust-remote-code"] if recipe.model.trust_remote_code else []
        arguments, what = [str(model), str(socket), *trusted], f"mlx-lm's server on {model}"
        return processes.running("finetune.backends.mlx.server", arguments, what=what, called_off=called_off)

    with keeper.kept(start, "mlx-lm's server", ended) as server:
        yield proxy.application(server)
