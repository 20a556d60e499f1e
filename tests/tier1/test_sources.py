"""Rows are read from every format with their file and line, and every malformed one is reported at once."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.core import retrying
from finetune.core.errors import DataError, MissingError, UsageError
from finetune.data import sources
from finetune.data.sources import Row, local_files, read, read_jsonl_objects, resolve
from finetune.recipe import load_mapping
from finetune.recipe.sections import Data

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def faults(path: str, **data: Any) -> list[str]:
    with pytest.raises(DataError) as caught:
        read(Data(path=path, **data))
    return [fault.replace(str(Path(path).parent) + "/", "") for fault in caught.value.faults]


def test_jsonl_lines_are_physical_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '\n{"text": "one"}\r\n\n  {"text": "two"}')
    assert read(Data(path=path)) == [Row({"text": "one"}, path, 2), Row({"text": "two"}, path, 4)]


@given(st.lists(st.dictionaries(TEXT, TEXT, min_size=1), min_size=1, max_size=5))
def test_any_text_survives_jsonl_and_json(
    tmp_path_factory: pytest.TempPathFactory, objects: list[dict[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("rows", numbered=True)
    lines = write(folder, "a.jsonl", "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects))
    array = write(folder, "a.json", json.dumps(objects, ensure_ascii=False, indent=1))
    assert [row.values for row in read(Data(path=lines))] == objects
    assert [row.line for row in read(Data(path=lines))] == list(range(1, len(objects) + 1))
    assert [row.values for row in read(Data(path=array))] == objects


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ('[\n {"a": 1},\n {"a":\n 2}, {"a": 3}\n]', [2, 3, 4]),
        ('{"version": [1, {"data": 0}],\n "data" : [\n\n{"a": 1},{"a": 2}\n,\n{"a": 3}]}', [4, 4, 6]),
        ('{"a": 1}\n\n{"a": 2}\n{"a": 3}\n', [1, 3, 4]),
    ],
    ids=["array", "data key", "one object a line"],
)
def test_json_line_is_where_the_object_starts(tmp_path: Path, text: str, lines: list[int]) -> None:
    rows = read(Data(path=write(tmp_path, "a.json", text)))
    assert [row.line for row in rows] == lines
    assert [row.values for row in rows] == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_csv_lines_count_quoted_newlines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'prompt,completion\n"two\nlines",one\n\n"a, b","say ""hi"""\n')
    assert read(Data(path=path)) == [
        Row({"prompt": "two\nlines", "completion": "one"}, path, 2),
        Row({"prompt": "a, b", "completion": 'say "hi"'}, path, 5),
    ]


def test_tsv_is_split_at_tabs(tmp_path: Path) -> None:
    assert read(Data(path=write(tmp_path, "a.tsv", "a\tb\n1,5\t2\n")))[0].values == {"a": "1,5", "b": "2"}


def test_parquet_rows_are_numbered(tmp_path: Path, skip_or_fail: Callable[[str, str], None]) -> None:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        skip_or_fail("pyarrow", "pyarrow is not installed: pip install 'finetune-proof[parquet]'")
    path = str(tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"text": ["one", "two", "three"]}), path)
    assert read(Data(path=path, limit=2)) == [Row({"text": "one"}, path, 1), Row({"text": "two"}, path, 2)]
    assert "not a readable parquet file" in faults(write(tmp_path, "b.parquet", b"nothing"))[0]


def test_parquet_without_pyarrow_gives_the_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingError, match=r"pip install 'finetune-proof\[parquet\]'"):
        read(Data(path=write(tmp_path, "a.parquet", b"x")))


def test_a_byte_order_mark_is_tolerated(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", '{"a": "1"}'), ("a.json", '[{"a": "1"}]'), ("a.csv", "a\n1\n")):
        assert read(Data(path=write(tmp_path, name, b"\xef\xbb\xbf" + text.encode())))[0].values == {"a": "1"}


def test_several_files_are_joined_and_limited_together(tmp_path: Path) -> None:
    one = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2}\n')
    two = write(tmp_path, "b.json", '[{"a": 3}, {"a": 4}]')
    assert [row.values["a"] for row in read(Data(path=[one, two]))] == [1, 2, 3, 4]
    assert [row.values["a"] for row in read(Data(path=[one, two], limit=3))] == [1, 2, 3]
    assert [row.values["a"] for row in read(Data(path=[one, two], limit=2))] == [1, 2]


def test_every_malformed_line_of_every_file_is_in_one_error(tmp_path: Path) -> None:
    one = write(tmp_path, "a.jsonl", '{"a": 1}\n{"a": \n[1]\n{}\nnull\n{"a": "\\ud800"}\n')
    two = write(tmp_path, "b.csv", "a,b\n1\n1,2\n1,2,3\n")
    with pytest.raises(DataError) as caught:
        read(Data(path=[one, two]))
    places = [fault.replace(f"{tmp_path}/", "").split(": ")[0] for fault in caught.value.faults]
    assert places == ["a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "a.jsonl:5", "a.jsonl:6", "b.csv:2", "b.csv:4"]


def test_at_most_twenty_faults_are_listed(tmp_path: Path) -> None:
    found = faults(write(tmp_path, "a.jsonl", "x\n" * 25))
    assert len(found) == 21
    assert found[-1] == "... and 5 more"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "a.jsonl:1: the file is empty"),
        ("a.csv", b" \n", "a.csv:1: the file is empty"),
        ("a.json", b"[]", "a.json:1: the file holds no rows"),
        ("a.csv", b"a,b\n", "a.csv:1: the file holds no rows"),
        ("a.json", b'[\n{"a": 1},\n]', "a.json:3: not valid JSON"),
        ("a.json", b'{"rows": []}', "a.json:1: expected an array of objects"),
        ("a.json", b'"text"', "a.json:1: expected an array of objects"),
        ("a.jsonl", b'{"a": "b"}\n{"a": "\xff"}', "a.jsonl:2: not UTF-8: byte 0xff at offset 18"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "It looks like UTF-16"),
        ("a.csv", b"a,a\n1,2\n", "a.csv:1: column 'a' is named twice"),
        ("a.csv", b'a,b\n1,2\n"1,2\n', "a.csv:3: not valid CSV"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl:1: not valid JSON: nested too deeply"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    assert expected in faults(write(tmp_path, name, content))[0]


def test_an_unknown_file_type_says_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown file type '\.txt'.*\.jsonl.*Plain text goes into"):
        read(Data(path=write(tmp_path, "a.txt", "hello")))


def test_a_missing_file_names_its_nearest_neighbour(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "")
    with pytest.raises(MissingError, match=r"trian\.jsonl\. Did you mean 'train\.jsonl'\?"):
        resolve(str(tmp_path / "trian.jsonl"))
    with pytest.raises(MissingError, match="nowhere does not exist"):
        resolve(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(UsageError, match="is a directory"):
        resolve(str(tmp_path))


def test_shipped_names_resolve_inside_the_package_only() -> None:
    assert resolve("shipped:quorra/train.jsonl") == sources.SHIPPED / "quorra" / "train.jsonl"
    with pytest.raises(MissingError, match=r"Did you mean 'quorra/train\.jsonl'\?.*shipped:quorra/probes\.jsonl"):
        resolve("shipped:quorra/trains.jsonl")
    with pytest.raises(MissingError, match="no shipped file"):
        resolve("shipped:../sources.py")


def test_probe_files_are_read_with_the_same_care(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", '{"id": "a"}\nbroken\n')
    with pytest.raises(DataError, match=r"p\.jsonl:2: not valid JSON"):
        read_jsonl_objects(path)
    assert read_jsonl_objects("shipped:quorra/probes.jsonl")[0].line == 1


def test_local_files_are_those_each_stage_reads(tmp_path: Path) -> None:
    here = {name: write(tmp_path, f"{name}.jsonl", "{}") for name in ("data", "eval", "pairs", "probes", "heldout")}
    jinja = write(tmp_path, "t.jinja", "x")
    recipe = load_mapping(
        {
            "data": {"path": [here["data"], "hub:owner/name", str(tmp_path / "gone.jsonl")], "eval_path": here["eval"]},
            "align": {"data": {"path": here["pairs"]}},
            "template": {"name": "custom", "path": jinja},
            "evaluate": {"probes": here["probes"], "heldout": here["heldout"], "unseen": "shipped:quorra/unseen.jsonl"},
        }
    )
    assert [path.name for path in local_files(recipe, "prepare")] == [
        "data.jsonl",
        "eval.jsonl",
        "pairs.jsonl",
        "t.jinja",
    ]
    evaluated = {path.name for path in local_files(recipe, "evaluate")}
    assert evaluated == {"probes.jsonl", "unseen.jsonl", "heldout.jsonl", "t.jinja"}
    assert local_files(recipe, "train") == []


def hub(monkeypatch: pytest.MonkeyPatch, answer: Any) -> dict[str, Any]:
    """A stand-in for the datasets library; what it was asked for lands in the returned mapping."""
    asked: dict[str, Any] = {}

    def load_dataset(name: str, subset: str | None, **options: Any) -> Any:
        asked.update(name=name, subset=subset, **options)
        if isinstance(answer, Exception):
            raise answer
        return answer

    module = ModuleType("datasets")
    monkeypatch.setattr(module, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_hub_rows_are_read_by_split_and_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub(monkeypatch, [{"text": "one"}, {"text": "two"}])
    rows = read(Data(path="hub:owner/name", split="test", subset="small", limit=1), token="secret")
    assert rows == [Row({"text": "one"}, "hub:owner/name", 1)]
    assert asked == {"name": "owner/name", "subset": "small", "split": "test", "token": "secret"}


def test_an_unreachable_hub_says_what_works_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST", 0.001)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub(monkeypatch, ConnectionError("Couldn't reach 'owner/name' on the Hub"))
    with pytest.raises(
        MissingError,
        match=r"owner/name.*no connection.*tried 5 times: Couldn't reach.*What works offline: a local file",
    ):
        read(Data(path="hub:owner/name"))


def test_an_unknown_split_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ValueError("Unknown split \"x\". Should be one of ['train']."))
    with pytest.raises(UsageError, match="Unknown split"):
        read(Data(path="hub:owner/name", split="x"))


def test_hub_data_without_the_library_gives_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingError, match="pip install"):
        read(Data(path="hub:owner/name"))


def test_rows_of_an_array_on_one_line_are_told_apart_by_their_number(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"text": "a"}, 3, {"text": "b"}]')
    with pytest.raises(DataError, match=r"rows\.json:2: "):
        read(Data(path=str(file)))
    file.write_text('[{"text": "a"}, {"text": "b"}]')
    assert [row.line for row in read(Data(path=str(file)))] == [1, 2]
