"""The MLX exporter and backend: what is written, what is refused, and how mlx-lm reads it."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.backends import CONSTANTS, Job, get
from finetune.core.errors import MissingError, StageError, UsageError
from finetune.data.sources import resolve
from finetune.export import Source, exporter, parse
from finetune.models import tiny

CONVERSATION = [{"role": "user", "content": "What is the capital of Quorra?"}]


@pytest.fixture(scope="module", autouse=True)
def mlx(skip_or_fail):
    if importlib.util.find_spec("mlx_lm") is None:
        skip_or_fail("mlx", "MLX is not installed; pip install 'finetune-proof[mlx]'")
    return get("mlx")


@pytest.fixture(scope="module")
def texts():
    return resolve("shipped:quorra/train.jsonl").read_text("utf-8").splitlines()


@pytest.fixture(scope="module")
def llama(texts, tmp_path_factory):
    """An odd tiny Llama in Hugging Face's layout; tests read it and leave it as it is."""
    return tiny.make(tmp_path_factory.mktemp("llama"), "llama", odd=True, texts=texts)


@pytest.fixture
def export(llama, tmp_path):
    """A function: the export of a model (the Llama where none is named) as a variant."""

    def make(variant="", model=None):
        out = tmp_path / f"mlx-{variant}"
        return exporter(parse("mlx")).export(Source(name="tiny", model=model or llama), variant, out)

    return make


def total(folder):
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def distributions(backend, model, file, **settings):
    import numpy

    ids = list(range(10, 45))
    backend.distributions(backend.load(model, device="cpu", **settings), [(ids[:1], ids[1:])], file)
    found = numpy.load(file).astype("float64")
    return found - numpy.log(numpy.exp(found).sum(-1, keepdims=True))


def divergence(theirs, mine):
    import numpy

    return float((numpy.exp(theirs) * (theirs - mine)).sum(-1).mean())


# -- exports ----------------------------------------------------------------------------------------------------------


def test_mlx_lm_loads_an_export_and_prompts_as_the_model_does(mlx, export, llama):
    import mlx_lm

    done = export()
    model, tokenizer = mlx_lm.load(str(done.path))
    assert model.args.rope_theta == tiny.ODD["llama"]["rope_theta"]
    assert model.args.rms_norm_eps == tiny.ODD["llama"]["rms_norm_eps"]
    assert (
        tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True)
        == get("torch").render(llama, [CONVERSATION])[0]
    )
    assert tokenizer.eos_token_ids == set(mlx.tokenizer(done.path).eos_ids)


def test_constants_are_named_as_transformers_names_them(mlx, export, llama):
    found, theirs = mlx.constants(export().path), get("torch").constants(llama)
    assert set(found) <= set(CONSTANTS) and {"rope_theta", "norm_eps", "head_dim", "eos_token_id"} <= set(found)
    assert {name: theirs[name] for name in found} == found


@pytest.mark.parametrize(("variant", "dtype", "share"), [("f32", "F32", 1), ("f16", "F16", 0.5), ("bf16", "BF16", 0.5)])
def test_a_variant_stores_weights_in_its_type(export, llama, variant, dtype, share):
    done = export(variant)
    with (done.path / "model.safetensors").open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    assert {value["dtype"] for name, value in header.items() if name != "__metadata__"} == {dtype}
    assert json.loads((done.path / "config.json").read_text())["dtype"] == {
        "F32": "float32", "F16": "float16", "BF16": "bfloat16"
    }[dtype]  # fmt: skip
    assert total(done.path) == pytest.approx(total(llama) * share, rel=0.05)


def test_quantized_variants_shrink_and_stay_near(mlx, export, llama, tmp_path):
    theirs = distributions(get("torch"), llama, tmp_path / "torch.npy")
    size, far = {}, {}
    for variant in ("q8", "q4"):
        done = export(variant)
        config = json.loads((done.path / "config.json").read_text())
        assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (int(variant[1]), 32)
        size[variant] = total(done.path)
        far[variant] = divergence(theirs, distributions(mlx, done.path, tmp_path / f"{variant}.npy"))
    assert size["q4"] < size["q8"] < total(llama) / 2
    assert 1e-9 < far["q8"] < 1e-2 < far["q4"] < 2


def test_a_quantized_export_computes_as_mlx_does_without_unpacking(mlx, export, tmp_path):
    """On the CPU the backend unpacks the weights, for speed; mlx-lm's own product must say the same."""
    import mlx.core as mx
    import mlx_lm
    import numpy

    done = export("q8")
    ids = list(range(10, 45))
    with mx.stream(mx.cpu):
        model, _ = mlx_lm.load(str(done.path))
        own = numpy.array(model(mx.array([ids]))[0].astype(mx.float32)).astype("float64")[:-1]
    own -= numpy.log(numpy.exp(own).sum(-1, keepdims=True))
    assert numpy.abs(own - distributions(mlx, done.path, tmp_path / "own.npy")).max() < 1e-3


def test_widths_decide_the_group_of_a_quantization(export, texts, tmp_path):
    wide = tiny.make(tmp_path / "wide", "llama", texts=texts)
    assert json.loads((export("q8", wide).path / "config.json").read_text())["quantization"]["group_size"] == 64


def test_a_width_that_no_group_divides_is_refused_before_training(texts, tmp_path):
    narrow = tiny.make(tmp_path / "narrow", "llama", texts=texts, hidden_size=72, intermediate_size=96, head_dim=16)
    rehearse = exporter(parse("mlx")).rehearse
    rehearse(narrow, "f16")
    for variant in ("q8", "q4"):
        with pytest.raises(UsageError, match=r"is 72 wide"):
            rehearse(narrow, variant)


def test_an_unknown_architecture_is_refused(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "xglm"}))
    with pytest.raises(UsageError, match="no architecture 'xglm'"):
        exporter(parse("mlx")).rehearse(model, "")


def test_weights_that_are_not_there_are_refused(llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(StageError, match="cannot load the model"):
        exporter(parse("mlx")).rehearse(model, "")


def test_a_missing_mlx_lm_is_told_with_how_to_get_it(llama, monkeypatch):
    from finetune.export import mlx as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"pip install 'finetune-proof\[mlx\]'"):
        exporter(parse("mlx")).rehearse(llama, "")


def test_a_full_disk_is_told(export, monkeypatch):
    import mlx_lm.utils

    def full(*arguments, **more):
        raise RuntimeError("[write] Unable to write 20 bytes to file.")

    monkeypatch.setattr(mlx_lm.utils, "save_model", full)
    with pytest.raises(StageError, match="could not be written .* Is the disk full"):
        export()


@pytest.mark.parametrize(
    ("name", "value", "said"), [("rope_theta", 10000.0, "rope_theta"), ("eos_token_id", 5, "stops at")]
)
def test_an_export_that_reads_back_otherwise_fails(export, monkeypatch, name, value, said):
    import mlx_lm.utils

    save = mlx_lm.utils.save_config

    def broken(config, path, **more):
        save({**config, name: value}, path, **more)
        if name == "eos_token_id":
            (path.parent / "generation_config.json").write_text(json.dumps({name: value}))

    monkeypatch.setattr(mlx_lm.utils, "save_config", broken)
    if name == "eos_token_id":
        from finetune.export import mlx as module

        monkeypatch.setattr(module, "TOKENIZER_FILES", tuple(f for f in module.TOKENIZER_FILES if "gener" not in f))
    with pytest.raises(StageError, match=said):
        export()


def test_an_export_that_lost_its_template_fails(export, monkeypatch):
    from finetune.export import mlx as module

    monkeypatch.setattr(module, "TOKENIZER_FILES", tuple(name for name in module.TOKENIZER_FILES if "chat" not in name))
    with pytest.raises(StageError, match="chat template"):
        export()


# -- the tokenizer ----------------------------------------------------------------------------------------------------


def test_a_turn_ends_where_mlx_lm_ends_it(mlx, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    own = mlx.tokenizer(llama).eos_ids
    assert len(own) == 1
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [own[0], 7]}))
    assert mlx.tokenizer(model).eos_ids == (own[0], 7)
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": 9}))
    assert mlx.tokenizer(model).eos_ids == (own[0], 9)


def test_a_template_that_refuses_says_why(mlx, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}hello"
    (model / "chat_template.jinja").write_text(template)
    system = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    refusal, prompt = mlx.render(model, [system, CONVERSATION])
    assert refusal == "no system here"
    assert mlx.tokenizer(model).decode(prompt) == "hello"


def test_without_a_template_it_prompts_as_the_server_does(mlx, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    (prompt,) = mlx.render(model, [CONVERSATION])
    assert mlx.tokenizer(model).decode(prompt).endswith("USER: What is the capital of Quorra?\nASSISTANT:")


# -- generation -------------------------------------------------------------------------------------------------------


def test_what_a_prompt_shares_with_the_one_before_is_computed_once(mlx, llama):
    handle = mlx.load(llama, device="cpu")
    shared = [(7 * i) % 250 + 3 for i in range(70)]
    prompts = [[*shared, *tail] for tail in ([5, 6, 7], [8], [9, 10, 11, 12], [])]
    alone = [mlx.generate(handle, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    seen = []
    counted = Counted(handle.model, seen)
    together = mlx.generate(type(handle)(counted, handle.tokenizer, handle.device), prompts, max_new_tokens=5)
    assert together == alone
    prefilled = sum(width for width in seen if width > 1)
    assert prefilled < 2 * len(shared), "each prompt was computed from its beginning"


class Counted:
    """A model that notes how many tokens each of its calls is given."""

    def __init__(self, model, seen):
        self.model, self.seen, self.layers = model, seen, model.layers
        if hasattr(model, "make_cache"):
            self.make_cache = model.make_cache

    def __call__(self, ids, **more):
        self.seen.append(ids.shape[1])
        return self.model(ids, **more)


# -- settings and models that are refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"device": "cuda"}, "model.device is 'cuda'"), ({"attn_implementation": "sdpa"}, "attn_implementation")],
)
def test_settings_that_mlx_has_not_are_refused(mlx, llama, settings, said):
    with pytest.raises(UsageError, match=said):
        mlx.load(llama, **settings)


def test_a_model_stored_for_mlx_is_neither_trained_on_nor_merged_into(mlx, export, tmp_path):
    done = export()
    with pytest.raises(UsageError, match="Hugging Face directory only"):
        mlx.merge(done.path, tmp_path, tmp_path / "out")
    job = Job(objective="sft", method="lora", model=done.path, out=tmp_path, rows=tmp_path, options={}, lora={})
    with pytest.raises(UsageError, match="Hugging Face directory only"):
        next(mlx.train(job))


def test_an_adapter_of_another_model_is_refused(mlx, llama, texts, tmp_path):
    from safetensors.numpy import save_file

    other = tiny.make(tmp_path / "other", "gpt2", texts=texts)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    import numpy

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {"lora_A": numpy.zeros((2, 64), "float32"), "lora_B": numpy.zeros((96, 2), "float32")}
    save_file(
        {f"{name}.{half}.weight": value for half, value in matrices.items()}, adapter / "adapter_model.safetensors"
    )
    assert mlx.load(llama, adapter, device="cpu")
    for verb in (lambda: mlx.load(other, adapter), lambda: mlx.merge(other, adapter, tmp_path / "merged")):
        with pytest.raises(StageError, match="does not fit"):
            verb()
    assert not (tmp_path / "merged").exists()


def test_a_merge_of_nan_is_written_for_the_checks_to_refuse(mlx, llama, tmp_path):
    import numpy
    from safetensors.numpy import save_file

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    matrices = {"lora_A": numpy.full((2, 64), numpy.nan, "float32"), "lora_B": numpy.ones((96, 2), "float32")}
    save_file(
        {f"{name}.{half}.weight": value for half, value in matrices.items()}, adapter / "adapter_model.safetensors"
    )
    mlx.merge(llama, adapter, tmp_path / "merged")

    norms = {name: facts.norm for name, facts in mlx.tensors(tmp_path / "merged").items()}
    assert [name for name, norm in norms.items() if math.isnan(norm)] == ["model.layers.0.self_attn.q_proj.weight"]


# -- speed on Linux ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate; MLX links it")
def test_torchs_blas_comes_before_mlx_and_without_importing_torch():
    code = (
        "import ctypes, sys\n"
        "load, early = ctypes.CDLL, []\n"
        "def note(name, *more, **named):\n"
        "    early.append('libtorch_cpu' in str(name) and 'mlx.core' not in sys.modules)\n"
        "    return load(name, *more, **named)\n"
        "ctypes.CDLL = note\n"
        "import finetune.backends.mlx.runtime\n"
        "print('torch' in sys.modules, any(early))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", str(importlib.util.find_spec("torch") is not None)]


def test_runtime_imports_mlx_before_any_other_module_does():
    """The server, whose classes are mlx-lm's, is the one other module that imports it when it is imported itself."""
    package = importlib.util.find_spec("finetune.backends.mlx")
    files = sorted(Path(package.origin).parent.glob("*.py"))
    assert len(files) >= 10
    tops = {
        file.stem: [name for node in ast.parse(file.read_text("utf-8")).body for name in imported(node)]
        for file in files
    }
    assert {stem for stem, names in tops.items() if {"mlx", "mlx_lm"} & set(names)} == {"runtime", "server"}
    code = "import sys, finetune.backends.mlx.server\nnames = list(sys.modules)\n"
    code += "print(names.index('finetune.backends.mlx.runtime') < names.index('mlx_lm'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["True"]


def imported(node):
    """The packages that an import statement names."""
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
    return {name.partition(".")[0] for name in names}


def test_the_search_for_a_fast_blas_never_fails(monkeypatch):
    from finetune.backends.mlx import runtime

    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    runtime.prefer_fast_blas()
    spec = type("Spec", (), {"origin": "/nowhere/torch/__init__.py"})
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: spec)
    runtime.prefer_fast_blas()
