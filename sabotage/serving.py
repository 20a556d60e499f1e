"""What goes wrong in serving."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sabotage import sabotage
from sabotage.context import Scene
from sabotage.targets import SERVED_MODEL, SERVED_REQUEST, SERVER

GROUND: dict[str, Any] = {"ground": "serving", "since": "measure"}


@sabotage("server answers from the base model", **GROUND)
def base_served(scene: Scene) -> None:
    """The server loads the model that the training started from."""
    _final(scene, lambda found, run, base: replace(found, path=base, adapter=None))


@sabotage("server answers from an older adapter", **GROUND)
def older_adapter_served(scene: Scene) -> None:
    """The server takes the oldest checkpoint's adapter, not the one that the training ended with."""
    _final(scene, lambda found, run, base: replace(found, path=base, adapter=min((run.path / "train").glob("check*"))))


@sabotage("server applies the adapter to the merged model", **GROUND)
def adapter_twice(scene: Scene) -> None:
    """The merged model is served with the adapter on it once more."""
    _final(scene, lambda found, run, base: replace(found, adapter=run.path / "train" / "adapter"))


def _final(scene: Scene, change: Callable[[Any, Any, Any], Any]) -> None:
    """Serve something else than the final model."""

    def final(original: Any, run: Any, recipe: Any) -> Any:
        base = Path(json.loads((run.path / "fetch" / "model.json").read_text(encoding="utf-8"))["base"])
        return change(original(run, recipe), run, base)

    scene.wrap(SERVED_MODEL, final)


@sabotage("server ignores temperature", **GROUND)
def temperature_ignored(scene: Scene) -> None:
    """Whatever temperature a request names, the likeliest token is taken."""
    _request(scene, lambda body: _without(body, "temperature", "top_p"))


@sabotage("server ignores top_p", **GROUND)
def top_p_ignored(scene: Scene) -> None:
    """All tokens stay in the draw, whatever share of them a request asks for."""
    _request(scene, lambda body: _without(body, "top_p"))


@sabotage("server ignores the seed", imitates="https://github.com/ggml-org/llama.cpp/issues/6955", **GROUND)
def seed_ignored(scene: Scene) -> None:
    """A request with a seed is drawn as one without."""
    _request(scene, lambda body: _without(body, "seed"))


@sabotage("server has one seed for all", **GROUND)
def seed_fixed(scene: Scene) -> None:
    """Every request is drawn with the same seed."""
    _request(scene, lambda body: {**body, "seed": 0})


@sabotage("server draws at temperature 0", imitates="https://github.com/huggingface/lighteval/issues/559", **GROUND)
def zero_temperature_draws(scene: Scene) -> None:
    """A temperature of 0 is taken for none, and none for the default of 1."""
    _request(scene, lambda body: {**body, "temperature": body.get("temperature") or 1.0})


@sabotage("server ignores max_tokens", **GROUND)
def max_tokens_ignored(scene: Scene) -> None:
    """An answer goes on beyond the tokens that a request allows."""
    _request(scene, lambda body: _without(body, "max_tokens"))


@sabotage("server ignores stop strings", imitates="https://github.com/ggml-org/llama.cpp/issues/11538", **GROUND)
def stop_ignored(scene: Scene) -> None:
    """An answer goes on through a stop string."""
    _request(scene, lambda body: _without(body, "stop"))


def _request(scene: Scene, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Generate by another request than the client's."""

    scene.wrap(
        SERVED_REQUEST,
        lambda original, self, body, *arguments, **more: original(self, change(body), *arguments, **more),
    )


def _without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


@sabotage("stop string left in the answer", **GROUND)
def stop_left(scene: Scene) -> None:
    """An answer ends with the stop string, not before it."""

    def before(original: Any, text: str, stops: Any) -> str:
        ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    scene.wrap(f"{SERVER}:before_stop", before)


@sabotage(
    "server does not stop at the end of a turn", imitates="https://github.com/unslothai/unsloth/issues/416", **GROUND
)
def end_of_turn_ignored(scene: Scene) -> None:
    """The server waits for the end of a text, which is another token than that of a turn: an answer runs on."""

    def endless(config: Any) -> Any:
        config.eos_token_id = [config.pad_token_id]
        return config

    scene.wrap(
        SERVED_REQUEST,
        lambda original, *arguments, **more: endless(original(*arguments, **more)),
    )


@sabotage("server has another chat template", imitates="https://github.com/hiyouga/LlamaFactory/issues/2509", **GROUND)
def other_template(scene: Scene) -> None:
    """The server renders with a template of its own, not with that of the training."""
    template = (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + m['content'] + '\\n\\n' }}{% endfor %}"
        "{{ '### assistant:\\n' }}"
    )

    scene.wrap(
        f"{SERVER}:application",
        lambda original, model, name, **more: original(model, name, **{**more, "chat_template": template}),
    )


@sabotage("server drops the system message", imitates="https://github.com/InternLM/lmdeploy/issues/464", **GROUND)
def system_dropped(scene: Scene) -> None:
    """Messages of the system are left out of the prompt."""
    _messages(scene, lambda messages: [each for each in messages if each["role"] != "system"])


@sabotage("server takes the last message only", **GROUND)
def history_dropped(scene: Scene) -> None:
    """Earlier turns of a conversation are left out of the prompt."""
    _messages(scene, lambda messages: messages[-1:])


@sabotage("conversations run into each other", **GROUND)
def conversations_mixed(scene: Scene) -> None:
    """A request is answered after the messages of the one before, whoever sent it."""
    seen: list[Any] = []

    def after_the_last(messages: Any) -> Any:
        before, seen[:] = list(seen), messages
        return [*before, *messages]

    _messages(scene, after_the_last)


@sabotage("earlier turns in the wrong order", **GROUND)
def turns_in_the_wrong_order(scene: Scene) -> None:
    """The turns before the last are put into the prompt newest first."""
    _messages(scene, lambda messages: [*reversed(messages[:-1]), messages[-1]])


def _messages(scene: Scene, change: Callable[[Any], Any]) -> None:

    scene.wrap(
        "transformers.cli.serving.utils:BaseHandler.get_processor_inputs_from_messages",
        lambda original, messages, modality: original(change(messages), modality),
    )


@sabotage(
    "begin token doubled in the served prompt", imitates="https://github.com/vllm-project/vllm/pull/27515", **GROUND
)
def begin_doubled(scene: Scene) -> None:
    """The token that begins a prompt is there twice: from the template, and from the tokenizer."""

    def prepared(original: Any, self: Any, model: Any, inputs: Any, *arguments: Any) -> Any:
        import torch

        doubled = {name: torch.cat([part[:, :1], part], dim=1) for name, part in inputs.items()}
        return original(self, model, doubled, *arguments)

    scene.wrap(f"{SERVER}:Manager._prepared", prepared)


@sabotage("special tokens in the served text", **GROUND)
def special_tokens_shown(scene: Scene) -> None:
    """The text of an answer has the tokens that mark turns."""

    async def generate(original: Any, self: Any, model: Any, processor: Any, *arguments: Any, **more: Any) -> Any:
        _, length, ids = await original(self, model, processor, *arguments, **more)
        return processor.decode(ids, skip_special_tokens=False), length, ids

    scene.wrap(f"{SERVER}:Manager.generate_non_streaming", generate)


@sabotage("stream loses its last piece", imitates="https://github.com/ai-dynamo/dynamo/pull/3531", **GROUND)
def stream_cut(scene: Scene) -> None:
    """A piece of text is sent when the next one comes, so that the last one never is."""

    def enqueue(original: Any, self: Any, item: Any) -> None:
        held = self.__dict__.pop("held", None)
        if item is not None:
            self.held = item
        if held is not None and item is not None:
            original(self, held)
        if item is None:
            original(self, None)

    scene.wrap("transformers.cli.serving.utils:DirectStreamer._enqueue", enqueue)


@sabotage("usage counts words", imitates="https://github.com/vllm-project/vllm/issues/8625", **GROUND)
def usage_of_words(scene: Scene) -> None:
    """The tokens of an answer are counted as its words."""

    def words(text: str, usage: Any) -> Any:
        count = len(text.split())
        return usage.model_copy(update={"completion_tokens": count, "total_tokens": usage.prompt_tokens + count})

    _completion(scene, lambda text, more: {**more, "usage": words(text, more["usage"])})


@sabotage("usage leaves the prompt out", **GROUND)
def usage_without_prompt(scene: Scene) -> None:
    """The sum of a request's tokens is that of its answer."""

    def total(usage: Any) -> Any:
        return usage.model_copy(update={"total_tokens": usage.completion_tokens})

    _completion(scene, lambda text, more: {**more, "usage": total(more["usage"])})


@sabotage("every answer said to have ended by itself", **GROUND)
def finish_always_stop(scene: Scene) -> None:
    """An answer that was cut off has the same end as one that was not."""
    _completion(scene, lambda text, more: {**more, "finish_reason": "stop"})


def _completion(scene: Scene, change: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    """Tell a client something else about an answer."""

    scene.wrap(
        "transformers.cli.serving.chat_completion:ChatCompletionHandler._build_completion",
        lambda original, self, name, text, model, **more: original(self, name, text, model, **change(text, more)),
    )
