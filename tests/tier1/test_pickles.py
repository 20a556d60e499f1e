"""Pickles are read and never run: what they would call is told from their opcodes."""

from __future__ import annotations

import io
import pickle
import random
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest

from finetune.core import pickles
from finetune.core.errors import UsageError
from finetune.models import files
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


NAMED = b"\x8c\x0bcollections", b"\x8c\x0bOrderedDict"


@pytest.mark.parametrize(
    ("body", "foreign"),
    [
        (NAMED[0] + b"\x95" + (100).to_bytes(8, "little") + NAMED[1] + b"\x93.", ()),  # a frame begins between the two
        (NAMED[0] + b"\x94" + NAMED[1] + b"\x94\x93.", ()),
        (
            b"\x8c\x05posixr\x01\x00\x00\x000\x8c\x05mkdirj\x01\x00\x00\x00" + b"\x93.",
            ("mkdir.posix",),
        ),  # with four bytes
        (b"\x82\x01.", ("copyreg.extension 1",)),
    ],
)
def test_a_name_is_read_however_it_came_onto_the_stack(tmp_path: Path, body: bytes, foreign: tuple[str, ...]) -> None:
    (tmp_path / "state.pt").write_bytes(b"\x80\x04" + body)

    found = pickles.read(tmp_path / "state.pt")

    assert found is not None
    assert found.foreign == foreign


@pytest.mark.parametrize(
    ("call", "harmless"),
    [
        ("builtins set", True),
        ("torch._utils _rebuild_tensor_v2", True),
        ("builtins eval", False),
        ("builtins getattr", False),
        ("__builtin__ exec", False),
        ("torchlike run", False),
        ("numpylike run", False),
        ("collections namedtuple", False),
        ("posix system", False),
    ],
)
def test_what_tensors_are_made_of_is_harmless_and_nothing_else(tmp_path: Path, call: str, harmless: bool) -> None:
    (tmp_path / "state.pt").write_bytes(b"\x80\x02c" + call.replace(" ", "\n").encode() + b"\n.")

    found = pickles.read(tmp_path / "state.pt")

    assert found is not None
    assert found.foreign == (() if harmless else (call.replace(" ", "."),))


def test_an_array_of_objects_is_a_pickle_however_damaged(tmp_path: Path) -> None:
    whole = FORMS["npy"](tmp_path / "mark")
    (tmp_path / "objects.npy").write_bytes(whole[: whole.index(b"\n") + 1])

    found = pickles.read(tmp_path / "objects.npy")

    assert found is not None
    assert found.calls == ()


def test_a_length_of_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"\x80\x04\x8e" + (2**30).to_bytes(8, "little") + b"abc")
    tracemalloc.start()
    try:
        pickles.read(tmp_path / "state.pt")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak < 10_000_000


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
        files.check(tmp_path)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_any_protocol_is_known_by_its_begin(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(pickle.dumps({}, protocol))

    with pytest.raises(UsageError, match="config.json holds a pickle, and is not what its name says"):
        files.check(tmp_path)


@pytest.mark.parametrize("name", ["training_args.bin", "notes.pkl", "cache.npy", "forest.joblib", "old.pth"])
def test_a_pickle_that_nothing_reads_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMS["protocol 2"](tmp_path / "mark"))

    files.check(tmp_path)
