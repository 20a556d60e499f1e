"""The servers themselves, one function each: a context manager of an ASGI application that answers with one model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import gguf_header
from finetune.backends import child
from finetune.lookup import load
from finetune.run import evidence
from finetune.serving import proxy

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.run import Run
    from finetune.serving.door import App

# llama.cpp sets memory aside for every request it answers at a time: 4 of 4,096 tokens are 360 MiB on the embedded model.
PARALLEL, CONTEXT = 4, 4096


@contextmanager
def torch(model: Path, run: Run, recipe: Recipe) -> Iterator[App]:
    """transformers' application, in this process, with the chat template of the training."""
    template = run.path / "prepare" / "chat_template.jinja"
    with load("finetune.backends.torch.server:application")(
        model,
        recipe.name,
        chat_template=template.read_text(encoding="utf-8") if template.is_file() else None,
        **evidence.model_settings(recipe),
    ) as app:
        yield app


@contextmanager
def llamacpp(model: Path, run: Run, recipe: Recipe) -> Iterator[App]:
    """llama.cpp's server on a GGUF file, in a process of its own."""
    header = gguf_header.read(model, before="tokenizer.")
    known = header.get(f"{header.get('general.architecture')}.context_length")
    n_ctx = min(CONTEXT, known) if isinstance(known, int) else CONTEXT
    serve = load("finetune.backends.llamacpp.server:serve")
    with serve(model, n_ctx=n_ctx, parallel=PARALLEL, name=recipe.name) as address:
        yield proxy.application(address)


@contextmanager
def mlx(model: Path, run: Run, recipe: Recipe) -> Iterator[App]:
    """mlx-lm's server on an MLX directory, in a process of its own."""
    arguments = [str(model), *(["--trust-remote-code"] if recipe.model.trust_remote_code else [])]
    with child.serving("finetune.backends.mlx.server", arguments, what=f"mlx-lm's server on {model}") as address:
        yield proxy.application(address)
