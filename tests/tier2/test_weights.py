"""Weights as people have them: pickled, under a wrapper's names, or not those of their model. None is made up in silence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.backends.torch.loading import load_adapter, load_model
from finetune.core.errors import StageError, UsageError
from finetune.models import sources
from finetune.recipe.sections import Model
from finetune.run import Run, evidence, layout
from finetune.run.base import base_changed

Tensors = dict[str, torch.Tensor]


def renamed(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def pickled(tensors: Any, place: Path, **more: Any) -> None:
    torch.save(tensors, place / "pytorch_model.bin", **more)


def safe(tensors: Tensors, place: Path) -> None:
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def sharded(tensors: Tensors, place: Path, kind: str) -> None:
    names = sorted(tensors)
    shards = {f"part-{number}.{kind}": names[number::2] for number in (0, 1)}
    for file, held in shards.items():
        part = {name: tensors[name] for name in held}
        torch.save(part, place / file) if kind == "bin" else save_file(part, place / file, metadata={"format": "pt"})
    stem = "pytorch_model.bin" if kind == "bin" else "model.safetensors"
    listed = {name: file for file, held in shards.items() for name in held}
    (place / f"{stem}.index.json").write_text(json.dumps({"weight_map": listed}))


def stored(tiny: Path, place: Path, write: Callable[[Tensors, Path], None], change: Any = lambda each: each) -> Path:
    """A copy of a tiny model whose weights are written otherwise."""
    shutil.copytree(tiny, place)
    tensors = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    write(change(tensors), place)
    return place


def loaded(place: Path) -> Tensors:
    return dict(load_model(sources.resolve(Model(path=str(place))).base, {"device": "cpu"}).state_dict())


AS_PEOPLE_HAVE_THEM: dict[str, tuple[Callable[[Tensors, Path], None], Any, str]] = {
    "pickled": (pickled, renamed(str), "pickled"),
    "pickled as before 1.6": (
        lambda t, p: pickled(t, p, _use_new_zipfile_serialization=False),
        renamed(str),
        "pickled",
    ),
    "inside of a training's state": (pickled, lambda t: {"epoch": 3, "model_state_dict": t}, "pickled"),
    "pickled shards": (lambda t, p: sharded(t, p, "bin"), renamed(str), "part-0.bin, part-1.bin are pickled"),
    "DataParallel": (pickled, renamed(lambda name: f"module.{name}"), "20 tensors have names that a wrapper"),
    "torch.compile": (safe, renamed(lambda name: f"_orig_mod.{name}"), "20 tensors have names that a wrapper"),
    "compiled within": (safe, renamed(lambda name: name.replace("model.", "model._orig_mod.", 1)), "20 tensors"),
    "wrapped twice": (safe, renamed(lambda name: f"module._orig_mod.{name}"), "20 tensors"),
    "wrapped shards": (lambda t, p: sharded(t, p, "safetensors"), renamed(lambda name: f"module.{name}"), "20 tensors"),
    "FSDP": (safe, renamed(lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")), "9 tensors"),
    "unloaded from PEFT": (
        safe,
        renamed(lambda name: "base_model.model." + name.replace("q_proj", "q_proj.base_layer")),
        "20 tensors",
    ),
    "each twice": (
        pickled,
        lambda t: {**t, **{f"base_model.model.{name}": each for name, each in t.items()}},
        "20 tensors",
    ),
    "TensorFlow's norms": (
        safe,
        renamed(lambda name: name.replace("layernorm.weight", "layernorm.gamma")),
        "4 tensors",
    ),
}


@pytest.mark.parametrize("kind", AS_PEOPLE_HAVE_THEM)
def test_weights_stored_otherwise_are_the_same_weights_and_it_is_told(tiny_model, tmp_path, kind):
    write, change, said = AS_PEOPLE_HAVE_THEM[kind]
    place = stored(tiny_model(), tmp_path / "base", write, change)

    found = sources.resolve(Model(path=str(place)))

    expected, got = loaded(tiny_model()), loaded(place)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert any(said in note for note in found.notes)
    assert list(found.base.glob("*.safetensors"))
    assert not list(found.base.glob("*.bin"))


def test_there_are_as_many_kinds_as_were_counted() -> None:
    assert len(AS_PEOPLE_HAVE_THEM) == 13


@pytest.mark.parametrize(
    "change",
    [lambda name: name.removeprefix("transformer."), lambda name: re.sub(r"(ln_\w+)\.weight$", r"\1.gamma", name)],
    ids=["without transformer.", "gamma"],
)
def test_gpt_2_under_the_names_that_it_was_published_with_is_the_same_model(tiny_model, tmp_path, change):
    place = stored(tiny_model("gpt2"), tmp_path / "base", pickled, renamed(change))

    expected, got = loaded(tiny_model("gpt2")), loaded(place)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    assert change("transformer.ln_f.weight") in torch.load(place / "pytorch_model.bin", weights_only=True)


def test_weights_that_need_nothing_are_not_copied(tiny_model):
    found = sources.resolve(Model(path=str(tiny_model())))

    assert (found.base, found.notes, found.sources) == (tiny_model(), (), {})


def test_a_conversion_is_made_once_and_again_for_other_weights(tiny_model, tmp_path):
    place = stored(tiny_model(), tmp_path / "base", pickled)
    first = sources.resolve(Model(path=str(place))).base
    before = (first / "model.safetensors").stat().st_mtime_ns
    again = sources.resolve(Model(path=str(place))).base
    pickled({name: tensor + 1 for name, tensor in load_file(tiny_model() / "model.safetensors").items()}, place)

    assert again == first
    assert (again / "model.safetensors").stat().st_mtime_ns == before
    assert sources.resolve(Model(path=str(place))).base != first


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if "q_proj" not in k}, r"2 of its weights are not in its files \(model"),
        (lambda t: {**t, "v_head.summary.weight": torch.zeros(1)}, r"no place in the model \(v_head.summary.weight\)"),
        (lambda t: {f"net.{k}": v for k, v in t.items()}, r"not in its files .*20 weights in its files have no place"),
        (lambda t: {k: v[:9].clone() if "q_proj" in k else v for k, v in t.items()}, r"q_proj.weight \(9 x 64 in the files, "),
        (lambda t: {**t, "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 64)}, "no place in the model"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_name(tiny_model, tmp_path, change, says):
    place = stored(tiny_model(), tmp_path / "base", safe, change)

    with pytest.raises(StageError, match=says):
        loaded(place)


def test_what_older_checkpoints_hold_beside_weights_is_no_fault(tiny_model, tmp_path):
    more = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "h.0.attn.masked_bias": torch.zeros(1)}
    place = stored(tiny_model(), tmp_path / "base", safe, lambda tensors: {**tensors, **more})

    assert loaded(place)


@pytest.mark.parametrize(
    ("held", "error", "says"),
    [
        (lambda t: {**t, **{f"module.{name}": each + 1 for name, each in t.items()}}, StageError, "twice, and not alike"),
        (lambda t: {**t, "step": 3}, UsageError, "holds int under 'step', and weights are tensors"),
        (lambda t: {**t, "a.lora_A.default.weight": torch.zeros(1)}, StageError, "an adapter that is not merged into it"),
        (lambda t: {"model": torch.nn.Linear(1, 1)}, UsageError, "holds more than tensors"),
    ],
)  # fmt: skip
def test_pickled_weights_that_mean_something_else_are_refused(tiny_model, tmp_path, held, error, says):
    place = stored(tiny_model(), tmp_path / "base", pickled, held)

    with pytest.raises(error, match=says):
        sources.resolve(Model(path=str(place)))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_pickled_weights_that_were_cut_short_are_named(tiny_model, tmp_path, share):
    place = stored(tiny_model(), tmp_path / "base", pickled)
    whole = (place / "pytorch_model.bin").read_bytes()
    (place / "pytorch_model.bin").write_bytes(whole[: int(len(whole) * share)])

    with pytest.raises(
        (StageError, UsageError), match=r"pytorch_model.bin (cannot be read as weights|holds more than tensors)"
    ):
        sources.resolve(Model(path=str(place)))


# -- adapters -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory) -> Path:
    """An adapter that changes what the model says."""
    from peft import LoraConfig, get_peft_model

    place = tmp_path_factory.mktemp("lora") / "adapter"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(load_model(tiny_model(), {"device": "cpu"}), config).save_pretrained(str(place))
    return place


def answer(base: Path, adapter: Path) -> torch.Tensor:
    found = sources.resolve(Model(path=str(adapter), base_model=str(base)))
    model = load_adapter(load_model(found.base, {"device": "cpu"}), found.adapter or adapter).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.tensor([[5, 6, 7]])).logits
    return logits


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("adapter_model.bin", str),
        ("adapter_model.bin", lambda name: f"module.{name}"),
        ("adapter_model.safetensors", lambda name: f"base_model.model.{name}"),
        ("adapter_model.safetensors", lambda name: name.replace("base_model.model.", "base_model.model._orig_mod.")),
        ("adapter_model.safetensors", lambda name: name.replace(".weight", ".default.weight")),
        ("adapter_model.safetensors", lambda name: name.removeprefix("base_model.model.")),
    ],
)
def test_an_adapter_stored_otherwise_is_the_same_adapter(tiny_model, adapter, tmp_path, file, change):
    place = tmp_path / "adapter"
    shutil.copytree(adapter, place)
    tensors = renamed(change)(load_file(place / "adapter_model.safetensors"))
    (place / "adapter_model.safetensors").unlink()
    torch.save(tensors, place / file) if file.endswith(".bin") else save_file(tensors, place / file)

    assert torch.equal(answer(tiny_model(), place), answer(tiny_model(), adapter))
    assert not torch.equal(
        answer(tiny_model(), adapter), load_model(tiny_model(), {})(torch.tensor([[5, 6, 7]])).logits
    )


def test_an_adapter_with_tensors_for_no_module_is_refused_by_name(tiny_model, adapter, tmp_path):
    place = tmp_path / "adapter"
    shutil.copytree(adapter, place)
    tensors = load_file(place / "adapter_model.safetensors")
    beyond = {
        name.replace("layers.0", "layers.9"): each.clone() for name, each in tensors.items() if "layers.0" in name
    }
    save_file({**tensors, **beyond}, place / "adapter_model.safetensors")

    with pytest.raises(StageError, match=r"4 of its tensors have no place in it \(base_model.model.model.layers.9"):
        answer(tiny_model(), place)


# -- a run --------------------------------------------------------------------------------------------------------------


def test_a_run_stands_on_the_files_that_were_converted(tiny_model, tmp_path, tiny_recipe):
    """The base is fetched anew where they were changed in their place."""
    from finetune.stages import fetch

    place = stored(tiny_model(), tmp_path / "base", pickled)
    recipe = tiny_recipe(model={"path": str(place), "device": "cpu"})
    run = Run(tmp_path / "run")
    result = fetch.run(recipe, run)
    found = evidence.read(run, layout.MODEL)

    assert "pickled" in result["notes"][0]
    assert found["converted_from"].keys() == {str(file) for file in place.iterdir()}
    assert base_changed(run) == []
    (place / "pytorch_model.bin").write_bytes(b"")
    assert [each.file for each in base_changed(run)] == [str(place / "pytorch_model.bin")]
