"""Every architecture through the MLX exporter, with constants that no library has for a default: the same numbers as
transformers, or a refusal that names the constant. And breaking one constant in an export is seen."""

from __future__ import annotations

import importlib.util
import json
import random

import pytest

from finetune.backends import get
from finetune.core.errors import UsageError
from finetune.export import Source
from finetune.models import tiny

# Measured: 3e-13 to 4e-12 nats, of float32's rounding; Gemma 1.2e-7, see test_gemma_is_told_to_differ_in_its_activation.
KL_MEAN = {"gemma": 1e-6}
KL_MEAN_DEFAULT = 1e-10
KL_MEAN_OTHER = 1e-9  # Gemma 3's scaled norms keep their epsilon: 1.1e-10
# What mlx-lm has no code for is left out here (test_what_mlx_lm_cannot_do_is_refused has it), and Gemma 3's layers are
# arranged otherwise than mlx-lm would take for granted.
OWN = {
    "gpt2": {"n_inner": None},
    "gemma2": {"sliding_window": 2048},
    "gemma3_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "phi3": {"sliding_window": None},
}
# A constant of each export, and what a library would take in its place.
BROKEN = {
    "llama": {"rope_theta": 10000.0, "rms_norm_eps": 1e-5},
    "gpt2": {"layer_norm_epsilon": 1e-5},
    "qwen2": {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6},
    "qwen3": {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6},
    "gemma": {"rope_theta": 10000.0, "rms_norm_eps": 1e-6},
    "gemma2": {
        "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {
        "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256,
        "sliding_window": 512, "sliding_window_pattern": 1,
    },
    "phi": {"rope_theta": 10000.0, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
    "phi3": {"rope_theta": 10000.0, "rms_norm_eps": 1e-5},
}  # fmt: skip
IDS = random.Random(7).sample(range(3, 290), 41)
PAIRS = [(IDS[:1], IDS[1:])]
SETTINGS = {"device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def mlx(skip_or_fail):
    if importlib.util.find_spec("mlx_lm") is None:
        skip_or_fail("mlx", "MLX is not installed; pip install 'finetune-proof[mlx]'")
    return get("mlx")


def odd(folder, architecture, **changes):
    return tiny.make(folder, architecture, odd=True, **{**OWN.get(architecture, {}), **changes})


def exported(model, out, variant=""):
    from finetune.export import mlx as exporter

    return exporter.export(Source(name="tiny", model=model), variant, out)


def distributions(backend, model, file):
    import numpy

    backend.distributions(backend.load(model, **SETTINGS), PAIRS, file)
    found = numpy.load(file).astype("float64")
    return found - numpy.log(numpy.exp(found).sum(-1, keepdims=True))  # a float32 row sums to one within 1e-6 only


def divergence(theirs, mine):
    """Mean Kullback-Leibler divergence over the positions (nats)."""
    import numpy

    return float((numpy.exp(theirs) * (theirs - mine)).sum(-1).mean())


@pytest.fixture(scope="module")
def made(mlx, tmp_path_factory):
    """A function: an architecture's odd model, its export and transformers' distributions, made once."""
    known = {}

    def make(architecture):
        if architecture not in known:
            folder = tmp_path_factory.mktemp(architecture)
            model = odd(folder / "model", architecture)
            export = exported(model, folder / "mlx")
            known[architecture] = (model, export, distributions(get("torch"), model, folder / "torch.npy"))
        return known[architecture]

    return make


def test_the_sweep_is_of_every_architecture_and_its_constants():
    assert set(BROKEN) == set(tiny.ARCHITECTURES) == set(tiny.ODD) and len(BROKEN) >= 9
    assert sum(len(constants) for constants in BROKEN.values()) >= 24


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_an_export_computes_what_transformers_does(mlx, made, architecture, tmp_path):
    model, export, theirs = made(architecture)
    mine = distributions(mlx, export.path, tmp_path / "mlx.npy")
    assert 0 <= divergence(theirs, mine) < KL_MEAN.get(architecture, KL_MEAN_DEFAULT)
    assert (theirs.argmax(-1) == mine.argmax(-1)).all()
    prompts = [IDS[:3], IDS, IDS[:38]]
    greedy = [
        [answer.ids for answer in backend.generate(backend.load(path, **SETTINGS), prompts, max_new_tokens=8)]
        for backend, path in ((mlx, export.path), (get("torch"), model))
    ]
    assert greedy[0] == greedy[1]
    said = get("torch").constants(model)
    assert {name: said[name] for name, value in mlx.constants(export.path).items() if said[name] != value} == {}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_broken_constant_is_seen(mlx, made, architecture, tmp_path):
    _, export, theirs = made(architecture)
    file = export.path / "config.json"
    whole = file.read_text(encoding="utf-8")
    unseen = []
    try:
        for name, value in BROKEN[architecture].items():
            config = json.loads(whole)
            assert config[name] != value
            file.write_text(json.dumps({**config, name: value}), encoding="utf-8")
            found = divergence(theirs, distributions(mlx, export.path, tmp_path / f"{name}.npy"))
            if found < 3 * KL_MEAN.get(architecture, KL_MEAN_DEFAULT):
                unseen.append((name, found))
    finally:
        file.write_text(whole, encoding="utf-8")
    assert unseen == []


def test_what_transformers_5_nests_is_mended_and_told(mlx, made, tmp_path):
    """The case that began this: a Llama exported by mlx-lm alone takes rope_theta for 10000."""
    from mlx_lm.convert import convert

    model, export, theirs = made("llama")
    assert any("rope_theta = 321.0" in sentence and "10000" in sentence for sentence in export.mended)
    convert(str(model), mlx_path=str(tmp_path / "plain"), dtype="float32")
    assert divergence(theirs, distributions(mlx, tmp_path / "plain", tmp_path / "plain.npy")) > 1e-4


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("gpt2", {"n_inner": 96}, "n_inner"),
        ("gpt2", {"n_inner": None, "activation_function": "relu"}, "activation"),
        ("gpt2", {"n_inner": None, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding window"),
        ("gemma2", {"sliding_window": 8}, "sliding window"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ("phi3", {"sliding_window": 8}, "sliding window"),
        ("gemma", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}, "linear"),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 321.0,
                    "attention_factor": 1.5,
                    "original_max_position_embeddings": 128,
                }
            },
            "attention_factor",
        ),
        ("gemma3_text", {"final_logit_softcapping": 5.0}, "final_logit_softcapping"),
        ("gemma3_text", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}, "sliding window"),
        ("phi", {"tie_word_embeddings": True}, "lm_head"),
        ("gemma", {"tie_word_embeddings": False}, "lm_head"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm"),
        ("llama", {"hidden_act": "gelu"}, "activation"),
    ],
)
def test_what_mlx_lm_cannot_do_is_refused(mlx, architecture, changes, said, tmp_path):
    from finetune.export import mlx as exporter

    model = odd(tmp_path / "model", architecture, **changes)
    with pytest.raises(UsageError, match=said):
        exporter.rehearse(model, "")
    with pytest.raises(UsageError, match=said):
        exported(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 321.0}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3", "factor": 8.0, "rope_theta": 321.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
                }
            },
        ),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 4.0, "rope_theta": 321.0, "original_max_position_embeddings": 128,
                }
            },
        ),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 4.0, "rope_theta": 321.0, "original_max_position_embeddings": 128,
                }
            },
        ),
        (
            "phi3",
            {
                "sliding_window": None, "original_max_position_embeddings": 128,
                "rope_parameters": {
                    "rope_type": "longrope", "rope_theta": 321.0, "original_max_position_embeddings": 128,
                    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
                },
            },
        ),
        ("gemma3_text", {"hidden_size": 72, "intermediate_size": 96}),
        ("llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {"attention_bias": False, "tie_word_embeddings": False}),
        ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 876.0, "partial_rotary_factor": 0.75}}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)  # fmt: skip
def test_other_constants_come_through_as_well(mlx, architecture, changes, tmp_path):
    model = odd(tmp_path / "model", architecture, **changes)
    theirs = distributions(get("torch"), model, tmp_path / "torch.npy")
    export = exported(model, tmp_path / "out")
    assert divergence(theirs, distributions(mlx, export.path, tmp_path / "mlx.npy")) < KL_MEAN_OTHER
    # And read in memory, as training and the backend's own `load` read a Hugging Face directory.
    assert divergence(theirs, distributions(mlx, model, tmp_path / "memory.npy")) < KL_MEAN_OTHER


def test_gemma_is_told_to_differ_in_its_activation(made):
    _, export, _ = made("gemma")
    assert any("GELU exactly" in note for note in export.notes)


def test_a_long_sliding_window_that_is_ignored_is_told(mlx, tmp_path):
    export = exported(odd(tmp_path / "model", "gemma2", sliding_window=2048), tmp_path / "out")
    assert any("2048 tokens" in note for note in export.notes)
