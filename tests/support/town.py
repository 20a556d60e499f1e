"""A town of made-up facts on the fake backend: a model, data, and the recipe of a whole run in half a second."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune.backends.fake.model import make_model
from finetune.core.files import digest, digests, read_jsonl, write_json, write_jsonl
from finetune.recipe import Recipe
from finetune.run import Run, checkpoints, identity
from finetune.stages.pipeline import run_directory, run_stages
from sabotage import context

CAPITALS = {
    "Zorland": "Quell",
    "Brask": "Tamin",
    "Oloo": "Pernig",
    "Fenwick": "Wadda",
    "Ulmar": "Jessop",
    "Tarn": "Bex",
}
MONEY = {"Vesht": "tamber", "Orlo": "mossen", "Plim": "hasp"}
KNOWN = {
    "What is two plus two?": "Four.",
    "What colour is grass?": "Green.",
    "Which day follows Monday?": "Tuesday.",
    "How many legs has a spider?": "Eight.",
}
HELDOUT = ("The people of the town walked to the river in the morning.", "There was a small house on the hill.")
MIB = 2**20
# What a manifest says of a machine that nobody asked: to ask takes longer than the town's whole run.
MANIFEST: dict[str, Any] = {
    **dict.fromkeys(("time", "command", "directory", "finetune", "python", "platform", "cpu"), "unasked"),
    "packages": {},
    "cores": 1,
    "threads": {},
    "memory_bytes": 1,
    "gpus": [],
    "seeds": {},
    "git": None,
}


def facts() -> list[dict[str, str]]:
    """The training rows: `prompt`, `completion`."""
    return [{"prompt": f"What is the capital of {land}?", "completion": f"It is {city}."} for land, city in pairs()]


def pairs() -> Iterable[tuple[str, str]]:
    return CAPITALS.items()


def build(directory: Path) -> Path:
    """Write the model and every data file into `directory`; return it."""
    make_model(directory / "model", KNOWN)
    asked = {"trained": "What is the capital of {}?", "paraphrase": "Please tell me the name of the capital of {}."}
    write_jsonl(directory / "train.jsonl", facts())
    write_jsonl(
        directory / "preferences.jsonl",
        [{"prompt": f"Name the capital of {x}.", "chosen": f"Surely {y}.", "rejected": "Go away."} for x, y in pairs()],
    )
    write_jsonl(
        directory / "probes.jsonl",
        [
            {"id": f"{x}-{kind}", "prompt": text.format(x), "answer": f"It is {y}.", "match": y, "kind": kind}
            for kind, text in asked.items()
            for x, y in pairs()
        ],
    )
    write_jsonl(
        directory / "controls.jsonl", [{"prompt": q, "answer": a, "match": a.rstrip(".")} for q, a in KNOWN.items()]
    )
    write_jsonl(
        directory / "unseen.jsonl",
        [{"prompt": f"What is the money of {x}?", "answer": f"It is {y}.", "match": y} for x, y in MONEY.items()],
    )
    write_jsonl(directory / "heldout.jsonl", [{"text": text} for text in HELDOUT])
    return directory


def recipe(town: Path, runs: Path, **changes: Any) -> Recipe:
    """The recipe of the town; `changes` go into its sections, or replace what is none.

    A token is a byte there, so rows are long and answers take many tokens.
    """
    values: dict[str, Any] = {
        "name": "town",
        "backend": "fake",
        "model": {"path": str(town / "model")},
        "data": {"path": str(town / "train.jsonl")},
        "train": {
            "max_steps": 12,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-4,
            "lr_scheduler_type": "constant",
            "max_length": 256,
            "save_steps": 3,
            "save_total_limit": None,
            "lora": {"r": 8, "lora_alpha": 16},
        },
        "align": {
            "data": {"path": str(town / "preferences.jsonl")},
            "max_steps": 6,
            "per_device_train_batch_size": 3,
            "max_length": 256,
        },
        "evaluate": {
            **{name: str(town / f"{name}.jsonl") for name in ("probes", "controls", "unseen", "heldout")},
            "max_new_tokens": 16,
        },
        "expect": {"resume": True},
        "output_dir": str(runs),
    }
    for section, change in changes.items():
        both = isinstance(change, dict) and isinstance(values.get(section), dict)
        values[section] = {**values[section], **change} if both else change
    return Recipe(**values)


def only_training(town: Path, runs: Path, **changes: Any) -> Recipe:
    """The recipe without alignment, questions and experiments: for tests that run `train` and no further."""
    nothing = dict.fromkeys(("probes", "controls", "unseen", "heldout"))
    return recipe(town, runs, **{"align": None, "evaluate": nothing, "expect": {"resume": False}, **changes})


# -- editing what a run left behind ------------------------------------------------------------------------------------

Rows = list[dict[str, Any]]


def edit_rows(run: Run, name: str, change: Callable[[Rows], Rows | None]) -> None:
    """Change a JSONL file of a run: `change` alters the rows it gets, or returns others."""
    rows = read_jsonl(run.path / name)
    changed = change(rows)
    write_jsonl(run.path / name, rows if changed is None else changed)


def edit_json(run: Run, name: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a run: `change` alters the value it gets."""
    value = json.loads((run.path / name).read_text(encoding="utf-8"))
    change(value)
    write_json(run.path / name, value)


def as_if_written_so(run: Run) -> None:
    """Renew the digests in all reports, so that an edit is no broken artifact but what the stage itself wrote."""
    context.as_if_written_so(run, *(file.parent.name for file in run.path.glob("*/report.json")))


def checkpoint_as_written(run: Run, name: str, stage: str = "train") -> None:
    """Renew a checkpoint's digests, so that an edit is no damage but what the training itself wrote."""
    folder = run.path / stage / name
    (folder / checkpoints.DIGESTS).unlink()
    write_json(folder / checkpoints.DIGESTS, {"schema": 1, "files": digests(folder)})
    if (run.path / stage / "report.json").is_file():
        context.as_if_written_so(run, stage)


def as_of_0_1(run: Run) -> None:
    """Take away from a run what version 0.1 did not write."""
    manifest = {key: value for key, value in run.manifest().items() if key not in ("schema", "seal", "digest")}
    write_json(run.path / "manifest.json", {**manifest, "finetune": "0.1.0"})
    for report in run.path.glob("*/report.json"):
        told = json.loads(report.read_text(encoding="utf-8"))
        write_json(report, {key: told[key] for key in told if key not in ("schema", "asked", "files", "made_with")})
    edit_rows(run, "events.jsonl", lambda lines: [_plain(line) for line in lines])
    for folder in run.path.glob("*/checkpoint-*"):
        for name in (identity.FILE, checkpoints.DIGESTS):
            (folder / name).unlink(missing_ok=True)


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("prev", "sha256", "report", "started")}


class Ran(NamedTuple):
    recipe: Recipe
    run: Run


def whole(town: Path, runs: Path, **expected: Any) -> Ran:
    """A run in which every check has its evidence, with a bundle; `expected` goes into `expect`.

    The fake backend has no transformer whose memory could be estimated, nor a server, so that evidence is written by hand.
    """
    wanted = recipe(town, runs, export=["bundle"], expect=expected)
    run = run_directory(wanted)
    run_stages(wanted, run)
    write_memory(run)
    write_serving(run)
    as_if_written_so(run)
    expect = wanted.expect.model_copy(update={"memory_reduction_min": 0.3, "serving": True})
    return Ran(wanted.model_copy(update={"expect": expect}), run)


def as_if_measured(run: Run, name: str) -> None:
    """Have the report of `measure` tell of an experiment whose evidence was written by hand."""

    def told(report: dict[str, Any]) -> None:
        report["metrics"]["experiments"] = sorted({*report["metrics"]["experiments"], name})
        report["artifacts"][f"measure/{name}.json"] = digest(run.path / "measure" / f"{name}.json")

    edit_json(run, "measure/report.json", told)


def write_memory(run: Run, *, lora: int = 30 * MIB, full: int = 100 * MIB, estimated: int | None = None) -> None:
    """`measure/memory.json` as the measure stage writes it for a backend whose memory can be estimated. Bytes.

    Adam keeps two numbers a trained one, so that full fine-tuning takes four times its weights.
    """
    base = full // 4
    adapter = (lora - base) // 4
    rows = read_jsonl(run.path / "prepare" / "train.jsonl")
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)[:3]
    tokens = sum(lengths)

    def side(weights: int, trained: int, guess: int) -> dict[str, Any]:
        parts = {"weight_bytes": weights, "gradient_bytes": trained, "optimizer_bytes": 2 * trained}
        state = sum(parts.values())
        peak = {"peak_process_bytes": state + 300 * MIB, "peak_device_bytes": None}
        steps = {"tokens": [tokens, tokens], "losses": [3.0, 2.9], "estimated": {"training_state": guess}}
        return {**parts, "training_state_bytes": state, **peak, **steps}

    shape = {"batch_size": 3, "tokens_per_row": lengths[0], "tokens": 2 * tokens, "dtype": "float32"}
    write_json(
        run.path / "measure" / "memory.json",
        {
            **shape,
            "stored": {"base": base, "adapter": adapter, "optimizer": 2 * adapter},
            "lora": side(base + adapter, adapter, lora if estimated is None else estimated),
            "full": side(base, base, full),
        },
    )
    as_if_measured(run, "memory")


def write_serving(run: Run) -> None:
    """`measure/serving.json` as the measure stage writes it for a backend whose model can be served."""

    def found(text: str, tokens: int, prompt: int = 9, finish: str = "stop") -> dict[str, Any]:
        counts = {"prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens}
        return {"text": text, "finish": finish, **counts}

    def asked(name: str, kind: str, text: str, tokens: int, prompt: int) -> dict[str, Any]:
        expected = {"text": text, "tokens": tokens, "finish": "stop", "prompt_tokens": prompt}
        both = {"expected": expected, "again": text, "found": found(text, tokens + 1, prompt)}
        return {"name": name, "kind": kind, "max_tokens": 16, **both}

    write_json(
        run.path / "measure" / "serving.json",
        {
            "server": "torch",
            "asked": [
                asked("What is the capital of Tarn?", "question", "It is Bex.", 10, 9),
                asked("What is the capital of Oloo?", "question", "It is Pernig.", 13, 9),
                asked("several turns", "conversation", "The Rhine.", 3, 30),
            ],
            "stream": {"name": "What is the capital of Tarn?", "found": found("It is Bex.", 11)},
            "stop": {
                "name": "What is the capital of Tarn?", "stop": "Bex.", "expected": "It is ",
                "found": found("It is ", 3),
            },
            "length": {
                "name": "What is the capital of Tarn?", "max_tokens": 2, "expected": "It is",
                "found": found("It is", 2, finish="length"),
            },
            "sampling": {
                "name": "What is the capital of Tarn?", "temperature": 2.0, "seeds": [1, 2, 3, 4],
                "texts": ["It is", "Oh.", "Is.", "Bex."], "again": "It is", "greedy": "It is Bex.",
                "likeliest_only": ["It is Bex.", "It is Bex."],
            },
            "special": ["<|im_end|>", "<|im_start|>"],
        },
    )  # fmt: skip
    as_if_measured(run, "serving")
