"""What sabotages came to: the stored results, their page, and the sabotages that need no real model to be carried out."""

from __future__ import annotations

import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from finetune import checks
from finetune.checks.expected import EXPECT_KEYS
from finetune.core import processes
from finetune.core.errors import StageError
from finetune.stages.pipeline import run_directory, run_stages
from sabotage import baseline, bench, detection, table, tables
from sabotage.__main__ import told
from sabotage.bench import Found
from sabotage.calls import Called
from sabotage.context import Context, as_if_written_so
from sabotage.controls import controls
from support import town

ROOT = Path(__file__).parents[2]
ON_ROWS = [each for each in table().values() if 1 in detection.tiers(each)]
RAREST = 60
TABLES = (detection.RESULTS, detection.CONTROLS, detection.BOUNDS)
STORED = detection.load(ROOT)


def found(name="a", failed=(), refused="", verdicts=()):
    return Found(name=name, failed=failed, refused=refused, seconds=1.0, verdicts=tuple(verdicts))


def verdict(measured, bound=1.0, compare="<=", name="v"):
    return {"name": name, "measured": measured, "bound": bound, "compare": compare, "unit": "nats", "passed": True}


# -- carried out on the fake backend -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A town whose data are prepared and trained on."""
    recipe = town.only_training(town.build(tmp_path_factory.mktemp("town")), tmp_path_factory.mktemp("runs"))
    run = run_directory(recipe)
    run_stages(recipe, run, ["train"])
    assert [each.name for each in checks.results(recipe, run, ["labels", "rows"]) if each.refuted] == []
    return recipe


def test_sabotages_of_the_rows_are_swept():
    assert len(ON_ROWS) >= 10


@pytest.mark.parametrize("each", ON_ROWS, ids=lambda each: each.name)
def test_a_sabotage_of_the_prepared_rows_is_caught(prepared, each, tmp_path):
    recipe = prepared.model_copy(update={"output_dir": str(tmp_path / "runs")})
    run = run_directory(recipe)
    run_stages(recipe, run, ["prepare"])
    context = Context()
    each.apply(context)
    for change in context.changes["prepare"]:
        change(run)
    as_if_written_so(run, "prepare")
    run_stages(recipe, run, ["train"])

    assert [each.name for each in checks.results(recipe, run, ["labels", "rows"]) if each.refuted]


# -- what is stored ----------------------------------------------------------------------------------------------------


def test_the_stored_results_are_those_of_the_sabotages_and_controls_there_are():
    assert [row["name"] for row in STORED["sabotages"]] == list(table())
    assert {row["name"] for row in STORED["controls"]} >= set(controls())


def test_of_sixty_sabotages_nineteen_in_twenty_are_caught_and_no_honest_run_raises_an_alarm():
    caught = [row for row in STORED["sabotages"] if detection.caught(row)]
    assert len(STORED["sabotages"]) >= RAREST
    assert len(caught) >= 0.95 * len(STORED["sabotages"])
    assert len(STORED["controls"]) >= 40
    assert [row["name"] for row in STORED["controls"] if detection.caught(row)] == []


def test_no_bound_of_ours_is_nearer_to_the_honest_runs_than_the_rule_says():
    ours = {name: each for name, each in STORED["spreads"].items() if name not in EXPECT_KEYS}
    assert len(ours) >= 15
    near = {name: round(each["room"], 2) for name, each in ours.items() if each["room"] is not None}
    assert {name: room for name, room in near.items() if room < detection.ROOM} == {}


# -- how it is told ----------------------------------------------------------------------------------------------------


def test_a_missed_sabotage_is_marked_and_listed():
    each = next(iter(table().values()))
    document = {
        "machine": "2 cores", "minutes": 1, "versions": {"torch": "2"}, "spreads": {},
        "sabotages": [detection.row(found(each.name), each)], "controls": [detection.row(found("c", failed=("x",)))],
    }  # fmt: skip
    page = detection.render(document)

    assert "## Missed" in page
    assert "| **missed** |" in page
    assert "**0 are caught** (0%)" in page
    assert "**1 false alarm**" in page
    assert "| c | x |" in page


def test_the_spread_of_a_verdict_is_over_all_controls_and_its_room_that_of_the_run_nearest_to_its_own_bound():
    runs = [found(verdicts=[verdict(0.4, bound=0.8)]), found(verdicts=[verdict(0.2, bound=1.0)])]
    (spread,) = detection.spreads(runs).values()

    assert (spread["least"], spread["most"], spread["count"]) == (0.2, 0.4, 2)
    assert (spread["strictest"], spread["loosest"], spread["room"]) == (0.8, 1.0, pytest.approx(2.0))


def test_what_a_stage_refuses_is_caught_and_what_passes_every_verdict_is_not():
    assert detection.caught(detection.row(found("a", refused="no such file")))
    assert detection.caught(detection.row(found("a", failed=("x",))))
    assert not detection.caught(detection.row(found("a")))


def test_a_run_is_not_held_to_the_bound_of_another_type_of_weights():
    runs = [found(verdicts=[verdict(1e-6, bound=1e-3)]), found(verdicts=[verdict(0.02, bound=0.05)])]
    assert detection.spreads(runs)["v"]["room"] == pytest.approx(2.5)


ROOMS = [
    ("<=", 1.0, (0.2, 0.5), "nats", 2.0),
    ("<=", 1.0, (0.2, 1.25), "nats", 0.8),
    ("<=", 1.0, (0.0, 0.0), "nats", None),
    (">", 2.0, (3.0, 9.0), "standard errors", 1.5),
    (">", 0.0, (0.1, 9.0), "reward", None),
    (">", 0.0, (-0.1, 9.0), "reward", 0.0),
    (">=", 0.9, (0.95, 1.0), "share", 2.0),
    (">=", 0.9, (0.8, 1.0), "share of steps", 0.5),
    (">=", 0.9, (1.0, 1.0), "share", None),
]


@pytest.mark.parametrize(("compare", "bound", "measured", "unit", "room"), ROOMS)
def test_the_room_of_a_bound_is_how_many_times_as_far_as_the_worst_control_it_goes(
    compare, bound, measured, unit, room
):
    runs = [found(verdicts=[{**verdict(each, bound, compare), "unit": unit}]) for each in measured]
    assert detection.spreads(runs)["v"]["room"] == (None if room is None else pytest.approx(room))


def test_what_must_be_equal_has_no_spread():
    assert detection.spreads([found(verdicts=[verdict(1.0, 1.0, "=="), verdict(math.nan, name="w")])]) == {}


def test_results_of_a_few_take_the_places_of_their_old_rows_and_of_no_others():
    first, second = list(table().values())[:2]
    honest, other = list(controls())[:2]
    old = {
        "sabotages": [detection.row(found(second.name), second), {"name": "no more", "failed": [], "refused": ""}],
        "controls": [detection.row(found(other)), detection.row(found("gone"))],
        "spreads": {"v": 1},
    }
    caught = detection.row(found(first.name, failed=("x",)), first)
    new = {"sabotages": [caught], "controls": [detection.row(found(honest))], "spreads": {"v": 2}}
    merged = detection.merge(old, new)

    assert merged["sabotages"] == [caught, old["sabotages"][0]]
    assert (merged["controls"], merged["spreads"]) == ([*new["controls"], old["controls"][0]], {"v": 1})
    anew = detection.merge(old, new, honest=True)
    assert (anew["controls"], anew["spreads"]) == (new["controls"], {"v": 2})


def test_what_is_stored_is_read_as_it_was_a_row_for_each(tmp_path):
    each = next(iter(table().values()))
    told = detection.row(found(each.name, refused='it said, "no"', failed=("x", "y")), each)
    told |= {"what": "One line.", "tiers": [1, 2]}
    document = {
        "machine": "2 cores", "minutes": 1.5, "versions": {"torch": "2"}, "sabotages": [told, {**told, "tiers": []}],
        "controls": [detection.row(found("c, seed 1"))],
        "spreads": detection.spreads([found(verdicts=[verdict(1 / 3), verdict(0.0, name="w")])]),
    }  # fmt: skip
    (tmp_path / "docs").mkdir()
    detection.store(tmp_path, document)

    assert detection.load(tmp_path) == document
    assert document["spreads"]["w"]["room"] is None
    assert [len((tmp_path / file).read_text().splitlines()) for file in TABLES] == [3, 2, 3]


def test_text_of_several_lines_is_stored_in_one(tmp_path):
    tables.write(tmp_path / "t.csv", {"said": str}, [{"said": "one\n  two"}])
    assert (tmp_path / "t.csv").read_text() == "said\none two\n"


def test_there_is_nothing_stored_in_a_checkout_without(tmp_path):
    assert detection.load(tmp_path) == {}


# -- the bench and its command -----------------------------------------------------------------------------------------


def test_a_sabotage_that_breaks_by_itself_is_no_catch():
    own = str(bench.SABOTAGES / "training.py")
    said = f'Traceback\n  File "x.py", line 1\n  File "{own}", line 3\nerror: unexpected KeyError: x'
    with pytest.raises(StageError, match="broken itself"):
        bench._refused("it", said)
    assert bench._refused("it", 'File "x.py", line 1\nerror: unexpected KeyError: x') == "unexpected KeyError: x"


def test_nor_is_one_of_somebody_elses_module():
    said = 'Traceback\n  File "x.py", line 1\n  File "/home/somebody/own.py", line 3\nerror: unexpected KeyError: x'
    with pytest.raises(StageError, match="broken itself"):
        bench._refused("it", said, "/home/somebody/own.py")
    assert bench._refused("it", said) == "unexpected KeyError: x"


def test_nothing_is_sabotaged_on_a_baseline_whose_honest_run_raises_an_alarm(tmp_path, monkeypatch):
    monkeypatch.setattr(baseline, "recipe", lambda name, folder: {})
    monkeypatch.setattr(bench.Bench, "_carry_out", lambda self, name, *_: found(name, failed=("loss_end",)))
    with pytest.raises(StageError, match="the honest run 'lora' raises an alarm"):
        bench.Bench(tmp_path).attempt(next(iter(table().values())))


def test_an_honest_run_is_made_once(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(baseline, "recipe", lambda name, folder: {})
    monkeypatch.setattr(bench.Bench, "_carry_out", lambda self, name, *_: made.append(name) or found(name))
    stand = bench.Bench(tmp_path)
    assert [stand.baseline("lora").name, stand.baseline("lora").name] == ["baseline lora", "baseline lora"]
    assert made == ["baseline lora"]


@pytest.mark.parametrize(("code", "failed"), [(0, True), (1, False)])
def test_an_exit_code_that_says_otherwise_than_the_verdicts_is_no_result(tmp_path, monkeypatch, code, failed):
    stored = {"verdicts": [{"name": "loss_end", "passed": not failed}]}
    ended = subprocess.CompletedProcess([], code, "", "")
    monkeypatch.setattr(baseline, "finetune", lambda *_, **__: ended)
    monkeypatch.setattr(bench, "verdicts", lambda run: stored)
    with pytest.raises(StageError, match=f"'it' ended with {code}"):
        bench.Bench(tmp_path).control("it", lambda folder: {})


def test_what_a_sabotage_did_is_told_with_how_often_and_what_noticed_it():
    each = table()["every second step skipped"]
    calls = (Called("one:f", 120, 2), Called("two:f", 0, 0))
    assert told(replace(found(each.name, failed=("step_size", "loss_end")), calls=calls[:1]), each).splitlines() == [
        "every second step skipped: caught, 1.0 s",
        f"  {each.what}",
        "  called 120 times in 2 processes: one:f",
        "  failed: step_size, loss_end",
    ]
    refused = told(replace(found(each.name, refused="no state to go on from"), calls=calls), each)
    assert refused.splitlines()[3:] == ["  NEVER CALLED: two:f", "  refused: no state to go on from"]
    assert told(found(each.name), each).splitlines()[0] == "every second step skipped: MISSED, 1.0 s"
    assert told(found(each.name), each).splitlines()[-1].startswith("  nothing noticed it")


def test_an_honest_run_is_told_as_quiet_or_as_a_false_alarm():
    assert told(found("c")) == "c: quiet, 1.0 s"
    assert told(found("c", failed=("loss_end",))) == "c: FALSE ALARM, 1.0 s\n  failed: loss_end"


def test_there_are_controls_of_every_kind():
    names = list(controls())
    assert len(names) >= 40
    for part in (
        "embedded model",
        "lora, seed",
        "full, seed",
        "dpo, seed",
        "data order",
        "learning rate",
        "qwen2",
        "phi3",
    ):
        assert any(part in name for name in names), part


def sabotage(*arguments):
    return subprocess.run(
        processes.command("sabotage", *arguments), env=baseline.environment(), capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip


def test_the_command_lists_what_there_is():
    done = sabotage("--list")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(table())
    assert "training: learning rate 0 (fast): The learning rate is 0" in done.stdout


def test_the_command_refuses_an_unknown_name_with_the_nearest():
    done = sabotage("learning rate nought")
    assert done.returncode == 2
    assert "no sabotage or control 'learning rate nought'. Did you mean 'learning rate 0'?" in done.stderr
