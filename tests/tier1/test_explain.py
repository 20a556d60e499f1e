"""What every verdict, check, stage and key means is told by the command line, for all there are and for nothing else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from finetune.checks import BY_NAME, CHECKS, owed, parts
from finetune.checks.expected import EXPECT_KEYS
from finetune.checks.explained import CHECK_OF, EXPLAINED, OF_CHECK
from finetune.checks.remedies import REMEDIES
from finetune.cli import explain
from finetune.cli.app import cli
from finetune.core.lookup import load
from finetune.recipe import Recipe
from finetune.recipe.keys import keys, matching
from finetune.report import summary, terminal
from finetune.run import layout
from finetune.run.plan import STAGES
from support import town as towns
from support.records import store_verdicts, verdict
from tools import docs_gen

EXPECT = {"resume": True, "serving": True, "invariance": True, "memory_reduction_min": 0.3}
EXPORTS = ["bundle", "gguf:f16", "gguf:q4_k_m", "mlx", "ollama"]


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, ["explain", *words], prog_name="finetune")


def told(*words: str) -> list[dict[str, Any]]:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return list(json.loads(result.stdout))


# -- the table of verdicts ---------------------------------------------------------------------------------------------


def recipes() -> list[Recipe]:
    """What makes every check owe all that it can."""
    here = Path("town")
    trains: list[dict[str, Any]] = [{"on_nan": "skip"}, {"method": "full"}, {"packing": True}]
    made = [
        towns.recipe(here, here / "runs", expect=EXPECT, export=EXPORTS, train=train, align={"on_nan": "skip"})
        for train in trains
    ]
    on_torch = [recipe.model_copy(update={"backend": "torch"}) for recipe in made]
    held = on_torch[0].model.model_copy(update={"quantization": "nf4"})
    return [*made, *on_torch, on_torch[0].model_copy(update={"model": held})]


def test_every_verdict_that_a_check_owes_is_explained_under_it_and_nothing_else() -> None:
    swept = {
        (check.name, name.partition("[")[0])
        for recipe in recipes()
        for check in CHECKS
        if check.wanted(recipe)
        for name in owed(check, recipe)
    }

    assert len(swept) >= 130
    assert swept == {(check, name) for name, check in CHECK_OF.items()}
    assert list(OF_CHECK) == [check.name for check in CHECKS]
    assert set(EXPLAINED) == set(REMEDIES)
    assert len(EXPLAINED) == sum(map(len, OF_CHECK.values()))  # none of the same name under two checks


def test_what_is_said_of_a_verdict_is_short_and_in_sentences() -> None:
    for name, entry in EXPLAINED.items():
        assert 20 < len(entry.measures) < 320 and entry.measures.endswith("."), name
        assert 20 < len(entry.fails) < 220 and entry.fails.endswith("."), name
        assert entry.bound and not entry.bound.endswith("."), name
        for text in (entry.measures, entry.bound, entry.fails, *entry.evidence):
            assert not re.search(r"[{}`|]|  ", text), f"{name}: {text}"


def test_the_files_of_a_verdict_are_those_that_a_run_may_hold() -> None:
    known = {file.path for file in layout.FILES}
    named = {path for entry in EXPLAINED.values() for path in entry.evidence if " " not in path}
    patterns = {"STAGE/report.json", "compare/HOP.json", "compare/merged.json"}
    patterns |= {f"{stage}/checkpoint-N" for stage in ("train", "align")}

    assert len(named) >= 45
    assert named - known == patterns


def test_a_key_of_a_recipe_that_a_verdict_names_is_there() -> None:
    places = {place for key in keys() for place in key.places}
    named = [
        (name, key)
        for name, entry in EXPLAINED.items()
        for text in (entry.measures, entry.bound, entry.fails)
        for key in re.findall(r"\b(?:train|align|evaluate|expect|data|model|template)\.(?:lora\.)?[a-z_]\w+", text)
    ]

    assert len(named) >= 70
    assert [each for each in named if each[1] not in places] == []


def test_the_bound_of_a_verdict_that_a_recipe_can_move_names_the_key() -> None:
    assert len(EXPECT_KEYS) >= 13
    for name, key in EXPECT_KEYS.items():
        assert re.search(rf"expect\.{key}\b", EXPLAINED[name].bound), name


# Files that a check opens and that no verdict stands on, and why.
BESIDE = {
    "fetch/model.json": "it says where the base is, with whose tokenizer rows and answers are read",
    "align/adapter/adapter_config.json": "of merged_once, which this backend does not owe",
}


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """The files that this process opens while a test is at it."""
    _opened.clear()
    _listening[0] = True
    yield _opened
    _listening[0] = False


_opened: list[str] = []
_listening = [False]


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _listening[0] and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_listen)  # one cannot be taken away again


def test_what_a_check_opens_is_what_is_said_to_be_read(honest: Any, opened: list[str]) -> None:
    """But for the verdicts that read everything."""
    recipe, run = honest
    swept = 0
    for check in CHECKS:
        for part in load(check.parts):
            names = [name.partition("[")[0] for name in part.owes(recipe)] if check.wanted(recipe) else []
            if not names or {"records_whole", "artifacts_intact"} & set(names):
                continue
            swept += 1
            parts._tensors.cache_clear()
            opened.clear()
            part.check(recipe, run)
            files = {
                Path(file).relative_to(run.path).as_posix() for file in opened if Path(file).is_relative_to(run.path)
            }
            said = [_pattern(path) for name in names for path in EXPLAINED[name].evidence if " " not in path]
            unsaid = [file for file in files if not any(each.match(file) for each in said)]
            assert set(unsaid) <= set(BESIDE), names
    assert swept >= 55


def _pattern(path: str) -> re.Pattern[str]:
    """A path of the table, or what is inside that folder."""
    return re.compile(re.sub(r"STAGE|HOP|(?<=-)N", "[^/]+", path) + r"($|/)")


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_verdict_is_told_with_its_remedy_and_its_check() -> None:
    (found,) = told("loss_is_of_answers")

    assert found["kind"] == "verdict" and found["check"] == "loss"
    assert "scored again" in found["measures"] and "evaluate/rows.json" in found["evidence"]
    assert "expect.loss_first_tolerance (0.05 by default)" in found["bound"]
    assert found["what_to_do"] == REMEDIES["loss_is_of_answers"]
    text = call("loss_is_of_answers").stdout
    for said in (found["measures"], found["bound"], found["why_it_fails"], found["what_to_do"]):
        assert said in text
    assert text.startswith("loss_is_of_answers: a verdict of the check loss\n")


@pytest.mark.parametrize(
    "name", ["distribution_parity", "distribution_parity[mlx]", "distribution_parity[gguf:q4_k_m]"]
)
def test_a_verdict_on_an_export_is_told_with_its_bracket_or_without(name: str) -> None:
    (found,) = told(name)

    assert found["name"] == name
    assert found["what_to_do"] == REMEDIES["distribution_parity"]
    assert "0.3 as q5 q4" in found["bound"]


def test_a_verdict_of_alignment_speaks_of_alignment() -> None:
    (found,) = told("dpo_gradients_clipped")

    assert "align.max_grad_norm" in found["measures"] and found["evidence"] == ["align/report.json"]


@pytest.mark.parametrize("name", ["train.learning_rate", "align.learning_rate", "learning_rate"])
def test_a_key_of_both_trainings_is_told_with_both_defaults(name: str) -> None:
    (found,) = told(name)

    assert found["default"] == {"train.learning_rate": "0.0002", "align.learning_rate": "5e-05"}
    assert (found["type"], found["section"]) == ("number >= 0", ["train", "align"])
    assert "0.0002 (train.learning_rate), 5e-05 (align.learning_rate)" in call(name).stdout


def test_a_key_that_means_another_thing_in_each_training_is_told_as_both() -> None:
    text = call("num_train_epochs").stdout

    assert "train.num_train_epochs  Passes over the rows." in text
    assert "align.num_train_epochs  Passes over the pairs." in text


@pytest.mark.parametrize("name", ["lora.r", "train.lora.r", "r"])
def test_a_key_is_found_by_the_end_of_its_place(name: str) -> None:
    (found,) = told(name)

    assert (found["name"], found["section"], found["type"]) == ("r", ["train.lora"], "integer > 0")


def test_a_key_of_expect_names_the_verdicts_that_are_held_to_it() -> None:
    assert told("expect.learned_min")[0]["verdicts"] == ["learned_as_trained", "learned_paraphrased"]
    assert told("expect.loss_below_unigram")[0]["verdicts"] == ["loss_end"]
    assert "verdicts" not in told("lora.r")[0]


def test_a_choice_is_told_with_all_that_may_be_chosen() -> None:
    assert told("train.on_nan")[0]["type"] == "one of stop, skip, rollback, ignore"


def test_a_name_of_several_things_is_told_as_each() -> None:
    assert [each["kind"] for each in told("train")] == ["stage", "section"]
    assert [each["kind"] for each in told("resume")] == ["check", "key"]
    text = call("train").stdout
    assert text.startswith("train: a stage\n") and "\n\ntrain: a section of the recipe\n" in text
    assert "learning_rate" in text and "early_stopping_patience" in text


def test_a_check_is_told_with_its_verdicts_and_a_stage_with_what_it_reads() -> None:
    (check,) = told("loss")
    (stage,) = told("prepare")

    assert check["help"] == BY_NAME["loss"].help
    assert check["verdicts"] == {name: entry.measures for name, entry in OF_CHECK["loss"].items()}
    assert {"model", "train.max_length", "align.data"} <= set(stage["reads"]) and "train" not in stage["reads"]
    assert stage["needs"] == ["fetch"]


def test_a_short_name_of_several_keys_is_refused_with_their_places() -> None:
    result = call("path")

    assert result.exit_code == 2
    assert "several keys are called 'path': model.path, data.path, template.path. Say which" in result.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("los_end", "loss_end"),
        ("distribution_pariti[mlx]", "distribution_parity"),
        ("train.lerning_rate", "train.learning_rate"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, meant: str) -> None:
    result = call(name)

    assert result.exit_code == 2
    assert f"nothing is called '{name}'. Did you mean '{meant}'?" in result.stderr
    assert result.stdout == ""


def test_without_a_name_everything_is_listed() -> None:
    listed = json.loads(call("--json").stdout)
    text = call().stdout

    assert listed["checks"] == {check: list(entries) for check, entries in OF_CHECK.items()}
    assert listed["stages"] == [stage.name for stage in STAGES]
    assert sum(map(len, listed["sections"].values())) >= 100
    for names in (*listed["checks"].values(), *listed["sections"].values()):
        assert ", ".join(names) in text
    assert len(text.splitlines()) < 45


def test_everything_that_has_a_name_is_told() -> None:
    """By its own name; a key by each of its places."""
    known = keys()
    places = {place for key in known for place in key.places}
    names = sorted({*EXPLAINED, *OF_CHECK, *(stage.name for stage in STAGES), *places})

    assert len(names) >= 300
    for name in names:
        found = list(explain._meanings(name))
        assert found, name
        for each in found:
            title, facts = explain._told(each)
            assert title and all(text for _, text in facts), name


def test_every_key_says_what_it_is_its_type_and_its_default() -> None:
    known = keys()

    assert len(known) >= 100
    for key in known:
        assert key.kind and all(key.defaults.values()) and all(key.descriptions.values()), key.places
    alone = [key for key in known if len(list(matching(key.name, known))) == 1]
    assert len(alone) >= 85


def test_names_are_completed() -> None:
    assert explain._complete_name(None, None, "loss_is") == ["loss_is_of_answers"]  # type: ignore[arg-type]
    assert "train.lora.r" in explain._complete_name(None, None, "train.lora")  # type: ignore[arg-type]


# -- beside it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outcomes", "times"), [(("refuted", "refuted"), 1), (("proved", "not examined"), 0)])
def test_where_something_is_refuted_the_command_is_named_once_and_else_not(
    copied: Any, capsys: pytest.CaptureFixture[str], outcomes: tuple[str, str], times: int
) -> None:
    listed = [verdict(name, said) for name, said in zip(("loss_end", "learned_net"), outcomes, strict=True)]
    store_verdicts(copied.run, listed)
    terminal.show_verdicts({"verdicts": listed})
    verified, reported = capsys.readouterr().out, terminal.render(summary.document(copied.run))

    for text in (verified, reported):
        assert text.count("what a verdict means: finetune explain NAME\n") == times
    assert verified.endswith("finetune explain NAME\n") is bool(times)


def test_the_docs_list_every_verdict_of_every_check() -> None:
    text = docs_gen.verdicts("before\n<!-- verdicts -->\nold\n<!-- /verdicts -->\nafter")

    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text.splitlines()
    for name, entry in EXPLAINED.items():
        assert f"| `{name}` | {entry.measures} |" in text
    assert [name for name in OF_CHECK if f"\n**{name}**: {BY_NAME[name].help}\n" not in text] == []
    assert docs_gen.verdicts("no markers") == "no markers"
