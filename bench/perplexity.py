"""What texts of known quality score with a reference model, as the tables of docs/perplexity.md.

    python bench/perplexity.py [--scorer smollm2-135m] [--out DIR]

English from english.jsonl, and what models write: the embedded one, the same with noise on its weights, and a tiny one
trained from scratch for a while. About 5 minutes on two cores; nothing is downloaded but the embedded model.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune.core.files import write_json
from finetune.recipe import load_mapping
from finetune.run import Run
from finetune.stages.pipeline import run_stages
from finetune.testing.perplexity import EMBEDDED, Perplexity, Scorer, load, measure

TOKENS, TEMPERATURE = 50, 0.7  # as in a spec's `inference` section
PERPLEXITY_MAX, DISTINCT_MIN = 500.0, 0.4  # its default bounds
SEEDS = (0, 1)
STEPS = (25, 50, 100, 500)
NOISE = (0.1, 0.2, 0.3, 0.5, 1.0)
PROMPTS = (
    "Once upon a time", "The weather in the mountains", "To bake good bread, you", "In the year 1905", "My grandmother",
    "The committee decided", "Water boils when", "She opened the door and", "The best way to learn a language",
    "The ship left the harbour",
)  # fmt: skip
STORIES = (
    "Once upon a time",
    "Once upon a time, there was",
    "One day,",
    "One sunny day, a little girl",
    "There was a boy",
)
TINY = "tiny:llama?vocab_size=1000&hidden_size=128&num_hidden_layers=3&intermediate_size=384"
LOOPS = (
    "the", " and", "I", "!", " the cat", " I don't know.", " very, very,", " It is a dog.", " and the man and the woman",
    " He went to the shop.", " She said that she did not know what to do.",
    " The boy was happy because he had found his little red ball.",
    " One day he went to the park with his mother and played with his friends until the sun went down.",
)  # fmt: skip

Sample = tuple[str, str]  # prompt, completion


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scorer", default=EMBEDDED)
    parser.add_argument("--out", type=Path, default=Path("runs/perplexity"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    scorer = load(options.scorer)
    scored: dict[str, list[tuple[Sample, Perplexity]]] = {}
    for band, samples in bands(options.out):
        scored[band] = [((prompt, text), measure(scorer, text, prompt)) for prompt, text in samples]
        values = [result.value for _, result in scored[band]]
        print(f"{band}: {min(values):.4g} .. {max(values):.4g}", flush=True)
    write_json(options.out / "perplexity.json", {band: [as_row(*one) for one in rows] for band, rows in scored.items()})
    print(f"\nPerplexity by {options.scorer}\n")
    show(scored)
    print("\nShare of distinct tokens, by length\n")
    show_distinct(scorer)


def bands(out: Path) -> Iterator[tuple[str, list[Sample]]]:
    for kind in ("published", "written"):
        yield f"English, {kind}", [("", row["text"]) for row in english() if row["kind"] == kind]
    words = " ".join(row["text"] for row in english()).split()
    yield (
        "words of English in random order",
        [("", " ".join(random.Random(seed).sample(words, 38))) for seed in range(12)],
    )

    embedded = load(EMBEDDED)
    yield f"{EMBEDDED}, as it is", written_by(embedded, PROMPTS)
    weights = {name: tensor.clone() for name, tensor in embedded.handle.model.state_dict().items()}
    for level in NOISE:
        with noise(embedded, weights, level):
            samples = written_by(embedded, PROMPTS)
        yield f"{EMBEDDED}, weights with noise of {level:g} of their spread", samples

    for steps, model in trained(out):
        yield f"tiny model, {steps} steps", written_by(load(str(model)), STORIES, seeds=range(4))
    shutil.rmtree(out / "tiny")

    tokenizer = embedded.tokenizer
    yield "loops", [("Once upon a time", repeated(tokenizer, text, TOKENS)) for text in LOOPS]
    draws = [random.Random(seed) for seed in range(200)]  # a bound is made of the lowest
    yield (
        "random tokens",
        [("", tokenizer.decode(draw.sample(range(17, tokenizer.vocab_size), TOKENS))) for draw in draws],
    )
    letters = "abcdefghijklmnopqrstuvwxyz    "
    yield "random letters", [("", "".join(draw.choices(letters, k=110))) for draw in draws]


def english() -> list[dict[str, str]]:
    return [json.loads(line) for line in (Path(__file__).parent / "english.jsonl").read_text("utf-8").splitlines()]


class noise:
    """While inside, a scorer's weights have Gaussian noise of `level` times each tensor's standard deviation."""

    def __init__(self, scorer: Scorer, weights: dict[str, Any], level: float) -> None:
        self.model, self.weights, self.level = scorer.handle.model, weights, level

    def __enter__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        changed = {
            name: tensor + self.level * tensor.std() * torch.randn(tensor.shape, generator=draw)
            for name, tensor in self.weights.items()
        }
        self.model.load_state_dict(changed)

    def __exit__(self, *error: object) -> None:
        self.model.load_state_dict(self.weights)


def written_by(scorer: Scorer, prompts: Sequence[str], seeds: Iterable[int] = SEEDS) -> list[Sample]:
    """What a model adds to each prompt: TOKENS tokens at TEMPERATURE, never the token that ends a text."""
    rows = [scorer.tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    samples = []
    for seed in seeds:
        torch.manual_seed(seed)
        written = scorer.handle.model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
            max_new_tokens=TOKENS, suppress_tokens=list(scorer.tokenizer.eos_ids),
        )  # fmt: skip
        texts = [scorer.tokenizer.decode(row[width:].tolist(), skip_special=True) for row in written]
        samples += zip(prompts, texts, strict=True)
    return samples


def trained(out: Path) -> Iterator[tuple[int, Path]]:
    """A tiny model after so many steps on simple stories."""
    recipe = load_mapping(
        {
            "name": "tiny",
            "model": {"path": TINY, "device": "cpu"},
            "data": {"path": "shipped:stories/train.jsonl", "format": "text"},
            "train": {
                "method": "full",
                "max_steps": max(STEPS),
                "per_device_train_batch_size": 8,
                "learning_rate": 3e-3,
                "warmup_steps": 20,
                "max_length": 256,
                "save_steps": 25,
                "save_total_limit": None,
            },
            "output_dir": str(out),
        }
    )
    run = Run(out / "tiny")
    run_stages(recipe, run, ["train"])
    for steps in STEPS:
        yield steps, run.path / "train" / f"checkpoint-{steps}"


def repeated(tokenizer: Any, text: str, tokens: int) -> str:
    ids = tokenizer.encode(text)
    return str(tokenizer.decode((ids * tokens)[:tokens]))


def show(scored: dict[str, list[tuple[Sample, Perplexity]]]) -> None:
    print("| text | n | tokens | perplexity: min | median | max | distinct: min | median | max | pass |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for band, rows in scored.items():
        values, distinct = [each.value for _, each in rows], [each.distinct for _, each in rows]
        tokens = [each.tokens for _, each in rows]
        cells = [band, str(len(rows)), f"{min(tokens)} to {max(tokens)}"]
        cells += [f"{number:.3g}" for number in (min(values), statistics.median(values), max(values))]
        cells += [f"{number:.2f}" for number in (min(distinct), statistics.median(distinct), max(distinct))]
        cells.append(str(sum(r.value <= PERPLEXITY_MAX and r.distinct >= DISTINCT_MIN for _, r in rows)))
        print(f"| {' | '.join(cells)} |")


def show_distinct(scorer: Scorer) -> None:
    """Longer texts repeat their common words, so the share depends on the length."""
    ids = scorer.tokenizer.encode(" ".join(row["text"] for row in english()))
    print("| tokens | English: min | median | loops: max |")
    print("|---|---|---|---|")
    for length in (10, 25, 50, 100, 200, 400):
        parts = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
        shares = sorted(len(set(part)) / length for part in parts)
        loops = [(scorer.tokenizer.encode(text) * length)[:length] for text in LOOPS]
        most = max(len(set(loop)) / length for loop in loops)
        print(f"| {length} | {shares[0]:.2f} | {statistics.median(shares):.2f} | {most:.2f} |")


def as_row(sample: Sample, result: Perplexity) -> dict[str, Any]:
    return {"prompt": sample[0], "completion": sample[1], **vars(result)}


if __name__ == "__main__":
    main()
