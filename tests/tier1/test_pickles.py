"""Pickles are read and never run: what they would call is told from their opcodes."""

from __future__ import annotations

import io
import pickle
import random
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest

from finetune import modelfiles
from finetune.core import pickles
from finetune.errors import UsageError
from support.poison import FORMS


def test_there_are_as_many_forms_as_were_counted() -> None:
    assert len(FORMS) == 13


@pytest.mark.parametrize("form", FORMS)
def test_what_a_pickle_would_call_is_told_and_not_called(form: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "weights.bin").write_bytes(FORMS[form](mark))

    found = pickles.read(tmp_path / "weights.bin")

    assert found is not None
    assert found.foreign == ("posix.mkdir",)
    assert str(found) == "a pickle that calls posix.mkdir"
    assert not mark.exists()


@pytest.mark.parametrize(
    "form",
    ["protocol 0", "protocol 2", "protocol 5", "instance", "names from the memo", "names between names", "npy", "npz"],
)
def test_the_payloads_of_these_tests_do_run_where_they_are_unpickled(form: str, tmp_path: Path) -> None:
    """Else no test here would prove a thing."""
    mark, file = tmp_path / "mark", tmp_path / f"file.{form}"
    file.write_bytes(FORMS[form](mark))

    if form in ("npy", "npz"):
        loaded = numpy.load(file, allow_pickle=True)
        _ = loaded if form == "npy" else loaded["weight"]
    else:
        pickle.loads(file.read_bytes())

    assert mark.is_dir()


def test_a_pickle_that_is_cut_short_has_run_before_that_is_seen(tmp_path: Path) -> None:
    stream = io.BytesIO(FORMS["row cut short"](tmp_path / "mark"))
    for _ in range(3):
        pickle.load(stream)
    with pytest.raises(EOFError):
        pickle.load(stream)

    assert (tmp_path / "mark").is_dir()


def test_a_name_that_a_pickle_puts_together_is_no_harmless_one(tmp_path: Path) -> None:
    """Duplicated, built into a tuple, taken away: what STACK_GLOBAL then takes is told by no string before it."""
    names = b"\x8c\x05posix\x8c\x06system" + b"\x8c\x0bcollections\x8c\x0bOrderedDict\x860"
    (tmp_path / "state.pt").write_bytes(b"\x80\x04" + names + b"\x93.")

    found = pickles.read(tmp_path / "state.pt")

    assert found is not None
    assert found.foreign == ("what it puts together",)


def test_an_array_of_numbers_is_no_pickle(tmp_path: Path) -> None:
    numpy.save(tmp_path / "numbers.npy", numpy.zeros(3))
    numpy.savez(tmp_path / "numbers.npz", a=numpy.zeros(3))

    assert pickles.read(tmp_path / "numbers.npy") is None
    assert pickles.read(tmp_path / "numbers.npz") is None


def test_plain_values_and_ordered_dictionaries_are_harmless(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(pickle.dumps(OrderedDict(a=[1, 2.0, "x", {3}])))

    found = pickles.read(tmp_path / "state.pt")

    assert found is not None
    assert found.foreign == ()


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"\x80", b"\x80\x05", b"PK\x03\x04", b"\x93NUMPY\x01", b"\x80\x02\x00\x00\x00\x00\x00\x00{}"]
)
def test_what_is_no_pickle_is_taken_for_none(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "some.bin").write_bytes(text)

    assert pickles.read(tmp_path / "some.bin") is None


def test_bytes_at_random_end_no_process(tmp_path: Path) -> None:
    """Lengths of gigabytes among them."""
    draw = random.Random(1)
    for form in FORMS.values():
        whole = form(tmp_path / "mark")
        for _ in range(40):
            changed = bytearray(whole[: draw.randrange(1, len(whole) + 1)])
            for _ in range(draw.randrange(4)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            (tmp_path / "some.bin").write_bytes(changed)
            pickles.read(tmp_path / "some.bin")

    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja", "vocab.txt",
        "model.safetensors", "adapter_model.safetensors", "adapter_config.json", "LICENSE", "README.md", "own.py",
        "additional_chat_templates/rag.jinja",
    ],
)  # fmt: skip
def test_a_pickle_under_another_files_name_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(FORMS["torch zip"](tmp_path / "mark"))

    with pytest.raises(
        UsageError, match=rf"{name} holds a pickle that calls posix.mkdir, and is not what its name says"
    ):
        modelfiles.check(tmp_path)


@pytest.mark.parametrize("name", ["training_args.bin", "notes.pkl", "cache.npy", "forest.joblib", "old.pth"])
def test_a_pickle_that_nothing_reads_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMS["protocol 2"](tmp_path / "mark"))

    modelfiles.check(tmp_path)
