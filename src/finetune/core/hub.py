"""The Hugging Face hub: whole model repositories or single files, and one clear message for each way it can fail."""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from finetune.core import console
from finetune.core.errors import FinetuneError, MissingError, StageError, UsageError
from finetune.core.install import missing_package
from finetune.core.memory import need_disk
from finetune.core.retrying import GaveUp, Passing, retried
from finetune.core.secrets import redact, remember

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_NEVER = ("*.h5", "*.msgpack", "*.ot", "*.onnx", "*.tflite", "*.mlmodel", "*.gguf", "onnx/*", "openvino/*", "coreml/*")
_PICKLES = ("*.bin", "*.pt", "*.pth")
_WEIGHTS = ("*.safetensors", *_PICKLES)
_BUSY = (408, 429, 500, 502, 503, 504)  # statuses that may be others a moment later
_ADDRESS = re.compile(r"\w+://\S+")
OFFLINE = "What works offline: the embedded model smollm2-135m, a local directory, or a GGUF file."

T = TypeVar("T")


def is_id(text: str) -> bool:
    """Whether `text` can be a repository's name: `owner/name`, or an old bare one like `gpt2`."""
    return bool(_ID.fullmatch(text))


def snapshot(repo: str, *, revision: str | None = None, token: str | None = None, into: Path | None = None) -> Path:
    """Download a model repository, pickled weights only where it has no safetensors, and return its directory.

    That is `into`, or the hub's own cache. Without a connection a complete earlier download is used.
    """
    with _explained(repo, revision, token) as hub:
        found = again(repo, partial(_listing_or_cached, repo, revision, token, into))
        if isinstance(found, Path):
            return found
        commit, sizes = found
        chosen = wanted(sizes)
        if not any(fnmatch(name, pattern) for name in chosen for pattern in _WEIGHTS):
            raise MissingError(f"the hub repository '{repo}' holds no safetensors or PyTorch weights")
        check_space(into or _cache(), _missing_bytes(repo, commit, chosen, sizes, into))
        console.say(f"downloading {repo} ({len(chosen)} files, {sum(sizes[name] for name in chosen) / 1e6:.0f} MB)")
        # An empty pattern list would mean everything; the names themselves mean exactly these.
        patterns = [_literal(name) for name in chosen]
        path = again(
            repo,
            lambda: hub.snapshot_download(
                repo, revision=revision, token=token, local_dir=into, allow_patterns=patterns
            ),
            partial(_held, repo, into),
        )
    return Path(path)


def files(
    repo: str, names: Iterable[str], into: Path | None, *, revision: str | None = None, token: str | None = None
) -> Path:
    """Download the named files of a repository into a directory (the hub's cache when None), and return it."""
    with _explained(repo, revision, token) as hub:
        commit, sizes = again(repo, lambda: _listing(repo, revision, token))
        check_space(into or _cache(), _missing_bytes(repo, commit, names, sizes, into))

        def file(name: str) -> Path:
            return Path(hub.hf_hub_download(repo, name, revision=commit, token=token, local_dir=into))

        places = [
            again(repo, partial(file, name), partial(_held, repo, into)).parents[name.count("/")] for name in names
        ]
    return into or places[0]


def names(repo: str, *, revision: str | None = None, token: str | None = None) -> list[str]:
    """The files that a repository holds."""
    with _explained(repo, revision, token):
        return list(again(repo, lambda: _listing(repo, revision, token))[1])


def wanted(sizes: Iterable[str]) -> list[str]:
    """The files of a model repository that are worth downloading."""
    kept = [name for name in sizes if not any(fnmatch(name, pattern) for pattern in _NEVER)]
    if any(name.endswith(".safetensors") for name in kept):
        kept = [name for name in kept if not any(fnmatch(name, pattern) for pattern in _PICKLES)]
    return kept


def check_space(directory: Path, needed: int) -> None:
    """Raise ResourceError where a model of `needed` bytes has no room in `directory` (see `memory.need_disk`)."""
    need_disk(directory, needed, "the model", "choose another place: FT_CACHE_DIR for our cache, HF_HOME for the hub's")


def _listing(repo: str, revision: str | None, token: str | None) -> tuple[str, dict[str, int]]:
    """The commit that a revision stands for, and the size of every file in it."""
    from huggingface_hub import HfApi

    info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True)
    return str(info.sha), {file.rfilename: int(file.size or 0) for file in info.siblings or ()}


def _listing_or_cached(
    repo: str, revision: str | None, token: str | None, into: Path | None
) -> tuple[str, dict[str, int]] | Path:
    """The listing or, without a connection, an earlier download that is complete."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _listing(repo, revision, token)
    except Exception as error:
        if not _is_connection(error):
            raise
        try:
            return _cached(repo, revision, into)
        except LocalEntryNotFoundError:
            raise error from None


def _missing_bytes(repo: str, commit: str, chosen: Iterable[str], sizes: dict[str, int], into: Path | None) -> int:
    from huggingface_hub import try_to_load_from_cache

    def here(name: str) -> bool:
        if into is not None:
            return (into / name).is_file()
        return isinstance(try_to_load_from_cache(repo, name, revision=commit), str)

    return sum(sizes.get(name, 0) for name in chosen if not here(name))


def _cached(repo: str, revision: str | None, into: Path | None) -> Path:
    """An earlier download; an incomplete one raises the hub's LocalEntryNotFoundError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Which files were wanted then depends on whether there were safetensors among them, which is not known now.
    for unwanted in ((*_NEVER, *_PICKLES), _NEVER):
        try:
            path = Path(
                snapshot_download(
                    repo, revision=revision, local_dir=into, local_files_only=True, ignore_patterns=list(unwanted)
                )
            )
        except LocalEntryNotFoundError:
            continue
        if any(any(path.glob(pattern)) for pattern in _WEIGHTS):
            return path
    raise LocalEntryNotFoundError(f"{repo} is not in the cache")


def _held(repo: str, into: Path | None) -> int:
    """Bytes of a repository that are here, those of files that are not whole included."""
    place = into or _cache() / f"models--{repo.replace('/', '--')}"
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file() and not file.is_symlink())


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def again(repo: str, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
    """What `attempt`, which asks the hub, returns; tried again where the hub is busy or out of reach (see `retrying`).

    Files that were downloaded by then are kept; where one broke off, huggingface_hub itself goes on (see `_steady`).
    """
    busy: list[Any] = []
    return retried(f"the hub, for {repo}", partial(_once, attempt, busy), partial(_passing, busy), progress)


def _once(attempt: Callable[[], T], busy: list[Any]) -> T:
    """An attempt in which huggingface_hub waits for no busy server by itself (it would for as long as it is asked to), and
    what it has to say is said in our way, without addresses, which can hold a key. `busy` gets such answers."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    busy.clear()

    def raise_at_once(response: Any) -> None:
        if response.status_code in _BUSY:
            busy.append(response)
            response.read()
            hf_raise_for_status(response)
        _steady(response)

    def tell(record: logging.LogRecord) -> bool:
        console.say(f"the hub: {_ADDRESS.sub('...', record.getMessage()).splitlines()[0]}")
        return False

    hooks = get_session().event_hooks["response"]
    handlers = logging.getLogger("huggingface_hub").handlers
    hooks.append(raise_at_once)
    for handler in handlers:
        handler.addFilter(tell)
    try:
        return attempt()
    finally:
        hooks.remove(raise_at_once)
        for handler in handlers:
            handler.removeFilter(tell)


def _steady(response: Any) -> None:
    """Let a connection that was reset in a body look like one that was closed there: huggingface_hub goes on after the
    second, at the byte (less ten megabytes at most), and begins anew after the first."""
    library = import_module(type(response).__module__.partition(".")[0])
    inner = response.stream

    class Steady(library.SyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Iterator[bytes]:
            try:
                yield from inner
            except library.NetworkError as error:
                raise library.RemoteProtocolError(str(error)) from error

        def close(self) -> None:
            inner.close()

    response.stream = Steady()


def _passing(busy: list[Any], error: Exception) -> Passing | None:
    """Whether asking the hub again may help. `busy` are the answers of a busy server, which a library may have made another
    error of; the reason for an error of its own it tells as the cause."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled

    if busy:
        asked = str(busy[-1].headers.get("Retry-After", ""))
        return Passing(f"it answered {busy[-1].status_code}", float(asked) if asked.isdigit() else 0.0)
    for cause in () if constants.is_offline_mode() else _causes(error):
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or hasattr(cause, "response") or isinstance(cause, OfflineModeIsEnabled):
            return None
        if _is_connection(cause) or isinstance(cause, ConnectionError | TimeoutError):
            return Passing("no connection")
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised over, the last first."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


def _is_connection(error: BaseException) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    # The HTTP library below the hub's has changed its name twice; its errors are all called so.
    client = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "requests")
    return isinstance(error, OfflineModeIsEnabled) or (client and not hasattr(error, "response"))


@contextmanager
def _explained(repo: str, revision: str | None, token: str | None) -> Iterator[Any]:
    """The hub's library; its errors inside become ours. Their own text is dropped: it can hold addresses and tokens."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors, utils
    except ModuleNotFoundError as error:
        raise MissingError(missing_package(error.name or "huggingface_hub")) from None
    if token:
        remember(token)
    shown = not utils.are_progress_bars_disabled()
    if console.mode() != "terminal":
        utils.disable_progress_bars()
    try:
        yield hub
    except FinetuneError:
        raise
    except GaveUp as given:
        last = _translated(given.error, errors, repo, revision, constants.is_offline_mode())
        raise MissingError(f"{last} ({given.tried})") from None
    except Exception as error:
        raise _translated(error, errors, repo, revision, constants.is_offline_mode()) from None
    finally:
        if shown:
            utils.enable_progress_bars()


def _translated(error: Exception, errors: Any, repo: str, revision: str | None, offline: bool) -> Exception:
    found = (getattr(getattr(cause, "response", None), "status_code", None) for cause in _causes(error))
    status = next((each for each in found if each is not None), None)
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"'{repo}' is no hub repository's name; expected owner/name, or an old bare one like gpt2")
    if isinstance(error, errors.GatedRepoError):
        return MissingError(
            f"the hub repository '{repo}' is gated: accept its terms on its page, then set HF_TOKEN to a token of that "
            "account (and write 'token: ${HF_TOKEN}' under model)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return MissingError(f"the hub repository '{repo}' has no revision '{revision}'. Check model.revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return MissingError(
            f"the hub has no repository '{repo}', or it is private and the token may not read it. Check the name; "
            "for a private one set HF_TOKEN"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return MissingError(f"the hub repository '{repo}' lacks a file that was asked for")
    if status == 401:
        return MissingError(f"the hub refused the token for '{repo}' (401). Set HF_TOKEN to a valid one, or unset it")
    if status == 403:
        return MissingError(f"the hub forbids access to '{repo}' (403). The token lacks the right to read it")
    if status == 429:
        return MissingError(f"the hub is being asked too often (429) for '{repo}'. Wait a few minutes, or set HF_TOKEN")
    if status is not None:
        return MissingError(f"the hub answered {status} for '{repo}'. Try again later. {OFFLINE}")
    if isinstance(error, errors.LocalEntryNotFoundError) or _is_connection(error):
        why = "HF_HUB_OFFLINE is set" if offline else "no connection"
        return MissingError(f"the hub cannot be reached ({why}), and '{repo}' is not in its cache. {OFFLINE}")
    if isinstance(error, OSError):
        return StageError(f"downloading '{repo}' failed: {redact(str(error)).partition(chr(10))[0]}")
    return error
