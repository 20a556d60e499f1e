"""What was read of the source is kept between processes; whatever becomes of that file, the answer is the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest

from finetune import __version__
from finetune.core import secrets
from finetune.run import fingerprint
from finetune.run.fingerprint import changes, code_of, libraries, scans
from finetune.run.fingerprint.scan import scan
from finetune.run.fingerprint.tree import Tree

TREE = {
    "__init__.py": "",
    "user.py": "import numpy\nfrom finetune import used\ndef f():\n    from finetune.used import g\n",
    "used.py": "def g():\n    return 1\n",
    "other.py": "",
}
REFERENCE = "finetune.user:f"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small package, looked at anew whenever it is asked about, whose scans are kept as soon as they are made."""
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "_tree", Tree)
    monkeypatch.setattr(scans, "SETTLED_NS", -1_000_000_000_000)
    (tmp_path / "finetune").mkdir()
    for name, text in TREE.items():
        (tmp_path / "finetune" / name).write_text(text)
    return tmp_path / "finetune"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules whose source has been read."""
    done: list[str] = []

    def counted(source: bytes, module: str, **how: bool) -> scans.Scan:
        done.append(module)
        return scan(source, module, **how)

    monkeypatch.setattr("finetune.run.fingerprint.scan.scan", counted)
    return done


def kept(package: Path) -> Path:
    (file,) = (package.parent / "cache" / "code").iterdir()
    return file


def test_a_second_process_reads_no_source(package: Path, read: list[str]) -> None:
    first = code_of(REFERENCE, root=package)
    assert read == ["finetune.user", "finetune.used"]

    assert code_of(REFERENCE, root=package) == first
    assert list(first.modules) == ["finetune/user.py", "finetune/used.py"] and list(first.libraries) == ["numpy"]
    assert read == ["finetune.user", "finetune.used"]


def test_the_nearest_files_come_first(package: Path) -> None:
    for name, imported in (("user", "used, other"), ("used", "far"), ("other", "used"), ("far", "other")):
        (package / f"{name}.py").write_text(f"from finetune import {imported}\n")

    reached = code_of(REFERENCE, root=package).modules
    assert list(reached) == [f"finetune/{name}.py" for name in ("user", "used", "other", "far")]


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-20]),
        lambda file: file.write_bytes(file.read_bytes().replace(b"finetune:used", b"finetune:othr")),
        lambda file: file.write_bytes(b"\xff" + file.read_bytes()),
        lambda file: (file.unlink(), file.mkdir()),
        lambda file: shutil.rmtree(file.parent.parent),
    ],
    ids=["gone", "empty", "cut", "other content", "no text", "a directory", "no folder"],
)
def test_a_damaged_file_is_no_evidence(package: Path, read: list[str], damage) -> None:
    first = code_of(REFERENCE, root=package)
    damage(kept(package))

    assert code_of(REFERENCE, root=package) == first
    assert len(read) == 4


def test_scans_of_another_reader_are_not_taken(package: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another Python writes the same syntax another way; an edit of the reader itself may find other imports."""
    first = code_of(REFERENCE, root=package)
    monkeypatch.setattr(sys, "version", "3.11.99")
    code_of(REFERENCE, root=package)
    monkeypatch.setattr(scans, "OWN", ("scan.py",))

    assert code_of(REFERENCE, root=package) == first
    assert len(read) == 6


def test_no_place_to_keep_it_changes_nothing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = code_of(REFERENCE, root=package)
    (package.parent / "file").write_text("")
    monkeypatch.setenv("FT_CACHE_DIR", str(package.parent / "file"))

    assert code_of(REFERENCE, root=package) == first


def test_a_secret_that_is_a_modules_name_changes_nothing_in_what_is_kept(
    package: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "_known", {"finetune:used"})
    first = code_of(REFERENCE, root=package)
    assert "***" not in kept(package).read_text()
    read.clear()

    assert code_of(REFERENCE, root=package) == first
    assert read == []


def test_an_edit_of_the_same_size_and_time_is_seen(package: Path) -> None:
    first = code_of(REFERENCE, root=package)
    file = package / "used.py"
    before = file.stat()
    file.write_text(file.read_text().replace("1", "2"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert changes(asdict(first), code_of(REFERENCE, root=package)) == ["finetune/used.py changed"]


def test_what_was_written_just_now_is_not_kept(package: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "SETTLED_NS", 2_000_000_000)
    for _ in range(2):
        code_of(REFERENCE, root=package)

    assert len(read) == 4
    assert not (package.parent / "cache").exists()


def test_a_process_looks_once(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has imported stays as it was, and so does what it says about it."""
    monkeypatch.undo()
    monkeypatch.setenv("FT_CACHE_DIR", str(package.parent / "cache"))
    first = code_of(REFERENCE, root=package)
    (package / "used.py").write_text("")

    assert code_of(REFERENCE, root=package) == first


# -- where there is no source, and other packages -------------------------------------------------------------------


def test_without_source_the_version_stands_for_it(package: Path) -> None:
    """As where only compiled files are installed."""
    for file in package.glob("*.py"):
        file.rename(file.with_suffix(".pyc"))

    assert code_of(REFERENCE, root=package).modules == {"finetune": __version__}


def test_a_package_in_a_zip_is_known_by_its_version(tmp_path: Path) -> None:
    archive = tmp_path / "finetune.zip"
    with zipfile.ZipFile(archive, "w") as into:
        for file in fingerprint.ROOT.rglob("*.py"):
            into.write(file, file.relative_to(fingerprint.ROOT.parent))
    program = (
        "from finetune.run.fingerprint import code_of; print(dict(code_of('finetune.stages.evaluate:run').modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(archive)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.strip() == repr({"finetune": __version__})


def test_a_backend_of_another_package_is_its_file_and_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme_models" / "deep").mkdir(parents=True)
    (tmp_path / "acme_models" / "__init__.py").write_text("raise AssertionError('it was imported')")
    module = tmp_path / "acme_models" / "deep" / "backend.py"
    module.write_text("a = 1")
    (tmp_path / "acme_single.py").write_text("")
    about = tmp_path / "acme-1.2+cpu.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.2+cpu\n\nVersion: 9\n")
    (about / "top_level.txt").write_text("acme_models\n")
    monkeypatch.syspath_prepend(tmp_path)
    libraries.version.cache_clear()

    before = code_of("finetune.core.errors", "acme_models.deep.backend:Backend", "acme_single")
    module.write_text("a = 2")
    after = code_of("finetune.core.errors", "acme_models.deep.backend:Backend", "acme_single")

    assert [*before.modules] == [
        "finetune/core/errors.py",
        "finetune/core/__init__.py",
        "acme_models/deep/backend.py",
        "acme_single.py",
    ]
    assert before.libraries == {"acme": "1.2+cpu"}
    assert changes(json.loads(json.dumps(asdict(before))), after) == ["acme_models/deep/backend.py changed"]


def test_a_version_is_read_without_parsing_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = metadata.version("jinja2")
    monkeypatch.setattr(metadata.Distribution, "version", property(lambda self: pytest.fail("it was parsed")))
    libraries.version.cache_clear()

    assert libraries.version("jinja2") == expected


def test_asking_imports_nothing_heavy() -> None:
    program = (
        "import sys; from finetune.run.fingerprint import code_of; "
        "code_of('finetune.stages.evaluate:run'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())

    assert "finetune.run.fingerprint.tree" in loaded
    assert (
        loaded & {"torch", "transformers", "numpy", "pydantic", "rich", "jinja2", "finetune.stages", "finetune.recipe"}
        == set()
    )
