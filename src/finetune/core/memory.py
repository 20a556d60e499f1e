"""How much memory a block of code took, and how much memory and disk there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from finetune.core.errors import ResourceError

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)
_SAMPLE_SECONDS = 0.01
SPARE = 1.05  # what is written is a little more than what is counted


class PeakMemory:
    """Peak resident memory of this process while the block runs.

    `start` and `peak` are bytes; `peak` can be read inside the block too. On Linux the kernel's own high-water mark is
    reset and read, so no peak is missed; elsewhere a thread samples every 10 ms. Blocks may be nested.
    """

    # One reset wipes the kernel's mark for every enclosing block, so those keep what was seen until then.
    _open: list[PeakMemory] = []

    def __init__(self) -> None:
        self.start = 0
        self._seen = 0
        self._exact = False
        self._closed = True
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        for outer in PeakMemory._open:
            outer._look()
        self.start = self._seen = resident()
        self._closed = False
        self._exact = _reset_high_water_mark()
        PeakMemory._open.append(self)
        if not self._exact:
            self._stop.clear()
            self._thread = threading.Thread(target=self._sample, name="finetune-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._look()
        self._closed = True
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        PeakMemory._open.remove(self)

    @property
    def peak(self) -> int:
        if not self._closed:
            self._look()
        return self._seen

    def _look(self) -> None:
        now = _high_water_mark() if self._exact else resident()
        self._seen = max(self._seen, now)

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._look()


def resident() -> int:
    """Resident bytes of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def available() -> int:
    """Bytes of memory that can still be used: the system's, or what a container's limit leaves if that is less."""
    import psutil

    left = int(psutil.virtual_memory().available)
    for limit_file, usage_file, stat_file, reclaimable_key in _CGROUPS:
        try:
            limit = int(Path(limit_file).read_text())
            usage = int(Path(usage_file).read_text())
            stat = dict(line.split() for line in Path(stat_file).read_text().splitlines())
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
        left = min(left, max(0, limit - usage + int(stat.get(reclaimable_key, 0))))
    return left


def total() -> int:
    """Bytes of memory of this machine."""
    import psutil

    return int(psutil.virtual_memory().total)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An NVIDIA GPU; sizes in bytes."""

    name: str
    total: int
    free: int


def gpus() -> list[Gpu]:
    """The visible NVIDIA GPUs as `nvidia-smi` reports them; empty without the tool. Does not start CUDA."""
    tool = shutil.which("nvidia-smi")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if tool is None or visible in ("", "-1"):
        return []
    query = [tool, "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
        found = [Gpu(name=name, total=int(size) * 1024**2, free=int(free) * 1024**2) for name, size, free in rows]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []
    chosen = [int(number) for number in (visible or "").split(",") if number.strip().isdigit()]
    return [found[number] for number in chosen if number < len(found)] if chosen else found


def disk_free(path: str | Path) -> int:
    """Free bytes on the disk that `path` is on, or would be on once it is made."""
    place = Path(path).resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def need_disk(place: str | Path, needed: float, what: str, way: str = "") -> None:
    """Raise ResourceError where the disk that `place` is on, or would be on, has less free than `needed` bytes and a
    twentieth more. `what` is to be written there; `way` is what to do beside making room."""
    free = disk_free(place)
    if needed * SPARE > free:
        raise ResourceError(
            f"{what} needs about {human(needed)} on the disk of {place}, which has {human(free)} left. Make room and run the "
            f"same command again{f', or {way}' if way else ''}"
        )


def human(size: float) -> str:
    """`size` bytes for a reader: `512 B`, `37.3 MiB`, `2.9 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return _high_water_mark() > 0


def _high_water_mark() -> int:
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
