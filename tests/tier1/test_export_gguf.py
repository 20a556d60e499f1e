"""What of the GGUF export needs no heavy package: the plan made from a config, and how its process is heard."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finetune.core import memory
from finetune.core.errors import MissingError, ResourceError, StageError, UsageError
from finetune.export import Source, gguf
from finetune.export.gguf_metadata import ARCHITECTURES, default_kinds, plan

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 321.0},
}  # fmt: skip


def config(model_type: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **SIZES, **changes}


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt2"}))
def test_the_rotary_base_is_always_written(architecture):
    activation = ARCHITECTURES[architecture].activations[0]
    kinds = default_kinds(6, ARCHITECTURES[architecture].period) if ARCHITECTURES[architecture].period else None
    changes = {"layer_types": kinds, "num_hidden_layers": 6, "sliding_window": 512} if kinds else {}
    made = plan(config(architecture, hidden_act=activation, **changes))
    assert made.metadata["rope.freq_base"] == 321.0
    assert made.metadata["attention.head_count_kv"] == 2
    assert made.metadata["attention.layer_norm_rms_epsilon"] == 1e-5


def test_layers_with_a_window_have_a_rotary_base_of_their_own():
    rope = {"full_attention": {"rope_theta": 765.0}, "sliding_attention": {"rope_theta": 321.0}}
    changes = {"num_hidden_layers": 6, "layer_types": default_kinds(6, 6), "sliding_window": 8, "rope_parameters": rope}
    made = plan(config("gemma3_text", **changes)).metadata
    assert (made["rope.freq_base"], made["rope.freq_base_swa"], made["attention.sliding_window"]) == (765.0, 321.0, 8)


def test_gpt2_has_no_rotary_base_and_its_own_inner_size():
    names = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "layer_norm_epsilon": 2e-3}
    made = plan({"model_type": "gpt2", **names, "activation_function": "gelu_new", "n_inner": 96})
    assert "rope.freq_base" not in made.metadata
    assert made.metadata["feed_forward_length"] == 96
    assert plan({"model_type": "gpt2", **names, "n_inner": None}).metadata["feed_forward_length"] == 256


@pytest.mark.parametrize(
    ("window", "context"),
    [(None, 4096), (8192, 4096), (4096, 4096), (2047, 2047), (256, 256)],
)
def test_a_window_that_llama_cpp_does_not_know_cuts_the_context(window, context):
    made = plan(config("phi3", sliding_window=window))
    assert made.metadata["context_length"] == context
    assert bool(made.mended) == (context < 4096)


def test_a_window_too_small_to_be_a_context_is_refused():
    with pytest.raises(UsageError, match="attends to the last 255 tokens only"):
        plan(config("mistral", sliding_window=255))


def test_a_window_that_is_switched_off_changes_nothing():
    full = ["full_attention"] * 2
    made = plan(config("qwen2", use_sliding_window=False, sliding_window=300, layer_types=full))
    assert made.metadata["context_length"] == 4096 and not made.mended


@pytest.mark.parametrize(
    ("layers", "scalar", "heads", "factor"),
    [(2, 16, 4, 1.0), (2, 64, 4, 0.5), (46, 32, 2, 1.0), (46, 16, 2, 2**0.5)],
)
def test_scores_scaled_otherwise_than_in_llama_cpp_go_into_the_weights(layers, scalar, heads, factor):
    kinds = default_kinds(layers, 2)
    changes = {"num_hidden_layers": layers, "num_attention_heads": heads, "head_dim": 16, "layer_types": kinds}
    made = plan(config("gemma2", **changes, sliding_window=512, query_pre_attn_scalar=scalar))
    assert made.query_factor == pytest.approx(factor)
    assert bool(made.mended) == (factor != 1.0)


def test_an_architecture_that_is_not_in_the_table_is_left_alone_and_told():
    made = plan({"model_type": "somebody_elses"})
    assert made.metadata == {} and "somebody_elses" in made.notes[0]


def test_exact_gelu_is_told():
    assert "tanh approximation" in plan(config("phi", hidden_act="gelu", tie_word_embeddings=False)).notes[0]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"dtype": "float32"}))
    (folder / "model.safetensors").write_bytes(bytes(4000))
    return folder


@pytest.fixture
def process(monkeypatch):
    """A function: what the process of gguf_convert leaves as its answer from now on (nothing: no file), and what it prints.
    Everything it is asked is noted, without the file that the answer is to go into."""
    monkeypatch.setattr(gguf, "PACKAGES", {})
    asked: list[list[str]] = []

    def answers(answer: str, stderr: str = "", code: int = 0):
        def run(command, **_):
            asked.append(command[:-1])
            if answer:
                Path(command[-1]).write_text(answer)
            return subprocess.CompletedProcess(command, code, '{"mended": ["printed"]}', stderr)

        monkeypatch.setattr(subprocess, "run", run)
        return asked

    return answers


def test_an_error_of_the_process_is_raised_as_what_it_is(model, process):
    process('{"error": "no such thing", "kind": "MissingError"}')
    with pytest.raises(MissingError, match="no such thing"):
        gguf.rehearse(model, "f16")


def test_a_process_that_dies_tells_its_last_line(model, process):
    process("", "warning\nggml.c:12: assertion failed\n", -6)
    with pytest.raises(StageError, match="ggml.c:12: assertion failed"):
        gguf.rehearse(model, "f16")
    process("", "", -9)
    with pytest.raises(StageError, match="exit code -9"):
        gguf.rehearse(model, "f16")


def test_only_a_quantized_variant_asks_for_the_quantizer(model, process):
    asked = process('{"mended": [], "notes": []}')
    for variant in ("f16", "q4_k_m"):
        gguf.rehearse(model, variant)
    assert [json.loads(command[-1])["quantized"] for command in asked] == [False, True]


@pytest.mark.parametrize(("dtype", "sixteen"), [("float32", "f16"), ("float16", "f16"), ("bfloat16", "bf16")])
def test_a_quantized_file_is_made_from_16_bits_of_the_models_kind(model, process, tmp_path, dtype, sixteen):
    (model / "config.json").write_text(json.dumps({"dtype": dtype}))
    asked = process('{"error": "enough seen", "kind": "StageError"}')
    with pytest.raises(StageError, match="enough seen"):
        gguf.export(Source(name="a", model=model), "q8_0", tmp_path / "out")
    assert json.loads(asked[0][-1])["outtype"] == sixteen
    done = tmp_path / "done.gguf"
    done.write_bytes(b"x")
    with pytest.raises(StageError, match="enough seen"):
        gguf.export(Source(name="a", model=model, done={f"gguf:{sixteen}": done}), "q8_0", tmp_path / "out")
    assert (asked[1][-2], json.loads(asked[1][-1])["source"]) == ("quantize", str(done))


def test_a_full_disk_is_seen_before_anything_is_written(model, process, tmp_path, monkeypatch):
    asked = process("")
    monkeypatch.setattr(memory, "disk_free", lambda path: 1999)
    with pytest.raises(ResourceError, match="needs about 2.0 KiB on the disk of .*, which has 2.0 KiB left"):
        gguf.export(Source(name="a", model=model), "f16", tmp_path / "out")
    assert asked == []


def test_a_missing_package_says_how_to_get_it(model, monkeypatch):
    monkeypatch.setattr(gguf, "PACKAGES", {"no_such_module": "no-such-package", "json": "json"})
    with pytest.raises(
        MissingError, match=r"package no-such-package\. Install with: pip install 'finetune-proof\[gguf\]'"
    ):
        gguf.rehearse(model, "f16")
