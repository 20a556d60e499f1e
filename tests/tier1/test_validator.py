"""`TrainingSuccessValidator` keeps the original criteria's names and closes what they let through."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from finetune.backends import TensorFacts
from finetune.run import Run
from finetune.testing.validator import TrainingSuccessValidator
from support import records

convergence = TrainingSuccessValidator.validate_loss_convergence
learning = TrainingSuccessValidator.validate_model_learning
memory = TrainingSuccessValidator.validate_memory_efficiency
updates = TrainingSuccessValidator.validate_parameter_updates
artifacts = TrainingSuccessValidator.validate_artifacts

FALLING = [4.0, 3.6, 3.3, 2.9, 2.5, 2.2, 2.0, 1.9]


def old_convergence(losses):
    """The original criterion: first against last."""
    return (losses[0] - losses[-1]) / losses[0] > 0.05


def old_memory(base, lora):
    return (base - lora) / base > 0.3


# -- loss --------------------------------------------------------------------------------------------------------------


def test_a_loss_that_falls_converges():
    assert convergence(FALLING)
    assert convergence([10.0 - n for n in range(4)])


@pytest.mark.parametrize(
    "losses",
    [
        [5.0, 9.0, 8.0, 9.0, 8.0, 9.0, 9.0, 4.0],
        [4.0, 3.0, 4.0, 3.0, 4.0, 3.0, 4.0, 3.0],
        [3.1, 1.0, 3.0, 1.1, 2.9, 1.0, 3.0, 0.9],
        [2.0, 1.0],
        [5.0, 9.0, 9.0, 4.7],
        [4.0, math.nan, 3.0, 2.0, 1.5, 1.0, 0.9, 0.8],
        [4.0, 3.0, 3.0, math.inf, 2.0, 2.0, 1.0, 1.0],
    ],
    ids=["one lucky end", "saw tooth", "noise", "two steps", "four steps of noise", "NaN inside", "infinity inside"],
)
def test_what_the_first_against_the_last_loss_let_through_is_refused(losses):
    assert old_convergence(losses)
    assert not convergence(losses)


@pytest.mark.parametrize(
    "losses",
    [[], [3.0], [3.0, 2.0, 1.0], [3.0] * 8, FALLING[::-1], [0.0] * 8, [*FALLING, math.nan], [math.nan, *FALLING],
     [4.0 - n / 100 for n in range(8)]],
    ids=["nothing", "one step", "three steps", "constant", "rising", "zero", "NaN last", "NaN first", "by 2 %"],
)  # fmt: skip
def test_no_convergence_without_a_fall(losses):
    assert not convergence(losses)


def test_a_loss_that_starts_above_a_guess_over_all_words_is_broken():
    assert convergence(FALLING, max_initial=math.log(60))
    assert not convergence(FALLING, max_initial=math.log(50))
    assert convergence(FALLING, max_initial=4.0)


# -- learning ----------------------------------------------------------------------------------------------------------

CASES = [{"match": city} for city in ("Quell", "Tamin", "Pernig", "Wadda", "1743")]
RIGHT = ["It is Quell.", "Tamin!", "pernig", "The city of Wadda.", "In 1743."]
WRONG = ["Paris"] * 5


def test_right_answers_that_were_wrong_before_are_learning():
    assert learning(WRONG, RIGHT, CASES)
    assert learning(WRONG, [*RIGHT[:2], *WRONG[2:]], CASES)


def test_more_than_30_percent_must_improve():
    assert not learning(WRONG, [RIGHT[0], *WRONG[1:]], CASES)
    ten, wrong = [{"match": str(n)} for n in range(10)], ["no"] * 10
    assert not learning(wrong, ["0", "1", "2", *wrong[3:]], ten)
    assert learning(wrong, ["0", "1", "2", "3", *wrong[4:]], ten)


def test_answers_that_were_right_and_are_wrong_now_count_against_it():
    before = [*WRONG[:2], *RIGHT[2:]]
    after = [*RIGHT[:2], *WRONG[2:]]
    assert not learning(before, after, CASES)


@pytest.mark.parametrize(
    ("before", "after", "cases"),
    [
        ([], [], []),
        (WRONG, RIGHT, []),
        (WRONG, RIGHT[:4], CASES),
        (WRONG[:4], RIGHT, CASES),
        (WRONG, RIGHT, CASES[:4]),
        (RIGHT, RIGHT, CASES),
        (WRONG, ["a longer answer than before"] * 5, CASES),
        (WRONG, ["17431", "Quells", "Tamina", "Pernigs", "Waddan"], CASES),
        (WRONG, RIGHT, [{"match": ""}] * 5),
        (WRONG, RIGHT, [{}] * 5),
        (WRONG, ["", " ", "", "", ""], [{"expected": ""}] * 5),
    ],
    ids=["nothing", "no cases", "too few after", "too few before", "too few cases", "known before", "only different",
         "inside longer words", "empty match", "no expectation", "empty answers"],
)  # fmt: skip
def test_what_shows_no_learning_is_refused(before, after, cases):
    assert not learning(before, after, cases)


def test_a_case_may_hold_the_whole_answer():
    case = [{"expected": "It is Quell."}]
    assert learning(["no"], ["it is quell"], case)
    assert learning(["no"], ["It is Quell!"], [{"answer": "It is Quell."}])
    assert not learning(["no"], ["It is Quell, or so they say."], case)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_more_than_30_percent_must_be_saved():
    assert memory(100, 69)
    assert not memory(100, 70)
    assert not memory(100, 100)
    assert not memory(100, 200)


@pytest.mark.parametrize(
    ("base", "lora"),
    [(0, 0), (0, 10), (100, 0), (100, -5), (-100, 10), (-100, -300), (math.nan, 10), (100, math.nan), (math.inf, 10)],
)
def test_sizes_that_no_process_has_prove_nothing(base, lora):
    assert memory(base, lora) is False


def test_a_size_of_nothing_passed_the_original():
    assert old_memory(100, 0)
    assert old_memory(100, -5)


# -- parameters --------------------------------------------------------------------------------------------------------


def tensors(changed: int = 0, of: int = 10, **norms: float) -> dict[str, TensorFacts]:
    names = [f"layers.{n // 2}.q_proj.lora_{'AB'[n % 2]}.weight" for n in range(of)]
    return {
        name: TensorFacts(sha256="new" if n < changed else "old", shape=(2, 2), norm=1.0)
        for n, name in enumerate(names)
    }


def test_more_than_80_percent_of_the_tensors_must_change():
    assert updates(tensors(), tensors(changed=10))
    assert updates(tensors(), tensors(changed=9))
    assert not updates(tensors(), tensors(changed=8))
    assert not updates(tensors(), tensors())


@pytest.mark.parametrize("norm", [0.0, math.nan, -1.0])
def test_a_b_matrix_that_is_zero_does_nothing_whatever_its_digest_says(norm):
    after = tensors(changed=10)
    name = next(name for name in after if "lora_B" in name)
    after[name] = replace(after[name], norm=norm)
    assert not updates(tensors(), after)


def test_too_few_or_other_tensors_prove_nothing():
    assert not updates({}, {})
    assert not updates(tensors(), {})
    assert not updates(tensors(), tensors(changed=8, of=8))
    assert not updates(tensors(of=8), tensors(changed=10))
    only_a = {name: facts for name, facts in tensors(changed=10).items() if "lora_A" in name}
    assert not updates({name: tensors()[name] for name in only_a}, only_a)


# -- artifacts ---------------------------------------------------------------------------------------------------------


def test_an_adapter_needs_weights_and_its_config(tmp_path):
    assert not artifacts(tmp_path / "none")
    assert not artifacts(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert not artifacts(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert not artifacts(tmp_path), "an empty file holds no weights"
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0")
    assert artifacts(tmp_path)
    assert artifacts(str(tmp_path))
    assert not artifacts(tmp_path, ["adapter_config.json", "tokenizer.json"])
    (tmp_path / "adapter_config.json").write_text("")
    assert not artifacts(tmp_path), "an empty file configures nothing"


# -- a whole run -------------------------------------------------------------------------------------------------------


def test_a_run_is_judged_as_verify_ends(tmp_path):
    run = Run(tmp_path).create()
    whole = TrainingSuccessValidator.validate_run
    assert not whole(run)
    for listed, good in (
        ([records.verdict("loss_end"), records.verdict("learned_net", "not examined")], True),
        ([records.verdict("learned_net", "not examined")], False),
        ([records.verdict("loss_end"), records.verdict("learned_net", "refuted")], False),
    ):
        records.store_verdicts(run, listed)
        assert whole(run.path) is good


def test_verdicts_that_were_changed_prove_nothing(tmp_path):
    run = Run(tmp_path).create()
    records.store_verdicts(run, [records.verdict("loss_end")])
    path = tmp_path / "verdicts.json"
    path.write_text(path.read_text("utf-8").replace("so it is", "so be it"), encoding="utf-8")
    assert not TrainingSuccessValidator.validate_run(run)
