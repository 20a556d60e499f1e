"""The check of the invariances from evidence made by hand, the tiny copies, and the command on the fake backend."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from finetune.checks import BY_NAME as CHECKS
from finetune.checks import Verdict, owed, results
from finetune.checks.invariance import OF
from finetune.cli.app import cli, guarded
from finetune.core.errors import StageError
from finetune.core.files import digest, write_json, write_text
from finetune.experiments.invariance import MEASURED, NAMES, tiny_copy
from finetune.recipe import Recipe, dump
from finetune.run import Run, seal
from finetune.stages.pipeline import run_directory, run_stages
from tests.support import town

LOSSES = [3.0, 2.5, 2.0]
ROWS = [[2, 0, 1], [1, 2, 0], [0, 1, 2]]


def training(what: str) -> dict[str, Any]:
    return {"what": what, "losses": list(LOSSES), "gradients": [1.0, 0.9, 0.8], "rows": [list(row) for row in ROWS]}


def comparison(of: str = "training") -> dict[str, Any]:
    return {"one": training("one"), "other": training("other"), "of": of}


def evidence() -> dict[str, Any]:
    """What an honest measurement leaves."""
    other = {**training("seed 1"), "rows": [[0, 1, 2], [2, 1, 0], [1, 0, 2]]}
    found: dict[str, Any] = {name: {"comparisons": [comparison(of) for of in OF[name]]} for name in NAMES if name in OF}
    found["order"] = {"first": training("seed 0"), "again": training("the same"), "other_seed": other}
    found["merge"]["off"] = [4.0, 4.0, 4.0]
    return found


def of_torch(place: Path, **train: Any) -> Recipe:
    """A recipe whose backend has all that is compared."""
    expect = {"invariance": True, "resume": False}
    return town.only_training(place, place, backend="torch", expect=expect, train=train)


@pytest.fixture
def judged(tmp_path: Path) -> Callable[[dict[str, Any]], dict[str, Verdict]]:
    """A function: the verdicts on evidence, by name."""

    def check(found: dict[str, Any], **train: Any) -> dict[str, Verdict]:
        run = Run(tmp_path / "run")
        facts = {"backend": "torch", "architecture": "llama", "tokens": [9], "trained_tokens": [3]}
        write_json(run.path / MEASURED, {**facts, "options": {}, "settings": {}, "invariances": found})
        verdicts = results(of_torch(tmp_path, **train), run, ["invariance"])
        return {each.name.removeprefix("invariant_"): each for each in verdicts}

    return check


def test_honest_evidence_passes(judged) -> None:
    found = judged(evidence())

    assert tuple(found) == NAMES
    assert all(each.passed for each in found.values())


def shifted(by: float, step: int = 1) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        found["accumulation"]["comparisons"][0]["other"]["losses"][step] += by

    return change


def set_to(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place: Any = found
        for part in above:
            place = place[part]
        place[last] = value

    return change


def no_gradients(found: dict[str, Any]) -> None:
    for side in ("one", "other"):
        del found["comparisons"][0][side]["gradients"]


OTHER = "comparisons.0.other"
FAULTS: dict[str, tuple[str, Callable[[dict[str, Any]], None], str]] = {
    "a loss that is off by 1e-4": ("accumulation", shifted(1e-4), "part at step 2"),
    "a first loss that differs": ("accumulation", shifted(1e-2, 0), "it is the loss that differs"),
    "a loss that is no number": ("accumulation", shifted(float("nan")), "nan"),
    "a gradient twice as large": ("checkpointing", set_to(f"checkpointing.{OTHER}.gradients.0", 2.0), "5.0e-01"),
    "a gradient that is missing": ("checkpointing", set_to(f"checkpointing.{OTHER}.gradients.0", None), "nan"),
    "other rows": ("packing", set_to(f"packing.{OTHER}.rows", ROWS[::-1]), "not given the same rows"),
    "a step less": ("padding", set_to(f"padding.{OTHER}.losses", LOSSES[:2]), "3 losses and 2"),
    "nothing compared": ("padding", set_to("padding.comparisons", []), "nothing was compared"),
    "an order by chance": ("order", set_to("order.again.rows", ROWS[::-1]), "rows differ from step 1"),
    "weights by chance": ("order", set_to("order.again.losses", [3.0, 2.5, 2.1]), "losses of the same rows differ"),
    "one order for all seeds": ("order", set_to("order.other_seed.rows", ROWS), "not shuffled by the seed"),
    "no row numbers": ("order", set_to("order.first.rows", [[], [], []]), "no row numbers"),
    "a merge that differs": ("merge", set_to(f"merge.{OTHER}.losses", [3.0, 2.5, 2.1]), "merged weights"),
    "an adapter without effect": ("merge", set_to("merge.off", LOSSES), "shows nothing"),
    "a comparison left out": ("padding", lambda found: found["padding"]["comparisons"].pop(), "compared were"),
    "no gradients": ("accumulation", lambda found: no_gradients(found["accumulation"]), "not every step of both"),
    "not measured": ("merge", lambda found: found.pop("merge"), "not measured"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_fails_its_own_verdict(judged, fault: str) -> None:
    name, change, says = FAULTS[fault]
    found = evidence()
    change(found)

    verdicts = judged(found)

    assert [each for each, verdict in verdicts.items() if verdict.refuted] == [name]
    assert says in verdicts[name].why


def test_every_invariance_has_a_fault_here() -> None:
    assert {name for name, _, _ in FAULTS.values()} == set(NAMES)


NOT_COMPARED = {"not_applicable": "it takes no positions", "used": False}


@pytest.mark.parametrize("name", ["packing", "checkpointing", "accumulation", "merge"])
def test_what_could_be_compared_and_was_not_fails(judged, monkeypatch, name: str) -> None:
    """Whatever the evidence says of itself."""
    monkeypatch.setattr(tiny_copy, "unpackable", lambda model: "")
    monkeypatch.setattr("finetune.run.evidence.fetched", lambda run: {"base": "model"})
    verdicts = judged({**evidence(), name: dict(NOT_COMPARED)})

    assert [each for each, verdict in verdicts.items() if verdict.refuted] == [name]
    assert "it was not compared (it takes no positions), and it can be" in verdicts[name].why


def test_a_model_that_cannot_pack_leaves_packing_not_examined(judged, monkeypatch) -> None:
    monkeypatch.setattr(tiny_copy, "unpackable", lambda model: "a gpt model takes no positions")
    monkeypatch.setattr("finetune.run.evidence.fetched", lambda run: {"base": "model"})
    verdicts = judged({**evidence(), "packing": dict(NOT_COMPARED)})

    assert verdicts["packing"].outcome == "not examined"
    assert all(verdict.passed for name, verdict in verdicts.items() if name != "packing")


@pytest.mark.parametrize(("name", "key"), [("packing", "packing"), ("checkpointing", "gradient_checkpointing")])
def test_what_the_recipe_uses_and_cannot_hold_fails(judged, name: str, key: str) -> None:
    verdict = judged({**evidence(), name: dict(NOT_COMPARED)}, **{key: True})[name]

    assert verdict.refuted
    assert "the recipe uses it, and it takes no positions" in verdict.why


@pytest.mark.parametrize(
    ("backend", "train", "lacks"),
    [
        ("torch", {}, set()),
        ("torch", {"packing_strategy": "wrapped"}, {"packing"}),
        ("torch", {"method": "full"}, {"merge"}),
        ("mlx", {}, {"packing"}),
        ("fake", {}, {"packing", "checkpointing"}),
        ("fake", {"gradient_checkpointing": True}, {"packing"}),
        ("torch", {"packing_strategy": "wrapped", "packing": True}, set()),
    ],
)
def test_the_recipe_decides_what_is_owed(tmp_path: Path, backend: str, train: dict[str, Any], lacks: set[str]) -> None:
    recipe = of_torch(tmp_path, **train).model_copy(update={"backend": backend})

    assert owed(CHECKS["invariance"], recipe) == [f"invariant_{name}" for name in NAMES if name not in lacks]


def test_no_evidence_fails_every_verdict(tmp_path: Path) -> None:
    verdicts = results(of_torch(tmp_path), Run(tmp_path / "run"), ["invariance"])

    assert [each.name for each in verdicts] == [f"invariant_{name}" for name in NAMES]
    assert all(each.refuted for each in verdicts)


def test_evidence_of_another_backend_is_none(tmp_path: Path, judged) -> None:
    judged(evidence())
    recipe = of_torch(tmp_path).model_copy(update={"backend": "mlx"})

    verdicts = results(recipe, Run(tmp_path / "run"), ["invariance"])

    assert all(each.refuted and "measured with the backend 'torch'" in each.why for each in verdicts)


# -- the tiny copy -----------------------------------------------------------------------------------------------------


def test_a_small_config_keeps_ties_groups_and_kinds_of_layers_and_loses_dropout() -> None:
    found = tiny_copy.smaller(
        {
            "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 40,
            "intermediate_size": 11008, "head_dim": 128, "attention_dropout": 0.1, "resid_pdrop": 0.1, "vocab_size": 99,
            "tie_word_embeddings": True, "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 35,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 7.0, "short_factor": [1.0] * 64},
            "quantization_config": {"bits": 4}, "n_inner": None,
        }
    )  # fmt: skip

    assert found == {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
        "intermediate_size": 128, "head_dim": 16, "attention_dropout": 0.0, "resid_pdrop": 0.0, "vocab_size": 99,
        "tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "n_inner": None,
    }  # fmt: skip


@pytest.mark.parametrize(("heads", "kv", "wanted"), [(32, 32, 4), (32, 8, 2), (8, 1, 1)])
def test_grouped_heads_stay_grouped(heads: int, kv: int, wanted: int) -> None:
    assert tiny_copy.smaller({"num_attention_heads": heads, "num_key_value_heads": kv})["num_key_value_heads"] == wanted


@pytest.mark.parametrize("config", [{"text_config": {}}, {"auto_map": {}}])
def test_a_model_of_parts_has_no_tiny_copy(tmp_path: Path, config: dict[str, Any]) -> None:
    write_json(tmp_path / "config.json", {"model_type": "odd", **config})

    with pytest.raises(StageError, match="no tiny copy of a odd model"):
        tiny_copy.copy(tmp_path, tmp_path / "out")


def row(number: int, prompt: int, answer: int) -> dict[str, Any]:
    ids = list(range(prompt + answer))
    return {"row": number, "input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


@pytest.mark.parametrize(("count", "prompt", "answer"), [(100, 20, 10), (3, 20, 10), (1, 300, 200), (40, 4, 40)])
def test_rows_are_short_and_unequal_whatever_the_data_are(count: int, prompt: int, answer: int) -> None:
    chosen = tiny_copy.rows([row(number, prompt, answer) for number in range(count)])

    lengths = [len(each["input_ids"]) for each in chosen]
    trained = [sum(label != -100 for label in each["labels"][1:]) for each in chosen]
    assert [each["row"] for each in chosen] == list(range(tiny_copy.ROWS))
    assert len(set(lengths)) >= 3 and len(set(trained)) >= 2
    assert max(lengths) <= tiny_copy.MOST_TOKENS and min(trained) >= 1


def test_padding_is_unequal_and_never_trained() -> None:
    chosen = tiny_copy.rows([row(number, 20, 10) for number in range(20)])

    wider = tiny_copy.padded(chosen, pad=7)

    added = [len(two["labels"]) - len(one["labels"]) for one, two in zip(chosen, wider, strict=True)]
    assert len(set(added)) >= 3
    for one, two, more in zip(chosen, wider, added, strict=True):
        assert two["labels"] == one["labels"] + [-100] * more
        assert two["input_ids"] == one["input_ids"] + [7] * more


# -- the command, on the fake backend ----------------------------------------------------------------------------------


@pytest.fixture
def small_town(tmp_path: Path) -> Path:
    place = town.build(tmp_path / "town")
    recipe = town.only_training(place, tmp_path / "runs")
    write_text(place / "recipe.yaml", dump(recipe))
    return place


def test_the_command_measures_without_training(small_town: Path, tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["invariance", str(small_town / "recipe.yaml"), "--json"], standalone_mode=False)

    answer = json.loads(said.stdout)
    assert said.return_value == 0 and answer["passed"]
    assert {each["name"] for each in answer["verdicts"]} == {
        f"invariant_{name}" for name in ("accumulation", "padding", "order", "merge")
    }
    assert set(answer["not_applicable"]) == {"packing", "checkpointing"}
    run = Run(tmp_path / "runs" / "town")
    assert not (run.path / "train").exists()
    assert not (run.path / "verdicts.json").exists()
    assert not (run.path / "measure" / "invariance").exists()


def test_the_command_ends_with_1_when_the_seed_is_not_heeded(small_town: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = small_town / "hook"
    write_text(
        hook / "sitecustomize.py",
        "import random\n"
        "from finetune.backends.fake import training as fake_training\n"
        "fake_training.random.Random = lambda seed: random.SystemRandom()\n",
    )
    monkeypatch.setenv("PYTHONPATH", str(hook))

    said = CliRunner().invoke(cli, ["invariance", str(small_town / "recipe.yaml"), "--json"], standalone_mode=False)

    failed = {each["name"] for each in json.loads(said.stdout)["verdicts"] if each["passed"] is False}
    assert said.return_value == 1
    assert "invariant_order" in failed


def test_a_recipe_without_training_is_refused(small_town: Path) -> None:
    recipe = small_town / "recipe.yaml"

    code = guarded(lambda: cli.main(["invariance", str(recipe), "--set", "train=null"], standalone_mode=False))

    assert code == 2


def test_the_stage_measures_when_the_recipe_expects_it_and_a_rerun_keeps_its_report_whole(tmp_path: Path) -> None:
    from finetune.experiments.invariance.measure import write

    place = town.build(tmp_path / "town")
    recipe = town.only_training(place, tmp_path / "runs", expect={"invariance": True, "resume": False})
    run = run_directory(recipe)
    run_stages(recipe, run, ["measure"])
    before = run.require("measure")
    assert MEASURED in before.artifacts
    assert before.metrics["experiments"] == ["fresh", "invariance"]

    write(town.only_training(place, tmp_path / "runs", train={"seed": 3}), run)

    newer, after = digest(run.path / MEASURED), run.require("measure")
    assert after.artifacts == {**before.artifacts, MEASURED: newer} != before.artifacts
    assert after.files == {**before.files, MEASURED: newer} != before.files
    assert seal.changed(run, after) == [] and seal.faults(run) == []
    assert run.manifest()["seal"]["lines"] == len(run.log())
    assert all(each.passed for each in results(recipe, run, ["invariance"]))


def test_newer_evidence_makes_no_other_file_and_no_changed_report_fit(tmp_path: Path) -> None:
    from finetune.experiments.invariance.measure import write

    place = town.build(tmp_path / "town")
    recipe = town.only_training(place, tmp_path / "runs")
    run = run_directory(recipe)
    run_stages(recipe, run, ["measure"])
    fresh = run.path / "measure" / "fresh.json"
    fresh.write_text(fresh.read_text() + " ")
    write(recipe, run)
    after = run.require("measure")
    assert MEASURED in after.files and MEASURED not in after.artifacts  # no stage was asked for it
    assert [each.file for each in seal.changed(run, after)] == ["measure/fresh.json"]

    report = run.path / "measure" / "report.json"
    report.write_text(report.read_text() + " ")
    write(recipe, run)
    assert [each.file for each in seal.faults(run)] == ["measure/report.json"]
