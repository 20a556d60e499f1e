"""Baselines by seed and by instruction set: what is stored, how it is told, and what a baseline begins with."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from finetune.core import processes
from finetune.testing import questions
from sabotage import baseline, controls, honest
from sabotage.bench import Found

ROOT = Path(__file__).parents[2]
STORED = honest.load(ROOT)
SEEDS = 5


def verdict(name, measured, bound, compare, unit):
    return {"name": name, "measured": measured, "bound": bound, "compare": compare, "unit": unit, "passed": True}


def found(*verdicts, failed=(), refused="", name="lora, seed 0"):
    return Found(name=name, failed=failed, refused=refused, seconds=2.0, verdicts=verdicts)


def kept(share):
    return verdict("controls_kept", share, 0.7, ">=", "share")


def document(*rows):
    return {"machine": "2 cores", "versions": {"torch": "2"}, "rows": list(rows)}


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_every_baseline_ran_with_five_seeds_under_every_instruction_set():
    places = [(row["baseline"], row["instructions"]) for row in STORED["rows"]]
    assert places == [(name, each) for name in baseline.BASELINES for each in honest.SETS]
    own = {row["capability"] for row in STORED["rows"] if row["instructions"] == "own"}
    few = [row for row in STORED["rows"] if row["runs"] < SEEDS]
    assert all(row["instructions"] != "own" and {row["capability"]} == own for row in few)


def test_no_baseline_raised_an_alarm_under_any_instruction_set():
    assert {row["baseline"]: row["alarms"] for row in STORED["rows"] if row["alarms"]} == {}


def test_the_stored_page_is_that_of_the_results():
    assert (ROOT / honest.PAGE).read_text(encoding="utf-8") == honest.render(STORED)


# -- how it is told ----------------------------------------------------------------------------------------------------


def test_a_row_has_the_worst_of_its_runs_with_the_room_that_was_left():
    ratios = [verdict("heldout_perplexity", value, 1.5, "<=", "ratio") for value in (0.4, 1.25)]
    runs = [found(kept(0.9), ratios[0]), found(kept(0.85), ratios[1])]
    row = honest.row("lora", "own", "AVX2", runs)

    assert (row["runs"], row["alarms"]) == (2, {})
    assert row["worst"]["controls_kept"]["measured"] == 0.85
    assert row["worst"]["controls_kept"]["room"] == pytest.approx(2.0)
    assert row["worst"]["heldout_perplexity"]["measured"] == 1.25
    assert row["worst"]["heldout_perplexity"]["room"] == pytest.approx(2.0)


def test_the_nearest_is_of_the_bounds_that_checks_chose():
    own = [verdict("fresh_process", 0.2, 1.0, "<=", "nats"), verdict("step_size", 0.1, 0.2, "<=", "distance")]
    row = honest.row("lora", "own", "AVX2", [found(kept(0.71), *own)])
    assert row["nearest"] == {"name": "step_size", "room": pytest.approx(2.0)}


def test_alarms_and_what_has_little_room_are_listed_and_what_has_enough_is_not():
    alarmed = honest.row("dpo", "avx2", "AVX2", [found(kept(0.75), failed=("controls_kept",), name="dpo, seed 3")])
    quiet = honest.row("lora", "own", "AVX2", [found(kept(1.0))])
    page = honest.render(document(alarmed, quiet))

    assert "In 2 honest runs of the bench's baselines there was **1 false alarm**" in page
    assert "| dpo, seed 3, `avx2` | controls_kept |" in page
    assert "| `dpo` | `avx2` | `controls_kept` | 0.75 >= 0.7 (1.2) |" in page
    assert "| `dpo` | `avx2` (AVX2) | 0 of 1 | 0.75 >= 0.7 (1.2) |" in page
    assert "| `lora` | `own` (AVX2) | 1 of 1 | 1 >= 0.7 |" in page
    assert "Nowhere less than 2 times." in honest.render(document(quiet))


def test_a_run_that_was_refused_is_an_alarm():
    assert honest.row("lora", "own", "AVX2", [found(refused="no such file")])["alarms"] == {
        "lora, seed 0": "no such file"
    }


def test_new_rows_take_the_places_of_their_old_ones_and_of_no_others():
    old = [honest.row(name, "own", "AVX2", [found(kept(1.0), name=f"{name}, old")]) for name in ("lora", "full")]
    gone = honest.row("no more", "own", "AVX2", [found(kept(1.0))])
    new = [honest.row("full", name, "AVX2", [found(kept(0.9))]) for name in ("own", "default")]
    merged = honest.merge(document(*old, gone), document(*new))
    assert merged["rows"] == [old[0], new[1], new[0]]


def test_what_is_stored_is_read_as_it_was(tmp_path):
    (tmp_path / "docs").mkdir()
    runs = [found(kept(0.9)), found(refused="no, there is none", name="lora, seed 1")]
    rows = [honest.row("lora", "avx2", "AVX2", ()), honest.row("lora", "own", "AVX2", runs)]
    stored = honest.write(tmp_path, document(*rows))

    assert stored["rows"] == rows
    assert honest.load(tmp_path) == stored
    assert len((tmp_path / honest.RESULTS).read_text().splitlines()) == 1 + 1 + 3


def test_there_is_nothing_stored_in_a_checkout_without(tmp_path):
    assert honest.load(tmp_path) == {}


# -- how it is measured ------------------------------------------------------------------------------------------------


def test_instructions_are_limited_within_and_as_they_were_afterwards(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "mine")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    with honest.instructions("avx2"):
        assert {name: os.environ.get(name) for name in baseline.INSTRUCTIONS} == honest.SETS["avx2"]
    with honest.instructions("own"):
        assert not set(baseline.INSTRUCTIONS) & set(os.environ)
    assert os.environ["ATEN_CPU_CAPABILITY"] == "mine"
    assert "ONEDNN_MAX_CPU_ISA" not in os.environ


def test_each_set_runs_each_baseline_with_each_seed_and_what_equals_the_cpus_own_is_not_run_twice(
    tmp_path, monkeypatch
):
    ran = []
    monkeypatch.setattr(honest, "_capability", {"default": "DEFAULT", "avx2": "AVX2", "own": "AVX2"}.get)
    monkeypatch.setattr(baseline, "model", lambda: ran.append(os.environ.get("ATEN_CPU_CAPABILITY")))
    monkeypatch.setattr(honest.Bench, "__enter__", lambda self: self)
    monkeypatch.setattr(honest.Bench, "control", lambda self, name, _: ran.append(name) or found(kept(1.0), name=name))
    measured = [honest.measure(["full", "dpo"], 2, name, tmp_path, jobs=1) for name in ("default", "avx2", "own")]

    runs = ["full, seed 0", "full, seed 1", "dpo, seed 0", "dpo, seed 1"]
    assert ran == ["default", *runs, None, *runs]
    assert [(row["baseline"], row["instructions"], row["runs"]) for each in measured for row in each["rows"]] == [
        ("full", "default", 2), ("dpo", "default", 2), ("full", "avx2", 0), ("dpo", "avx2", 0), ("full", "own", 2),
        ("dpo", "own", 2),
    ]  # fmt: skip
    assert "the same as `own`" in honest.render(measured[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--baselines", "lorra"), "no baseline 'lorra'. Did you mean 'lora'?"),
        (("--baselines", "--capabilities", "avx"), "no instruction set 'avx'. Did you mean 'avx2'?"),
    ],
)
def test_the_command_refuses_an_unknown_baseline_and_an_unknown_set(arguments, said):
    command = processes.command("sabotage", *arguments)
    done = subprocess.run(command, env=baseline.environment(), capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr


# -- what a baseline begins with -----------------------------------------------------------------------------------------


def test_the_model_has_heard_of_no_fact_that_a_run_teaches_or_asks_for():
    rows = questions.generate(baseline.HEARD_TO, seed=baseline.KNOWN_SEED)
    most = max(seed for seeds in controls.SEEDS.values() for seed in seeds)
    end = baseline.KNOWN + baseline.UNSEEN + baseline.NEW * (max(most, SEEDS - 1) + 1)
    taught = {questions.fact_of(row) for row in rows[baseline.KNOWN : end]}
    before = baseline.pretrained_on()
    assert not taught & {questions.fact_of(row) for row in before}
    assert end <= baseline.HEARD_FROM


def test_what_the_model_has_heard_of_is_seldom_right_so_that_no_rule_of_the_names_can_be_learned():
    rows = {row["id"]: row for row in questions.generate(baseline.HEARD_TO, seed=baseline.KNOWN_SEED)}
    heard = baseline.pretrained_on()[baseline.KNOWN :]
    assert len(heard) >= 200
    assert sum(row["completion"] == rows[row["id"]]["completion"] for row in heard) < 0.05 * len(heard)
    assert all(row["match"] in row["completion"] for row in heard)
