"""What an Ollama server does, held against the stand-in in tier 1 and against a real one in tier 3."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from contract import InferenceContract
from finetune.backends.ollama import GREEDY
from finetune.backends.ollama.api import Client, Refused
from finetune.core.errors import UsageError
from finetune.core.files import digest

# Answers that no page promises, recorded from this version; others word them otherwise.
RECORDED = "0.24.0"
NAME = "finetune-answers:1"
CONTEXT = 64  # tokens
LONG = "hello world " * CONTEXT
HELLO: list[dict[str, str]] = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
}


class OllamaContract(InferenceContract):
    """The contract, where the runtime tells no probabilities."""

    @staticmethod
    def refuses(backend: Any, handle: Any, tmp_path: Path) -> None:
        for ask in (
            lambda: backend.score(handle, [([1], [2])]),
            lambda: backend.distributions(handle, [([1], [2])], tmp_path / "all.npy"),
        ):
            with pytest.raises(UsageError, match="does not tell the probabilities"):
                ask()
        assert not (tmp_path / "all.npy").exists()

    def test_score_is_one_log_probability_for_every_target_token(self, backend, handle, tmp_path):
        assert not backend.scores
        self.refuses(backend, handle, tmp_path)

    test_scoring_in_a_batch_equals_scoring_alone = None
    test_score_forces_the_teacher = None
    test_probabilities_of_the_next_token_sum_to_one = None
    test_generation_takes_the_likeliest_token = None
    test_distributions_are_whole_and_hold_the_scores = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question about the model NAME, and its answer: fields of it, or HTTP's status and the refusal's words."""

    path: str
    body: Mapping[str, Any]
    answer: Mapping[str, Any] = field(default_factory=dict)
    refusal: tuple[int, str] | None = None


ASKED = {
    "an empty prompt loads": Asked(
        path="/api/generate", body={"prompt": ""}, answer={"response": "", "done": True, "done_reason": "load"}
    ),
    "an empty prompt, to be kept no longer, unloads": Asked(
        path="/api/generate", body={"keep_alive": 0}, answer={"response": "", "done": True, "done_reason": "unload"}
    ),
    "no messages load": Asked(
        path="/api/chat",
        body={"messages": []},
        answer={"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "load"},
    ),
    "a prompt too long is refused where it may not be cut": Asked(
        path="/api/generate",
        body={"prompt": LONG, "raw": True, "truncate": False},
        refusal=(400, "the input length exceeds the context length"),
    ),
    "a prompt too long is cut in silence elsewhere": Asked(
        path="/api/generate",
        body={"prompt": LONG, "raw": True, "options": {**GREEDY, "num_predict": 2}},
        # How it ends is the model's word: a tiny one may end its turn at once.
        answer={"prompt_eval_count": CONTEXT, "done": True},
    ),
    "a chat that is only rendered has an empty message": Asked(
        path="/api/chat",
        body={"messages": HELLO, "_debug_render_only": True},
        answer={
            "message": {"role": "", "content": ""},
            "done": False,
            "_debug_info": {"rendered_template": "<|user|>hello\n<|assistant|>"},
        },
    ),
    "tools are refused by a template without them": Asked(
        path="/api/chat",
        body={"messages": HELLO, "tools": [TOOL]},
        refusal=(400, f"registry.ollama.ai/library/{NAME} does not support tools"),
    ),
    "so is thinking": Asked(
        path="/api/chat", body={"messages": HELLO, "think": True}, refusal=(400, f'"{NAME}" does not support thinking')
    ),
}  # fmt: skip

# What is made of a GGUF file before a model is created of it; None where nothing is sent.
FILES: dict[str, tuple[Callable[[bytes], bytes | None], int, str]] = {
    "not there": (lambda gguf: None, 500, r"^open .*: no such file or directory$"),
    "empty": (lambda gguf: b"", 400, r"^supplied file was not in GGUF format$"),
    "another format": (lambda gguf: b"hello", 400, r"^supplied file was not in GGUF format$"),
    "cut in its head": (lambda gguf: gguf[:200], 500, r"^unexpected EOF$"),
    "cut in its tensors": (
        lambda gguf: gguf[:-8], 500, r'^tensor "[a-z0-9_.]+" offset\+size \(\d+\) exceeds file size \(\d+\)$',
    ),
}  # fmt: skip


class OllamaAnswers:
    """Subclasses give the fixtures `gguf` (a file) and `client`, both of the class's scope."""

    @pytest.fixture(scope="class")
    @classmethod
    def asked(cls, client: Client, gguf: Path) -> Iterator[Client]:
        """A client of a server that has the model NAME, with a context of CONTEXT tokens."""
        mark = f"sha256:{digest(gguf)}"
        client.upload(gguf, mark)
        client.call("POST", "/api/create", cls.creation(mark))
        yield client
        client.delete(NAME)

    @staticmethod
    def creation(mark: str) -> dict[str, Any]:
        return {
            "model": NAME,
            "files": {"model.gguf": mark},
            "template": "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}\n{{ end }}<|assistant|>",
            "parameters": {"num_ctx": CONTEXT},
            "stream": False,
        }

    def test_answers_are_those_recorded(self, asked: Client) -> None:
        """All in one, as it is skipped whole where the server is of another version; so the next."""
        wanted = {title: question.refusal or question.answer for title, question in ASKED.items()}
        assert {title: _answered(asked, question) for title, question in ASKED.items()} == wanted

    def test_a_file_that_is_no_whole_model_is_refused(self, client: Client, gguf: Path, tmp_path: Path) -> None:
        for kind, (change, status, words) in FILES.items():
            file, data = tmp_path / f"{kind}.gguf", change(gguf.read_bytes())
            file.write_bytes(b"never sent" if data is None else data)
            mark = f"sha256:{digest(file)}"
            if data is not None:
                client.upload(file, mark)
            with pytest.raises(Refused, match="/api/create") as caught:
                client.call("POST", "/api/create", {**self.creation(mark), "model": "finetune-none:1"})
            assert (kind, caught.value.status) == (kind, status)
            assert re.search(words, caught.value.reason), (kind, caught.value.reason)

    def test_no_more_tokens_than_zero_is_no_bound(self, asked: Client) -> None:
        body = {"model": NAME, "prompt": "hello world", "raw": True, "stream": False}
        bounded, unbounded = (
            asked.call("POST", "/api/generate", {**body, "options": {**GREEDY, "num_predict": most}}) for most in (2, 0)
        )
        assert bounded["eval_count"] == 2 < unbounded["eval_count"]
        assert unbounded["response"].startswith(bounded["response"])


def _answered(client: Client, question: Asked) -> Mapping[str, Any] | tuple[int, str]:
    """The refusal, or the fields of the answer that are wanted."""
    try:
        found = client.call("POST", question.path, {"model": NAME, "stream": False, **question.body})
    except Refused as refused:
        return refused.status, refused.reason
    return {name: found.get(name) for name in question.answer}
