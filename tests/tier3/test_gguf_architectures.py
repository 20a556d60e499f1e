"""Every architecture with constants that are nobody's default: the GGUF file computes what the model does, and would not
with any one constant taken in silence; what llama.cpp cannot compute is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from finetune.backends import get
from finetune.core.errors import UsageError
from finetune.data.sources import resolve
from finetune.export import Source
from finetune.export import gguf as exporter
from finetune.models import tiny
from support.gguf_files import rewrite

# Mean KL divergence in nats over 47 positions; measured: f32 5e-9 to 3e-7 (llama.cpp looks GELU up in a table of 16-bit
# numbers), f16 7e-7 to 2e-5.
BOUNDS = {"f32": 1e-6, "f16": 5e-5}
# llama.cpp knows no window in phi3: 8 tokens are refused, 300 cut the context (below).
CHANGES: dict[str, dict[str, Any]] = {"phi3": {"sliding_window": 300, "partial_rotary_factor": 0.5}}
SCORES = "the factor of the attention scores (query_pre_attn_scalar 9) is in the weights"
MENDED = {
    "llama": [],
    "qwen2": [],
    "qwen3": [],
    "gpt2": ["gpt2.feed_forward_length is 96; the converter writes 256"],
    "phi": [
        "phi2.feed_forward_length is 128; the converter writes 256",
        "phi2.rope.freq_base is 876; the converter leaves it out",
    ],
    "phi3": ["the context length is 300 instead of 512: llama.cpp knows no sliding window in 'phi3'"],
    "gemma": ["gemma.rope.freq_base is 543; the converter leaves it out"],
    "gemma2": [SCORES, "gemma2.rope.freq_base is 654; the converter leaves it out"],
    "gemma3_text": [SCORES.replace("9", "20")],
}  # fmt: skip
BROKEN = [
    *(
        (name, f"{arch}.rope.freq_base", value)
        for name, arch in {
            "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi": "phi2", "phi3": "phi3",
            "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
        }.items()
        for value in (10000.0, None)
    ),
    *(
        (name, f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
        for name, arch in {
            "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3",
            "gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3",
        }.items()
    ),
    ("gpt2", "gpt2.attention.layer_norm_epsilon", 1e-5),
    ("phi", "phi2.attention.layer_norm_epsilon", 1e-5),
    ("phi", "phi2.rope.dimension_count", 16),
    ("phi3", "phi3.rope.dimension_count", 16),
    ("gemma2", "gemma2.attention.sliding_window", 4096),
    ("gemma2", "gemma2.attn_logit_softcapping", 50.0),
    ("gemma2", "gemma2.final_logit_softcapping", 30.0),
    ("gemma3_text", "gemma3.attention.sliding_window", 512),
    ("gemma3_text", "gemma3.rope.freq_base_swa", 10000.0),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def here(family):
    """The converter in this process: its imports take longer than its work."""
    family("gguf")
    from finetune.export import gguf_convert

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "_work", lambda command, **options: getattr(gguf_convert, command)(**options))
        yield


@dataclass(frozen=True)
class Case:
    """A model, the ids it is asked, its own log-probabilities (positions x vocabulary), and its greedy answer."""

    model: Path
    ids: list[int]
    rows: Any
    answer: tuple[int, ...]

    @property
    def pairs(self):
        return [(self.ids[:1], self.ids[1:])]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return resolve("shipped:quorra/train.jsonl").read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def case(texts, tmp_path_factory):
    """A function: the case of an architecture, made once for each set of changes."""
    import numpy

    made: dict[str, Case] = {}
    torch = get("torch")

    def make(architecture: str, **changes: Any) -> Case:
        name = f"{architecture} {sorted(changes.items())}"
        if name not in made:
            folder = tmp_path_factory.mktemp(architecture)
            model = tiny.make(folder / "model", architecture, texts=texts, odd=True, **changes)
            handle = torch.load(model, dtype="float32", device="cpu")
            ids = handle.tokenizer.encode(" ".join(texts[:3]))[:48]
            torch.distributions(handle, [(ids[:1], ids[1:])], folder / "rows.npy")
            (answer,) = torch.generate(handle, [ids[:20]], max_new_tokens=16)
            made[name] = Case(model, ids, numpy.load(folder / "rows.npy"), answer.ids)
        return made[name]

    return make


@pytest.fixture(scope="module")
def file(case, tmp_path_factory):
    """A function: what the exporter makes of an architecture as f32 or f16, made once."""
    made: dict[tuple[str, str], Any] = {}

    def make(architecture: str, variant: str = "f32") -> Any:
        if (architecture, variant) not in made:
            model = case(architecture, **CHANGES.get(architecture, {})).model
            out = tmp_path_factory.mktemp(f"{architecture}-{variant}")
            made[architecture, variant] = exporter.export(Source(name="tiny", model=model), variant, out)
        return made[architecture, variant]

    return make


def divergence(case: Case, gguf: Path, folder: Path) -> float:
    """Mean KL divergence of the file from the model, in nats."""
    import numpy

    backend = get("llamacpp")
    backend.distributions(backend.load(gguf, threads=1), case.pairs, folder / "theirs.npy")
    ours, theirs = case.rows.astype("float64"), numpy.load(folder / "theirs.npy").astype("float64")
    return float((numpy.exp(ours) * (ours - theirs)).sum(-1).mean())


def test_the_sweep_covers_every_architecture():
    assert set(MENDED) == set(tiny.ARCHITECTURES) == set(tiny.ODD)
    assert len(MENDED) == 9
    assert {name for name, _, _ in BROKEN} == set(tiny.ARCHITECTURES) and len(BROKEN) == 32


@pytest.mark.parametrize("variant", BOUNDS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_file_computes_what_the_model_does(architecture, variant, case, file, tmp_path):
    expected = case(architecture, **CHANGES.get(architecture, {}))
    assert len(expected.ids) == 48
    gguf = file(architecture, variant).path
    assert abs(divergence(expected, gguf, tmp_path)) < BOUNDS[variant]
    backend = get("llamacpp")
    (answer,) = backend.generate(backend.load(gguf, threads=1), [expected.ids[:20]], max_new_tokens=16)
    assert answer.ids == expected.answer


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_was_mended_is_told(architecture, file):
    mended = file(architecture).mended
    assert len(mended) == len(MENDED[architecture])
    for said, begins in zip(mended, MENDED[architecture], strict=True):
        assert said.startswith(begins)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_no_ordinary_token_ends_a_turn(architecture, case, file):
    """The converter gives every Gemma CodeGemma's end of turn, 107."""
    ours = get("torch").tokenizer(case(architecture, **CHANGES.get(architecture, {})).model)
    ends = [token for text in ("<|im_end|>", "<|endoftext|>") for token in ours.encode(text)]
    assert list(get("llamacpp").tokenizer(file(architecture).path).eos_ids) == ends


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_file_tells_the_constants_of_the_model(architecture, case, file):
    expected = get("torch").constants(case(architecture, **CHANGES.get(architecture, {})).model)
    found = get("llamacpp").constants(file(architecture).path)
    if architecture == "phi3":
        assert found.pop("max_position_embeddings") == expected.pop("sliding_window") == 300
        assert "sliding_window" not in found
    told = sorted(expected.keys() & found.keys())
    assert len(told) >= 11
    assert {name: found[name] for name in told} == pytest.approx({name: expected[name] for name in told}, rel=1e-6)


@pytest.mark.parametrize(("architecture", "key", "value"), BROKEN)
def test_one_wrong_constant_is_seen_in_the_probabilities(architecture, key, value, case, file, tmp_path):
    broken = rewrite(file(architecture).path, tmp_path / "broken.gguf", {key: value})
    assert divergence(case(architecture, **CHANGES.get(architecture, {})), broken, tmp_path) > 2 * BOUNDS["f16"]


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_without_the_factor_in_the_weights_the_scores_are_wrong(architecture, case, tmp_path, monkeypatch):
    from finetune.export import gguf_check

    plan = gguf_check.plan
    monkeypatch.setattr(gguf_check, "plan", lambda config: replace(plan(config), query_factor=1.0))
    model = case(architecture).model
    made = exporter.export(Source(name="tiny", model=model), "f32", tmp_path)
    assert divergence(case(architecture), made.path, tmp_path) > 2 * BOUNDS["f16"]


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {
            "rope_type": "llama3", "rope_theta": 321.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 321.0, "factor": 3.0}}),
        ("qwen2", {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 300, "max_window_layers": 1}),
        ("qwen2", {"rope_parameters": {
            "rope_type": "yarn", "rope_theta": 777.0, "factor": 4.0, "original_max_position_embeddings": 128,
        }}),
        ("phi", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
        ("phi3", {"sliding_window": None, "tie_word_embeddings": True}),
        ("gemma2", {"num_hidden_layers": 3}),
        ("gpt2", {"tie_word_embeddings": False}),
    ],
)  # fmt: skip
def test_other_shapes_of_an_architecture_agree_too(architecture, changes, case, tmp_path):
    expected = case(architecture, **changes)
    made = exporter.export(Source(name="tiny", model=expected.model), "f32", tmp_path)
    assert abs(divergence(expected, made.path, tmp_path)) < BOUNDS["f32"]


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("phi3", {}, "attends to the last 8 tokens only (sliding_window), and llama.cpp knows no window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "the last 8 tokens only"),
        (
            "gemma3_text",
            {"num_hidden_layers": 4},
            "full attention to every sixth layer of 'gemma3_text' and no other, and",
        ),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, "full attention to every second layer"),
        ("gemma", {"tie_word_embeddings": False}, "reads the output matrix of 'gemma' from the embedding"),
        ("gpt2", {"activation_function": "relu"}, "with the activation gelu_pytorch_tanh, and this model has 'relu'"),
        ("gpt2", {"scale_attn_weights": False}, "with scale_attn_weights: True, and this model has False"),
        ("phi", {"qk_layernorm": True}, "Can not map tensor"),
        ("qwen3", {"attention_bias": True}, "wrong number of tensors"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_before_training(architecture, changes, said, texts, tmp_path):
    model = tiny.make(tmp_path / "model", architecture, texts=texts, odd=True, **changes)
    with pytest.raises(UsageError, match=re.escape(said)):
        exporter.rehearse(model, "f16")
