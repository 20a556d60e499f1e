"""The whole line on the embedded model, nothing mocked: trained, aligned, merged, exported, run, served, compared."""

from __future__ import annotations

import json
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune.core.files import digest, read_jsonl
from finetune.evaluation.answers import is_correct
from finetune.report import summary
from finetune.run import Run

ONLY = os.environ.get("FT_TIER3")  # the runtime that a session is for; every one that is here without it
REPORTS = Path(__file__).parents[2] / "reports"
SECTIONS = ("environment", "data_statistics", "training_metrics", "export_formats", "inference_metrics", "sample_answers",
            "artifacts")  # fmt: skip


def verdicts(run: Run) -> dict[str, dict[str, Any]]:
    return {verdict["name"]: verdict for verdict in summary.verdicts(run)["verdicts"]}


def hop(run: Run, name: str) -> dict[str, Any]:
    return json.loads((run.path / "compare" / f"{name.replace(':', '-')}.json").read_text(encoding="utf-8"))


def test_the_generated_data_is_split_90_to_10(asked, line):
    assert [len(read_jsonl(asked[name])) for name in ("train", "eval", "queries")] == [90, 10, 100]
    assert line.require("prepare").metrics["rows"] == 110  # and 20 general questions
    assert line.require("prepare").metrics["eval_rows"] == 10


def test_every_verdict_of_the_line_passes(line):
    failed = [f"{v['name']}: {v['measured']} {v['compare']} {v['bound']}: {v['why']}" for v in verdicts(line).values()
              if v["passed"] is False]  # fmt: skip
    assert failed == []


def test_every_hop_was_compared(line, recipe):
    assert [each["hop"] for each in summary.exports(line)] == ["merged", *recipe.export]


def test_the_bundle_lists_every_file_with_its_digest(line):
    bundle = line.path / "export" / "bundle"
    listed = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["files"]
    there = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    assert set(listed) == there - {"manifest.json"}
    assert {name: digest(bundle / name) for name in listed} == {name: each["sha256"] for name, each in listed.items()}
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "tokenizer.json", "LICENSE", "README.md"} <= there


def test_gguf_f16_is_within_its_promise(line, family):
    family("gguf")
    seen = hop(line, "gguf:f16")
    assert seen["distributions"]["mean"] < 1e-3
    assert seen["greedy"]["equal"] / seen["greedy"]["compared"] >= 0.95
    assert seen["served"]["compared"] >= 6


def test_gguf_q8_0_is_within_its_promise(line, family):
    family("gguf")
    assert hop(line, "gguf:q8_0")["distributions"]["mean"] < 1e-2


def test_gguf_q4_k_m_is_smaller_and_further_off_than_q8_0(line, family):
    family("gguf")
    coarse, fine = hop(line, "gguf:q4_k_m"), hop(line, "gguf:q8_0")
    assert coarse["bytes"] < fine["bytes"]
    assert coarse["distributions"]["mean"] > fine["distributions"]["mean"]


def test_mlx_in_fp32_answers_every_probe_with_the_same_tokens(line, family):
    family("mlx")
    seen = hop(line, "mlx")
    assert seen["distributions"]["mean"] < 1e-4
    assert seen["greedy"]["equal"] == seen["greedy"]["compared"] >= 25
    assert seen["learned"]["kept"] == seen["learned"]["known"] >= 12


# The others in sessions of their own (make test-e2e-mlx, -ollama): beside each other they take longer than all else.
@pytest.mark.parametrize("name", [ONLY or "gguf"])
def test_its_own_server_answers_100_queries(name, line, asked, family):
    """An OpenAI client's request for each of the 100 generated questions, answered by the server of the export's runtime:
    llama.cpp's, mlx-lm's behind `finetune serve`, Ollama. What came of it is told with the whole line, as JSON."""
    queries = read_jsonl(asked["queries"])
    with SERVERS[family(name)](line) as (base, model):
        answered = [ask(base, model, query["prompt"]) for query in queries]
    right = [
        is_correct(text, query["answer"], query["match"]) for (text, _), query in zip(answered, queries, strict=True)
    ]
    told = json.loads(write_summary(line, name, queries=len(queries), right=sum(right)).read_text(encoding="utf-8"))
    assert len(answered) == 100
    assert sum(right) >= 90, [(q["prompt"], a) for q, a, r in zip(queries, answered, right, strict=True) if not r][:5]
    assert [finish for _, finish in answered].count("stop") >= 95
    assert told["served"] == {"runtime": name, "queries": 100, "right": sum(right)}
    assert any(each["hop"].startswith(name) for each in told["export_formats"])
    assert all(told[section] for section in SECTIONS)


@contextmanager
def llama_server(line: Run) -> Iterator[tuple[str, str]]:
    from finetune.backends.llamacpp.server import serve

    (gguf,) = (line.path / "export" / "gguf-q8_0").glob("*.gguf")
    with serve(gguf, n_ctx=512, name="line") as base:
        yield base, "line"


@contextmanager
def mlx_server(line: Run) -> Iterator[tuple[str, str]]:
    from finetune.serving import serving

    with serving(line, backend="mlx") as base:
        yield base, line.path.name


@contextmanager
def ollama_server(line: Run) -> Iterator[tuple[str, str]]:
    from finetune.backends.ollama import OllamaBackend

    with OllamaBackend().load(line.path / "export" / "ollama-q8_0") as model:
        yield model.client.address, model.name


# By runtime: the base URL of its OpenAI-compatible server, and what the server calls the model.
SERVERS = {"gguf": llama_server, "mlx": mlx_server, "ollama": ollama_server}


def ask(base: str, model: str, prompt: str) -> tuple[str, str]:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 24}
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        (choice,) = json.load(answer)["choices"]
    return choice["message"]["content"], choice["finish_reason"]


def write_summary(line: Run, name: str, **served: int) -> Path:
    """One file a runtime, beside its session's report."""
    REPORTS.mkdir(exist_ok=True)
    path = REPORTS / f"tier3-{name}.json"
    told = {**summary.end_to_end(line), "served": {"runtime": name, **served}}
    path.write_text(json.dumps(told, indent=2, ensure_ascii=False), "utf-8")
    return path


def test_the_summary_has_every_section(line):
    found = json.loads(json.dumps(summary.end_to_end(line)))
    assert all(found[section] for section in SECTIONS)
    assert found["environment"]["packages"]["transformers"]
    assert {"merged", "bundle"} <= set(found["inference_metrics"])
    assert len(found["sample_answers"]) == 10
    assert all(Path(path).exists() for path in found["artifacts"].values())


def test_the_size_of_ollamas_export_is_that_of_the_weights_and_the_modelfile(line, family):
    family("ollama")
    folder = line.path / "export" / "ollama-q8_0"
    (gguf,) = folder.glob("*.gguf")
    assert hop(line, "ollama:q8_0")["bytes"] == gguf.stat().st_size + (folder / "Modelfile").stat().st_size
    assert gguf.stat().st_size > 1_000_000


@pytest.mark.parametrize("name", ["gguf", "mlx", "ollama"])
def test_the_line_was_exported_to(name, family, recipe):
    """Named apart for each runtime, so that `--require NAME` makes its absence a failure."""
    family(name)
    assert any(export.startswith(name) for export in recipe.export)
