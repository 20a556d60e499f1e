"""Ollama's own server: the contract, and whether it does with a Modelfile what its author meant.

Where none answers the tests skip with the way to get one; `--require ollama` makes that a failure.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from contract import CHATS, CONVERSATIONS, write_rows
from finetune.backends import get
from finetune.backends.ollama import OllamaBackend, modelfile, unavailable
from finetune.backends.ollama.api import Client
from finetune.core.errors import StageError
from finetune.export import Source, ollama
from finetune.export.gotemplate import CONVERSATIONS as ASKED
from finetune.export.gotemplate import REFUSAL, TOLERATED
from finetune.models import tiny
from support.ollama_contract import RECORDED, OllamaAnswers, OllamaContract

GOLDEN = Path(__file__).parents[1] / "tier1" / "golden"
TEMPLATES = sorted(path.stem.removeprefix("ollama-template-") for path in GOLDEN.glob("ollama-template-*.json"))
PACKAGES = ("cyllama", "conversion", "torch", "transformers")


@pytest.fixture(scope="session", autouse=True)
def server(skip_or_fail) -> None:
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        skip_or_fail(
            "ollama", f"{', '.join(missing)} not installed. Install with: pip install 'finetune-proof[gguf,torch]'"
        )
    if reason := unavailable():
        skip_or_fail("ollama", reason)


@pytest.fixture(scope="session")
def exported(server, tmp_path_factory) -> Path:
    """The Modelfile of a tiny model whose constants no library has for a default."""
    folder = tmp_path_factory.mktemp("ollama")
    texts = [text for chat in CHATS for text in chat]
    model = tiny.make(folder / "model", "llama", texts=texts, odd=True)
    (folder / "out").mkdir()
    return ollama.export(Source(name="tiny", model=model, license="Apache-2.0"), "f16", folder / "out").path


@pytest.fixture
def handle(exported) -> Iterator:
    with OllamaBackend().load(exported) as made:
        yield made


def names(handle) -> set[str]:
    return {model["name"] for model in handle.client.call("GET", "/api/tags")["models"]}


class TestOllama(OllamaContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls):
        return get("ollama")

    @pytest.fixture(scope="class")
    @classmethod
    def model_dir(cls, exported):
        return exported

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, backend, model_dir, tmp_path_factory):
        return write_rows(backend.tokenizer(model_dir), tmp_path_factory.mktemp("rows") / "rows.jsonl")


class TestOllamaAnswers(OllamaAnswers):
    """As the stand-in of tier 1 does (tests/tier1/test_ollama_api.py)."""

    @pytest.fixture(scope="class")
    @classmethod
    def gguf(cls, exported):
        return next(exported.parent.glob("*.gguf"))

    @pytest.fixture(scope="class")
    @classmethod
    def client(cls, server):
        client = Client()
        if (version := client.version()) != RECORDED:
            pytest.skip(f"the answers are those of Ollama {RECORDED}, and this is {version}")
        return client


def test_the_server_keeps_the_modelfile_as_it_was_written(exported, handle):
    written = modelfile.parse(exported.read_text(encoding="utf-8"))
    shown = handle.client.call("POST", "/api/show", {"model": handle.name})
    assert shown["template"] == dict(written)["template"]
    assert shown["license"] == "Apache-2.0"
    stops = [value for name, value in written if name == "stop"]
    assert stops and all(f'"{stop}"' in shown["parameters"] for stop in stops)
    assert dict(written)["num_ctx"] in shown["parameters"]


def test_the_server_counts_as_many_prompt_tokens_as_were_rendered(exported, handle):
    rendered = OllamaBackend().render(exported, CONVERSATIONS)
    for messages, ids in zip(CONVERSATIONS, rendered, strict=True):
        body = {"model": handle.name, "messages": messages, "stream": False, "options": {"num_predict": 1}}
        assert handle.client.call("POST", "/api/chat", body)["prompt_eval_count"] == len(ids)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_server_writes_with_a_translation_what_go_wrote(exported, handle, name, tmp_path):
    """The golden prompts are Go's; here are Ollama's own, for the same templates."""
    compared = 0
    for number, entry in enumerate(json.loads((GOLDEN / f"ollama-template-{name}.json").read_text(encoding="utf-8"))):
        other = exported.with_name(f"Modelfile-{name}-{number}")
        commands = [("from", "./" + handle.gguf.name), ("template", entry["template"])]
        commands += [("system", entry["system"])] if entry["system"] else []
        other.write_text(modelfile.write([*commands, ("num_ctx", "2048")]), encoding="utf-8")
        with OllamaBackend().load(other) as made:
            for asked, messages in {**ASKED, **TOLERATED}.items():
                body = {"model": made.name, "messages": messages, "stream": False, "_debug_render_only": True}
                body["truncate"] = False  # else it leaves out turns that do not fit
                wanted = entry["prompts"][asked]
                if isinstance(wanted, dict):
                    with pytest.raises(StageError, match=REFUSAL):
                        made.client.call("POST", "/api/chat", body)
                else:
                    found = made.client.call("POST", "/api/chat", body)["_debug_info"]["rendered_template"]
                    assert found == wanted, asked
                compared += 1
    assert compared >= len(ASKED) + len(TOLERATED)


def test_the_constants_are_those_that_llama_cpp_reads_from_the_file(exported, handle):
    ours, theirs = OllamaBackend().constants(exported), get("llamacpp").constants(handle.gguf)
    both = ours.keys() & theirs.keys()
    assert len(both) >= 10
    assert {key: ours[key] for key in both} == {key: pytest.approx(theirs[key], rel=1e-6) for key in both}


def test_a_closed_handle_leaves_the_servers_list_as_it_was(exported, handle):
    with OllamaBackend().load(exported) as other:
        assert {handle.name, other.name} <= names(handle)
    assert other.name not in names(handle) and handle.name in names(handle)
