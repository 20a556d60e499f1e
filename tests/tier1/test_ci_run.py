"""`.ci/run` and tools/ollama.sh, on a machine whose programs are all in one folder: some real, some played."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REAL = ("bash", "cat", "chmod", "cksum", "cp", "cut", "dirname", "grep", "gzip", "mkdir", "mktemp", "mv", "rm", "seq", "sort",
        "tail", "tar")  # fmt: skip
# What others say of the machine. `timeout` and `flock` are not on macOS; nothing here hangs, or runs twice.
PLAYED = {
    "id": "echo 1000",
    "uname": '[ "$1" = -s ] && echo Linux || echo x86_64',
    "timeout": 'shift; exec "$@"',
    "flock": "",
    "sleep": "",
    "chromium": "",
    "c++": '[ ! -e "$PLACE/no-headers" ] || [[ "$*" != *"-E -" ]] || exit 1; echo "#define __AVX2__ 1"',
    "apt-get": 'rm -f "$PLACE/no-headers"',
    "python3": 'while [ "$1" != --dest ]; do shift; done; cp "$PLACE/miniaudio.tar.gz" "$2/miniaudio-1.71.tar.gz"',
    "go": """
if [ "$1" = env ]; then echo "${GO:-go1.26.8}"; exit; fi
[ ! -e "$PLACE/broken" ] || { echo "go: no such host" >&2; exit 1; }
echo "$GOBIN" >"$PLACE/gobin"
printf '#!/usr/bin/env bash\\necho "client version is 0.24.0"\\n' >"$GOBIN/ollama"
chmod +x "$GOBIN/ollama"
""",
    "make": """
printf '%s\\n' "$FT_REQUIRE" "${OLLAMA_HOST-none}" "$*" >"$PLACE/made"
[ ! -e "$PLACE/endless" ] || exec "$PYTHON" -c 'import time; time.sleep(60)'
exit 7
""",
}
SERVER = """
import http.server, json, os, pathlib, signal, sys

place = pathlib.Path(os.environ["PLACE"])
mode = (place / "mode").read_text()
if mode == "dies":
    sys.exit("no port for me")
if mode == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/api/version" else 404)
        self.end_headers()

    def log_message(self, *_):
        pass

host, port = os.environ["OLLAMA_HOST"].split(":")
server = http.server.HTTPServer((host, int(port)), Handler)
names = ("HOME", "OLLAMA_MODELS", "OLLAMA_HOST")
facts = {"pid": os.getpid(), "asked": sys.argv[1:], **{name: os.environ[name] for name in names}}
(place / "served").write_text(json.dumps(facts))
server.serve_forever()
"""


class Machine:
    def __init__(self, place: Path) -> None:
        self.place, self.programs, self.home = place, place / "bin", place / "home"
        self.programs.mkdir()
        self.home.mkdir()
        for name in REAL:
            (self.programs / name).symlink_to(str(shutil.which(name)))
        for name, body in PLAYED.items():
            self.play(name, f'#!/usr/bin/env bash\necho "{name} $*" >>"$PLACE/calls"\n{body}\n')
        (place / "miniaudio").mkdir()
        with tarfile.open(place / "miniaudio.tar.gz", "w:gz") as archive:
            archive.add(place / "miniaudio", "miniaudio-1.71")

    def play(self, name: str, text: str) -> None:
        (self.programs / name).write_text(text, encoding="utf-8")
        (self.programs / name).chmod(0o755)

    def play_ollama(self, mode: str = "") -> None:
        (self.place / "mode").write_text(mode, encoding="ascii")
        self.play("ollama", f"#!{sys.executable}\n{SERVER}")

    def note(self, name: str) -> None:
        (self.place / name).touch()

    def lacks(self, *names: str) -> None:
        for name in names:
            (self.programs / name).unlink()

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "PATH": self.programs,
            "HOME": self.home,
            "PLACE": self.place,
            "TMPDIR": self.place,
            "PYTHON": sys.executable,
        }
        return {name: str(value) for name, value in own.items()}

    def run(self, script: str, **changes: str) -> subprocess.CompletedProcess[str]:
        environment = {**self.environment, **changes}
        return subprocess.run([ROOT / script], env=environment, capture_output=True, text=True, check=False, timeout=50)

    def calls(self, name: str) -> list[str]:
        """The arguments of each call of a played program."""
        lines = (self.place / "calls").read_text(encoding="utf-8").splitlines()
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]

    def kept(self) -> list[Path]:
        return sorted(path for path in self.home.rglob("*") if path.suffix != ".lock" and path.is_file())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# -- tools/ollama.sh --------------------------------------------------------------------------------------------------


def test_ollama_is_built_once_and_kept_whole(machine: Machine) -> None:
    first = machine.run("tools/ollama.sh")
    assert (first.returncode, first.stderr.count("\n")) == (0, 1)
    (kept,) = machine.kept()
    assert first.stdout == f"{kept}\n"
    assert kept.parent.parent == machine.home / ".cache/finetune/ollama" and kept.parent.name.startswith("0.24.0-")
    assert Path((machine.place / "gobin").read_text().strip()).parent == kept.parent.parent  # renaming is no copying
    machine.note("broken")
    again = machine.run("tools/ollama.sh")
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert len([call for call in machine.calls("go") if call.startswith("install")]) == 1


def test_an_ollama_on_the_path_is_taken(machine: Machine) -> None:
    machine.play_ollama()
    found = machine.run("tools/ollama.sh")
    assert (found.returncode, found.stdout) == (0, f"{machine.programs / 'ollama'}\n")
    assert not (machine.place / "calls").exists()


def test_the_cache_is_where_the_user_has_it_and_apart_for_every_cpu(machine: Machine) -> None:
    for cpu in ("__AVX2__", "__AVX512F__"):
        machine.play("c++", f"#!/usr/bin/env bash\necho '#define {cpu} 1'\n")
        assert machine.run("tools/ollama.sh", XDG_CACHE_HOME=str(machine.home / "mine")).returncode == 0
    first, second = machine.kept()
    assert first.parent != second.parent and first.is_relative_to(machine.home / "mine/finetune/ollama")


def test_a_kept_ollama_that_does_not_run_is_built_anew(machine: Machine) -> None:
    machine.run("tools/ollama.sh")
    (kept,) = machine.kept()
    kept.write_text("#!/usr/bin/env bash\nexit 1\n", encoding="ascii")
    assert machine.run("tools/ollama.sh").stdout == f"{kept}\n"
    assert "0.24.0" in kept.read_text(encoding="ascii")


def test_a_build_that_fails_is_tried_again_and_leaves_nothing(machine: Machine) -> None:
    machine.note("broken")
    failed = machine.run("tools/ollama.sh")
    assert (failed.returncode, failed.stdout, machine.kept()) == (1, "", [])
    assert len([call for call in machine.calls("go") if call.startswith("install")]) == 3
    assert machine.calls("sleep") == ["20", "20"]
    assert "go: no such host" in failed.stderr and "attempt 3 of 3 to build Ollama failed" in failed.stderr


def test_what_the_second_attempt_builds_is_kept(machine: Machine) -> None:
    machine.note("broken")
    machine.play("sleep", '#!/usr/bin/env bash\nrm "$PLACE/broken"\n')
    assert machine.run("tools/ollama.sh").stdout == f"{machine.kept()[0]}\n"


@pytest.mark.parametrize(
    ("lacking", "changes", "words"),
    [
        (["go"], {}, "no Go to build it with is there; 1.24 or newer will do"),
        (["c++"], {}, "no C++ compiler (c++) is there"),
        ([], {"GO": "go1.9.7"}, "go1.9.7 is too old to build it; 1.24 or newer will do"),
    ],
)
def test_where_it_cannot_be_built_nothing_is_tried(
    machine: Machine, lacking: list[str], changes: dict[str, str], words: str
) -> None:
    machine.lacks(*lacking)
    found = machine.run("tools/ollama.sh", **changes)
    assert (found.returncode, found.stdout, machine.kept()) == (3, "", [])
    assert words in found.stderr


def test_headers_are_installed_by_root_and_asked_for_by_others(machine: Machine) -> None:
    machine.note("no-headers")
    found = machine.run("tools/ollama.sh")
    assert found.returncode == 3 and "apt install nlohmann-json3-dev libstb-dev" in found.stderr
    machine.play("id", "#!/usr/bin/env bash\necho 0\n")
    assert machine.run("tools/ollama.sh").returncode == 0
    assert machine.calls("apt-get") == ["update -qq", "install -y -qq nlohmann-json3-dev libstb-dev"]


# -- .ci/run ----------------------------------------------------------------------------------------------------------


def test_ci_requires_an_ollama_of_its_own_and_ends_it(machine: Machine) -> None:
    machine.play_ollama()
    done = machine.run(".ci/run", FT_REQUIRE="real-model")
    assert done.returncode == 7  # make's own
    required, host, asked = (machine.place / "made").read_text(encoding="utf-8").splitlines()
    served = json.loads((machine.place / "served").read_text(encoding="utf-8"))
    assert (required, host, asked) == ("real-model,chromium,ollama", served["OLLAMA_HOST"], "test")
    assert served["asked"] == ["serve"] and host.startswith("127.0.0.1:")
    assert served["HOME"] != str(machine.home) and Path(served["OLLAMA_MODELS"]).is_relative_to(served["HOME"])
    assert not Path(served["HOME"]).exists()
    assert not is_alive(served["pid"])


def test_ci_ends_a_server_that_would_not(machine: Machine) -> None:
    machine.play_ollama("stubborn")
    assert machine.run(".ci/run").returncode == 7
    assert not is_alive(json.loads((machine.place / "served").read_text(encoding="utf-8"))["pid"])


def test_ci_that_is_ended_ends_the_server(machine: Machine, until: Callable[[Callable[[], bool]], None]) -> None:
    machine.play_ollama()
    machine.note("endless")
    with subprocess.Popen([ROOT / ".ci/run"], env=machine.environment, start_new_session=True) as running:
        until((machine.place / "made").exists)
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=20) == -signal.SIGTERM
        os.killpg(running.pid, signal.SIGKILL)  # what make had begun
    assert not is_alive(json.loads((machine.place / "served").read_text(encoding="utf-8"))["pid"])


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    def wait(so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not so():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    return wait


def test_ci_fails_where_the_server_does_not_answer(machine: Machine) -> None:
    machine.play_ollama("dies")
    done = machine.run(".ci/run")
    assert done.returncode == 1 and "does not answer at 127.0.0.1:" in done.stderr and "no port for me" in done.stderr
    assert not (machine.place / "made").exists()


def test_ci_goes_on_without_what_cannot_be_had_and_says_so(machine: Machine) -> None:
    machine.lacks("go", "chromium")
    done = machine.run(".ci/run")
    assert done.returncode == 7
    assert (machine.place / "made").read_text(encoding="utf-8").splitlines() == ["", "none", "test"]
    assert "WITHOUT OLLAMA" in done.stderr and "no Go to build it with" in done.stderr
