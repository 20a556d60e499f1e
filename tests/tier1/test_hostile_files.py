"""Files that ask for all of a machine are refused at once, by name and line: YAML, JSON, CSV, `--set`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner

from finetune.cli.app import cli
from finetune.core import parsing
from finetune.core.errors import DataError, FinetuneError, RecipeError, StageError, UsageError
from finetune.core.files import read_jsonl, read_object
from finetune.data import formats, sources
from finetune.recipe import limits, load
from finetune.recipe import yaml as our_yaml
from finetune.recipe.faults import LISTED
from finetune.recipe.sections import Data
from finetune.testing.spec.load import SpecError
from finetune.testing.spec.load import load as load_spec

SECONDS = 20.0  # of this process's own computing; seen: 0.6, and minutes without the bounds


@contextmanager
def at_once() -> Iterator[None]:
    begin = time.process_time()
    yield
    assert time.process_time() - begin < SECONDS


def _laughs(levels: int, width: int) -> str:
    """`width ** levels` values, in a line a level."""
    lines = [f"a0: &a0 [{', '.join(['x'] * width)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


YAML: dict[str, tuple[str, int, str]] = {
    "aliases": (_laughs(9, 9), 5, "more than 10,000 keys and values"),
    "few aliases of much": (f"a: &a [{'1, ' * 4000}1]\nb: [*a, *a]\nc: *a", 2, "more than 10,000"),
    "merged mappings": (
        "\n".join(["a0: &a0 {k: 1}", *(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]),
        21,
        "more than 10,000",
    ),
    "an alias of itself": ("a: 1\nb: &b [*b]", 2, "contains itself"),
    "a list in lists": (f"a:\n- {'[' * 3000}{']' * 3000}", 2, "nested more than 50 deep"),
    "a mapping in mappings": ("\n".join(" " * n + "a:" for n in range(600)), 51, "nested more than 50 deep"),
    "dashes": ("- " * 3000 + "1", 1, "nested more than 50 deep"),
    "a comment": ("a: 1\n#" + "x" * 20_000_000, 1, "at most 262,144 are read"),
    "many keys": ("".join(f"k{n}: 1\n" for n in range(12_000)), 5000, "more than 10,000"),
    "a large float": ("a:\n  b: 1e999999", 2, "too large"),
    "a long integer": ("a: 1\nb: " + "1" * 200_000, 2, "a whole number of 200000 digits"),
    "a large integer": (f"b: {2**63}", 1, "too large"),
    "a large negative integer": (f"b: -{2**63}", 1, "too large"),
    "a large integer in parts": ("a: 1\nb: 9_223_372_036_854_775_808", 2, "too large"),
    "a large integer in base 16": ("b: 0xFFFFFFFFFFFFFFFFFF", 1, "too large"),
    "a large integer in base 8": ("b: [0o7777777777777777777777777]", 1, "too large"),
    "a large integer in base 60": ("%YAML 1.1\n---\nb: 1:0:0:0:0:0:0:0:0:0:0:0", 3, "too large"),
    "a large float in parts": ("b: 1_e999999", 1, "too large"),
    "an integer that is none": ('a: 1\nb: !!int ""', 2, "no !!int"),
    "a float that is none": ('a: 1\nb: !!float ""', 2, "no !!float"),
    "a truth that is none": ("a: 1\nb: !!bool x", 2, "no !!bool"),
    "aliases of one value": (f"a: &a 1\nb: [{'*a, ' * 10_000}*a]", 2, "more than 10,000"),
    "a NUL": ('a: 1\nb: "\\0"', 2, "U+0000"),
    "a raw NUL": ("a: 1\nb: x\0", 2, "special characters"),
    "half a surrogate pair": ('a: 1\n"\\ud800": 1', 2, "U+D800"),
    "a key twice": ("a: 1\na: 2", 2, "duplicate key"),
    "a date that is none": ("a: 2001-02-30", 1, "day is out of range"),
    "a large float in base 60": ("%YAML 1.1\n---\nb: 1" + ":0" * 200 + ".0", 1, "too large"),
    "a Python object": ("a: !!python/object:os.system x", 1, "could not determine a constructor"),
    "a long directive": ("%YAML " + "1" * 100_000, 1, "limit"),
}


@pytest.mark.parametrize("name", YAML)
def test_a_recipe_and_a_spec_beyond_a_limit_are_refused_at_once_with_file_and_line(tmp_path: Path, name: str) -> None:
    text, line, told = YAML[name]
    file = tmp_path / "hostile.yaml"
    file.write_text(text)
    for read, kind in ((load, RecipeError), (load_spec, SpecError)):
        with at_once(), pytest.raises(kind) as caught:
            read(file)  # type: ignore[operator]
        assert caught.value.faults[0].startswith(f"{file}:{line}: ")
        assert told in caught.value.faults[0]


def test_a_secret_under_a_key_that_is_there_twice_is_not_quoted_back(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model:\n  token: openingword\n  token: otherword\n")
    with pytest.raises(RecipeError) as caught:
        load(file)
    assert "duplicate key" in str(caught.value)
    assert "openingword" not in str(caught.value)
    assert "otherword" not in str(caught.value)


def test_a_file_that_is_no_text_is_named_with_the_line(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(RecipeError) as caught:
        load(file)
    assert caught.value.faults == [f"{file}:2: not UTF-8 text"]


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    with file.open("wb") as stream:
        stream.truncate(2**40)
    with at_once(), pytest.raises(RecipeError, match="1,099,511,627,776 bytes"):
        load(file)


def test_what_the_limits_allow_is_read() -> None:
    deep = "a: " + "[" * (limits.DEPTH - 1) + "]" * (limits.DEPTH - 1)
    wide = "a: &a [" + "1," * 4000 + "]\nb: *a"
    assert our_yaml.parse(deep, "f.yaml")[0]
    assert len(our_yaml.parse(wide, "f.yaml")[0]["b"]) == 4000
    assert our_yaml.parse(f"a: {2**63 - 1}\nb: .inf\nc: &c 1\nd: *c\ne: .nan", "f.yaml")[0]["a"] == 2**63 - 1
    assert our_yaml.parse("a: 1\n#".ljust(limits.BYTES, "x"), "f.yaml")[0] == {"a": 1}
    with pytest.raises(RecipeError, match="at most"):
        our_yaml.parse("a: 1\n#".ljust(limits.BYTES + 1, "x"), "f.yaml")
    assert our_yaml.parse(f"[{'1,' * (limits.VALUES - 1)}]", "f.yaml")[0]
    with pytest.raises(RecipeError, match="more than 10,000"):
        our_yaml.parse(f"[{'1,' * limits.VALUES}]", "f.yaml")


def test_of_very_many_faults_the_first_are_told(tmp_path: Path) -> None:
    file = tmp_path / "many.yaml"
    file.write_text("".join(f"key{n}: 1\n" for n in range(4000)))
    with at_once(), pytest.raises(RecipeError) as caught:
        load(file)
    assert len(caught.value.faults) == LISTED + 1
    assert "3900 more" in caught.value.faults[-1]


SET = ["[" * 3000, "1e999999", "9" * 5000, '"\\0"', '"\\ud800"', _laughs(9, 9), "*a", "{a: 1, a: 2}"]


@pytest.mark.parametrize("value", SET, ids=lambda value: value[:10])
def test_a_value_of_set_beyond_a_limit_is_refused_at_once(tmp_path: Path, value: str) -> None:
    (tmp_path / "r.yaml").write_text("data:\n  path: rows.jsonl\n")
    with at_once(), pytest.raises(UsageError, match="--set train.max_steps: the value is not valid YAML"):
        load(tmp_path / "r.yaml", [f"train.max_steps={value}"])


def test_a_key_of_set_beyond_a_limit_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data:\n  path: rows.jsonl\n")
    with pytest.raises(UsageError, match="expected section.key=value"):
        load(tmp_path / "r.yaml", [".".join(["a"] * 3000) + "=1"])


def test_a_token_in_a_value_of_set_is_not_quoted_back(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data:\n  path: rows.jsonl\n")
    result = CliRunner().invoke(cli, ["validate", str(tmp_path / "r.yaml"), "--set", "model.token=*mysecrettoken"])
    assert result.exit_code == 2
    assert "mysecrettoken" not in result.output


GOOD = '{"prompt": "a", "completion": "b"}'
ROWS: dict[str, tuple[str, int, str]] = {
    "deep.jsonl": (f'{GOOD}\n{{"a": {"[" * 100_000}', 2, "nested too deeply"),
    "deeper.jsonl": (f'{GOOD}\n{{"a": {"[" * 300}{"]" * 300}}}', 2, "nested more than 100 deep"),
    "deep.json": (f'[{GOOD},\n{GOOD},\n{{"a": {"[" * 100_000}]', 3, "nested too deeply"),
    "deeper.json": (f'[{GOOD},\n{{"a": {"[" * 300}{"]" * 300}}}]', 2, "nested more than 100 deep"),
    "float.jsonl": (f'{GOOD}\n{{"a": 1e999999}}', 2, "1e999999 is too large"),
    "float.json": (f'[{GOOD},\n{{"a": -1e999999}}]', 2, "-1e999999 is too large"),
    "digits.jsonl": (f'{GOOD}\n{{"a": {"1" * 1_000_000}}}', 2, "1,000,000 digits"),
    "digits.json": (f'[{GOOD},\n{{"a": {"1" * 1_000_000}}}]', 2, "1,000,000 digits"),
    "twice.jsonl": (f'{GOOD}\n{{"prompt": "a", "prompt": "b", "completion": "c"}}', 2, "'prompt' is there twice"),
    "twice.json": (f'[{GOOD},\n{{"a": {{"b": 1, "b": 2}}}}]', 2, "'b' is there twice"),
    "twice-above.json": (f'{{"data": [], "data": [{GOOD}]}}', 1, "'data' is there twice"),
    "nul.jsonl": (f'{GOOD}\n{{"prompt": "\\u0000", "completion": "b"}}', 2, "NUL"),
    "raw.jsonl": (f'{GOOD}\n{{"prompt": "\0", "completion": "b"}}', 2, "control character"),
    "nul.csv": ("prompt,completion\na,b\n\0,b\n", 3, "NUL"),
    "nul.tsv": ("prompt\tcompletion\n\0\tb\n", 2, "NUL"),
    "half.jsonl": (f'{GOOD}\n{{"prompt": "\\udc00", "completion": "b"}}', 2, "surrogate"),
    "key.jsonl": (f'{GOOD}\n{{"a": {{"\\u0000": 1}}}}', 2, "NUL"),
    "long.jsonl": (f'{{"{"k" * 9000}": 1, "{"k" * 9000}": 2}}', 1, f"'{'k' * 37}...' is there twice"),
    "columns.csv": (",".join(f"c{n}" for n in range(100_000)) + "\n", 1, "100,000 columns"),
    "columns.jsonl": ("{" + ",".join(f'"c{n}": 1' for n in range(100_000)) + "}\n", 1, "100,000 columns"),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_beyond_a_limit_are_refused_at_once_with_file_and_line(tmp_path: Path, name: str) -> None:
    text, line, told = ROWS[name]
    file = tmp_path / name
    file.write_text(text)
    with at_once(), pytest.raises(DataError) as caught:
        formats.to_examples(sources.read(Data(path=str(file))), Data(path=str(file)))
    assert caught.value.faults[0].startswith(f"{file}:{line}: ")
    assert told in caught.value.faults[0]


def test_rows_at_a_limit_are_read_and_one_more_is_refused(tmp_path: Path) -> None:
    depth = parsing.DEPTH - 2  # the row itself is one level, what is in the innermost list another
    for more, kept in ((0, True), (1, False)):
        for value in ("[" * (depth + more) + "1" + "]" * (depth + more), "1" * (parsing.DIGITS + more)):
            file = tmp_path / "rows.jsonl"
            file.write_text(f'{{"a": {value}}}\n')
            with nullcontext() if kept else pytest.raises(DataError):
                assert sources.read(Data(path=str(file)))


def test_where_the_nesting_of_a_file_goes_too_deep_is_told_whatever_stands_in_its_texts(tmp_path: Path) -> None:
    file = tmp_path / "deep.json"
    shallow = '{"a": "[[[[", "b": [1], "c": "\\"["},\n'
    file.write_text(f'[{shallow * 200}{{"a": {"[" * 100_000}')
    with pytest.raises(DataError) as caught:
        sources.read(Data(path=str(file)))
    assert caught.value.faults[0].startswith(f"{file}:201: ")


def test_tuples_which_parquet_makes_of_maps_are_looked_into() -> None:
    assert parsing.odd({"a": ("\0",)})


def test_large_numbers_that_can_be_held_are_read(tmp_path: Path) -> None:
    file = tmp_path / "ids.jsonl"
    file.write_text(f'{{"id": {2**127}, "score": 1e308, "prompt": "a", "completion": "b"}}\n')
    (row,) = sources.read(Data(path=str(file)))
    assert row.values["id"] == 2**127


def test_json_of_a_model_that_is_nested_without_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(StageError, match=r"config\.json is not JSON \(nested too deeply\)"):
        read_object(tmp_path / "config.json")
    (tmp_path / "rows.jsonl").write_text('{"a":' * 100_000 + "\n{}\n")
    with pytest.raises(FinetuneError, match=r"rows\.jsonl:1: not JSON \(nested too deeply\)"):
        read_jsonl(tmp_path / "rows.jsonl")
