"""Parity: every verdict fails for its own fault, put into an export or into what was observed of it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest

from finetune.backends import get
from finetune.checks import Verdict, results
from finetune.checks.parity import owed
from finetune.core.errors import StageError
from finetune.core.files import write_json
from finetune.experiments import worker
from finetune.parity import comparison as hop
from finetune.parity import prompts as material
from finetune.parity import stored
from finetune.parity.divergence import divergence, gap, top
from finetune.parity.tolerances import _TABLE, bits, bounds
from finetune.recipe import Recipe
from finetune.recipe.exports import FORMATS
from finetune.run import Run
from finetune.stages import compare
from support.town import edit_json

BUNDLE, MERGED = "compare/bundle.json", "compare/merged.json"
EXPORTS, MATERIAL = "export/exports.json", "compare/material.json"
KINDS = (
    "prompt_parity", "vocabulary_parity", "template_carried", "distribution_parity", "distribution_worst",
    "greedy_parity", "stop_parity", "no_special_tokens", "stop_tokens", "learned_parity", "constants_parity",
    "adapter_carried", "served_parity", "merged_once", "merge_exact", "stored_bits", "compared_as_listed",
)  # fmt: skip
COUNTED = "compared_as_listed"  # fails as well where counts are not those of the answers


def found(recipe: Recipe, run: Run) -> list[Verdict]:
    """The verdicts on the models of the chain."""
    return [verdict for verdict in results(recipe, run, ["parity"]) if "[" in verdict.name]


def failed(ran: Any) -> dict[str, str]:
    return {v.name: v.why for v in found(ran.recipe, ran.run) if v.refuted}


def of_torch(ran: Any, *exports: str) -> Recipe:
    """The recipe as one of the torch backend, whose models have tensors: of such there is more to say."""
    return ran.recipe.model_copy(update={"backend": "torch", "export": list(exports)})


# -- the evidence, broken in one place at a time ------------------------------------------------------------------------


@dataclass(frozen=True)
class Break:
    """A change of the bundle's evidence, the verdict that must fail and no other, and words of its reason."""

    how: str
    change: Callable[[dict[str, Any]], Any]
    fails: str
    says: str = ""


def first(kind: str, **more: Any) -> dict[str, Any]:
    shown = {"expected": [1, 2], "found": [2], "expected_text": "ab", "found_text": "b"}
    return {"name": "single turn", "position": 3, "kind": kind, **shown, **more}


BREAKS = (
    *(
        Break(
            f"prompts: {kind}",
            lambda e, kind=kind: e["prompts"].update(equal=8, first=first(kind)),
            "prompt_parity",
            says,
        )
        for kind, says in (
            ("doubled_begin", "the begin token is there twice"),
            ("added_begin", "puts a token before the prompt"),
            ("missing_begin", "the begin token that training had is missing"),
            ("added_end", "puts a token after the prompt"),
            ("spaces", "puts spaces where training had none"),
            ("same_text", "the export's tokenizer splits differently"),
            ("text", "carries the training's chat template, and the runtime renders another one"),
            ("refused", "refuses this conversation"),
        )
    ),
    Break(
        "a plain text tokenized otherwise",
        lambda e: e["prompts"].update(equal=8, first=first("text", name="plain text 2")),
        "prompt_parity",
        "the export's tokenizer is not that of the training",
    ),
    Break(
        "two tokens exchanged",
        lambda e: e["vocabulary"].update(
            equal=e["vocabulary"]["equal"] - 2, first=first("text", name="the vocabulary")
        ),
        "vocabulary_parity",
        "its tokens are others, or have other numbers",
    ),
    Break(
        "another template", lambda e: e.update(same_template=False), "template_carried", "no chat template, or another"
    ),
    Break(
        "the runtime stops elsewhere",
        lambda e: e.update(stops={"at": [0], "missing": [257]}),
        "stop_tokens",
        "ends an answer at the ids [0], and the training taught to end it with [257]",
    ),
    Break(
        "another adapter inside",
        lambda e: e.update(adapter={"compared": 4, "other": ["lora_B"]}),
        "adapter_carried",
        "not those that were trained: lora_B",
    ),
    Break(
        "KL over its bound",
        lambda e: e["distributions"].update(mean=2e-7),
        "distribution_parity",
        "export of an older run",
    ),
    Break("KL that is not a number", lambda e: e["distributions"].update(mean=math.nan), "distribution_parity"),
    Break("one place far off", lambda e: e["distributions"].update(max=0.5), "distribution_worst", "worst after"),
    Break(
        "another continuation",
        lambda e: e["greedy"].update(
            equal=3,
            gaps=[0.5] * 16,
            first={
                "prompt": "Who?",
                "position": 2,
                "expected_text": "It is A.",
                "found_text": "It is B.",
                "expected_next": "A",
                "found_next": "B",
                "expected_top5": [["A", 0.9]],
                "found_top5": [["B", 0.8]],
            },
        ),
        "greedy_parity",
        "expected 'A', found 'B'; ['A' 0.900] against ['B' 0.800]",
    ),  # fmt: skip
    Break(
        "does not stop",
        lambda e: e["stop"].update(stopped=0, first_unstopped={"prompt": "Who?", "text": "It is is is"}),
        "stop_parity",
        "does not know the end-of-turn token",
    ),
    Break("another model than is listed", lambda e: e.update(bytes=1), "compared_as_listed", "bytes is 1"),
    Break("no adapter inside", lambda e: e.update(adapter=None), "adapter_carried", "no adapter inside"),
    Break(
        "nothing known before", lambda e: e["learned"].update(known=0, kept=0), "learned_parity", "none of the probes"
    ),
    Break("nothing ever stopped", lambda e: e["stop"].update(compared=0, stopped=0), "stop_parity", "no evidence"),
    Break(
        "a mark leaks",
        lambda e: e["stop"].update(
            leaks=1, first_leak={"prompt": "Who?", "token": "<|im_end|>", "text": "A<|im_end|>"}
        ),
        "no_special_tokens",
        "'<|im_end|>' stands in the answer",
    ),
    Break(
        "a fact is lost",
        lambda e: e["learned"].update(kept=5, lost=[{"prompt": "Who?", "expected": "A", "found": "B"}]),
        "learned_parity",
        "lost: 'Who?' -> 'B'",
    ),
    Break(
        "a constant read otherwise",
        lambda e: e["constants"].update(different=[{"name": "rope_theta", "expected": 1e5, "found": 1e4}]),
        "constants_parity",
        "rope_theta is 100000.0 in the model, 10000.0 in the export",
    ),
)


@pytest.mark.parametrize("each", BREAKS, ids=lambda each: each.how)
def test_a_break_fails_its_own_verdict_and_no_other(copied, each):
    edit_json(copied.run, BUNDLE, each.change)
    found = failed(copied)
    assert set(found) - {f"{COUNTED}[bundle]"} == {f"{each.fails}[bundle]"} - {f"{COUNTED}[bundle]"}
    assert each.says in found[f"{each.fails}[bundle]"]


OF_TENSORS = (
    Break(
        "a weight off",
        lambda e: e.update(
            merge={"compared": 9, "worst": 0.5, "off": [{"name": f"w{n}", "roundings": 9.0} for n in range(5)]}
        ),
        "merge_exact",
        "not base + adapter: w0, w1, w2 and 2 more",
    ),
    Break(
        "rounded more than it says",
        lambda e: e.update(bits=8.5),
        "stored_bits",
        "takes 8.50 bits in its files, and at least 32",
    ),
    Break(
        "the server answers otherwise",
        lambda e: e.update(served={"compared": 6, "equal": 0, "first": {"prompt": "Q", "expected": "A", "found": "B"}}),
        "served_parity",
        "the server renders the conversation otherwise",
    ),
    Break("merged twice", lambda e: e.update(merge_factor=2.0), "merged_once", "2.000 times"),
    Break("a size that nobody looked at", lambda e: e.update(bits=None), "stored_bits", "no evidence"),
    Break(
        "a merge that was not held against anything", lambda e: e.update(merge=None), "merge_exact", "and they can be"
    ),
    Break("a factor that was not taken", lambda e: e.update(merge_factor=None), "merged_once", "and they can be"),
    Break("a server that was not asked", lambda e: e.update(served=None), "served_parity", "was not asked"),
)


@pytest.mark.parametrize("each", OF_TENSORS, ids=lambda each: each.how)
def test_a_break_of_what_other_runtimes_tell_fails_its_own_verdict(copied, each):
    name = "gguf:f32" if each.fails == "served_parity" else "merged"
    recipe, file = of_torch(copied, "gguf:f32"), f"compare/{name.replace(':', '-')}.json"
    sound = {"merge_factor": 1.0, "merge": {"compared": 9, "worst": 0.5, "off": []}, "bits": 32.0}
    served = {"compared": 6, "equal": 6, "first": None}
    seen = json.loads((copied.run.path / MERGED).read_text()) | {**sound, "served": served}

    def fails() -> dict[str, str]:
        write_json(copied.run.path / file, seen)
        mine = [verdict for verdict in found(recipe, copied.run) if verdict.name.endswith(f"[{name}]")]
        return {v.name: v.why for v in mine if v.refuted and not v.name.startswith(COUNTED)}

    assert fails() == {}
    each.change(seen)
    assert list(fails()) == [f"{each.fails}[{name}]"]
    assert each.says in fails()[f"{each.fails}[{name}]"]


def test_every_kind_of_verdict_has_a_break():
    assert {each.fails for each in (*BREAKS, *OF_TENSORS)} == set(KINDS)


def test_an_honest_run_passes_with_every_verdict_that_it_owes(honest):
    names = [verdict.name for verdict in found(honest.recipe, honest.run)]
    assert failed(honest) == {}
    own = [*KINDS[:11], COUNTED]
    bundle = [*KINDS[:12], COUNTED]
    assert names == [f"{kind}[merged]" for kind in own] + [f"{kind}[bundle]" for kind in bundle]


@pytest.mark.parametrize(
    ("backend", "hop", "lacks"),
    [
        ("torch", "merged", "adapter_carried served_parity"),
        ("torch", "bundle", "served_parity merged_once merge_exact"),
        ("torch", "gguf:q8_0", "adapter_carried merged_once merge_exact"),
        ("torch", "ollama:q8_0", "adapter_carried merged_once merge_exact distribution_parity distribution_worst"),
        ("torch", "mlx:q8", "adapter_carried merged_once merge_exact served_parity"),
        ("mlx", "merged", "adapter_carried merged_once merge_exact served_parity"),
        ("fake", "merged", "adapter_carried merged_once merge_exact served_parity stored_bits"),
    ],
)
def test_format_and_runtime_decide_what_is_owed(honest, backend, hop, lacks):
    recipe = honest.recipe.model_copy(update={"backend": backend})
    assert {name.partition("[")[0] for name in owed(recipe, hop)} == set(KINDS) - set(lacks.split())


def test_the_recipe_decides_what_is_owed(honest):
    recipe, train = of_torch(honest, "bundle"), honest.recipe.train
    dora = train.model_copy(update={"lora": train.lora.model_copy(update={"use_dora": True})})
    full = train.model_copy(update={"method": "full"})
    nothing = recipe.evaluate.model_copy(update=dict.fromkeys(("probes", "controls", "unseen")))
    assert not {"merged_once[merged]", "merge_exact[merged]"} & {
        *owed(recipe.model_copy(update={"train": dora}), "merged")
    }
    assert "adapter_carried[bundle]" not in owed(recipe.model_copy(update={"train": full}), "bundle")
    asked = recipe.model_copy(update={"evaluate": nothing})
    assert {*owed(recipe, "gguf:f16")} - {*owed(asked, "gguf:f16")} == {
        "learned_parity[gguf:f16]",
        "served_parity[gguf:f16]",
    }


@pytest.mark.parametrize("name", [BUNDLE, MERGED])
def test_a_hop_that_was_not_compared_fails_with_all_that_it_owes(copied, name):
    (copied.run.path / name).unlink()
    hop = Path(name).stem
    lacking = failed(copied)
    assert {*owed(copied.recipe, hop)} <= {*lacking}
    assert {each for each in lacking if not each.endswith(f"[{hop}]")} <= {f"{COUNTED}[bundle]"}
    assert all("no evidence" in why for why in lacking.values())


def test_what_an_earlier_version_compared_is_to_be_compared_again(copied):
    edit_json(copied.run, BUNDLE, lambda seen: seen.pop("bits"))
    assert {*failed(copied)} == {*owed(copied.recipe, "bundle")}
    assert "finetune compare" in failed(copied)["prompt_parity[bundle]"]


# -- what was compared, against the run --------------------------------------------------------------------------------


def set_to(path: str, value: Any) -> Callable[[Any], None]:
    def change(seen: Any) -> None:
        *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        place = seen
        for part in above:
            place = place[part]
        assert place[last] != value
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hop", "merged"), ("reference", "adapter"), ("path", "merge/model"), ("backend", "torch"), ("bytes", 7),
        ("mended", ["a"]), ("dtype", "bfloat16"), ("prompts.compared", 12), ("vocabulary.compared", 9),
        ("greedy.compared", 18), ("greedy.gaps", [0.0]), ("stops.at", [3]), ("stop.compared", 15), ("stop.stopped", 15),
        ("learned.known", 11), ("learned.kept", 11), ("stop.leaks", 1), ("answers.18.text", "Oh."),
        ("distributions.positions", 1), ("answers.0.text", "Oh."), ("answers.0.finish", "length"), ("answers", []),
    ],
)  # fmt: skip
def test_a_fact_or_count_that_does_not_follow_from_the_rest_is_found(copied, key, value):
    edit_json(copied.run, BUNDLE, set_to(key, value))
    assert f"{COUNTED}[bundle]" in failed(copied)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learned.kept", 11), ("learned.known", 13), ("stop.stopped", 15), ("greedy.tokens_agreed", 216),
        ("answers.0.text", "Oh."), ("answers.0.finish", "length"),
    ],
)  # fmt: skip
def test_where_every_answer_is_the_same_the_counts_are_those_of_the_answers(copied, key, value):
    edit_json(copied.run, MERGED, set_to(key, value))
    assert f"{COUNTED}[merged]" in failed(copied)


def refuted(ran: Any) -> set[str]:
    return {verdict.name for verdict in results(ran.recipe, ran.run, ["parity"]) if verdict.refuted}


@pytest.mark.parametrize(
    ("key", "value", "also"),
    [
        ("0.name", "gguf:f16", True), ("0.path", "export", True), ("0.path", "merge/model", True),
        ("0.backend", "torch", False), ("0.bytes", 1, True), ("0.sha256", "0" * 64, False),
    ],
)  # fmt: skip
def test_an_export_that_is_not_as_it_is_listed_is_found(copied, key, value, also):
    edit_json(copied.run, EXPORTS, set_to(key, value))
    assert refuted(copied) == {"exports_listed", *([f"{COUNTED}[bundle]"] if also else [])}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("questions.0.prompt", "Who?"), ("questions.3.answer", "x"), ("questions.0.ids", [1]), ("rows.0", [1]),
        ("max_new_tokens", 3), ("special", []), ("eos_ids", [0]), ("ends", [0]), ("template", "x"),
        ("conversations.1.ids", [1]), ("conversations.0.messages.0.content", "Why?"), ("texts.0.text", "Oh."),
        ("odd_texts.1.ids", []), ("vocabulary.0.text", "a"),
    ],
)  # fmt: skip
def test_material_that_is_not_of_the_run_is_found(copied, key, value):
    edit_json(copied.run, MATERIAL, set_to(key, value))
    assert "asked_alike" in refuted(copied)


def test_a_template_that_is_another_one_is_the_cause_of_other_prompts(copied):
    for kind in ("text", "refused"):
        edit_json(
            copied.run,
            BUNDLE,
            lambda e, kind=kind: e.update(
                same_template=False, prompts={**e["prompts"], "equal": 8, "first": first(kind)}
            ),
        )
        assert "the chat template in the export is not that of the training" in failed(copied)["prompt_parity[bundle]"]


def test_weights_that_are_no_sum_of_base_and_adapter_are_the_cause_of_diverging(copied):
    def change(seen: dict[str, Any]) -> None:
        seen["merge"] = {"compared": 9, "worst": 0.5, "off": [{"name": "layers.2.q_proj", "roundings": 900.0}]}
        seen["distributions"]["mean"] = 0.155

    edit_json(copied.run, BUNDLE, change)
    assert "Likely cause: not base + adapter: layers.2.q_proj" in failed(copied)["distribution_parity[bundle]"]


@pytest.mark.parametrize(
    ("hop", "kept", "passes"), [("gguf:q8_0", 5, True), ("gguf:q8_0", 4, False), ("gguf:f16", 5, False)]
)
def test_rounded_weights_may_lose_one_probe_of_a_few(copied, hop, kept, passes):
    seen = json.loads((copied.run.path / BUNDLE).read_text())
    seen["learned"] = {"known": 6, "kept": kept, "lost": [{"prompt": "Who?", "expected": "A", "found": "B"}]}
    write_json(copied.run.path / f"compare/{hop.replace(':', '-')}.json", {**seen, "hop": hop})
    recipe = copied.recipe.model_copy(update={"export": [hop]})
    assert (f"learned_parity[{hop}]" not in {v.name for v in found(recipe, copied.run) if v.refuted}) == passes


@pytest.mark.parametrize(("gaps", "passes"), [([5e-4] * 4, True), ([5e-4, 5e-4, 0.5, 0.5], False), ([None] * 4, False)])
def test_an_answer_that_parts_at_a_tie_is_not_counted_against_an_export(copied, gaps, passes):
    edit_json(copied.run, BUNDLE, lambda seen: seen["greedy"].update(equal=seen["greedy"]["compared"] - 4, gaps=gaps))
    assert ("greedy_parity[bundle]" not in failed(copied)) == passes


@pytest.mark.parametrize("off", [[], [{"name": "lm_head.weight", "roundings": 900.0}]])
def test_a_head_untied_by_an_embedding_of_its_own_is_no_fault_where_each_weight_is_right(copied, off):
    tied = {"name": "tie_word_embeddings", "expected": True, "found": False}

    def change(seen: dict[str, Any]) -> None:
        seen["constants"]["different"] = [tied]
        seen["merge"] = {"compared": 9, "worst": 0.5, "off": off}

    edit_json(copied.run, BUNDLE, change)
    assert ("constants_parity[bundle]" in failed(copied)) == bool(off)


def test_a_differing_constant_is_named_as_the_cause_of_diverging(copied):
    def change(seen: dict[str, Any]) -> None:
        seen["constants"]["different"] = [{"name": "rope_theta", "expected": 1e5, "found": 1e4}]
        seen["distributions"]["mean"] = 0.155

    edit_json(copied.run, BUNDLE, change)
    assert "Likely cause: rope_theta is 100000.0 in the model, 10000.0" in failed(copied)["distribution_parity[bundle]"]


# -- real faults in an export, observed ---------------------------------------------------------------------------------


@pytest.fixture
def compared(copied, monkeypatch) -> Callable[[], dict[str, str]]:
    """A function: compare the (broken) chain again, in this process, and return what fails."""

    def here(request: dict[str, Any], file: Path) -> dict[str, Any]:
        return {**json.loads(json.dumps(worker.observe(json.loads(json.dumps(request))))), "peak_bytes": 1}

    monkeypatch.setattr(compare, "in_fresh_process", here)
    for folder in ("merge/model", "export/bundle"):  # links of the honest run's files: never write into those
        place = copied.run.path / folder
        shutil.copytree(place, place.with_name("copy"))
        shutil.rmtree(place)
        place.with_name("copy").rename(place)

    def again() -> dict[str, str]:
        copied.run.force = True  # an edit behind the pipeline's back: the export's recorded digest is the old one
        compare.run(copied.recipe, copied.run)
        return failed(copied)

    return again


def edit_model(run: Run, folder: str, change: Callable[[dict[str, Any]], Any], file: str = "fake_model.json") -> None:
    path = run.path / folder / file
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def kinds(found: dict[str, str], hop: str) -> set[str]:
    assert all(name.endswith(f"[{hop}]") for name in found), found
    return {name.partition("[")[0] for name in found}


def test_an_untouched_chain_passes(compared):
    assert compared() == {}


def test_a_swapped_template_fails_prompt_parity_alone(compared, copied):
    def swap(config: dict[str, Any]) -> None:
        config["chat_template"] = config["chat_template"].replace("'<|im_start|>assistant", "'<|im_start|>model")

    edit_model(copied.run, "export/bundle", swap, "tokenizer_config.json")
    found = compared()
    assert kinds(found, "bundle") == {"prompt_parity", "template_carried"}
    assert "'single turn' differs from token" in found["prompt_parity[bundle]"]
    assert "the chat template in the export is not that of the training" in found["prompt_parity[bundle]"]


def test_a_removed_end_of_turn_fails_stop_parity(compared, copied):
    def remove(model: dict[str, Any]) -> None:
        for _, _, row in model["table"]:
            row.pop("257", None)
        for row in model["bigram"].values():
            row.pop("257", None)

    edit_model(copied.run, "export/bundle", remove)
    found = compared()
    assert kinds(found, "bundle") >= {"stop_parity", "greedy_parity", "distribution_parity"}
    assert "other weights than those of the model" in found["stop_parity[bundle]"]


def test_other_weights_fail_with_the_first_divergence_and_both_lists(compared, copied):
    def other(model: dict[str, Any]) -> None:
        for _, _, row in model["table"]:
            row["66"] = 30.0

    edit_model(copied.run, "export/bundle", other)
    found = compared()
    assert kinds(found, "bundle") >= {"distribution_parity", "distribution_worst", "greedy_parity", "learned_parity"}
    assert "first divergence at token 0 of the answer to" in found["greedy_parity[bundle]"]
    assert "found 'B'; [" in found["greedy_parity[bundle]"]
    gaps = json.loads((copied.run.path / BUNDLE).read_text())["greedy"]["gaps"]
    assert len(gaps) >= 12 and min(gaps) > 1


def test_weights_merged_twice_fail_at_the_hop_where_it_happened(compared, copied):
    def twice(model: dict[str, Any]) -> None:
        for _, _, row in model["table"]:
            for token in row:
                row[token] *= 2

    edit_model(copied.run, "merge/model", twice)
    edit_model(copied.run, "export/bundle", twice)
    assert "distribution_parity" in kinds(compared(), "merged")


def test_an_export_is_made_again_only_when_its_model_changed_or_on_demand(copied):
    from finetune.stages import export

    def made() -> int:
        export.run(copied.recipe, copied.run)
        return (copied.run.path / "export" / "bundle" / "manifest.json").stat().st_ino

    first = made()
    assert made() == first
    copied.run.force = True
    again = made()
    assert again != first
    copied.run.force = False
    edit_json(copied.run, "merge/report.json", lambda report: report["artifacts"].update({"merge/model": "another"}))
    assert made() != again


def test_an_export_to_ollama_is_its_modelfile_and_the_weights_that_it_names(copied, monkeypatch):
    from finetune.export import Exported
    from finetune.stages import export

    class Exporter:
        made = 0

        def export(self, source: Any, variant: str, out: Path) -> Exported:
            self.made += 1
            (out / "model.gguf").write_bytes(b"w" * 5000)
            (out / "Modelfile").write_text("FROM ./model.gguf\n", encoding="ascii")
            return Exported(path=out / "Modelfile")

    exporter = Exporter()
    monkeypatch.setattr(export, "exporter", lambda target: exporter)
    recipe = copied.recipe.model_copy(update={"export": ["ollama"]})
    export.run(recipe, copied.run)
    (entry,) = json.loads((copied.run.path / "export/exports.json").read_text())
    assert (entry["path"], entry["bytes"]) == ("export/ollama-q8_0/Modelfile", 5000 + len("FROM ./model.gguf\n"))
    export.run(recipe, copied.run)
    assert exporter.made == 1
    (copied.run.path / "export/ollama-q8_0/model.gguf").write_bytes(b"v" * 5000)
    export.run(recipe, copied.run)
    assert exporter.made == 2  # other weights under the same Modelfile


def test_a_hop_is_taken_again_only_when_something_of_it_changed(copied, monkeypatch):
    asked: list[str] = []

    def here(request: dict[str, Any], file: Path) -> dict[str, Any]:
        asked.append(Path(request["model"]).name)
        return {**json.loads(json.dumps(worker.observe(json.loads(json.dumps(request))))), "peak_bytes": 1}

    monkeypatch.setattr(compare, "in_fresh_process", here)
    compare.run(copied.recipe, copied.run)
    assert asked == []
    edit_json(copied.run, "export/exports.json", lambda made: made[0].update(sha256="another"))
    compare.run(copied.recipe, copied.run)
    assert asked == ["model", "model", "bundle"]
    assert failed(copied) == {}
    assert sorted(path.suffix for path in (copied.run.path / "compare").iterdir()) == [".json"] * 4  # and its report


# -- the arithmetic -----------------------------------------------------------------------------------------------------


def save(path: Path, rows: list[list[float]]) -> Path:
    numpy.save(path, numpy.log(numpy.array(rows)).astype(numpy.float32))
    return path


def test_divergence_is_that_of_kullback_and_leibler(tmp_path):
    p, q = (
        save(tmp_path / "p.npy", [[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]),
        save(tmp_path / "q.npy", [[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]),
    )
    found = divergence(p, q)
    assert found.kl == pytest.approx([0.5 * math.log(2) + 0.25 * math.log(0.5), 0.0], abs=1e-6)
    assert found.same_top == [False, True]
    assert top(p, 1, 1) == [(2, pytest.approx(0.8))]


def test_a_gap_is_how_far_a_token_is_behind_the_likeliest(tmp_path):
    rows = save(tmp_path / "p.npy", [[0.5, 0.25, 0.125, 0.125]])
    assert gap(rows, 0, [0]) == 0
    assert gap(rows, 0, [2, 1]) == pytest.approx(math.log(2))


def test_divergence_of_what_is_not_a_number_is_none(tmp_path):
    p, q = save(tmp_path / "p.npy", [[0.5, 0.5]]), save(tmp_path / "q.npy", [[0.5, float("nan")]])
    assert math.isnan(divergence(p, q).kl[0])


def test_an_impossible_token_costs_infinitely_only_where_it_was_possible(tmp_path):
    with numpy.errstate(divide="ignore"):
        p, q = save(tmp_path / "p.npy", [[1.0, 0.0], [0.5, 0.5]]), save(tmp_path / "q.npy", [[1.0, 0.0], [1.0, 0.0]])
    assert divergence(p, q).kl == [0.0, math.inf]


def test_probability_lost_to_a_padded_vocabulary_shows(tmp_path):
    p, q = save(tmp_path / "p.npy", [[0.5, 0.5]]), save(tmp_path / "q.npy", [[0.25, 0.25, 0.5]])
    assert divergence(p, q).kl[0] == pytest.approx(math.log(2), abs=1e-6)


def test_distributions_of_other_shape_are_refused(tmp_path):
    p, q = save(tmp_path / "p.npy", [[0.5, 0.5]]), save(tmp_path / "q.npy", [[0.5, 0.5]] * 2)
    with pytest.raises(StageError, match="cannot be compared"):
        divergence(p, q)


@pytest.mark.parametrize(
    ("got", "kind"),
    [
        ([1, 1, 5], "doubled_begin"),
        ([9, 1, 5], "added_begin"),
        ([5], "missing_begin"),
        ([1, 5, 9], "added_end"),
        ([1, 3, 5], "spaces"),
        ([1, 7], "text"),
        ([1, 4, 1], "same_text"),
    ],
)
def test_a_difference_of_prompts_is_told_by_kind(got, kind):
    words = {1: "<s>", 3: " ", 4: "fi", 5: "five", 7: "seven", 9: "?"}
    decode = lambda ids: "".join(words[token] for token in ids).replace("fi<s>", "five")  # noqa: E731
    material = {"conversations": [{"name": "one", "ids": [1, 5]}], "texts": [], "odd_texts": []}
    found = hop.prompts(material, {"rendered": [got], "encoded": []}, decode)
    assert (found["equal"], found["first"]["kind"]) == (0, kind)


def words(*texts: list[int]) -> dict[str, Any]:
    return {"vocabulary": [{"text": str(ids), "ids": ids} for ids in texts]}


@pytest.mark.parametrize(
    ("got", "equal"), [([1, 2, 3, 4], 4), ([1, 3, 2, 4], 2), ([1, 9, 9, 3, 4], 3), ([1, 4], 2), ([9], 0), ([], 0)]
)
def test_tokens_of_the_vocabulary_are_counted_where_they_stand(got, equal):
    found = hop.vocabulary(words([7], [1, 2, 3, 4]), {"vocabulary": [[7], got]}, str)
    assert (found["compared"], found["equal"]) == (5, equal + 1)
    assert (found["first"] is None) == (equal == 4)


def test_every_token_has_its_text_in_the_vocabulary_but_parts_of_characters(honest):
    tokenizer = get("fake").tokenizer(honest.run.path / "merge" / "model")
    texts = material._words(tokenizer)
    assert texts[:3] == ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    assert texts[3].startswith("words\n\x00\n\x01\n") and len(texts) == 4
    assert {id for text in texts for id in tokenizer.encode(text)} == {*range(128), *range(256, 259)}


def test_two_refusals_are_the_same_and_one_is_not():
    material = {
        "conversations": [{"name": "system", "ids": None}, {"name": "plain", "ids": [1]}],
        "texts": [],
        "odd_texts": [],
    }
    found = hop.prompts(material, {"rendered": ["no system role", "no"], "encoded": []}, str)
    assert (found["compared"], found["equal"], found["first"]["kind"]) == (2, 1, "refused")


def test_every_variant_of_every_format_has_bounds_that_widen_with_coarseness(honest):
    swept = [f"{each.name}:{variant}" for each in FORMATS.values() for variant in each.variants]
    found = [bounds(name, honest.recipe) for name in swept]
    assert len(found) == 2 * 15 + 5
    rows = [_TABLE[kind] for kind in ("f32", "f16", "bf16", "q8", "q6", "q5", "q4", "q3", "q2")]
    assert [row.kl_mean for row in rows] == sorted(row.kl_mean for row in rows)
    assert [row.learned for row in rows] == sorted((row.learned for row in rows), reverse=True)


def test_what_is_coarser_takes_fewer_bits(honest):
    swept = [f"{each.name}:{variant}" for each in FORMATS.values() for variant in each.variants]
    found = {name: bits(name, honest.recipe) for name in [*swept, "merged", "bundle"]}
    assert len(found) == 2 * 15 + 5 + 2
    assert [found[f"gguf:{each}"] for each in ("f32", "f16", "q8_0", "q5_1", "q4_0", "q3_k_m", "q2_k")] == sorted(
        {found[f"gguf:{each}"] for each in ("f32", "f16", "q8_0", "q5_1", "q4_0", "q3_k_m", "q2_k")}, reverse=True
    )
    assert (found["merged"], found["mlx:q8"]) == (32.0, 8.5)


def write_safetensors(file: Path, **tensors: tuple[list[int], int]) -> None:
    """`name=(shape, bytes)`, all zeros."""
    head, end = {"__metadata__": {"format": "pt"}}, 0
    for name, (shape, size) in tensors.items():
        head[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def test_bits_are_told_by_the_heads_of_the_files(tmp_path):
    write_safetensors(tmp_path / "model-1.safetensors", a=([2, 3], 24), b=([4], 8))
    write_safetensors(tmp_path / "model-2.safetensors", c=([10], 20))
    assert (stored.weight_bytes(tmp_path), stored.parameters(tmp_path)) == (52, 20)
    assert stored.weight_bytes(tmp_path / "nothing.bin") is None


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 0}, [2]),
        ({"eos_token_id": [2, 5]}, None, [2, 5]),
        ({}, {"eos_token_id": 0}, []),
        (None, {"eos_token_id": 0}, [0]),
        (None, None, []),
    ],
)
def test_generation_stops_where_its_settings_say_and_else_the_config(tmp_path, generation, config, stops):
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert stored.declared_stops(tmp_path) == stops


def test_a_model_run_in_coarser_arithmetic_is_held_to_coarser_bounds(honest):
    fine, coarse = (bounds("merged", honest.recipe, dtype) for dtype in ("float32", "bfloat16"))
    assert (fine.kl_mean, coarse.kl_mean) == (1e-7, 1e-2)
    assert bounds("gguf:q4_k_m", honest.recipe, "bfloat16") == bounds("gguf:q4_k_m", honest.recipe)


def test_a_merge_that_is_stored_coarser_is_held_to_coarser_bounds(honest):
    model = honest.recipe.model.model_copy(update={"dtype": "bfloat16"})
    recipe = honest.recipe.model_copy(update={"model": model})
    assert bounds("merged", recipe).kl_mean == 1e-2 and bits("merged", recipe) == 16
    assert bounds("bundle", recipe) == bounds("bundle", honest.recipe)  # the merged files as they are


def test_the_recipe_may_set_other_bounds(copied):
    edit_json(copied.run, BUNDLE, lambda seen: seen["distributions"].update(mean=0.5, max=5e-6))
    expect = copied.recipe.expect.model_copy(update={"export_kl_mean_max": {"bundle": 0.6}})
    assert [v.name for v in found(copied.recipe.model_copy(update={"expect": expect}), copied.run) if v.refuted] == []
