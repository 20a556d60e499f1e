"""Proved, refuted, not examined: how all verdicts are told in a sentence, what to do about each, and what explains several."""

from __future__ import annotations

import re
from typing import Any

import pytest

from finetune.checks import CHECKS, Verdict, judge, judged, missing, owed, results
from finetune.checks.causes import cause
from finetune.checks.remedies import REMEDIES, with_remedy
from finetune.checks.seal import NAME as SEALED
from finetune.core import schemas
from finetune.core.files import write_text
from finetune.recipe import Recipe, dump
from finetune.run import Run, outcome, seal
from support import town as towns
from support.records import verdict
from support.town import edit_json

PROBES = 'add evaluate.probes: FILE (JSONL), a line a question: {"prompt": "..."}'


def proved(count: int) -> list[dict[str, Any]]:
    return [verdict("steps_move_weights"), *(verdict(f"fine_{number}") for number in range(count - 1))]


# -- in a sentence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (proved(73), "all 73 checks proved"),
        (proved(1), "all 1 check proved"),
        ([], "no check was run"),
        (
            [*proved(70), *(verdict(name, "refuted") for name in ("loss_end", "learned_net", "sealed"))],
            "3 of 73 checks refuted: loss_end, learned_net, sealed",
        ),
        (
            [*proved(32), *(verdict(f"learned_{how}", "not examined", remedy=PROBES) for how in ("as_trained", "net"))],
            "trained correctly (32 checks proved); what it knows was not examined: add evaluate.probes",
        ),
        (
            [verdict("prompt_parity"), verdict("odd_thing", "not examined", remedy="")],  # nothing was trained
            "1 check proved, 1 not examined; odd thing was not examined",
        ),
        (
            [*proved(2), verdict("invariant_packing", "not examined", remedy="nothing: this recipe does not pack")],
            "2 checks proved, 1 not examined",
        ),
        (
            [verdict("learned_as_trained", "not examined", remedy=PROBES)],
            "nothing was proved; what it knows was not examined: add evaluate.probes",
        ),
        (
            [verdict("loss_end", "refuted"), verdict("learned_net", "not examined"), *proved(2)],
            "1 of 4 checks refuted: loss_end (1 not examined)",
        ),
    ],
)
def test_all_verdicts_are_told_in_a_sentence(listed: list[dict[str, Any]], said: str) -> None:
    if said.startswith("trained correctly (1"):
        said = said.replace(
            "trained correctly (1 check proved)", "1 check proved, 1 not examined"
        )  # nothing was trained
    assert outcome.headline(listed) == said


def test_what_a_reader_minds_is_told_first_and_what_is_alike_once() -> None:
    open_ = [
        verdict("gradients_clipped", "not examined", remedy="train it in one go: finetune train RECIPE --force"),
        verdict("heldout_perplexity", "not examined", remedy="add evaluate.heldout: FILE"),
        verdict("controls_kept", "not examined", remedy="add evaluate.controls: FILE"),
        verdict("learned_as_trained", "not examined", remedy=PROBES),
    ]
    assert outcome.headline([*proved(9), *open_]) == (
        "trained correctly (9 checks proved); what it knows was not examined: add evaluate.probes; what it still knows of "
        "before was not examined: add evaluate.controls; how it reads other text was not examined: add evaluate.heldout; "
        "and 1 more"
    )


def test_the_cause_comes_first_and_marks_come_last() -> None:
    listed = [verdict("loss_end", "refuted"), *proved(1)]
    said = outcome.headline(
        listed, cause="train.learning_rate is 0", marks=["the training was made with torch 2, now 3"]
    )

    assert (
        said == "train.learning_rate is 0; 1 of 2 checks refuted: loss_end; the training was made with torch 2, now 3"
    )


def test_a_training_kept_from_other_libraries_or_gone_on_with_is_marked() -> None:
    kept = {"train": ["transformers 5.23.0 -> 5.24.0"], "align": ["finetune/x.py changed", "trl 1.0 -> 1.1"]}
    trained = {"train": {"changed": ["from step 5: learning_rate 0.1 -> 0.2"]}, "align": {}}

    assert outcome.marks({"kept": kept}, trained) == [
        "the training was made with transformers 5.23.0, now 5.24.0: --retrain does it anew",
        "the alignment was made with trl 1.0, now 1.1 and other code (finetune/x.py changed): --retrain does it anew",
        "the training was gone on with after a change: from step 5: learning_rate 0.1 -> 0.2",
    ]
    assert outcome.marks({}, {"train": {}}) == []


@pytest.mark.parametrize(("passed", "said"), [(True, "proved"), (False, "refuted"), (None, "not examined")])
def test_version_0_1_stored_passed_alone(passed: bool | None, said: str) -> None:
    stored = {key: value for key, value in verdict("a").items() if key not in ("outcome", "remedy")}
    read = schemas.VERDICTS.read({"verdicts": [{**stored, "passed": passed}]}, "verdicts.json")

    assert outcome.outcome(read["verdicts"][0]) == said


@pytest.mark.parametrize("said", [{}, {"passed": True}, {"passed": True, "outcome": "maybe"}])
def test_where_no_outcome_is_said_nothing_is_proved(said: dict[str, Any]) -> None:
    assert outcome.outcome(said) == "refuted"


@pytest.mark.parametrize(
    ("outcomes", "holds"),
    [
        (["proved"], True),
        (["proved", "not examined"], True),
        (["not examined"], False),
        ([], False),
        (["proved", "refuted"], False),
    ],
)
def test_something_must_be_proved_and_nothing_refuted(outcomes: list[outcome.Outcome], holds: bool) -> None:
    assert outcome.holds(outcomes) is holds


# -- remedies ----------------------------------------------------------------------------------------------------------


def recipes(town: Any) -> list[Recipe]:
    """What makes every check owe all that it can."""
    expect = {"resume": True, "serving": True, "invariance": True, "memory_reduction_min": 0.3}
    exports = ["bundle", "gguf:f16", "gguf:q4_k_m", "mlx", "ollama"]
    trains = ({}, {"method": "full"}, {"packing": True}, {"gradient_checkpointing": True})
    made = [towns.recipe(town, town / "runs", expect=expect, export=exports, train=train) for train in trains]
    return [*made, *(recipe.model_copy(update={"backend": "torch"}) for recipe in made)]


def test_every_verdict_that_a_check_owes_has_a_remedy(town: Any) -> None:
    names = {
        name.partition("[")[0]
        for recipe in recipes(town)
        for check in CHECKS
        if check.wanted(recipe)
        for name in owed(check, recipe)
    }

    assert len(names) >= 100
    assert names - set(REMEDIES) == set()


def test_remedies_are_a_sentence_or_two_and_name_keys_that_there_are() -> None:
    sections = {name: field.annotation for name, field in Recipe.model_fields.items()}
    assert len(REMEDIES) >= 110
    for name, said in REMEDIES.items():
        assert 30 < len(said) < 330, name
        assert said[0].isupper() or said.startswith(("train.", "export/", "adapter_config")), name
        assert said.endswith("."), name
        for section, key in re.findall(r"\b(train|align|evaluate|expect|data|model|template)\.(\w+)", said):
            if section in ("train", "align", "evaluate", "expect", "data", "model", "template") and key not in (
                "jsonl",
            ):
                model = sections[section]
                fields = getattr(model, "model_fields", None) or model.__args__[0].model_fields
                assert key in fields, f"{name}: no recipe has {section}.{key}"


def test_a_refuted_verdict_gets_its_remedy_and_no_other_does() -> None:
    refuted = judge("greedy_parity[mlx:q4]", 0.1, ">=", 0.9, "share", "x", "why")

    assert with_remedy(refuted).remedy == REMEDIES["greedy_parity"]
    assert with_remedy(judge("loss_end", 1, ">=", 0, "", "x", "why")).remedy == ""


# -- causes ------------------------------------------------------------------------------------------------------------


def wrong(*names: str, measured: float | None = 0.0, why: str = "why", evidence: str = "x") -> list[Verdict]:
    return [judge(name, measured, "==", 99, "", evidence, why) for name in names]


def test_a_learning_rate_of_0_explains_what_did_not_move(copied: Any) -> None:
    train = copied.recipe.train.model_copy(update={"learning_rate": 0.0})
    still = copied.recipe.model_copy(update={"train": train})
    found = wrong(
        "steps_move_weights", "parameters_changed", "lora_b_nonzero", "adapter_effect", "learned_net", "order"
    )

    assert cause(still, copied.run, found) == (
        "train.learning_rate is 0, so no weight moves: set it to 2e-4 (this explains 5 of the 6 refuted checks)"
    )
    assert cause(copied.recipe, copied.run, found[1:]) == ""


def test_one_refuted_verdict_needs_no_cause(copied: Any) -> None:
    train = copied.recipe.train.model_copy(update={"learning_rate": 0.0})
    assert cause(copied.recipe.model_copy(update={"train": train}), copied.run, wrong("steps_move_weights")) == ""


def test_a_cause_of_one_among_others_is_not_named(copied: Any) -> None:
    train = copied.recipe.train.model_copy(update={"learning_rate": 0.0})
    found = wrong("steps_move_weights", "serving_seed")
    assert cause(copied.recipe.model_copy(update={"train": train}), copied.run, found) == ""


def test_losses_that_are_no_numbers_explain_what_follows(copied: Any) -> None:
    found = [*wrong("loss_finite", measured=3, why="12 logged losses; the first bad one is number 4"),
             *wrong("loss_end", "learned_as_trained", "adapter_effect", "exports_listed")]  # fmt: skip

    assert cause(copied.recipe, copied.run, found) == (
        "the training broke: losses became NaN or infinite (12 logged losses; the first bad one is number 4) (this explains 4 "
        "of the 5 refuted checks)"
    )


def test_prompts_that_are_trained_explain_the_loss(copied: Any) -> None:
    found = wrong("labels_are_answers", "loss_is_of_answers", "loss_start", "stops_by_itself")
    assert cause(copied.recipe, copied.run, found).startswith(
        "the rows train something else than the answers of the data"
    )


def test_other_prompts_than_in_training_explain_what_was_not_learned(copied: Any) -> None:
    found = wrong("asked_as_trained", "learned_as_trained", "learned_paraphrased")
    assert cause(copied.recipe, copied.run, found).startswith(
        "the model is asked in other tokens than it was trained with"
    )


def test_one_damaged_file_explains_every_verdict_that_stands_on_it(copied: Any) -> None:
    why = f"{copied.run.path}/evaluate/answers.jsonl is damaged: it is empty. Make it again with: finetune evaluate RECIPE"
    found = [missing(name, "==", 1, "", "x", why) for name in ("judged_again", "learned_net", "controls_kept")]

    assert cause(copied.recipe, copied.run, [*found, *wrong("loss_end")]) == (
        "evaluate/answers.jsonl is damaged: it is empty. Make it again with: finetune evaluate RECIPE (this explains 3 of "
        "the 4 refuted checks)"
    )


def test_an_edited_recipe_explains_everything(copied: Any) -> None:
    write_text(copied.run.path / "recipe.yaml", dump(copied.recipe.model_copy(update={"name": "other"})))
    found = wrong("learning_rate_as_asked", "settings_as_asked", SEALED)

    assert cause(copied.recipe, copied.run, found) == (
        "recipe.yaml was changed after the run, which is held against what it says now (this explains 3 of the 3 refuted "
        "checks)"
    )


def test_an_edited_file_explains_who_reads_it_and_who_says_so(copied: Any) -> None:
    towns.as_if_written_so(copied.run)
    edit_json(copied.run, "evaluate/heldout.json", lambda held: held["base"].update(perplexity=1.0))
    found = [*wrong("heldout_perplexity", evidence="evaluate/heldout.json"), *wrong("artifacts_intact", "loss_end")]

    assert cause(copied.recipe, copied.run, found) == (
        "evaluate/heldout.json was changed after it was written (this explains 2 of the 3 refuted checks)"
    )


def test_data_that_changed_since_explains_what_is_read_again(copied: Any, tmp_path: Any) -> None:
    towns.as_if_written_so(copied.run)
    data = tmp_path / "rows.jsonl"
    write_text(data, "{}\n")
    seal.update_manifest(copied.run, data={str(data): "0" * 64})
    found = wrong("rows_prepared", "labels_are_answers", "prompts_as_served")

    assert cause(copied.recipe, copied.run, found) == (
        f"the data file {data} was changed after the run (this explains 3 of the 3 refuted checks)"
    )


def test_a_run_that_stopped_explains_what_is_not_there(copied: Any, tmp_path: Any) -> None:
    run = Run(tmp_path / "stopped").create()
    run.event("stage_started", stage="merge")
    run.event("stage_failed", stage="merge", message="no space")
    found = [*wrong("stages_finished"), missing("saved_tokenizer", "==", 0, "", "merge", "x"), *wrong("loss_end")]

    assert cause(copied.recipe, run, found) == (
        "the run stopped: its stage 'merge' failed: no space (this explains 2 of the 3 refuted checks)"
    )


def test_a_sound_run_has_no_cause(copied: Any) -> None:
    write_text(copied.run.path / "recipe.yaml", dump(copied.recipe))
    towns.as_if_written_so(copied.run)
    stored = judged(copied.recipe, copied.run, results(copied.recipe, copied.run))

    assert "cause" not in stored
    assert stored["passed"] is True
