"""The application of `transformers serve` around one loaded model: its routes, its handlers, its generation thread.

What its handlers leave undone is added where they can be extended: a temperature samples, a seed belongs to its own
request, an answer ends before a stop string, a prompt longer than the model's context is refused, `max_tokens` ends with
the context, a request whose client has left stops computing, a stream ends with `[DONE]`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import BaseHandler, GenerateManager, GenerationState
from transformers.utils import logging as transformers_logging

from finetune.backends.torch.loading import Handle, load_for_inference
from finetune.core.errors import StageError, first_line

STOP_SECONDS = 10.0
COLDEST = 1e-6  # a temperature below is none: what is divided by it is beyond float32


@contextmanager
def application(model: Path, name: str, *, chat_template: str | None = None, **settings: Any) -> Iterator[Any]:
    """The ASGI application that answers with the model in a directory, which it calls `name`; with a chat template in
    place of the one stored there, where one is given. What is still being computed at its end is called off."""
    handle = load_for_inference(model, **settings)
    tokenizer = handle.tokenizer.hf
    if not tokenizer.is_fast:
        raise StageError(f"the tokenizer in {model} is a slow one, with which transformers' server cannot stream")
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.apply_chat_template = _Rendering(tokenizer.apply_chat_template)
    tokenizer.clean_up_tokenization_spaces = False  # a stream is not cleaned up either
    config = handle.model.generation_config
    config.eos_token_id, config.pad_token_id = list(handle.tokenizer.eos_ids), tokenizer.pad_token_id
    config.max_length = None
    transformers_logging.set_verbosity_error()
    models, state = OneModel(handle, name), State()
    handlers: list[Any] = [handler(models, state) for handler in (ChatHandler, TextHandler)]
    nothing: Any = None  # no route of these is let through
    try:
        yield build_server(models, *handlers, nothing, nothing, nothing, generation_state=state)
    finally:
        state.manager.stop()


class _Rendering:
    """A tokenizer's `apply_chat_template`, as a request may use it. A template is a program: messages and variables that it
    was not written for end it with any error there is, and that is the request's fault."""

    def __init__(self, render: Callable[..., Any]) -> None:
        self.render = render
        self.settings = {*inspect.signature(render).parameters, "messages"}

    def __call__(self, messages: Any, **given: Any) -> Any:
        try:
            return self.render(messages, **given)
        except Exception as error:
            raise HTTPException(400, f"the chat template refuses these messages: {first_line(error)}") from None

    def check(self, variables: dict[str, Any]) -> None:
        """Raise an error of status 400 for what is no variable of the template: another template, or how it is tokenized."""
        taken = sorted(self.settings & variables.keys())
        if taken:
            raise HTTPException(400, f"'chat_template_kwargs' may not set {', '.join(taken)}")


class OneModel(ModelManager):
    """The one model there is: loaded before the server starts, whatever it is called, never unloaded."""

    def __init__(self, handle: Handle, name: str) -> None:
        super().__init__()
        self.handle, self.name = handle, name

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self.handle.model, self.handle.tokenizer.hf


class State(GenerationState):
    def __init__(self) -> None:
        super().__init__()
        self.manager = Manager()

    def get_manager(self, model_id: str, use_cb: bool = False) -> Manager:
        return self.manager


class Handler(BaseHandler):
    """What both handlers share, before transformers' own."""

    def _validate_request(self, body: dict[str, Any]) -> None:
        """The door has looked at every field but these, which transformers would take for its own settings."""
        self.model_manager.handle.tokenizer.hf.apply_chat_template.check(body.get("chat_template_kwargs", {}))

    def _resolve_model(self, body: dict[str, Any]) -> tuple[str, Any, Any]:
        return self.model_manager.name, *self.model_manager.load_model_and_processor()

    def _build_generation_config(self, body: dict[str, Any], *arguments: Any, **more: Any) -> Any:
        """Without a temperature and a `top_p`, as the model's own generation config says: greedy where it says nothing."""
        if (body.get("temperature") or 1) < COLDEST:
            body = {**body, "temperature": 0}
        own = {**body, "seed": None, "logit_bias": None}
        config = super()._build_generation_config(own, *arguments, **more)
        config.seed = body.get("seed")  # transformers would seed at once, while another request is being computed
        if body.get("logit_bias"):  # transformers hears it in chats only, and wants no whole numbers
            biases = {int(token): float(bias) for token, bias in body["logit_bias"].items()}
            self._check_tokens(biases)
            config.sequence_bias = {(token,): bias for token, bias in biases.items()}
        if body.get("temperature") is not None or body.get("top_p") is not None:
            config.do_sample = body.get("temperature") != 0
            config.top_k = config.top_k or 0
        if not config.do_sample:
            config.temperature = config.top_p = config.top_k = None
        if isinstance(config.stop_strings, str):
            config.stop_strings = [config.stop_strings]
        return config

    def _check_tokens(self, tokens: Iterable[int]) -> None:
        size = self.model_manager.handle.model.config.get_text_config().vocab_size
        if max(tokens) >= size:
            raise HTTPException(400, f"'logit_bias' names token {max(tokens)}; the model has {size} of them, from 0")

    async def _non_streaming(self, *arguments: Any, **more: Any) -> Any:
        response = await super()._non_streaming(*arguments, **more)
        stops = arguments[5].stop_strings
        if not stops:
            return response
        body = json.loads(response.body)
        for choice in body["choices"]:
            holder, key = (choice["message"], "content") if "message" in choice else (choice, "text")
            holder[key] = before_stop(holder.get(key) or "", stops)
        return JSONResponse(body)

    def _streaming(self, *arguments: Any, **more: Any) -> StreamingResponse:
        response = super()._streaming(*arguments, **more)
        response.body_iterator = _with_end(response.body_iterator)
        return response


class ChatHandler(Handler, ChatCompletionHandler):
    pass


class TextHandler(Handler, CompletionHandler):
    pass


async def _with_end(events: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for event in events:
        yield event
    yield "data: [DONE]\n\n"


class Manager(GenerateManager):
    """One request after the other, each on transformers' generation thread."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = threading.Event()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        inputs = self._prepared(model, inputs, gen_config)
        queue, streamer = super().generate_streaming(model, processor, inputs, gen_config, request_id, response_parser)
        return (BeforeStop(queue, gen_config.stop_strings) if gen_config.stop_strings else queue), streamer

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        left = threading.Event()
        inputs = self._prepared(model, inputs, gen_config, left)
        try:
            return await super().generate_non_streaming(model, processor, inputs, gen_config, request_id)
        except asyncio.CancelledError:
            left.set()
            raise
        except ValueError as error:  # `generate` checks its arguments itself
            raise HTTPException(400, first_line(error)) from None

    def async_submit(self, fn: Callable[..., Any], *arguments: Any, **more: Any) -> asyncio.Future[Any]:
        """As transformers' own, whose thread dies where nobody waits for a result any more."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def settle(result: Any, error: Exception | None) -> None:
            if future.done():
                return
            future.set_result(result) if error is None else future.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                result = fn(*arguments, **more)
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(settle, result, error)

        self.submit(work)
        return future

    def stop(self) -> None:
        """Call off what is being computed: a process that ends in the midst of it is aborted by PyTorch."""
        self.stopped.set()
        with suppress(TimeoutError):
            self.submit(lambda: None).result(timeout=STOP_SECONDS)

    def _prepared(self, model: Any, inputs: Any, config: Any, *left: threading.Event) -> dict[str, Any]:
        """What `generate` gets. Raises an error of status 400 where the prompt leaves no room in the context."""
        prompt = inputs["input_ids"].shape[-1]
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if context is not None:
            if prompt >= context:
                raise HTTPException(400, f"the prompt has {prompt} tokens, which exceeds the context size of {context}")
            config.max_new_tokens = min(config.max_new_tokens, context - prompt)
        return {
            **inputs,
            "logits_processor": LogitsProcessorList([_Seeded(config.seed)]),
            "stopping_criteria": StoppingCriteriaList([_Until(self.stopped, *left)]),
        }


class _Seeded:
    """Seeds in the generation thread, before the first token is drawn: nothing else draws there meanwhile."""

    def __init__(self, seed: int | None) -> None:
        self.seed, self.begun = seed, False

    def __call__(self, ids: Any, scores: Any) -> Any:
        if not self.begun:
            self.begun = True
            torch.seed() if self.seed is None else torch.manual_seed(self.seed)
        return scores


class _Until:
    """Ends a generation once one of some events is set."""

    def __init__(self, *events: threading.Event) -> None:
        self.events = events

    def __call__(self, ids: Any, scores: Any, **_: Any) -> Any:
        over = any(event.is_set() for event in self.events)
        return torch.full((ids.shape[0],), over, device=ids.device, dtype=torch.bool)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the stop strings in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


class BeforeStop:
    """A queue of text whose reader gets nothing of a stop string, nor of what comes after it."""

    def __init__(self, queue: asyncio.Queue[Any], stops: Sequence[str]) -> None:
        self.queue, self.stops = queue, stops
        self.held, self.stopped = "", False
        self.ready: deque[Any] = deque()

    async def get(self) -> Any:
        while not self.ready:
            self._take(await self.queue.get())
        return self.ready.popleft()

    def get_nowait(self) -> Any:
        while not self.ready:
            self._take(self.queue.get_nowait())
        return self.ready.popleft()

    def _take(self, item: Any) -> None:
        if type(item) is not str:  # reasoning is a subclass of its own; None is the end
            self._give(len(self.held))
            self.ready.append(item)
            return
        if self.stopped:
            return
        self.held += item
        text = before_stop(self.held, self.stops)
        self.stopped = len(text) < len(self.held)
        self.held = text
        self._give(len(text) if self.stopped else len(text) - self._begun())

    def _give(self, length: int) -> None:
        if text := self.held[:length]:
            self.ready.append(text)
        self.held = self.held[length:]

    def _begun(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        return max(
            size for stop in self.stops for size in range(len(stop)) if size == 0 or self.held.endswith(stop[:size])
        )
