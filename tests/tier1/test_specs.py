"""The spec format: keys, defaults, faults with their lines, cases, and what is vacuous."""

from __future__ import annotations

import math
import time
from pathlib import Path

import jsonschema
import psutil
import pytest

from finetune.checks.expected import EXPECT_KEYS
from finetune.core.errors import MissingError, UsageError
from finetune.core.files import write_json
from finetune.recipe import yaml
from finetune.recipe.sections import Expect
from finetune.run import Report, Run
from finetune.testing.spec.execute import Outcome, Served, command, execute
from finetune.testing.spec.judge import judge
from finetune.testing.spec.load import Case, SpecError, load
from finetune.testing.spec.model import Spec, json_schema
from support import project, records
from support.records import MADE, WHEN

REQUIRED = "test_id: a\nproject_dir: project\nconfig: recipe.yaml\n"


@pytest.fixture
def spec(tmp_path):
    """A function: the one case of a spec with these lines after the required ones."""

    def make(more: str = "") -> Case:
        file = tmp_path / "spec.yaml"
        file.write_text(REQUIRED + more, encoding="utf-8")
        return load(file)[0]

    return make


def faults(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "spec.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        load(file)
    return [fault.removeprefix(str(file) + ":") for fault in caught.value.faults]


# -- the format --------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_format():
    made = Spec(test_id="a", project_dir="p", config="c.yaml", inference={})
    assert (made.dynamic_args, made.expected_files, made.min_steps_logged) == ({}, ["trainer_logs.json"], 1)
    assert (made.gpu_requirement, made.timeout, made.markers) == (1, 300, ["integration"])
    assert (made.loss.final_max, made.loss.final_min, made.loss.no_nan) == (None, None, True)
    assert (made.stderr.forbidden_patterns, made.stderr.warn_patterns) == ([], [])
    asked = made.inference
    assert (asked.prompt, asked.max_tokens, asked.temperature) == ("Once upon a time", 50, 0.7)
    assert (asked.perplexity_max, asked.server_timeout) == (500.0, 60)


def test_every_fault_is_told_at_once_with_its_line(tmp_path):
    text = REQUIRED + "los:\n  final_max: 1\nstderr:\n  forbiden_patterns: []\ntimeout: soon\nmarkers: [not a name]\n"
    found = faults(tmp_path, text)
    assert [fault.split(": ")[:2] for fault in found] == [
        ["7", "stderr.forbiden_patterns"],
        ["8", "timeout"],
        ["9", "markers.0"],
        ["4", "los"],
    ]
    assert "Did you mean 'forbidden_patterns'?" in found[0] and "Did you mean 'loss'?" in found[3]


@pytest.mark.parametrize("key", ["test_id", "project_dir", "config"])
def test_a_required_key_that_is_missing_is_named(tmp_path, key):
    text = "".join(line for line in REQUIRED.splitlines(keepends=True) if not line.startswith(key))
    assert faults(tmp_path, text) == [f"1: {key}: required, but missing"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("max_step", "Did you mean 'max_steps'?"),
        ("train.lora.rr", "the recipe has no key 'train.lora.rr'"),
        ("trian.max_steps", "the recipe has no key 'trian.max_steps'"),
        ("expect.learned_min", "instead: expect"),
        ("export", "instead: parity"),
    ],
)
def test_a_dynamic_arg_that_no_recipe_has_is_refused(tmp_path, name, said):
    (fault,) = faults(tmp_path, f"{REQUIRED}dynamic_args:\n  {name}: 1\n")
    assert fault.startswith("4: dynamic_args") and said in fault


def test_dynamic_args_reach_the_command_line_as_keys_of_the_recipe(spec):
    made = spec("dynamic_args:\n  max_steps: 5\n  save_strategy: 'no'\n  train.lora.target_modules: [q_proj]\n").spec
    assert made.overrides == {
        "train.max_steps": 5,
        "train.save_strategy": "no",
        "train.lora.target_modules": ["q_proj"],
    }


def test_keys_beyond_training_run_the_whole_recipe(spec):
    assert not spec().spec.whole
    for more in ("expect: {learned_min: 0.5}", "checks: [loss]", "parity: [mlx]", "learned: {}", "resume: true"):
        assert spec(more).spec.whole, more
    made = spec("expect: {learned_min: 0.5}\nparity: [gguf]\nresume: true\nlearned: {probes: p.jsonl}\n").spec
    assert made.overrides == {
        "expect.learned_min": 0.3,
        "export": ["gguf:f16"],
        "evaluate.probes": "p.jsonl",
        "expect.resume": True,
    }


def test_inference_without_a_checkpoint_is_refused(tmp_path):
    (fault,) = faults(tmp_path, f"{REQUIRED}dynamic_args: {{save_strategy: 'no'}}\ninference: {{}}\n")
    assert "save_strategy" in fault
    (fault,) = faults(tmp_path, f"{REQUIRED}inference: {{backend: llamacpp}}\n")
    assert "needs a gguf format in 'parity'" in fault


def test_cases_are_laid_over_the_spec_and_have_their_own_lines(tmp_path):
    file = tmp_path / "spec.yaml"
    text = "loss: {final_max: 5, no_nan: false}\ncases:\n  small:\n    loss:\n      final_max: 4\n  large: {}\n"
    file.write_text(REQUIRED + text, encoding="utf-8")
    small, large = load(file)
    assert (small.id, large.id) == ("a[small]", "a[large]")
    assert (small.spec.loss.final_max, small.spec.loss.no_nan) == (4, False)
    assert (small.line("loss.final_max"), large.line("loss.final_max")) == (8, 4)
    assert small.line("timeout") == 6 and large.line("timeout") == 9  # not written: the case's own line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cases: {}", "4: cases: there is no case in it"),
        ("cases: [a]", "4: cases: expected names"),
        ("cases: {a: {test_id: b}}", "4: cases.a: a case has neither"),
        ("cases: {a: {timeout: 0}}", "4: timeout"),
    ],
)
def test_cases_that_make_no_sense_are_refused(tmp_path, text, said):
    assert faults(tmp_path, REQUIRED + text)[0].startswith(said)


def test_a_file_that_is_no_mapping_and_one_that_is_no_yaml_say_so(tmp_path):
    assert faults(tmp_path, "- a\n") == ["1: expected 'key: value' lines"]
    assert faults(tmp_path, "a: [\n")[0].startswith("2: ")


def test_the_json_schema_accepts_what_the_format_does_and_nothing_else():
    schema = json_schema()
    good = {"test_id": "a", "project_dir": "p", "config": "c", "loss": {"final_max": 2}, "cases": {"x": {"timeout": 1}}}
    jsonschema.validate(good, schema)
    wrong = [{**good, "los": {}}, {**good, "loss": {"final_maxx": 1}}, {**good, "timeout": "soon"}, {"test_id": "a"}]
    for value in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(value, schema)
    described = [name for name, key in schema["properties"].items() if key.get("description")]
    assert len(described) == len(Spec.model_fields) == 19


def test_every_bound_of_a_recipe_that_a_verdict_is_held_to_is_known():
    assert set(EXPECT_KEYS.values()) <= set(Expect.model_fields)
    experiments = {"memory_reduction_min", "resume", "serving", "invariance"}
    own = {*experiments, "export_kl_mean_max", "export_greedy_min", "export_learned_min"}
    assert set(Expect.model_fields) - set(EXPECT_KEYS.values()) <= own


# -- where the recipe is -----------------------------------------------------------------------------------------------


def test_a_project_is_found_from_the_repository_then_pytests_root_then_the_spec(tmp_path):
    root = project.make(tmp_path / "repo", one=project.plain("one"))
    (case,) = load(root / "specs" / "one.yaml")
    arguments, folder = command(case, tmp_path / "out", root=tmp_path)
    assert folder == root / "project" and arguments[:2] == ["train", str(root / "project" / "recipe.yaml")]


def test_a_project_or_a_recipe_that_is_not_there_is_told_with_the_specs_line(tmp_path):
    root = project.make(tmp_path, a=project.plain("a"), b=project.plain("b"))
    for name, key, value, line in (("a", "project_dir", "projct", 2), ("b", "config", "recipee.yaml", 3)):
        file = root / "specs" / f"{name}.yaml"
        old = {"project_dir": "project", "config": "recipe.yaml"}[key]
        file.write_text(file.read_text("utf-8").replace(f"{key}: {old}", f"{key}: {value}"), encoding="utf-8")
        with pytest.raises(MissingError) as caught:
            command(load(file)[0], tmp_path / "out", root=root)
        assert f"{file}:{line}: {key}: no '{value}'" in str(caught.value)
    assert "Did you mean 'recipe.yaml'?" in str(caught.value)


def test_a_users_file_named_as_a_library_is_no_module_of_the_command(tmp_path):
    root = project.make(tmp_path / "repo", one=project.plain("one"))
    for name in ("json", "random", "pydantic"):
        (root / "project" / f"{name}.py").write_text("raise SystemExit(9)\n", encoding="utf-8")
    outcome = execute(load(root / "specs" / "one.yaml")[0], _folder(tmp_path / "out"), root=root)
    assert outcome.code == 0, outcome.stderr


def test_what_a_recipe_publishes_goes_into_the_temporary_directory(tmp_path):
    root = project.make(tmp_path / "repo", one=project.plain("one"))
    recipe = root / "project" / "recipe.yaml"
    value, _ = yaml.parse(recipe.read_text("utf-8"), "recipe")
    value["train"]["output_dir"] = "published"
    recipe.write_text(yaml.write(value), encoding="utf-8")
    outcome = execute(load(root / "specs" / "one.yaml")[0], _folder(tmp_path / "out"), root=root)
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "out" / "published" / "train").is_dir()
    assert not (root / "project" / "published").exists()


def test_a_command_that_will_not_stop_is_ended_with_everything_it_started(tmp_path, monkeypatch):
    root = project.make(tmp_path / "repo", one=project.plain("one", "timeout: 1\n"))
    stubborn = tmp_path / "stubborn"
    stubborn.write_text(
        f"#!/bin/sh\ntrap '' TERM\nsleep 60 & echo $! > {tmp_path}/child\nwait\nsleep 60\n", encoding="ascii"
    )
    stubborn.chmod(0o700)
    monkeypatch.setattr("sys.executable", str(stubborn))
    monkeypatch.setattr("finetune.testing.spec.execute.GRACE_SECONDS", 0.5)
    outcome = execute(load(root / "specs" / "one.yaml")[0], _folder(tmp_path / "out"), root=root)
    assert outcome.code is None and outcome.seconds < 10
    assert not _lives(int((tmp_path / "child").read_text("ascii")))


def _lives(pid: int) -> bool:
    """Whether it still runs two seconds later: a process that was killed is not gone at once, its first state is no answer."""
    for _ in range(40):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return False
        except psutil.NoSuchProcess:
            return False
        time.sleep(0.05)
    return True


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


# -- judging -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def outcome(tmp_path):
    """A function: what a command left behind, made of these losses and this standard error."""

    def make(losses, *, code=0, stderr="", served=None, problem="", unigram=3.0, peak=None) -> Outcome:
        run = Run(tmp_path / "run").create()
        write_json(run.path / "train" / "trainer_logs.json", [records.step(n, x) for n, x in enumerate(losses, 1)])
        entropies = {"unigram_entropy": unigram, "uniform_entropy": math.log(2000)}
        for stage, metrics in (("prepare", entropies), ("train", {"tokens_per_second": 50.0})):
            whole = records.metrics(stage, **metrics)
            run.write_report(Report(stage=stage, started=WHEN, metrics=whole, peak=peak or {"process": 1}, **MADE))
        return Outcome(
            command=("finetune", "train"), run=run, code=code, seconds=10.0, stdout="", stderr=stderr,
            served=served, problem=problem,
        )  # fmt: skip

    return make


def found(case: Case, outcome: Outcome) -> dict[str, str]:
    """Key: kind, of the findings that did not pass."""
    return {each.key: each.kind for each in judge(case, outcome) if each.kind != "passed"}


def test_a_good_run_passes(spec, outcome):
    case = spec(
        "loss: {final_max: 2.0, final_min: 0.5}\nmin_steps_logged: 3\nstderr: {forbidden_patterns: [Traceback]}\n"
    )
    assert found(case, outcome([5.0, 2.5, 1.0])) == {}


@pytest.mark.parametrize(
    ("more", "losses", "key"),
    [
        ("loss: {final_max: 2.0}", [4, 2.5], "loss.final_max"),
        ("loss: {final_max: 2.0}", [4, math.nan], "loss.final_max"),
        ("loss: {final_min: 0.5}", [4, 0.1], "loss.final_min"),
        ("loss: {final_min: 0.5}", [4, math.inf], "loss.final_min"),
        ("", [4, math.nan, 1], "loss.no_nan"),
        ("", [4, math.inf, 1], "loss.no_nan"),
        ("min_steps_logged: 4", [4, 3, 1], "min_steps_logged"),
        ("expected_files: [checkpoint-*/trainer_state.json]", [4, 1], "expected_files.0"),
        ("bounds: {seconds_max: 9}", [4, 1], "bounds.seconds_max"),
        ("bounds: {tokens_per_second_min: 51}", [4, 1], "bounds.tokens_per_second_min"),
        ("bounds: {process_mib_max: 0.5}", [4, 1], "bounds.process_mib_max"),
        ("bounds: {device_mib_max: 5}", [4, 1], "bounds.device_mib_max"),
    ],
)
def test_a_run_that_falls_short_fails_at_the_key_that_asked_for_it(spec, outcome, more, losses, key):
    assert found(spec(more), outcome(losses, peak={"process": 2**20}))[key] == "failed"


def test_nan_is_let_pass_where_the_spec_says_so(spec, outcome):
    assert found(spec("loss: {no_nan: false}"), outcome([4, math.nan, 1])) == {}


def test_no_steps_at_all_is_a_failure_and_not_a_pass(spec, outcome):
    case, empty = spec("min_steps_logged: 0\nloss: {final_max: 9}"), outcome([])
    assert found(case, empty) == {"loss.final_max": "failed"}
    (empty.run.path / "train" / "trainer_logs.json").write_text("{}", encoding="utf-8")
    assert found(case, empty) == {"min_steps_logged": "failed"}


def test_a_command_that_failed_is_one_finding_with_its_last_words(spec, outcome):
    (finding,) = [f for f in judge(spec(), outcome([1], code=4, stderr="one\nerror: disk full")) if f.kind == "failed"]
    assert finding.key == "config" and "exit code 4" in finding.why and "error: disk full" in finding.why
    assert found(spec(), outcome([1], code=None)) == {"timeout": "failed"}
    assert found(spec(), outcome([1], code=1)) == {"config": "failed"}  # `train` has no checks that could fail


def test_patterns_in_standard_error_fail_or_warn(spec, outcome):
    case = spec("stderr:\n  forbidden_patterns: [CUDA error, Traceback]\n  warn_patterns: [slow]\n")
    made = outcome([2, 1], stderr="a slow disk\nTraceback (most recent call last)")
    assert found(case, made) == {"stderr.forbidden_patterns.1": "failed", "stderr.warn_patterns.0": "warning"}


@pytest.mark.parametrize("bound", [9.0, 8.0, 4.0, 3.0])
def test_a_bound_that_a_model_passes_which_learned_nothing_is_honoured_and_called_vacuous(spec, outcome, bound):
    (finding,) = [f for f in judge(spec(f"loss: {{final_max: {bound}}}"), outcome([4.0, 2.0])) if f.kind != "passed"]
    assert (finding.kind, finding.key) == ("vacuous", "loss.final_max")
    assert "A bound below 2.85 would mean something, and 2.5 is 25% above what this run reached" in finding.why


def test_a_bound_that_means_something_is_not_called_vacuous(spec, outcome):
    assert found(spec("loss: {final_max: 2.9}"), outcome([4.0, 2.0])) == {}


def test_failed_verdicts_are_told_at_the_key_that_asked_for_them(spec, outcome):
    case = spec("expect: {learned_min: 0.9}\nresume: true\nparity: [gguf:f16]\n")
    made = outcome([2, 1], code=1)
    names = ["learned_as_trained", "resume_weights", "greedy_parity[gguf:f16]", "loss_start"]
    rest = {"measured": 0.5, "compare": ">", "bound": 0.9, "why": "x"}
    records.store_verdicts(made.run, [records.verdict(name, "refuted", **rest) for name in names])
    failed = [finding for finding in judge(case, made) if finding.kind == "failed"]
    assert [finding.key for finding in failed] == ["expect.learned_min", "resume", "parity.0", "expect"]
    assert (
        failed[0]
        .text(case)
        .startswith(f"{case.file}:4: expect.learned_min: learned_as_trained: measured 0.5, bound > 0.9")
    )
    assert failed[0].why.endswith("(x). What to do: mend learned_as_trained")


def test_the_cause_of_failed_verdicts_is_told_first_and_once(spec, outcome):
    made = outcome([2, 1], code=1)
    listed = [records.verdict(name, "refuted") for name in ("loss_end", "adapter_effect")]
    records.store_verdicts(made.run, listed, cause="train.learning_rate is 0")
    failed = [finding for finding in judge(spec("expect: {}\n"), made) if finding.kind == "failed"]
    assert [finding.why.partition(":")[0] for finding in failed] == [
        "train.learning_rate is 0",
        "loss_end",
        "adapter_effect",
    ]


def test_what_was_not_examined_is_a_warning_and_nothing_proved_a_failure(spec, outcome):
    case, made = spec("expect: {}\n"), outcome([2, 1])
    unknown = records.verdict("learned_net", "not examined", remedy="add evaluate.unseen")
    records.store_verdicts(made.run, [records.verdict("loss_end"), unknown])
    (warned,) = [finding for finding in judge(case, made) if finding.kind != "passed"]
    assert (warned.kind, warned.measured) == ("warning", None) and "What to do: add evaluate.unseen" in warned.why
    records.store_verdicts(made.run, [unknown])
    assert [f.why for f in judge(case, made) if f.kind == "failed"] == ["nothing proved: 1 check not examined"]


def test_a_whole_run_without_verdicts_fails(spec, outcome):
    assert found(spec("checks: [loss]"), outcome([2, 1]))["expect"] == "failed"


# -- inference ---------------------------------------------------------------------------------------------------------


def score(value: float, distinct: float = 0.8):
    from finetune.testing.perplexity import Perplexity

    return Perplexity(value=value, whole=value, tokens=50, distinct=distinct, scorer="smollm2-135m")


@pytest.mark.parametrize(
    ("served", "failed"),
    [
        (Served(text=" there was a fox", score=score(40.0)), {}),
        (Served(text=" fox fox fox", score=score(3.0, distinct=0.04)), {"inference.distinct_min"}),
        (Served(text=" zx qv", score=score(900.0)), {"inference.perplexity_max"}),
        (Served(text=" zx qv", score=score(math.inf)), {"inference.perplexity_max"}),
        (Served(text="", score=None), {"inference.prompt"}),
    ],
)
def test_a_completion_is_held_to_its_perplexity_and_to_its_distinct_tokens(spec, outcome, served, failed):
    found_ = found(spec("inference: {}"), outcome([2, 1], served=served))
    assert {key for key, kind in found_.items() if kind == "failed"} == set(failed)


def test_a_server_that_does_not_answer_is_a_failure(spec, outcome):
    assert found(spec("inference: {}"), outcome([2, 1], problem="the server answers 500")) == {"inference": "failed"}


def test_a_perplexity_bound_that_random_tokens_pass_is_vacuous(spec, outcome):
    case = spec("inference: {perplexity_max: 1000000}")
    assert found(case, outcome([2, 1], served=Served(text="x", score=score(20)))) == {
        "inference.perplexity_max": "vacuous"
    }


# -- recording ---------------------------------------------------------------------------------------------------------


def test_a_run_that_failed_or_was_never_verified_is_not_recorded(tmp_path):
    from finetune.testing.spec.record import record

    run = Run(tmp_path).create()
    with pytest.raises(UsageError, match="never verified"):
        record(run, tmp_path / "spec.yaml")
    records.store_verdicts(run, [records.verdict("loss_finite", "refuted")])
    with pytest.raises(UsageError, match="not a good run to record: 1 of 1 check refuted: loss_finite"):
        record(run, tmp_path / "spec.yaml")
