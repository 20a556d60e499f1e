"""The Ollama backend against a stand-in that knows Ollama's documented API and nothing else, over real HTTP."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from contract import CONVERSATIONS, write_rows
from finetune.backends import CONSTANTS, Generation, Job, get
from finetune.backends import ollama as backend_module
from finetune.backends.ollama import OllamaBackend, api, modelfile
from finetune.core.errors import MissingError, StageError, UsageError
from finetune.core.files import digest
from finetune.data.templates import ChatTemplate
from finetune.export import gotemplate
from support.chat_templates import CHATML_TURNS, LIKE
from support.ollama import Letters, serve
from support.ollama_contract import OllamaContract
from support.small_gguf import write_gguf

KEYS = {
    "general.architecture": "llama", "llama.vocab_size": 300, "llama.embedding_length": 64, "llama.block_count": 2,
    "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 24,
    "llama.attention.layer_norm_rms_epsilon": 0.003, "llama.rope.freq_base": 321.0,
    "llama.context_length": 512, "llama.feed_forward_length": 96, "tokenizer.ggml.eos_token_id": 256,
    "tokenizer.ggml.bos_token_id": 258, "tokenizer.ggml.add_bos_token": False,
}  # fmt: skip


def write_model(folder: Path, template: str = CHATML_TURNS, **changes) -> Path:
    """A Modelfile beside a GGUF file without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / "town-q8_0.gguf", {**KEYS, **changes.pop("keys", {})})
    made = gotemplate.translate(ChatTemplate("own", template), bos_token=None, eos_token="<|im_end|>", **changes)
    commands = [
        ("from", "./town-q8_0.gguf"),
        ("template", made.text),
        *([("system", made.system)] if made.system else []),
    ]
    commands += [("stop", "<|im_end|>"), ("num_ctx", "512"), ("license", "Use it.")]
    (folder / "Modelfile").write_text(modelfile.write(commands), encoding="utf-8")
    return folder / "Modelfile"


@pytest.fixture(autouse=True, scope="module")
def _letters():
    """The GGUF file's own tokenizer needs llama.cpp, which tier 1 has not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend_module, "_tokenizer", lambda gguf: Letters(template=CHATML_TURNS))
        yield


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    with serve(tmp_path / "server") as running:
        monkeypatch.setenv("OLLAMA_HOST", running.address)
        yield running


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "export")


class TestOllamaBackend(OllamaContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, tmp_path_factory):
        with serve(tmp_path_factory.mktemp("server")) as running, pytest.MonkeyPatch.context() as patch:
            patch.setenv("OLLAMA_HOST", running.address)
            yield get("ollama")

    @pytest.fixture(scope="class")
    @classmethod
    def model_dir(cls, tmp_path_factory):
        return write_model(tmp_path_factory.mktemp("export"))

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, backend, model_dir, tmp_path_factory):
        return write_rows(backend.tokenizer(model_dir), tmp_path_factory.mktemp("rows") / "rows.jsonl")


# -- load and close -----------------------------------------------------------------------------------------------


def test_a_model_is_created_as_ollama_create_would(server, model):
    gguf = model.parent / "town-q8_0.gguf"
    with OllamaBackend().load(model) as handle:
        (made,) = server.asked("/api/create")
        assert made.pop("template") == dict(modelfile.parse(model.read_text()))["template"]
        assert made == {
            "model": handle.name,
            "files": {"town-q8_0.gguf": f"sha256:{digest(gguf)}"},
            "license": ["Use it."],
            "parameters": {"stop": ["<|im_end|>"], "num_ctx": 512},
            "stream": False,
        }
        assert handle.name.startswith(f"finetune-{digest(gguf)[:12]}:")
        assert server.blob(f"sha256:{digest(gguf)}").read_bytes() == gguf.read_bytes()


def test_the_directory_will_do_for_the_modelfile(server, model):
    with OllamaBackend().load(model.parent) as handle:
        assert handle.name in server.models


def test_the_weights_are_sent_once_for_two_models(server, model):
    with OllamaBackend().load(model) as one, OllamaBackend().load(model) as two:
        assert one.name != two.name and set(server.models) == {one.name, two.name}
    sent = [method for method, path, _ in server.requests if path == "/api/blobs"]
    assert sent == ["HEAD", "POST", "HEAD"]


def test_a_closed_handle_leaves_nothing_on_the_server(server, model):
    with OllamaBackend().load(model) as handle:
        OllamaBackend().generate(handle, [[65]], max_new_tokens=2)
        assert server.loaded == {handle.name}
    assert (server.models, server.loaded, list(server.folder.iterdir())) == ({}, set(), [])
    handle.close()
    assert len(server.asked("/api/delete")) == 1


def test_a_forgotten_handle_leaves_nothing_on_the_server(server, model):
    handle = OllamaBackend().load(model)
    assert server.models
    del handle
    gc.collect()
    assert server.models == {}


def test_a_process_that_ends_leaves_nothing_on_the_server(server, model):
    code = (
        "from finetune.backends import ollama; from pathlib import Path; import sys;"
        "ollama._tokenizer = lambda gguf: None; handle = ollama.OllamaBackend().load(Path(sys.argv[1]));"
        "print(handle.name)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=True)
    assert server.asked("/api/create")[0]["model"] == ended.stdout.strip()
    assert server.models == {}


def test_an_observation_that_is_ended_leaves_nothing_on_the_server(server, model, tmp_path):
    code = (
        "import time; from pathlib import Path; from finetune.backends import ollama\n"
        "from finetune.experiments import worker as experiment\n"
        "def hold(request):\n"
        "    with ollama.OllamaBackend().load(Path(request['model'])):\n"
        "        print('held', flush=True); time.sleep(50)\n"
        "ollama._tokenizer = lambda gguf: None; experiment.WORK['hold'] = hold; experiment.main()"
    )
    (tmp_path / "request.json").write_text(json.dumps({"do": "hold", "model": str(model)}), encoding="utf-8")
    command = [sys.executable, "-c", code, str(tmp_path / "request.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout.readline() == "held\n" and len(server.models) == 1
        running.terminate()
        assert running.wait(timeout=20) == 128 + signal.SIGTERM
    assert server.models == {}


def test_a_tokenizer_that_cannot_be_had_leaves_nothing_on_the_server(server, model, monkeypatch):
    def fail(gguf):
        raise MissingError("no llama.cpp")

    monkeypatch.setattr(backend_module, "_tokenizer", fail)
    with pytest.raises(MissingError, match=r"no llama\.cpp"):
        OllamaBackend().load(model)
    gc.collect()
    assert server.models == {}


def test_a_creation_that_is_broken_off_leaves_nothing_on_the_server(server, model, monkeypatch):
    call = api.Client.call

    def interrupted(self, method, path, *rest, **more):
        answer = call(self, method, path, *rest, **more)
        if path == "/api/create":
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(api.Client, "call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        OllamaBackend().load(model)
    assert server.asked("/api/create") and (server.models, list(server.folder.iterdir())) == ({}, [])


# -- generate -----------------------------------------------------------------------------------------------------


def test_a_prompt_goes_raw_and_greedy_whatever_the_defaults(server, model):
    backend = OllamaBackend()
    prompt = Letters().encode("<|im_start|>user\nnaïve 👩‍👩‍👧‍👦?<|im_end|>\n<|im_start|>assistant\n")
    with backend.load(model) as handle:
        (made,) = backend.generate(handle, [prompt], max_new_tokens=9)
    body = server.asked("/api/generate")[0]
    assert body["prompt"] == "<|im_start|>user\nnaïve 👩‍👩‍👧‍👦?<|im_end|>\n<|im_start|>assistant\n"
    assert (body["raw"], body["truncate"], body["shift"]) == (True, False, False)
    options = body["options"]
    assert (options["temperature"], options["seed"], options["num_predict"]) == (0.0, 0, 9)
    assert options["repeat_penalty"] == 1.0 and "num_ctx" not in options  # another context would load it again
    assert made.finish == "stop" and made.text and "<|im_end|>" not in made.text
    assert list(made.ids) == Letters().encode(made.text)[:9]


def test_an_answer_that_is_cut_ends_by_length(server, model):
    backend = OllamaBackend()
    with backend.load(model) as handle:
        (made,) = backend.generate(handle, [[65]], max_new_tokens=2)
    assert made.finish == "length" and len(made.ids) == 2


def test_no_tokens_are_not_asked_for(server, model):
    """Ollama takes a `num_predict` of 0 for no bound at all."""
    backend, nothing = OllamaBackend(), Generation(ids=(), text="", finish="length")
    with backend.load(model) as handle:
        assert backend.generate(handle, [[65], [66]], max_new_tokens=0) == [nothing, nothing]
    assert backend.chat(model, [[{"role": "user", "content": "Who?"}]], max_new_tokens=0) == [nothing]
    assert [body for body in server.asked("/api/generate") if "options" in body] == server.asked("/api/chat") == []


def test_the_begin_token_is_left_to_a_server_that_adds_it(server, model, monkeypatch):
    letters = Letters(bos="<s>", adds_bos=True)
    monkeypatch.setattr(backend_module, "_tokenizer", lambda gguf: letters)
    backend = OllamaBackend()
    with backend.load(model) as handle:
        backend.generate(handle, [[letters.bos_id, 65]], max_new_tokens=1)
        with pytest.raises(UsageError, match="puts a begin token before every prompt"):
            backend.generate(handle, [[65]], max_new_tokens=1)
        with pytest.raises(UsageError, match="without tokens"):
            backend.generate(handle, [[letters.bos_id]], max_new_tokens=1)
    assert server.asked("/api/generate")[0]["prompt"] == "A"


def test_messages_are_answered_as_the_prompt_that_they_render_to(server, model):
    backend = OllamaBackend()
    asked = [[{"role": "user", "content": "Who?"}], [{"role": "user", "content": "naïve 👩‍👩‍👧‍👦?"}]]
    with backend.load(model) as handle:
        alone = backend.generate(handle, backend.render(model, asked), max_new_tokens=9)
    answered = backend.chat(model, asked, max_new_tokens=9)
    assert [(each.text, each.finish) for each in answered] == [(each.text, each.finish) for each in alone]
    assert {body["options"]["temperature"] for body in server.asked("/api/chat") if "options" in body} == {0.0}
    assert backend.chat(model, asked, max_new_tokens=2)[0].finish == "length"


# -- render and constants -----------------------------------------------------------------------------------------


def test_a_doubled_begin_token_shows_in_what_is_rendered(server, tmp_path, monkeypatch):
    letters = Letters(template=CHATML_TURNS, bos="<s>", adds_bos=True)
    monkeypatch.setattr(backend_module, "_tokenizer", lambda gguf: letters)
    (right,) = OllamaBackend().render(write_model(tmp_path / "right"), CONVERSATIONS[:1])
    (wrong,) = OllamaBackend().render(write_model(tmp_path / "wrong", "<s>" + CHATML_TURNS), CONVERSATIONS[:1])
    assert right[:2] == [letters.bos_id, 257] and wrong[:2] == [letters.bos_id] * 2


def test_the_system_message_of_the_modelfile_is_in_what_is_rendered(server, tmp_path):
    model = write_model(tmp_path / "export", LIKE["smollm2-like"][0])
    assert server.models == {}
    without, own, _ = OllamaBackend().render(model, CONVERSATIONS)
    assert "You are a helper named Small." in Letters().decode(without)
    assert "You are a helper named Small." not in Letters().decode(own)
    assert server.models == {} and "system" in server.asked("/api/create")[0]


def test_what_a_template_refuses_comes_back_as_the_servers_words(server, tmp_path):
    model = write_model(tmp_path / "export", LIKE["gemma2-like"][0])
    single, refused, _ = OllamaBackend().render(model, CONVERSATIONS)
    assert isinstance(single, list)
    assert "takes no message of this role here" in refused


def test_a_server_too_old_to_tell_its_prompt_says_so_without_answering(server, model):
    server.version = "0.9.6"
    found = OllamaBackend().render(model, CONVERSATIONS)
    assert found == ["Ollama 0.9.6 does not tell the prompt it renders; 0.11.5 and later do"] * len(CONVERSATIONS)
    assert server.asked("/api/chat") == []


def test_a_server_that_does_not_tell_its_prompt_all_the_same_says_so(server, model, monkeypatch):
    monkeypatch.setattr(backend_module, "RENDERS", (0, 1))
    server.version = "0.2.0"
    assert OllamaBackend().render(model, CONVERSATIONS[:1]) == ["Ollama 0.2.0 does not tell the prompt it renders"]


def test_constants_come_under_hugging_faces_names(server, model):
    found = OllamaBackend().constants(model)
    assert set(found) <= set(CONSTANTS)
    assert found == {
        "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 24, "norm_eps": 0.003, "rope_theta": 321.0,
        "max_position_embeddings": 512, "intermediate_size": 96, "eos_token_id": 256, "bos_token_id": 258,
        "add_bos_token": False, "tie_word_embeddings": True,
    }  # fmt: skip


def test_a_vocabulary_that_is_not_told_is_counted_and_an_output_matrix_seen(server, tmp_path):
    server.tensors, server.vocabulary = ("token_embd.weight", "output.weight"), 321
    keys = {key: value for key, value in KEYS.items() if key != "llama.vocab_size"}
    model = write_model(tmp_path / "export")
    write_gguf(model.parent / "town-q8_0.gguf", keys)
    found = OllamaBackend().constants(model)
    assert (found["vocab_size"], found["tie_word_embeddings"]) == (321, False)


# -- what goes wrong ----------------------------------------------------------------------------------------------


def test_only_merged_models_are_run(server, model, tmp_path):
    backend = OllamaBackend()
    assert (backend.trains, backend.scores) == (False, False)
    with pytest.raises(UsageError, match="merge the adapter first"):
        backend.load(model, tmp_path)
    with pytest.raises(UsageError, match="only runs models"):
        backend.merge(tmp_path, tmp_path, tmp_path)
    with pytest.raises(UsageError, match="only runs models"):
        backend.train(Job(objective="sft", method="lora", model=model, out=tmp_path, rows=tmp_path, options={}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "no Modelfile at"),
        ("FROM ./other.gguf\n", r"names other\.gguf, which is not beside it"),
        ("TEMPLATE x\n", "no FROM line"),
        ("FROM ./town-q8_0.gguf\nADAPTER ./a\n", "'adapter' is not known here"),
        ("FROM ./town-q8_0.gguf\nPARAMETER num_ctx many\n", "num_ctx is 'many', which is no number"),
    ],
)
def test_a_modelfile_that_cannot_be_used_is_refused_before_anything_is_created(server, model, text, words):
    model.write_text(text) if text else model.unlink()
    with pytest.raises((UsageError, MissingError), match=words):
        OllamaBackend().load(model)
    assert server.models == {}


def test_what_the_server_refuses_is_told_in_its_words(server, model):
    model.write_text('FROM ./town-q8_0.gguf\nTEMPLATE """{{ nosuch .Messages }}"""\n')
    with pytest.raises(StageError, match=r'/api/create: template error: function "nosuch" not defined'):
        OllamaBackend().load(model)


def test_a_server_that_breaks_off_is_an_error_and_not_an_answer(server, model):
    with OllamaBackend().load(model) as handle:
        server.cut = "/api/generate"
        with pytest.raises(StageError, match="broke off at POST /api/generate"):
            OllamaBackend().generate(handle, [[65]], max_new_tokens=1)
        server.cut = ""
