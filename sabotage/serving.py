"""What goes wrong in serving."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sabotage import sabotage
from sabotage.context import Context
from sabotage.targets import SERVED_MODEL, SERVED_REQUEST, SERVER

BASELINE: dict[str, Any] = {"baseline": "serving", "since": "measure"}


@sabotage("server answers from the base model", **BASELINE)
def base_served(context: Context) -> None:
    """The server loads the model that the training started from."""
    _final(context, lambda found, run, base: replace(found, path=base, adapter=None))


@sabotage("server answers from an older adapter", **BASELINE)
def older_adapter_served(context: Context) -> None:
    """The server takes the oldest checkpoint's adapter, not the one that the training ended with."""
    _final(
        context, lambda found, run, base: replace(found, path=base, adapter=min((run.path / "train").glob("check*")))
    )


@sabotage("server applies the adapter to the merged model", **BASELINE)
def adapter_twice(context: Context) -> None:
    """The merged model is served with the adapter on it once more."""
    _final(context, lambda found, run, base: replace(found, adapter=run.path / "train" / "adapter"))


def _final(context: Context, change: Callable[[Any, Any, Any], Any]) -> None:
    """Serve something else than the final model."""

    def final(original: Any, run: Any, recipe: Any) -> Any:
        base = Path(json.loads((run.path / "fetch" / "model.json").read_text(encoding="utf-8"))["base"])
        return change(original(run, recipe), run, base)

    context.wrap(SERVED_MODEL, final)


@sabotage("server ignores temperature", **BASELINE)
def temperature_ignored(context: Context) -> None:
    """Whatever temperature a request names, the likeliest token is taken."""
    _request(context, lambda body: _without(body, "temperature", "top_p"))


@sabotage("server ignores top_p", **BASELINE)
def top_p_ignored(context: Context) -> None:
    """All tokens stay in the draw, whatever share of them a request asks for."""
    _request(context, lambda body: _without(body, "top_p"))


@sabotage("server ignores the seed", imitates="https://github.com/ggml-org/llama.cpp/issues/6955", **BASELINE)
def seed_ignored(context: Context) -> None:
    """A request with a seed is drawn as one without."""
    _request(context, lambda body: _without(body, "seed"))


@sabotage("server has one seed for all", **BASELINE)
def seed_fixed(context: Context) -> None:
    """Every request is drawn with the same seed."""
    _request(context, lambda body: {**body, "seed": 0})


@sabotage("server draws at temperature 0", imitates="https://github.com/huggingface/lighteval/issues/559", **BASELINE)
def zero_temperature_draws(context: Context) -> None:
    """A temperature of 0 is taken for none, and none for the default of 1."""
    _request(context, lambda body: {**body, "temperature": body.get("temperature") or 1.0})


@sabotage("server ignores max_tokens", **BASELINE)
def max_tokens_ignored(context: Context) -> None:
    """An answer goes on beyond the tokens that a request allows."""
    _request(context, lambda body: _without(body, "max_tokens"))


@sabotage("server ignores stop strings", imitates="https://github.com/ggml-org/llama.cpp/issues/11538", **BASELINE)
def stop_ignored(context: Context) -> None:
    """An answer goes on through a stop string."""
    _request(context, lambda body: _without(body, "stop"))


def _request(context: Context, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Generate by another request than the client's."""

    context.wrap(
        SERVED_REQUEST,
        lambda original, self, body, *arguments, **more: original(self, change(body), *arguments, **more),
    )


def _without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


@sabotage("stop string left in the answer", **BASELINE)
def stop_left(context: Context) -> None:
    """An answer ends with the stop string, not before it."""

    def before(original: Any, text: str, stops: Any) -> str:
        ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    context.wrap(f"{SERVER}:before_stop", before)


@sabotage(
    "server does not stop at the end of a turn", imitates="https://github.com/unslothai/unsloth/issues/416", **BASELINE
)
def end_of_turn_ignored(context: Context) -> None:
    """The server waits for the end of a text, which is another token than that of a turn: an answer runs on."""

    def endless(config: Any) -> Any:
        config.eos_token_id = [config.pad_token_id]
        return config

    context.wrap(
        SERVED_REQUEST,
        lambda original, *arguments, **more: endless(original(*arguments, **more)),
    )


@sabotage(
    "server has another chat template", imitates="https://github.com/hiyouga/LlamaFactory/issues/2509", **BASELINE
)
def other_template(context: Context) -> None:
    """The server renders with a template of its own, not with that of the training."""
    template = (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
        "{{ '### assistant:\\n' }}"
    )

    context.wrap(
        f"{SERVER}:application",
        lambda original, model, name, **more: original(model, name, **{**more, "chat_template": template}),
    )


@sabotage("server drops the system message", imitates="https://github.com/InternLM/lmdeploy/issues/464", **BASELINE)
def system_dropped(context: Context) -> None:
    """Messages of the system are left out of the prompt."""
    _messages(context, lambda messages: [each for each in messages if each["role"] != "system"])


@sabotage("server takes the last message only", **BASELINE)
def history_dropped(context: Context) -> None:
    """Earlier turns of a conversation are left out of the prompt."""
    _messages(context, lambda messages: messages[-1:])


@sabotage("conversations run into each other", **BASELINE)
def conversations_mixed(context: Context) -> None:
    """A request is answered after the messages of the one before, whoever sent it."""
    seen: list[Any] = []

    def after_the_last(messages: Any) -> Any:
        before, seen[:] = list(seen), messages
        return [*before, *messages]

    _messages(context, after_the_last)


@sabotage("earlier turns in the wrong order", **BASELINE)
def turns_in_the_wrong_order(context: Context) -> None:
    """The turns before the last are put into the prompt newest first."""
    _messages(context, lambda messages: [*reversed(messages[:-1]), messages[-1]])


def _messages(context: Context, change: Callable[[Any], Any]) -> None:

    context.wrap(
        "transformers.cli.serving.utils:BaseHandler.get_processor_inputs_from_messages",
        lambda original, messages, modality: original(change(messages), modality),
    )


@sabotage(
    "begin token doubled in the served prompt", imitates="https://github.com/vllm-project/vllm/pull/27515", **BASELINE
)
def begin_doubled(context: Context) -> None:
    """The token that begins a prompt is there twice: from the template, and from the tokenizer."""

    def prepared(original: Any, self: Any, model: Any, inputs: Any, *arguments: Any) -> Any:
        import torch

        doubled = {name: torch.cat([part[:, :1], part], dim=1) for name, part in inputs.items()}
        return original(self, model, doubled, *arguments)

    context.wrap(f"{SERVER}:Manager._prepared", prepared)


@sabotage("special tokens in the served text", **BASELINE)
def special_tokens_shown(context: Context) -> None:
    """The text of an answer has the tokens that mark turns."""

    async def generate(original: Any, self: Any, model: Any, processor: Any, *arguments: Any, **more: Any) -> Any:
        _, length, ids = await original(self, model, processor, *arguments, **more)
        return processor.decode(ids, skip_special_tokens=False), length, ids

    context.wrap(f"{SERVER}:Manager.generate_non_streaming", generate)


@sabotage("stream loses its last piece", imitates="https://github.com/ai-dynamo/dynamo/pull/3531", **BASELINE)
def stream_cut(context: Context) -> None:
    """A piece of text is sent when the next one comes, so that the last one never is."""

    def enqueue(original: Any, self: Any, item: Any) -> None:
        held = self.__dict__.pop("held", None)
        if item is not None:
            self.held = item
        if held is not None and item is not None:
            original(self, held)
        if item is None:
            original(self, None)

    context.wrap("transformers.cli.serving.utils:DirectStreamer._enqueue", enqueue)


@sabotage("usage counts words", imitates="https://github.com/vllm-project/vllm/issues/8625", **BASELINE)
def usage_of_words(context: Context) -> None:
    """The tokens of an answer are counted as its words."""

    def words(text: str, usage: Any) -> Any:
        count = len(text.split())
        return usage.model_copy(update={"completion_tokens": count, "total_tokens": usage.prompt_tokens + count})

    _completion(context, lambda text, more: {**more, "usage": words(text, more["usage"])})


@sabotage("usage leaves the prompt out", **BASELINE)
def usage_without_prompt(context: Context) -> None:
    """The sum of a request's tokens is that of its answer."""

    def total(usage: Any) -> Any:
        return usage.model_copy(update={"total_tokens": usage.completion_tokens})

    _completion(context, lambda text, more: {**more, "usage": total(more["usage"])})


@sabotage("every answer said to have ended by itself", **BASELINE)
def finish_always_stop(context: Context) -> None:
    """An answer that was cut off has the same end as one that was not."""
    _completion(context, lambda text, more: {**more, "finish_reason": "stop"})


def _completion(context: Context, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    """Tell a client something else about an answer."""

    context.wrap(
        "transformers.cli.serving.chat_completion:ChatCompletionHandler._build_completion",
        lambda original, self, name, text, model, **more: original(self, name, text, model, **change(text, more)),
    )
