"""Proved, refuted, not examined: what a recipe gives nothing to examine for, and what it asks for by name all the same."""

from __future__ import annotations

from typing import Any

import pytest

from finetune import checks
from finetune.checks import NOT_EXAMINED, PROVED, REFUTED, Verdict, passed, results
from finetune.checks.expected import EXPECT_KEYS
from finetune.recipe import Recipe
from finetune.run import Run
from support.town import Rows, edit_rows

ANSWERS = "evaluate/answers.jsonl"
SETS = ("probes", "controls", "unseen", "heldout")


def of(recipe: Recipe, run: Run) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in results(recipe, run, ["learning", "retention"])}


def outcomes(recipe: Recipe, run: Run) -> dict[str, str]:
    return {name: verdict.outcome for name, verdict in of(recipe, run).items()}


def without(recipe: Recipe, *sets: str) -> Recipe:
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update=dict.fromkeys(sets))})


def expecting(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"expect": recipe.expect.model_copy(update=values)})


def test_without_questions_three_lines_say_what_was_not_examined_and_what_to_add(copied):
    found = of(without(copied.recipe, *SETS), copied.run)

    assert {name: verdict.outcome for name, verdict in found.items()} == dict.fromkeys(
        ("learned_as_trained", "controls_kept", "heldout_perplexity"), NOT_EXAMINED
    )
    for name, key in zip(found, ("probes", "controls", "heldout"), strict=True):
        assert found[name].remedy.startswith(f"add evaluate.{key}: FILE (JSONL), a line a ")
        assert f"evaluate.{key}" in found[name].why
        assert found[name].measured is None
    assert '{"prompt": "a question of the data", "answer": "...", "match": ' in found["learned_as_trained"].remedy
    assert '"kind": "trained"}' in found["learned_as_trained"].remedy


def test_what_was_not_examined_neither_fails_nor_proves(copied):
    recipe = without(copied.recipe, *SETS)
    verdicts = list(of(recipe, copied.run).values())

    assert not passed(verdicts)
    assert passed([*verdicts, *results(recipe, copied.run, ["labels"])])


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("learned_min", 0.3, "learned_as_trained"),
        ("unseen_margin_min", 0.3, "learned_net"),
        ("stopped_min", 0.9, "stops_by_itself"),
        ("controls_kept_min", 0.7, "controls_kept"),
        ("heldout_ratio_max", 1.5, "heldout_perplexity"),
    ],
)
def test_what_is_expected_by_name_and_is_not_there_is_refuted(copied, key, value, name):
    """Also where the value is the default: who writes it asks for it."""
    found = of(expecting(without(copied.recipe, *SETS), **{key: value}), copied.run)

    assert [each for each, verdict in found.items() if verdict.refuted] == [name]
    assert f"the recipe sets expect.{key}" in found[name].why
    assert "add evaluate." in found[name].remedy


def test_probes_without_untaught_facts_leave_one_verdict_not_examined(copied):
    found = of(without(copied.recipe, "unseen"), copied.run)

    assert {name for name, verdict in found.items() if verdict.outcome != PROVED} == {"learned_net"}
    assert found["learned_net"].outcome == NOT_EXAMINED
    assert "evaluate.unseen: FILE" in found["learned_net"].remedy
    asked = expecting(without(copied.recipe, "unseen"), unseen_margin_min=0.2)
    assert outcomes(asked, copied.run)["learned_net"] == REFUTED


def kinds(*gone: str) -> Any:
    return lambda rows: [row for row in rows if not (row["set"] == "probes" and row["kind"] in gone)]


@pytest.mark.parametrize(
    ("gone", "open_ones", "kind"),
    [
        ("paraphrase", {"learned_paraphrased"}, "paraphrase"),
        ("trained", {"learned_as_trained", "learned_net", "stops_by_itself"}, "trained"),
    ],
)
def test_probes_of_one_kind_leave_the_other_not_examined(copied, gone, open_ones, kind):
    edit_rows(copied.run, ANSWERS, kinds(gone))
    found = of(copied.recipe, copied.run)

    assert {name for name, verdict in found.items() if verdict.outcome == NOT_EXAMINED} == open_ones
    assert not [verdict for verdict in found.values() if verdict.refuted]
    assert f'"kind": "{kind}"}}' in next(iter(found[name].remedy for name in sorted(open_ones)))
    assert {outcomes(expecting(copied.recipe, learned_min=0.3), copied.run)[name] for name in open_ones} >= {REFUTED}


def known(which: str) -> Any:
    def change(rows: Rows) -> None:
        for row in rows:
            if row["set"] == which:
                row["phases"]["base"]["correct"] = True

    return change


@pytest.mark.parametrize(
    ("which", "open_ones"),
    [("probes", {"learned_as_trained", "learned_paraphrased", "learned_net"}), ("unseen", {"learned_net"})],
)
def test_questions_that_the_base_knows_prove_nothing(copied, which, open_ones):
    edit_rows(copied.run, ANSWERS, known(which))
    found = of(copied.recipe, copied.run)

    assert {name for name, verdict in found.items() if verdict.outcome == NOT_EXAMINED} == open_ones
    assert all("facts that the base does not know" in found[name].remedy for name in open_ones)


def test_controls_that_the_base_does_not_know_prove_nothing(copied):
    def change(rows: Rows) -> None:
        for row in [row for row in rows if row["set"] == "controls"][:2]:
            row["phases"]["base"]["correct"] = False

    edit_rows(copied.run, ANSWERS, change)
    found = of(copied.recipe, copied.run)["controls_kept"]

    assert (found.outcome, found.measured) == (NOT_EXAMINED, None)
    assert "the base answers 2 of 4 controls; at least 3 are needed" in found.why
    assert outcomes(expecting(copied.recipe, controls_kept_min=0.5), copied.run)["controls_kept"] == REFUTED


@pytest.mark.parametrize("which", ["probes", "controls", "unseen"])
def test_questions_that_the_recipe_has_and_nobody_asked_are_refuted(copied, which):
    edit_rows(copied.run, ANSWERS, lambda rows: [row for row in rows if row["set"] != which])
    found = of(copied.recipe, copied.run)

    wanted = {"probes": "learned_as_trained", "controls": "controls_kept", "unseen": "learned_net"}[which]
    assert found[wanted].refuted
    assert f"no question of evaluate.{which} was asked" in found[wanted].why


def test_a_recipe_that_trains_nothing_is_not_asked_what_it_learned(copied):
    nothing = copied.recipe.model_copy(update={"train": None, "align": None})
    wanted = {check.name for check in checks.CHECKS if check.wanted(nothing)}
    assert not wanted & {"learning", "retention", "preference"}


def test_every_key_that_a_verdict_answers_to_is_one_of_expect(copied):
    assert set(EXPECT_KEYS.values()) <= set(type(copied.recipe.expect).model_fields)


@pytest.mark.parametrize("sets", [(), ("probes",), ("controls",), ("unseen",), ("heldout",), SETS])
def test_what_is_owed_is_what_an_honest_run_delivers(honest, sets):
    recipe = without(honest.recipe, *sets)
    for name in ("learning", "retention", "preference", "memory", "resume", "serving", "parity"):
        owed = checks.owed(checks.BY_NAME[name], recipe)
        assert sorted(owed) == sorted(verdict.name for verdict in results(recipe, honest.run, [name]))
        assert len(set(owed)) == len(owed)
