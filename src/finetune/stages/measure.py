"""The experiments that checks ask for, each in a process of its own; the checks only read what is written here."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from finetune.backends import Job, get, tokenizer_of
from finetune.core.arithmetic import DTYPE_BYTES, mean
from finetune.core.console import progress
from finetune.core.errors import StageError
from finetune.core.files import write_jsonl
from finetune.data import encode, sources, templates
from finetune.experiments import FRESH_TEXTS, MEMORY_STEPS, serving
from finetune.experiments.invariance import measure as invariance
from finetune.experiments.worker import in_fresh_process, score_request, train_request
from finetune.recipe import Recipe
from finetune.run import Run, checkpoints, evidence, layout
from finetune.run.identity import Adaptation
from finetune.run.records.trained import Row
from finetune.stages import Result
from finetune.training.estimate import check_resources, estimate
from finetune.training.job import sft_job

Experiment = Callable[[Recipe, Run, Path], Any]

FRESH_QUESTIONS = 8


def run(recipe: Recipe, run: Run) -> Result:
    """Write `measure/fresh.json`, and `memory.json` and `resume.json` where the recipe expects them."""
    out = run.stage_dir("measure")
    wanted: dict[str, tuple[layout.Document[Any], Experiment]] = {"fresh": (layout.FRESH, _fresh)}
    if recipe.train is not None and recipe.train.method == "lora" and recipe.expect.memory_reduction_min is not None:
        wanted["memory"] = layout.MEMORY, _memory
    if recipe.train is not None and recipe.expect.resume:
        wanted["resume"] = layout.RESUME, _resume
    if recipe.train is not None and recipe.expect.invariance:
        wanted["invariance"] = layout.INVARIANCE, invariance.measure
    if recipe.expect.serving:
        wanted["serving"] = layout.SERVING, serving.measure
    with progress(len(wanted), "measure") as bar:
        for number, (file, experiment) in enumerate(wanted.values(), 1):
            evidence.write(run, file, experiment(recipe, run, out))
            bar.update(number)
    return {
        "metrics": {"experiments": list(wanted)},
        "artifacts": [run.path / file.path for file, _ in wanted.values()],
    }


def _fresh(recipe: Recipe, run: Run, out: Path) -> dict[str, Any]:
    """The merged model scores expected answers and held-out texts in a new process; checks hold them against `evaluate`."""
    model = run.path / "merge" / "model"
    tokenizer = tokenizer_of(recipe, model)
    template = templates.ChatTemplate(name="merged", source=tokenizer.chat_template or "")
    if template.digest != evidence.read(run, layout.TEMPLATE)["sha256"]:
        return {"template_sha256": template.digest, "scores": {}}
    questions = evidence.maybe_rows(run, layout.ANSWERS)[:FRESH_QUESTIONS]
    render: dict[str, Any] = {"tokenizer": tokenizer, "template": template, "system": recipe.template.system}
    pairs = []
    for question in questions:
        chat = [{"role": "user", "content": question["prompt"]}]
        pairs.append([encode.prompt_ids(chat, **render), encode.answer_ids(chat, question["answer"], **render)])
    of = "answers" if questions else "rows" if recipe.train else "pairs"
    rows = _scored_rows(run)[:FRESH_QUESTIONS] if of == "rows" else []
    preferences = evidence.rows(run, layout.PAIRS)[:FRESH_QUESTIONS] if of == "pairs" else []
    pairs += [[row["input_ids"][:1], row["input_ids"][1:]] for row in rows]
    pairs += [[pair["prompt_ids"], pair["chosen_ids"]] for pair in preferences]
    texts = sources.read_jsonl_objects(recipe.evaluate.heldout) if recipe.evaluate.heldout else []
    heldout = [ids for row in texts if len(ids := tokenizer.encode(row.values["text"])) > 1][:FRESH_TEXTS]
    pairs += [[ids[:1], ids[1:]] for ids in heldout]
    request = score_request(recipe.backend, model, None, pairs, evidence.model_settings(recipe, merged=True))
    answer = in_fresh_process(request, out / "fresh-request.json")
    names = [str(place) for place in range(len(questions))] or [str(row["row"]) for row in (*rows, *preferences)]
    means = [mean(values) for values in answer["scores"][: len(names)]]
    return {
        "template_sha256": template.digest,
        "of": of,
        "scores": dict(zip(names, means, strict=True)),
        "heldout": [[sum(values), len(values)] for values in answer["scores"][len(names) :]],
        "peak_bytes": answer["peak_bytes"],
    }


def _scored_rows(run: Run) -> list[Row]:
    """The prepared rows that `evaluate` scored last: it takes a sample, and others could be held against nothing."""
    *_, scored = evidence.read(run, layout.ROW_SCORES).values()
    return [row for row in evidence.rows(run, layout.TRAIN_ROWS) if str(row["row"]) in scored]


def _memory(recipe: Recipe, run: Run, out: Path) -> dict[str, Any]:
    """LoRA and full fine-tuning for two steps at the same shape: same optimizer, batch and checkpointing."""
    job = sft_job(recipe, run, out)
    rows = evidence.rows(run, layout.TRAIN_ROWS)
    batch = job.options["per_device_train_batch_size"]
    longest = sorted(rows, key=lambda row: -len(row["input_ids"]))[:batch]
    width = len(longest[0]["input_ids"])
    file = out / "memory-rows.jsonl"
    write_jsonl(file, [{**row, "row": i} for i in range(MEMORY_STEPS) for row in longest])
    result: dict[str, Any] = {"batch_size": batch, "tokens_per_row": width, "dtype": recipe.model.dtype}
    rounds = MEMORY_STEPS if len(longest) == batch else MEMORY_STEPS**2  # few rows: a step takes all of the file
    result |= {"tokens": rounds * sum(len(row["input_ids"]) for row in longest), "stored": _stored(recipe, run, job)}
    check_resources(recipe, run, method="full")
    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    for method in ("lora", "full"):
        work = out / f"memory-{method}"
        options = {**job.options, "max_steps": MEMORY_STEPS, "save_strategy": "no", "eval_strategy": "no"}
        options |= {"gradient_accumulation_steps": 1, "early_stopping_patience": None, "report_to": "none"}
        trial = replace(
            job, method=method, out=work, rows=file, eval_rows=None, adapter=None, options=options,
            lora=job.lora if method == "lora" else None,
            settings=evidence.model_settings(recipe, merged=method == "full"),  # only LoRA trains on quantized weights
        )  # fmt: skip
        guess = estimate(
            config, recipe.train, width, method=method, dtype=recipe.model.dtype,  # type: ignore[arg-type]
            quantization=recipe.model.quantization,
        )  # fmt: skip
        answer = in_fresh_process(train_request(recipe.backend, trial), out / f"memory-{method}-request.json")
        facts = answer["facts"]
        result[method] = {
            "weight_bytes": facts["weight_bytes"],
            "gradient_bytes": facts["gradient_bytes"],
            "optimizer_bytes": facts["optimizer_bytes"],
            "training_state_bytes": facts["weight_bytes"] + facts["gradient_bytes"] + facts["optimizer_bytes"],
            "peak_process_bytes": answer["peak_bytes"],
            "peak_device_bytes": facts.get("device_peak_bytes"),
            "tokens": [step["tokens"] for step in answer["steps"]],
            "losses": [step["loss"] for step in answer["steps"]],
            "estimated": guess.as_dict(),
        }
        shutil.rmtree(work, ignore_errors=True)
    file.unlink()
    return result


def _stored(recipe: Recipe, run: Run, job: Job) -> dict[str, int | None]:
    """Bytes of what this run has on disk: the base, as it is in memory; the adapter's tensors; the optimizer's state in the
    newest checkpoint (None without one, or where it is no file of PyTorch's, which is a zip)."""
    size = DTYPE_BYTES[recipe.model.dtype]
    tensors = get(recipe.backend).tensors(job.model)  # a tied matrix may be stored under two names
    unique = {facts.sha256 if len(facts.shape) > 1 else name: facts.shape for name, facts in tensors.items()}
    base = sum(size * math.prod(shape) for shape in unique.values())
    adapter = sum(map(evidence.tensor_bytes, (run.path / layout.TRAINED.path).glob("*.safetensors")))
    states = [path for folder in checkpoints.stored(run.path / "train") if (path := folder / "optimizer.pt").is_file()]
    optimizer = None
    if states and zipfile.is_zipfile(states[-1]):
        with zipfile.ZipFile(states[-1]) as archive:
            optimizer = sum(part.file_size for part in archive.infolist() if "/data/" in part.filename)
    return {"base": base, "adapter": adapter, "optimizer": optimizer}


def _as_trained(job: Job, run: Run, step: int) -> dict[str, Any]:
    """The options that the run's own training went on with from a step: those of the recipe, or as they were adapted."""
    adapted = run.require("train").metrics.get("adaptations", [])
    done = [Adaptation.model_validate(each) for each in adapted if each["step"] <= step]
    return done[-1].applied(job.options) if done else dict(job.options)


def _resume(recipe: Recipe, run: Run, out: Path) -> dict[str, Any]:
    """Train the last part again from a stored checkpoint, in a new process; then compare."""
    steps = evidence.steps(run, "train")
    last = steps[-1]["step"]
    usable = [c for c in checkpoints.stored(run.path / "train") if checkpoints.step_of(c) < last]
    if not usable:
        raise StageError(
            "expect.resume needs a checkpoint before the last step: lower train.save_steps or raise save_total_limit"
        )
    work = out / "resume"
    shutil.rmtree(work, ignore_errors=True)
    job = sft_job(recipe, run, work)
    begin = checkpoints.step_of(usable[-1])
    options = {**_as_trained(job, run, begin), "report_to": "none"}
    answer = in_fresh_process(
        train_request(recipe.backend, replace(job, resume=usable[-1], options=options)), out / "resume-request.json"
    )
    name = "adapter" if job.method == "lora" else "model"
    backend = get(recipe.backend)
    straight, again = backend.tensors(run.path / "train" / name), backend.tensors(work / name)
    differing = [key for key in straight if key not in again or straight[key].sha256 != again[key].sha256]
    result = {
        "from_step": begin,
        "to_step": last,
        "parameters": run.require("train").metrics.get("trainable_parameters"),
        "parameters_resumed": answer["facts"].get("trainable_parameters"),
        "losses": {str(step["step"]): step["loss"] for step in steps if step["step"] > begin},
        "losses_resumed": {str(step["step"]): step["loss"] for step in answer["steps"]},
        "tensors": len(straight),
        "tensors_differing": [*differing, *(key for key in again if key not in straight)],
    }
    shutil.rmtree(work, ignore_errors=True)
    return result
