"""A model that is broken is a refuted verdict, not an exception: it answers nothing, never ends, or is not of numbers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from finetune.backends import Generation
from finetune.backends.fake.model import VOCAB_SIZE, make_model
from finetune.backends.fake.training import Training
from finetune.checks import Verdict, judge, results, verify
from finetune.checks.loss import fall
from finetune.checks.preference import LOSSES
from finetune.core.arithmetic import mean, perplexity
from finetune.core.errors import StageError
from finetune.core.files import write_json
from finetune.parity import comparison
from finetune.parity.divergence import divergence
from finetune.parity.observe import _served, _speed
from finetune.recipe.sections import Align
from finetune.report import files, summary
from finetune.run import Run, layout
from finetune.stages import measure
from finetune.stages.evaluate import _perplexity, _reread
from finetune.stages.pipeline import run_directory, run_stages
from support.processes import stay_here
from support.town import KNOWN, build, edit_json, edit_rows, recipe, write_memory, write_serving

NAN, INF = math.nan, math.inf
END, LETTER = 257, ord("a")


# -- whole runs of broken models ----------------------------------------------------------------------------------------


def every_weight(value: float) -> Callable[[dict[str, Any]], None]:
    def change(model: dict[str, Any]) -> None:
        for row in (*model["bigram"].values(), *(row for _, _, row in model["table"])):
            row.update(dict.fromkeys(row, value))

    return change


def always(token: int) -> Callable[[dict[str, Any]], None]:
    """Whatever came before, this token is the likeliest, by so much that perplexity is beyond a float."""

    def change(model: dict[str, Any]) -> None:
        for last in range(VOCAB_SIZE):
            letter = chr(last) if last < 256 else chr(0xE000 + last - 256)
            model["bigram"].setdefault(letter, {})[str(token)] = 1000.0

    return change


def named(verdicts: list[Verdict]) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in verdicts}


def verified(directory: Path, town: Path, **changes: Any) -> dict[str, Verdict]:
    """The verdicts of a whole run, whose report is written too."""
    wanted = recipe(town, directory, export=["bundle"], **changes)
    run = run_directory(wanted)
    with pytest.MonkeyPatch.context() as patch:
        stay_here(patch)
        run_stages(wanted, run)
    write_memory(run)
    write_serving(run)
    expect = wanted.expect.model_copy(update={"memory_reduction_min": 0.3, "serving": True})
    verdicts = verify(wanted.model_copy(update={"expect": expect}), run)
    files.write(run, files.render(summary.document(run))[1])
    return named(verdicts)


@pytest.mark.parametrize(
    ("change", "fails", "says"),
    [
        (every_weight(NAN), "weights_finite", "they begin in the base: model.embed_tokens.weight"),
        (every_weight(NAN), "loss_finite", "the first bad one is that of step 1"),
        (every_weight(NAN), "distribution_parity[bundle]", "weights that hold NaN or infinity"),
        (every_weight(NAN), "heldout_perplexity", "NaN, not a number"),
        (every_weight(NAN), "answers_are_greedy", "the probabilities of 'base' are NaN at token 0"),
        (every_weight(-INF), "weights_finite", "they begin in the base"),
        (always(END), "learned_as_trained", "the model answers nothing: all 6 answers are empty"),
        (always(END), "controls_kept", "the model answers nothing: all 4 answers are empty"),
        (always(END), "greedy_parity[merged]", "answers of 'adapter' are empty: the model answers nothing"),
        (always(END), "learned_parity[bundle]", "'merged' answers none of the probes"),
        (always(LETTER), "stops_by_itself", "0 of 6 answers ended"),
        (always(LETTER), "heldout_perplexity", "inf before"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_broken_base_is_refuted_by_name(broken_bases, change, fails, says):
    found = broken_bases(change)[fails]

    assert not found.passed
    assert says in found.why


@pytest.fixture(scope="module")
def broken_bases(tmp_path_factory) -> Callable[..., dict[str, Verdict]]:
    """A function: the verdicts of a run whose base was changed so; one run for each change."""
    ran: dict[str, dict[str, Verdict]] = {}

    def of(change: Callable[[dict[str, Any]], None]) -> dict[str, Verdict]:
        directory = tmp_path_factory.mktemp("broken")
        make_model(directory / "model", KNOWN)
        model = json.loads((directory / "model" / "fake_model.json").read_text())
        change(model)
        text = json.dumps(model)
        if text not in ran:
            town = build(directory / "town")
            (town / "model" / "fake_model.json").write_text(text)
            ran[text] = verified(directory / "runs", town, train={"on_nan": "ignore"}, align={"on_nan": "ignore"})
        return ran[text]

    return of


@pytest.mark.parametrize("change", [every_weight(NAN), every_weight(-INF), always(END), always(LETTER)])
def test_a_broken_run_has_the_verdicts_of_an_honest_one_and_no_others(broken_bases, honest, change):
    """What cannot be measured fails under its own name."""
    expected = {verdict.name for verdict in results(honest.recipe, honest.run)}

    assert broken_bases(change).keys() == expected


def test_an_infinite_perplexity_is_reported_and_found_again_as_it_is(broken_bases):
    found = broken_bases(always(LETTER))

    assert found["evaluated_as_reported"].passed
    assert found["heldout_confirmed"].passed


def test_what_training_broke_runs_to_its_verdicts(town, tmp_path, monkeypatch):
    """Sound at first, NaN when it was saved: the verdicts tell where it began, and none of NaN has passed."""
    save = Training._save

    def ruined(self: Training, directory: Path, **more: str) -> Path:
        if self.model.adapter and directory.name != "initial":
            for row in self.model.adapter.b.values():
                row[:] = [NAN] * len(row)
        return save(self, directory, **more)

    monkeypatch.setattr(Training, "_save", ruined)
    found = verified(tmp_path, town, align=None, train={"save_steps": 6, "on_nan": "ignore"})

    assert "they begin in train/adapter: base_model" in found["weights_finite"].why
    assert "lora_B.weight is nan" in found["lora_b_nonzero"].why
    for name in ("loss_confirmed", "adapter_effect", "fresh_process", "distribution_parity[merged]"):
        assert not found[name].passed
    assert found["saved_last"].passed, "what is NaN in both is saved as it was trained"
    assert not [v.name for v in found.values() if v.passed and v.measured is not None and math.isnan(v.measured)]


# -- the arithmetic of each stage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(-math.log(8) * 2, 2, 8.0), (-1e6, 2, INF), (-INF, 2, INF), (NAN, 2, NAN), (0.0, 0, NAN)],
)
def test_perplexity_is_a_number_for_whatever_was_scored(total, count, expected):
    assert perplexity([[total, count]]) == pytest.approx(expected, nan_ok=True)


def test_a_mean_of_nothing_or_of_both_infinities_is_nan():
    assert mean([1.0, 3.0]) == 2.0
    assert math.isnan(mean([]))
    assert math.isnan(mean([INF, -INF]))


class Scripted:
    """A backend that scores and says what it is told, and refuses to write no token, as torch does."""

    def __init__(self, scores: float = 0.0) -> None:
        self.scores = scores
        self.asked: list[int] = []

    def score(self, handle: Any, pairs: Any) -> list[list[float]]:
        return [[self.scores] * len(target) for _, target in pairs]

    def generate(self, handle: Any, prompts: Any, *, max_new_tokens: int) -> list[Generation]:
        assert max_new_tokens > 0
        self.asked.append(max_new_tokens)
        return [said("")] * len(prompts)


class Bytes:
    eos_ids = (END,)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def said(text: str, finish: str = "stop") -> Generation:
    return Generation(ids=tuple(text.encode()), text=text, finish=finish)


@pytest.mark.parametrize(("score", "expected"), [(-1e5, INF), (NAN, NAN), (-INF, INF)])
def test_held_out_text_beyond_any_perplexity_is_counted(score, expected):
    found = _perplexity(Scripted(score), None, ["abc", "x"], Bytes())

    assert found["tokens"] == 2
    assert found["perplexity"] == pytest.approx(expected, nan_ok=True)


def test_held_out_text_without_a_token_to_score_has_no_perplexity():
    found = _perplexity(Scripted(), None, ["x"], Bytes())

    assert math.isnan(found["perplexity"])
    assert (found["tokens"], found["texts"]) == (0, [])


def test_answers_without_a_token_are_not_read_again(tmp_path):
    """Not even an end of turn: nothing is asked of the backend, and nothing is the worst."""
    question = {"prompt_ids": [1], "prompt": "?", "phases": {"base": {"ids": [], "finish": "length"}}}

    found = _reread(Scripted(), None, [question], "base", Bytes(), tmp_path)

    assert found == {"answers": 1, "tokens": 0, "gap": None, "worst": None}


def test_answers_of_which_no_token_was_read_again_are_not_greedy(copied):
    edit_json(copied.run, "evaluate/greedy.json", lambda read: read["trained"].update(gap=None, worst=None))

    found = named(results(copied.recipe, copied.run, ["questions"]))

    assert not found["answers_are_greedy"].passed
    assert "'trained' names no token as the least likely one" in found["answers_are_greedy"].why


@pytest.mark.parametrize("texts", [["", ""], ["a", ""]])
def test_no_runtime_is_asked_for_an_answer_of_no_tokens(texts):
    backend = Scripted()
    found = _speed(backend, None, [[1], [1, 2]], [said(text) for text in texts])

    assert backend.asked == [1]
    assert found["generation_tokens_per_second"] is None
    assert found["prompt_tokens_per_second"] > 0


def test_where_nothing_is_asked_nothing_is_timed():
    assert _speed(Scripted(), None, [], []) == dict.fromkeys(
        ("prompt_tokens_per_second", "generation_tokens_per_second")
    )


class Silent(Scripted):
    """Its server refuses."""

    def chat(self, model: Path, conversations: Any, *, max_new_tokens: int) -> list[Generation]:
        raise StageError("the server refuses: NaN\nmore of it")


def test_a_runtimes_server_that_refuses_is_a_difference():
    answers = _served(Silent(), Path("m.gguf"), [[], []], 8)
    material = {"questions": [{"messages": [1], "prompt": "Who?"}, {"messages": [2], "prompt": "What?"}]}
    own = [{"text": "", "finish": "stop"}] * 2

    found = comparison.served({"served": answers, "generated": own}, material)

    assert found == {
        "compared": 2,
        "equal": 0,
        "first": {"prompt": "Who?", "expected": "", "found": "no answer: the server refuses: NaN"},
    }


def test_distributions_of_nan_have_no_likeliest_token(tmp_path):
    ours = numpy.log(numpy.full((3, 4), 0.25, numpy.float32))
    theirs = ours.copy()
    ours[0], theirs[0], theirs[1, 2] = NAN, NAN, NAN
    numpy.save(tmp_path / "a.npy", ours)
    numpy.save(tmp_path / "b.npy", theirs)

    found = divergence(tmp_path / "a.npy", tmp_path / "b.npy")

    assert [math.isnan(kl) for kl in found.kl] == [True, True, False]
    assert found.same_top == [False, False, True]


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e200])
def test_a_loss_that_is_none_has_no_fall(bad):
    assert all(map(math.isnan, fall([bad, -bad, *[1.0] * 10])))
    assert all(map(math.isnan, fall([*[1.0] * 10, bad, -bad])))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_loss_of_pairs_scored_nan_is_nan(loss_type):
    align = Align(data={"path": "x"}, loss_type=loss_type)
    loss = LOSSES[loss_type]

    assert math.isnan(loss(align, {"chosen": NAN, "rejected": 0.0}, {"chosen": 1, "rejected": 1}))
    assert loss(align, {"chosen": -1e300, "rejected": 1e300}, {"chosen": 1, "rejected": 1}) > 0


@pytest.mark.parametrize("compare", [">=", "<=", ">", "<", "=="])
def test_nan_passes_no_bound_and_says_what_it_is(compare):
    verdict = judge("x", NAN, compare, NAN, "nats", "x.json", "why")

    assert not verdict.passed
    assert verdict.why == "why; what was measured is NaN, not a number"


def test_a_gain_from_infinity_is_no_gain(copied):
    """A score of minus infinity before training would make any later one an infinite gain."""
    edit_json(copied.run, layout.HELDOUT.path, lambda scored: scored["base"].update(perplexity=INF))

    found = scored_so(copied, ("base", "trained"), -INF)

    assert {*GAINS, "heldout_perplexity"} <= found


def test_a_gain_to_infinity_is_no_gain(copied):
    assert scored_so(copied, ("trained", "aligned"), INF) >= GAINS


GAINS = {"loss_confirmed", "adapter_effect", "dpo_margin", "dpo_prefers_chosen"}


def scored_so(copied: Any, phases: tuple[str, str], value: float) -> set[str]:
    """What is not proved where every row has this score in the one phase, and every chosen answer in the other."""
    of_rows, of_pairs = phases

    def rows(scored: Any) -> None:
        for score in scored[of_rows].values():
            score["answer"][0] = value

    def pairs(scored: Any) -> None:
        for pair in scored:
            pair["phases"][of_pairs]["chosen"] = value

    edit_json(copied.run, layout.ROW_SCORES.path, rows)
    edit_rows(copied.run, layout.SCORED_PAIRS.path, pairs)
    return {verdict.name for verdict in results(copied.recipe, copied.run) if not verdict.passed}


# -- a server that answers nothing --------------------------------------------------------------------------------------


COUNTS = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"))
REFUSED = {"text": None, "finish": None, **COUNTS, "refused": "Error code: 500 - NaN"}


def served(copied: Any, answer: dict[str, Any], *, expected: str | None = None) -> dict[str, Verdict]:
    """The verdicts on a server that gives this answer to everything."""
    file = copied.run.path / "measure" / "serving.json"
    seen = json.loads(file.read_text(encoding="utf-8"))
    for each in (*seen["asked"], seen["stream"], seen["stop"], seen["length"]):
        each["found"] = dict(answer)
        if expected is not None and "again" in each:
            each["again"] = expected
        if expected is not None and "expected" in each:
            each["expected"] = {**each["expected"], "text": expected} if "tokens" in each["expected"] else expected
    seen["sampling"].update(
        texts=[answer["text"]] * 4, again=answer["text"], greedy=answer["text"], likeliest_only=[answer["text"]] * 2
    )
    write_json(file, seen)
    return named(results(copied.recipe, copied.run, ["serving"]))


def test_a_server_that_refuses_everything_passes_nothing(copied):
    found = served(copied, REFUSED)

    assert [name for name, verdict in found.items() if verdict.passed] == []
    assert "refused (Error code: 500" in found["serving_answers"].why
    assert "the server cannot run this model" in found["serving_answers"].why
    assert "4 refused" in found["serving_temperature"].why


def test_a_stream_is_held_against_no_answer_that_was_refused(copied):
    """Only what was not to be streamed is refused."""
    name = json.loads((copied.run.path / "measure" / "serving.json").read_text())["stream"]["name"]
    edit_json(
        copied.run,
        "measure/serving.json",
        lambda seen: [each.update(found=REFUSED) for each in seen["asked"] if each["name"] == name],
    )

    found = named(results(copied.recipe, copied.run, ["serving"]))

    assert found["serving_streaming"].why == "no evidence: no answer in one piece: refused (Error code: 500 - NaN)"


def test_a_server_that_answers_nothing_is_told_from_one_that_answers(copied):
    empty = {"text": "", "finish": "stop", "prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}

    found = served(copied, empty)

    for name in ("serving_answers", "serving_conversations"):
        assert not found[name].passed
        assert "the model answers nothing" in found[name].why
    for name in ("serving_temperature", "serving_max_tokens", "serving_special_tokens"):
        assert not found[name].passed


def test_a_model_that_answers_nothing_has_nothing_to_cut_off(copied):
    empty = {"text": "", "finish": "stop", "prompt_tokens": 9, "completion_tokens": 0, "total_tokens": 9}

    found = served(copied, empty, expected="")

    assert found["serving_max_tokens"].why == "no evidence: the model says nothing that could be cut off"
    assert found["serving_special_tokens"].why == "no evidence: no answer has a text"


# -- what a fresh process scores ----------------------------------------------------------------------------------------


def test_a_fresh_process_scores_rows_that_evaluate_scored(honest, tmp_path):
    """Of many rows `evaluate` takes a sample, which need not have the first ones."""
    shutil.copytree(honest.run.path, tmp_path / "run")
    run = Run(tmp_path / "run")
    for name in (layout.ANSWERS.path, layout.PROMPTS.path):
        (run.path / name).write_text("")
    edit_json(run, layout.ROW_SCORES.path, lambda scores: [each.pop("0") for each in scores.values()])

    with pytest.MonkeyPatch.context() as patch:
        stay_here(patch)
        found = measure._fresh(honest.recipe, run, tmp_path)

    assert found["of"] == "rows"
    assert list(found["scores"]) == ["1", "2", "3", "4", "5"]
