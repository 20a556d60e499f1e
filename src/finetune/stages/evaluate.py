"""Ask the model at each point of the run: base, trained, aligned, each loaded afresh from disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from finetune.backends import Backend, get, tokenizer_of
from finetune.core.arithmetic import mean, perplexity
from finetune.core.console import progress
from finetune.core.errors import DataError
from finetune.data import encode, secrecy, sources, templates
from finetune.data.tokenizer import Tokenizer
from finetune.evaluation import REREAD
from finetune.evaluation.answers import is_correct
from finetune.recipe import Recipe
from finetune.run import Run, evidence, layout
from finetune.run.records import evaluated, trained
from finetune.stages import Result


def run(recipe: Recipe, run: Run) -> Result:
    """Write `answers.jsonl` (probes, controls, unseen), `greedy.json` (some of them read again), `rows.json` (training
    rows scored again), `heldout.json` and `preferences.jsonl`, with one entry a phase; and `prompts.jsonl`, the ids that
    each question was asked with. Log-probabilities are natural, means over tokens."""
    backend = get(recipe.backend)
    phases = evidence.phases(run, recipe)
    refuse_secrets(recipe)
    questions = _questions(recipe)
    rows = _sample_rows(recipe, run)
    pairs = evidence.rows(run, layout.PAIRS) if recipe.align else []
    texts = _heldout(recipe)
    row_scores: dict[str, dict[str, evaluated.RowScore]] = {}
    heldout: dict[str, evaluated.HeldOut] = {}
    greedy: dict[str, evaluated.Reread] = {}
    scored: list[evaluated.ScoredPair] = [{"row": pair["row"], "phases": {}} for pair in pairs]
    with progress(len(phases), "evaluate") as bar:
        for number, (phase, (model, adapter)) in enumerate(phases.items(), 1):
            tokenizer = tokenizer_of(recipe, model)
            template = templates.ChatTemplate(name="run", source=evidence.chat_template(run))
            handle = backend.load(model, adapter, **evidence.model_settings(recipe))
            _ask(backend, handle, questions, phase, recipe, tokenizer, template)
            if questions and find_spec("numpy"):
                greedy[phase] = _reread(backend, handle, questions, phase, tokenizer, run.stage_dir("evaluate"))
            if rows:
                row_scores[phase] = _score_rows(backend, handle, rows)
            if texts:
                heldout[phase] = _perplexity(backend, handle, texts, tokenizer)
            if pairs and (phase != "base" or "trained" not in phases):  # the base, where nothing else is aligned
                _score_pairs(backend, handle, pairs, scored, phase)
            bar.update(number)
    prompts: list[evaluated.Prompt] = [
        {"prompt": question["prompt"], "ids": question.pop("prompt_ids")} for question in questions
    ]
    written = [
        evidence.write_rows(run, layout.PROMPTS, prompts),
        evidence.write_rows(run, layout.ANSWERS, cast(list[evaluated.Question], questions)),
    ]
    if greedy:
        written.append(evidence.write(run, layout.GREEDY, greedy))
    if row_scores:
        written.append(evidence.write(run, layout.ROW_SCORES, row_scores))
    if heldout:
        written.append(evidence.write(run, layout.HELDOUT, heldout))
    if pairs:
        written.append(evidence.write_rows(run, layout.SCORED_PAIRS, scored))
    return {"metrics": _summary(questions, heldout), "artifacts": written}


def read_questions(recipe: Recipe) -> None:
    """Read every file that this stage will need, only to raise what is wrong with them."""
    _questions(recipe)
    _heldout(recipe)
    refuse_secrets(recipe)


def refuse_secrets(recipe: Recipe) -> None:
    """Raise DataError for secrets in the questions, unless the recipe says that they may be there."""
    wanted = recipe.evaluate
    if not secrecy.allowed(recipe):
        for path in filter(None, (wanted.probes, wanted.controls, wanted.unseen, wanted.heldout)):
            secrecy.refuse(sources.read_jsonl_objects(path))


def _questions(recipe: Recipe) -> list[dict[str, Any]]:
    questions: list[dict[str, Any]] = []
    faults: list[str] = []
    sets = {"probes": recipe.evaluate.probes, "controls": recipe.evaluate.controls, "unseen": recipe.evaluate.unseen}
    for name, path in sets.items():
        for number, row in enumerate(sources.read_jsonl_objects(path) if path else [], 1):
            lacking = [key for key in ("prompt", "answer") if not isinstance(row.values.get(key), str)]
            if lacking:
                faults.append(f"{row.file}:{row.line}: needs {' and '.join(lacking)} (text)")
                continue
            questions.append(
                {
                    "set": name,
                    "id": str(row.values.get("id", number)),
                    "kind": row.values.get("kind", "trained" if name == "probes" else name),
                    "prompt": row.values["prompt"],
                    "answer": row.values["answer"],
                    "match": row.values.get("match"),
                    "phases": {},
                }
            )
    if faults:
        raise DataError("the questions of 'evaluate' have faults:", faults)
    return questions


def _ask(
    backend: Backend,
    handle: Any,
    questions: list[dict[str, Any]],
    phase: str,
    recipe: Recipe,
    tokenizer: Tokenizer,
    template: templates.ChatTemplate,
) -> None:
    if not questions:
        return
    render: dict[str, Any] = {"tokenizer": tokenizer, "template": template, "system": recipe.template.system}
    chats = [[{"role": "user", "content": question["prompt"]}] for question in questions]
    prompts = [encode.prompt_ids(chat, **render) for chat in chats]
    targets = [encode.answer_ids(chat, q["answer"], **render) for chat, q in zip(chats, questions, strict=True)]
    scores = backend.score(handle, list(zip(prompts, targets, strict=True)))
    size = recipe.evaluate.batch_size or len(prompts)
    answers = [
        answer
        for at in range(0, len(prompts), size)
        for answer in backend.generate(handle, prompts[at : at + size], max_new_tokens=recipe.evaluate.max_new_tokens)
    ]
    for question, ids, answer, logprobs in zip(questions, prompts, answers, scores, strict=True):
        question["prompt_ids"] = ids
        question["phases"][phase] = {
            "text": answer.text,
            "ids": list(answer.ids),
            "finish": answer.finish,
            "correct": is_correct(answer.text, question["answer"], question["match"]),
            "logprob": mean(logprobs),
        }


def _reread(
    backend: Backend, handle: Any, questions: list[dict[str, Any]], phase: str, tokenizer: Tokenizer, folder: Path
) -> evaluated.Reread:
    """Some answers, read again in one pass: `gap` is how much likelier (nats) than a token that was said another one
    was, at worst; an end that was said is the likeliest end-of-turn token. None where nothing was said, not even an end."""
    import numpy

    chosen = questions[:: -(-len(questions) // REREAD)]
    answers = [question["phases"][phase] for question in chosen]
    targets = [[*answer["ids"], *(tokenizer.eos_ids[:1] if answer["finish"] == "stop" else ())] for answer in answers]
    if not any(targets):
        return {"answers": len(chosen), "tokens": 0, "gap": None, "worst": None}
    file = folder / ".greedy.npy"
    backend.distributions(handle, [(q["prompt_ids"], ids) for q, ids in zip(chosen, targets, strict=True)], file)
    rows = iter(numpy.load(file))
    file.unlink()
    places = []
    for question, ids in zip(chosen, targets, strict=True):
        for position, token in enumerate(ids):
            row = next(rows)
            said = max(row[end] for end in tokenizer.eos_ids) if token in tokenizer.eos_ids else row[token]
            places.append((float(row.max() - said), question["prompt"], position, token, int(row.argmax())))
    gap, prompt, position, token, likeliest = max(
        places, key=lambda place: math.inf if math.isnan(place[0]) else place[0]
    )
    return {
        "answers": len(chosen),
        "tokens": len(places),
        "gap": gap,
        "worst": {
            "prompt": prompt,
            "position": position,
            "said": tokenizer.decode([token]),
            "likeliest": tokenizer.decode([likeliest]),
        },
    }


def _sample_rows(recipe: Recipe, run: Run) -> list[trained.Row]:
    """Rows to score again: those of the first logged step and of the last ones, then from the start, up to score_rows."""
    if recipe.train is None:
        return []
    stored = {row["row"]: row for row in evidence.rows(run, layout.TRAIN_ROWS)}
    steps = evidence.steps(run, "train")
    wanted = [row for step in (*steps[:1], *reversed(steps[1:])) for row in step["rows"] if row in stored]
    chosen = list(dict.fromkeys([*wanted, *stored]))[
        : max(recipe.evaluate.score_rows, len(steps[0]["rows"]) if steps else 0)
    ]
    return [stored[row] for row in chosen]


def _score_rows(backend: Backend, handle: Any, rows: list[trained.Row]) -> dict[str, evaluated.RowScore]:
    """For each row: `answer` and `all`: [sum of log-probabilities, tokens], over labelled and over all tokens."""
    scored = backend.score(handle, [(row["input_ids"][:1], row["input_ids"][1:]) for row in rows])
    result: dict[str, evaluated.RowScore] = {}
    for row, logprobs in zip(rows, scored, strict=True):
        labelled = [value for value, label in zip(logprobs, row["labels"][1:], strict=True) if label != -100]
        result[str(row["row"])] = {"answer": [sum(labelled), len(labelled)], "all": [sum(logprobs), len(logprobs)]}
    return result


def _score_pairs(
    backend: Backend, handle: Any, pairs: list[trained.Pair], scored: list[evaluated.ScoredPair], phase: str
) -> None:
    """Sum of log-probabilities of the chosen and the rejected answer of every pair."""
    chosen, rejected = (
        backend.score(handle, [(pair["prompt_ids"], ids) for pair, ids in zip(pairs, answers, strict=True)])
        for answers in ([pair["chosen_ids"] for pair in pairs], [pair["rejected_ids"] for pair in pairs])
    )
    for row, one, other in zip(scored, chosen, rejected, strict=True):
        row["phases"][phase] = {"chosen": sum(one), "rejected": sum(other)}


def _heldout(recipe: Recipe) -> list[str]:
    path = recipe.evaluate.heldout
    if not path:
        return []
    rows = sources.read_jsonl_objects(path)
    faults = [f"{row.file}:{row.line}: needs 'text'" for row in rows if not isinstance(row.values.get("text"), str)]
    if faults:
        raise DataError("the held-out text has faults:", faults)
    return [row.values["text"] for row in rows]


def _perplexity(backend: Backend, handle: Any, texts: list[str], tokenizer: Tokenizer) -> evaluated.HeldOut:
    """exp of the mean negative log-probability over all tokens but each text's first; `texts` has the sum of
    log-probabilities and the count of tokens of each."""
    encoded = [ids for ids in map(tokenizer.encode, texts) if len(ids) > 1]
    scored = backend.score(handle, [(ids[:1], ids[1:]) for ids in encoded])
    each = [[sum(logprobs), len(logprobs)] for logprobs in scored]
    return {"perplexity": perplexity(each), "tokens": sum(map(len, scored)), "texts": each}


def _summary(questions: list[dict[str, Any]], heldout: dict[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    groups: dict[str, Callable[[dict[str, Any]], bool]] = {
        "trained": lambda q: q["set"] == "probes" and q["kind"] == "trained",
        "paraphrase": lambda q: q["set"] == "probes" and q["kind"] != "trained",
        "controls": lambda q: q["set"] == "controls",
        "unseen": lambda q: q["set"] == "unseen",
    }
    for name, belongs in groups.items():
        chosen = [q for q in questions if belongs(q)]
        for phase in chosen[0]["phases"] if chosen else ():
            summary[f"{name}_correct_{phase}"] = sum(q["phases"][phase]["correct"] for q in chosen) / len(chosen)
    return {**summary, **{f"perplexity_{phase}": value["perplexity"] for phase, value in heldout.items()}}
