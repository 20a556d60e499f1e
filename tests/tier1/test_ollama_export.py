"""The Ollama export without Ollama: the Modelfile, and the chat template in Go's template language.

The files golden/ollama-*.json hold what Go 1.19's text/template wrote, under the rules of Ollama 0.32's own template.go
and parser.go, for the templates and texts that they name; Go itself is not needed to compare with them.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from finetune.backends.ollama import modelfile
from finetune.core.errors import StageError, UsageError
from finetune.data.templates import BUILTIN, ChatTemplate, with_system
from finetune.export import Exported, Source, gotext, ollama
from finetune.export import gotemplate as gt
from finetune.models import gguf_header
from support.chat_templates import CHATML_TURNS, LIKE, REFUSED
from support.ollama import Letters
from support.small_gguf import write_gguf

GOLDEN = Path(__file__).parent / "golden"
ENDS = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}
BEGINS = {"llama": "<s>", "llama3": "<|begin_of_text|>"}
EVERYONE = {name: (source, BEGINS.get(name), ENDS.get(name, "</s>")) for name, source in BUILTIN.items()} | LIKE
REFUSES = "(refused)"
LONG = struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1 << 40) + b"key"  # whose key says that it has a terabyte
ASKED = {**gt.CONVERSATIONS, **gt.TOLERATED}


def read(name: str):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


def translated(name: str, **changes) -> gt.GoTemplate:
    source, bos, eos = EVERYONE[name]
    return gt.translate(ChatTemplate(name, source), bos_token=bos, eos_token=eos, **changes)


def evaluated(made: gt.GoTemplate, messages) -> str:
    """The prompt, or REFUSES where there is none."""
    try:
        return gotext.render(made.text, messages, system=made.system)
    except gotext.GoError:
        return REFUSES


# -- Go's language ------------------------------------------------------------------------------------------------


def test_the_evaluator_writes_and_refuses_what_go_does():
    golden = read("ollama-go")
    for case in golden["cases"]:
        try:
            found = {"output": gotext.Template(case["template"]).execute(golden["data"])}
        except gotext.GoError:
            found = {"error": case.get("error")}
        assert found == {key: case[key] for key in ("output", "error") if key in case}, case["template"]
    assert len(golden["cases"]) >= 45 and sum("error" in case for case in golden["cases"]) >= 10


def test_modelfiles_are_read_as_ollama_reads_them():
    cases = read("ollama-modelfile")
    for case in cases:
        try:
            found = {"commands": [list(command) for command in modelfile.parse(case["modelfile"])]}
        except UsageError:
            found = {"error": case.get("error")}
        assert found == {key: case[key] for key in ("commands", "error") if key in case}, case["modelfile"]
    assert len(cases) >= 25 and sum("error" in case for case in cases) >= 8


def test_a_go_literal_reads_back_as_the_text():
    odd = "a\"b\\c\n\t\r\x00\u00a0👩‍👩 𝔘 {{ }} '`"
    assert gotext.Template(f"{{{{ {gotext.quote(odd)} }}}}").execute({}) == odd


def test_ollama_joins_neighbours_of_one_role_and_puts_system_first():
    source = "{{ range .Messages }}<{{ .Role }}:{{ .Content }}>{{ end }}|{{ .System }}"
    turns = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "system", "content": "c"}]
    assert gotext.render(source, turns, system="s") == "<system:s><user:a\n\nb><system:c>|s\n\nc"
    assert gotext.render(source, turns[::-1], system="s") == "<system:c><user:b\n\na>|c"


# -- translation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYONE)
def test_go_writes_with_the_translation_what_jinja_writes(name):
    source, bos, eos = EVERYONE[name]
    template = ChatTemplate(name, source)
    compared = 0
    for entry in read(f"ollama-template-{name}"):
        made = translated(name, runner_bos=entry["runner_bos"])
        assert (made.text, made.system) == (entry["template"], entry["system"])  # else Go has to be asked again
        for asked, messages in ASKED.items():
            go = entry["prompts"][asked]
            assert evaluated(made, messages) == (go if isinstance(go, str) else REFUSES), asked
            if isinstance(go, dict):
                assert gt.REFUSAL in go["error"]
            try:
                jinja = template.render(messages, add_generation_prompt=True, bos_token=bos, eos_token=eos)
            except UsageError:
                continue
            if any(asked in note for note in made.notes):
                continue
            assert go == (jinja.removeprefix(bos) if entry["runner_bos"] else jinja), asked
            compared += 1
    assert compared >= 9 and list(entry["prompts"]) == list(ASKED)


def test_every_template_is_swept():
    files = {path.stem.removeprefix("ollama-template-") for path in GOLDEN.glob("ollama-template-*.json")}
    assert files == set(EVERYONE) and len(files) == 12


@pytest.mark.parametrize("reason", REFUSED)
def test_a_template_that_go_cannot_say_is_refused_with_the_reason(reason):
    source, words = REFUSED[reason]
    with pytest.raises(UsageError) as caught:
        gt.translate(ChatTemplate("odd", source), bos_token=None, eos_token="</s>")
    assert words in str(caught.value)
    assert "'odd'" in str(caught.value) and "Export 'gguf' instead" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "conversation"),
    [
        (lambda text: text.replace("<|im_end|>", "<|im_end|> ", 1), "a single turn"),
        (lambda text: text.replace("<|im_start|>assistant\n{{ .Content }}", "{{ .Content }}"), "two turns"),
        (lambda text: text.replace("<|im_start|>system", "<|im_start|>System"), "a system message"),
        (lambda text: text.replace("user\n{{ .Content }}", 'user\n{{ or .Content "-" }}'), "an empty question"),
    ],
)  # fmt: skip
def test_a_wrong_translation_is_caught_and_the_conversation_named(monkeypatch, change, conversation):
    right = gt._Parts.text
    monkeypatch.setattr(gt._Parts, "text", lambda self: change(right(self)))
    with pytest.raises(UsageError, match=f"with {conversation}, it has '.*' where Ollama's would have"):
        translated("chatml")


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("smollm2-like", "You are a helper named Small."),
        ("qwen2.5-like", "You are Q, made by A. You help."),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
        ),
        ("chatml", None),
        ("llama3", None),
        ("llama", None),
        ("gemma2-like", None),
    ],
)
def test_the_default_system_message_is_found(name, system):
    assert translated(name).system == system


def test_a_recipes_system_message_takes_the_place_of_the_templates_own():
    made = translated("qwen2.5-like", system="Answer like a pirate.")
    asked = gt.CONVERSATIONS["two turns"]
    prompt = gotext.render(made.text, asked, system=made.system)
    assert prompt == gotext.render(made.text, with_system(asked, "Answer like a pirate."))
    assert "Answer like a pirate." in prompt and "You are Q" not in prompt


def test_a_system_message_for_a_template_without_one_is_refused():
    with pytest.raises(UsageError, match="System role not supported"):
        translated("gemma2-like", system="Be brief.")


def test_a_begin_token_that_the_server_adds_is_left_out_and_told():
    kept, left = translated("gemma2-like"), translated("gemma2-like", runner_bos=True)
    assert "<bos>" in kept.text and kept.mended == ()
    assert "<bos>" not in left.text and "begin token '<bos>'" in left.mended[0]


def test_a_begin_token_that_training_put_there_without_the_template_is_written():
    source, _, eos = EVERYONE["chatml"]
    made = gt.translate(ChatTemplate("chatml", source), bos_token="<s>", eos_token=eos, trained_bos=True)
    assert gotext.render(made.text, ASKED["a single turn"]).startswith("<s><|im_start|>user\n")


def test_a_begin_token_that_training_never_had_is_refused():
    with pytest.raises(UsageError, match="asks for a begin token before every prompt, and training had none"):
        translated("chatml", runner_bos=True)


def test_a_role_that_the_template_refuses_ends_in_an_error_on_the_server():
    for name, role in (("gemma2-like", "system"), ("chatml", "tool")):
        with pytest.raises(gotext.GoError, match="takes no message of this role here"):
            gotext.render(translated(name).text, [{"role": role, "content": "x"}, *ASKED["a single turn"]])


def test_thoughts_in_earlier_answers_are_told_as_kept():
    assert "an answer with its thoughts in it" in translated("qwen3-like").notes[0]
    assert translated("chatml").notes == ()


def test_constants_that_a_modelfile_or_go_would_misread_are_quoted():
    source = "{% for m in messages %}{{ '\u2028' + m.role + '\u00a0{' + '{ \"\"\"\\n' + m.content + '\u200d\\n' }}{% endfor %}"
    source += "{% if add_generation_prompt %}{{ '\u2028assistant\u00a0{' + '{ \"\"\"\\n' }}{% endif %}"
    made = gt.translate(ChatTemplate("odd", source), bos_token=None, eos_token="</s>")
    commands = [("from", "./a.gguf"), ("template", made.text)]
    assert modelfile.parse(modelfile.write(commands)) == commands
    prompt = gotext.render(made.text, ASKED["a single turn"])
    opening = '\u00a0{{ """\n'
    assert prompt == f"\u2028user{opening}What is the capital?\u200d\n\u2028assistant{opening}"


# -- the Modelfile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        'has "quotes" and ends with one"',
        "\n leading and trailing \n",
        "tab\tand\r\nreturn",
        "a ''' b",
        "",
        " x",
    ],
)
def test_a_text_comes_back_from_a_modelfile_as_it_was(text):
    commands = [("from", "./a.gguf"), ("template", text), ("system", text), ("stop", "<|im_end|>"), ("num_ctx", "512")]
    assert modelfile.parse(modelfile.write(commands)) == commands


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("system", "a family: 👩‍👩‍👧", r"drops U\+200D"),
        ("system", "no\u00a0break", r"drops U\+00A0"),
        ("system", 'code:\n"""\nx', "take a part of it for the end"),
        ("stop", "\x00", r"drops U\+0000"),
    ],
)
def test_a_text_that_a_modelfile_would_change_is_refused(name, text, why):
    with pytest.raises(UsageError, match=why):
        modelfile.write([("from", "./a.gguf"), (name, text)])


@pytest.fixture
def model(tmp_path) -> Path:
    directory = tmp_path / "merged"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 8192}')
    return directory


@pytest.fixture
def tokenizer(monkeypatch) -> Letters:
    made = Letters(template=LIKE["smollm2-like"][0])
    monkeypatch.setattr(ollama, "_tokenizer", lambda model, trust_remote_code: made)
    return made


@pytest.fixture
def weights(tmp_path) -> Path:
    keys = {"general.architecture": "llama", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.add_bos_token": False}
    folder = tmp_path / "gguf-q8_0"
    folder.mkdir()
    return write_gguf(folder / "town-q8_0.gguf", keys)


def export(model: Path, weights: Path, out: Path, **changes) -> tuple[Exported, list[modelfile.Command]]:
    out.mkdir()
    source = Source(name="town", model=model, done={"gguf:q8_0": weights}, **changes)
    made = ollama.export(source, "q8_0", out)
    return made, modelfile.parse(made.path.read_text(encoding="utf-8"))


def test_the_modelfile_names_weights_template_system_stops_context_and_licence(model, tokenizer, weights, tmp_path):
    made, commands = export(model, weights, tmp_path / "out", license="Apache-2.0", license_text='Use it.\f "As is".')
    assert made.path == tmp_path / "out" / "Modelfile"
    assert [name for name, _ in commands] == ["from", "template", "system", "stop", "num_ctx", "license"]
    assert commands[0] == ("from", "./town-q8_0.gguf")
    assert commands[2:] == [
        ("system", "You are a helper named Small."),
        ("stop", "<|im_end|>"),
        ("num_ctx", "4096"),
        ("license", 'Use it. "As is".'),
    ]
    assert (tmp_path / "out" / "town-q8_0.gguf").read_bytes() == weights.read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["Modelfile", "town-q8_0.gguf"]
    assert "num_ctx is 4096 of the model's 8192" in made.notes[0]
    prompt = gotext.render(commands[1][1], ASKED["two turns"], system=commands[2][1])
    template = ChatTemplate("own", tokenizer.chat_template)
    assert prompt == template.render(
        ASKED["two turns"], add_generation_prompt=True, bos_token=None, eos_token="<|im_end|>"
    )


def test_every_end_of_turn_is_a_stop_and_a_short_context_stays_short(model, tokenizer, weights, tmp_path):
    (model / "config.json").write_text('{"n_positions": 512}')
    tokenizer.eos_ids = (256, 257)
    made, commands = export(model, weights, tmp_path / "out", system="Be brief.")
    assert [value for name, value in commands if name == "stop"] == ["<|im_end|>", "<|im_start|>"]
    assert ("num_ctx", "512") in commands and ("system", "Be brief.") in commands
    assert made.notes == () and not any(name == "license" for name, _ in commands)


def test_what_sampling_does_is_left_to_ollama(model, tokenizer, weights, tmp_path):
    _, commands = export(model, weights, tmp_path / "out")
    assert not {name for name, _ in commands} & {"temperature", "top_p", "top_k", "seed", "repeat_penalty"}


def test_the_template_follows_what_the_gguf_file_says_of_the_begin_token(model, tokenizer, weights, tmp_path):
    tokenizer.chat_template, tokenizer.bos_token = LIKE["mistral-like"][0], "<s>"
    _, plain = export(model, weights, tmp_path / "plain")
    write_gguf(weights, {"general.architecture": "llama", "tokenizer.ggml.add_bos_token": True})
    told, adding = export(model, weights, tmp_path / "adding")
    assert plain[1][1].startswith("<s>") and "<s>" not in adding[1][1].partition("</s>")[0]
    assert "begin token '<s>'" in told.mended[0]
    write_gguf(weights, {"general.architecture": "llama", "tokenizer.ggml.model": "llama"})
    silent, commands = export(model, weights, tmp_path / "silent")
    assert commands[1] == adding[1] and "lacks tokenizer.ggml.add_bos_token" in " ".join(silent.notes)


def test_weights_not_yet_exported_are_made_beside_the_modelfile(model, tokenizer, weights, tmp_path, monkeypatch):
    from finetune.export import gguf

    def make(source, variant, out):
        return Exported(path=Path(weights.rename(out / weights.name)), mended=("a constant",), notes=("a note",))

    monkeypatch.setattr(gguf, "export", make)
    (tmp_path / "out").mkdir()
    made = ollama.export(Source(name="town", model=model), "q8_0", tmp_path / "out")
    assert made.mended[0] == "a constant" and made.notes[0] == "a note"
    assert modelfile.parse(made.path.read_text())[0] == ("from", "./town-q8_0.gguf")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda tokenizer: setattr(tokenizer, "chat_template", None), "no chat template"),
        (lambda tokenizer: setattr(tokenizer, "chat_template", REFUSED["newest first"][0]), "another order"),
        (lambda tokenizer: setattr(tokenizer, "eos_token", "a\u200db"), r"drops U\+200D"),
    ],
)
def test_a_failed_export_leaves_no_modelfile(model, tokenizer, weights, tmp_path, spoil, words):
    spoil(tokenizer)
    with pytest.raises(UsageError, match=words):
        export(model, weights, tmp_path / "out")
    assert not (tmp_path / "out" / "Modelfile").exists()


def test_the_rehearsal_refuses_what_the_export_would(model, tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr("finetune.export.gguf.rehearse", lambda *given, **more: asked.append(given))
    ollama.rehearse(model, "q8_0")
    assert asked == [(model, "q8_0")]
    tokenizer.chat_template = REFUSED["upper case"][0]
    with pytest.raises(UsageError, match="has no equal in Ollama's template language"):
        ollama.rehearse(model, "q8_0")
    tokenizer.chat_template = None  # training brings one
    ollama.rehearse(model, "q8_0")


def test_gguf_metadata_is_read_past_its_arrays(tmp_path):
    keys = {"general.architecture": "llama", "llama.rope.freq_base": 321.0, "x": True, "n": -3, "text": "naïve"}
    file = write_gguf(tmp_path / "a.gguf", keys, tokens=["a", "naïve", ""] * 50)
    assert gguf_header.read(file) == keys


@pytest.mark.parametrize(
    "data", [b"", b"GGUF", b"nothing of the kind, long enough", b"GGUF\3\0\0\0" + b"\xff" * 40, LONG]
)
def test_a_file_that_is_no_gguf_is_refused(tmp_path, data):
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(StageError, match="no GGUF file that can be read"):
        gguf_header.read(tmp_path / "a.gguf")


def test_chatml_without_spaces_is_the_template_people_know():
    made = gt.translate(ChatTemplate("plain", CHATML_TURNS), bos_token=None, eos_token="<|im_end|>")
    assert made.text.startswith(
        '{{ range $place, $_ := .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}'
    )
    assert made.text.endswith("<|im_start|>assistant\n")
