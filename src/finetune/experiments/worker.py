"""One piece of real work in a process of its own, so that its memory is its own:

    python -m finetune.experiments.worker REQUEST ANSWER

Both are files of one JSON object. Standard output is no part of it: libraries and models' own code print there.
"""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from finetune.backends import Job, get
from finetune.core import processes
from finetune.core.files import write_json
from finetune.core.memory import PeakMemory
from finetune.experiments.invariance import worker
from finetune.parity.observe import observe

PATHS = ("model", "out", "rows", "adapter", "eval_rows", "resume")


def in_fresh_process(request: dict[str, Any], file: Path) -> dict[str, Any]:
    """Run `request` in a new Python process and return its answer. Raises StageError with its last words; the request is
    left in `file` then, and taken away otherwise."""
    write_json(file, request)
    what = f"the experiment {file.name} failed in its own process"
    answer = processes.answer_of("finetune.experiments.worker", [str(file)], what=what)
    file.unlink(missing_ok=True)
    return answer


def train_request(backend: str, job: Job) -> dict[str, Any]:
    values = {field.name: getattr(job, field.name) for field in fields(job) if field.name != "should_stop"}
    return {"do": "train", "backend": backend, "job": {**values, **{k: _text(values[k]) for k in PATHS}}}


def score_request(backend: str, model: Path, adapter: Path | None, pairs: Any, settings: Any) -> dict[str, Any]:
    return {
        "do": "score",
        "backend": backend,
        "model": str(model),
        "adapter": _text(adapter),
        "pairs": pairs,
        "settings": settings,
    }


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _train(request: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {k: Path(v) if k in PATHS and v is not None else v for k, v in request["job"].items()}
    steps = []
    stream = get(request["backend"]).train(Job(**values))
    while True:
        try:
            steps.append(asdict(next(stream)))
        except StopIteration as end:
            return {"facts": end.value, "steps": steps}


def _score(request: dict[str, Any]) -> dict[str, Any]:
    backend = get(request["backend"])
    adapter = Path(request["adapter"]) if request["adapter"] else None
    handle = backend.load(Path(request["model"]), adapter, **request["settings"])
    return {"scores": backend.score(handle, request["pairs"])}


def _several(request: dict[str, Any]) -> dict[str, Any]:
    return {"answers": {name: _do(each) for name, each in request["requests"].items()}}


def _do(request: dict[str, Any]) -> dict[str, Any]:
    done: dict[str, Any] = WORK[request["do"]](request)
    return done


WORK = {
    "train": _train,
    "score": _score,
    "observe": observe,
    "together": worker.together,
    "merged": worker.merged,
    "several": _several,
}


def main() -> None:
    # Ended from outside, it still does what stands in `finally`: a model that was handed to a server is taken back.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    processes.end_with_parent()
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with PeakMemory() as memory:
        answer = _do(request)
    processes.answer(sys.argv[2], {**answer, "start_bytes": memory.start, "peak_bytes": memory.peak})


if __name__ == "__main__":
    main()
