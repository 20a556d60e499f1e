"""What a run leaves about itself: report.json, junit.xml, report.md, report.html; and two runs side by side."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from click.testing import CliRunner, Result

from finetune.checks import verify
from finetune.cli.app import cli
from finetune.core import secrets
from finetune.core.files import write_json, write_text
from finetune.recipe import dump
from finetune.report import charts, compare, curves, files, html, junit, markdown, summary, terminal, wording
from finetune.run import Report, Run
from support import records
from support.records import refuted, restate
from support.town import as_if_written_so, edit_json, edit_rows, only_training

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))
NASTY = "<script>alert('x')</script> & \"quoted\" </style> | `code` [link](http://example.org) \x00\x1b[31m \u202e"
FILES = ("report.json", "junit.xml", "report.md", "report.html")


class Page(HTMLParser):
    """The elements of a page: (tag, attributes), and the text that is in none of style and script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inside: list[str] = []
        self.text = ""
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside.append("")

    def handle_data(self, data: str) -> None:
        if self.inside[-1:] in (["style"], ["script"]):
            self.raw[self.inside[-1]].append(data)
        else:
            self.text += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        return [
            attributes
            for name, attributes in self.elements
            if name == tag and all(attributes.get(key) == value for key, value in wanted.items())
        ]


@pytest.fixture(scope="module")
def proved(honest: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy of the town's run with its verdicts. Tests read it; to change it they take `mine`."""
    place = tmp_path_factory.mktemp("proved") / "town"
    ignored = shutil.ignore_patterns("verdicts.json", ".lock")
    shutil.copytree(honest.run.path, place, copy_function=linked, ignore=ignored)
    run = Run(place)
    write_text(run.path / "recipe.yaml", dump(honest.recipe))
    as_if_written_so(run)
    verify(honest.recipe, run)
    return run


@pytest.fixture
def mine(proved: Run, tmp_path: Path) -> Run:
    shutil.copytree(proved.path, tmp_path / "runs" / "mine", copy_function=linked)
    return Run(tmp_path / "runs" / "mine")


def linked(source: str, target: str) -> None:
    """A file of a copy: a link, but for the log, which is written on and not replaced."""
    if source.endswith("events.jsonl"):
        shutil.copy2(source, target)
    else:
        os.link(source, target)


@pytest.fixture
def failed(mine: Run) -> Run:
    """A run with two refuted verdicts, one of them for want of evidence, one of them of an export, and one that was not
    examined."""
    end = {"measured": 4.5, "bound": 3.25, "compare": "<", "why": f"why: {NASTY}", "remedy": f"train {NASTY}"}
    unknown = {
        "outcome": "not examined",
        "passed": None,
        "measured": None,
        "remedy": "add evaluate.unseen: FILE (JSONL)",
    }
    restate(
        mine,
        loss_end=refuted(**end),
        learned_parity__bundle=refuted(measured=None, remedy="Export with more bits."),
        learned_net={**unknown, "why": "no untrained facts"},
    )
    return mine


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], prog_name="finetune")


def say(run: Run, text: str) -> None:
    """Have the model answer its first probe with `text`, after training and in the export."""

    def change(rows: list[dict[str, Any]]) -> None:
        rows[0]["prompt"] = rows[0]["answer"] = text
        for answer in rows[0]["phases"].values():
            answer["text"] = text

    edit_rows(run, "evaluate/answers.jsonl", change)


def lose(run: Run, losses: dict[int, float]) -> None:
    """Give steps of the training other losses."""

    def change(events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["event"] == "step" and event["stage"] == "train" and event["step"] in losses:
                event["loss"] = losses[event["step"]]

    edit_rows(run, "events.jsonl", change)


def end(run: Run, event: str, **values: Any) -> None:
    """Append an event of a later time to a copy of a run, whose files are links."""
    edit_rows(run, "events.jsonl", lambda rows: [*rows, {"time": "2999-01-01T00:00:00.000Z", "event": event, **values}])


def rendered(run: Run) -> dict[str, str]:
    """The text of every file that a run leaves about itself."""
    return files.render(summary.document(run))[1]


# -- report.json -------------------------------------------------------------------------------------------------------


def _stopped(run: Run) -> None:
    (run.path / "verdicts.json").unlink()
    end(run, "stage_failed", stage="merge", message="no space")


def _bare(run: Run) -> None:
    for name in ("train", "align", "evaluate", "measure", "compare", "export", "events.jsonl", "manifest.json"):
        shutil.rmtree(run.path / name) if (run.path / name).is_dir() else (run.path / name).unlink()


STATES: dict[str, Callable[[Run], None]] = {
    "as it is": lambda run: None,
    "no verdicts": lambda run: (run.path / "verdicts.json").unlink(),
    "a stage failed": _stopped,
    "losses that are no numbers": lambda run: lose(run, {3: math.nan, 4: math.inf, 5: -math.inf}),
    "markup in answers": lambda run: say(run, NASTY),
    "hardly anything": _bare,
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_run_is_reported_and_its_json_fits_the_schema(mine: Run, state: str) -> None:
    STATES[state](mine)
    plain, texts = files.render(summary.document(mine))

    jsonschema.Draft202012Validator(SCHEMA).validate(plain)
    assert tuple(texts) == FILES
    assert json.loads(texts["report.json"], parse_constant=pytest.fail) == plain
    ElementTree.fromstring(texts["junit.xml"])
    assert len(Page(texts["report.html"]).all("h2")) >= 7
    assert len(texts["report.html"]) < 200_000


def test_the_schema_is_one_and_knows_every_key(proved: Run) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    plain = summary.as_dict(proved)

    assert set(SCHEMA["properties"]) == set(plain)
    assert len(plain["verdicts"]) > 30
    assert len(plain["answers"]) > 15
    assert set(plain["curves"]) == {"train", "align"}
    for broken in ({**plain, "schema": 1}, {**plain, "new": 1}, {k: v for k, v in plain.items() if k != "verdicts"}):
        assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(broken)


def test_numbers_that_are_none_are_text_in_json(mine: Run) -> None:
    lose(mine, {3: math.nan, 4: math.inf})
    curve = summary.as_dict(mine)["curves"]["train"]

    assert [point["loss"] for point in curve["points"][2:4]] == ["NaN", "Infinity"]
    assert curve["not_finite"] == {"loss": {"count": 2, "steps": [3, 4]}}


def test_a_stage_that_ran_after_the_verdicts_makes_them_outdated(mine: Run) -> None:
    assert summary.as_dict(mine)["passed"] is True
    end(mine, "stage_started", stage="train", fingerprint="x")
    end(mine, "stage_finished", stage="train", seconds=1)
    found = summary.as_dict(mine)

    assert (found["passed"], found["outdated"]) == (None, True)
    assert wording.status(found) == "changed since it was verified"


def test_a_failure_that_all_checks_have_passed_since_is_over() -> None:
    failure = {"time": "2026-01-01T00:00:00.000Z", "event": "stage_failed", "stage": "compare", "message": "gone"}
    later = {"time": "2026-01-02T00:00:00.000Z", "passed": True}

    assert summary.stopped([failure], later) is None
    for stored in ({**later, "passed": False}, {**later, "time": "2025-01-01T00:00:00.000Z"}, None):
        assert summary.stopped([failure], stored) == {
            "stage": "compare", "how": "failed", "message": "gone", "time": failure["time"],
        }  # fmt: skip


def test_no_secret_reaches_a_file_in_any_spelling(mine: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    say(mine, "it is p&ss<w>rd\"'1, no?")
    monkeypatch.setattr(secrets, "_known", {"p&ss<w>rd\"'1"})
    texts = rendered(mine)

    assert all("ss<w>rd" not in text and "ss&lt;w&gt;rd" not in text for text in texts.values())
    assert "it is ***, no?" in texts["report.html"]


# -- junit.xml ---------------------------------------------------------------------------------------------------------


def cases(run: Run, suite: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(junit.render(summary.document(run)))
    return root.findall(f"testsuite[@name='{suite}']/testcase")


def test_every_verdict_is_a_test_case_and_a_failure_tells_measured_and_bound(failed: Run) -> None:
    found = cases(failed, "checks")
    broken = {case.get("name"): case.find("failure") for case in found if case.find("failure") is not None}
    root = ElementTree.fromstring(junit.render(summary.document(failed)))

    assert len(found) == len(summary.document(failed)["verdicts"])
    assert set(broken) == {"loss_end", "learned_parity[bundle]"}
    assert broken["loss_end"].get("message") == "measured 4.5 nats, wanted less than 3.25 nats"
    assert "why: <script>" in broken["loss_end"].text
    assert "\x1b" not in broken["loss_end"].text
    assert "what to do: train <script>" in broken["loss_end"].text
    assert broken["learned_parity[bundle]"].get("message") == "measured no evidence, wanted at least 95 %"
    assert (root.get("failures"), root.get("skipped")) == ("2", "1")


def test_what_was_not_examined_is_a_skipped_case_with_its_remedy(failed: Run) -> None:
    skipped = {case.get("name"): case.find("skipped") for case in cases(failed, "checks")}
    (name,) = [name for name, found in skipped.items() if found is not None]

    assert name == "learned_net"
    assert skipped[name].get("message") == "add evaluate.unseen: FILE (JSONL)"
    assert skipped[name].text == "no untrained facts"


def test_a_run_without_verdicts_is_a_skipped_test_and_not_a_passed_one(mine: Run) -> None:
    (mine.path / "verdicts.json").unlink()
    (only,) = cases(mine, "checks")

    assert "not verified yet" in only.find("skipped").get("message")


def test_a_failed_stage_is_an_error_in_junit(mine: Run) -> None:
    _stopped(mine)
    last = cases(mine, "stages")[-1]

    assert last.get("name") == "merge"
    assert last.find("error").get("message") == "the stage 'merge' failed: no space"


# -- report.md ---------------------------------------------------------------------------------------------------------


def test_markdown_says_first_what_failed_and_why(failed: Run) -> None:
    lines = markdown.render(summary.document(failed)).splitlines()

    count = len(summary.document(failed)["verdicts"])
    assert lines[0] == f"## mine: 2 of {count} checks refuted, 1 not examined"
    assert lines[4].startswith(r"| **loss\_end** | 4.5 nats | less than 3.25 nats | why: \<script\>")
    assert r"| train \<script\>" in lines[4]
    assert r"| learned\_net | no untrained facts | add evaluate.unseen: FILE (JSONL) |" in lines
    assert len("\n".join(lines)) < 5000


def test_markdown_holds_no_markup_of_others(failed: Run) -> None:
    text = markdown.render(summary.document(failed))

    assert re.search(r"(?<!\\)[<`|\[](?:script|/style|code|link)", text) is None
    assert not re.search("[\x00-\x09\x0b-\x1f\u202a-\u202e]", text)
    assert all(line.count(" | ") == 4 for line in text.splitlines() if line.startswith(r"| **loss\_end"))


# -- report.html -------------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_and_runs_its_own_script_only(failed: Run) -> None:
    say(failed, NASTY)
    text = rendered(failed)["report.html"]
    page = Page(text)
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] or ""

    assert "<script>alert" not in text
    assert [len(page.all(tag)) for tag in ("script", "style", "img", "iframe", "object")] == [1, 1, 0, 0, 0]
    links = [attributes.get("href") or "" for tag in ("a", "link") for attributes in page.all(tag)]
    assert links
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert not [attributes for _, attributes in page.elements if "src" in attributes or "style" in attributes]
    assert policy.startswith("default-src 'none'")
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256("".join(page.raw[kind]).encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_text_of_others_is_shown_as_it_is(mine: Run) -> None:
    say(mine, NASTY)
    page = Page(html.render(summary.document(mine)))

    assert page.text.count("<script>alert('x')</script> & \"quoted\" </style>") >= 4
    assert "\\x00\\x1b[31m" in page.text
    assert not page.all("script", onerror="")


def test_refuted_verdicts_stand_open_and_first_then_what_was_not_examined_then_what_is_proved(failed: Run) -> None:
    page = Page(html.render(summary.document(failed)))
    shown = [(each["class"], "open" in each) for each in page.all("details") if "verdict" in (each.get("class") or "")]

    assert shown[:3] == [("verdict bad", True), ("verdict bad", True), ("verdict open", True)]
    assert len(shown) >= 5
    assert set(shown[3:]) == {("verdict good", False)}
    order = [
        "2 of ",
        "Refuted: Loss end",
        "What to do: train <script>",
        "Not examined",
        "Add evaluate.unseen",
        "Training and its",
    ]
    places = [page.text.index(said) for said in order]
    assert places == sorted(places)
    assert "less than 3.25 nats" in page.text
    assert "no evidence" in page.text


def test_charts_have_titles_and_text_and_the_points_of_the_run(proved: Run) -> None:
    page = Page(html.render(summary.document(proved)))
    drawings = page.all("svg", role="img")
    lines = [each for each in page.all("path") if each.get("data-points")]

    assert len(drawings) == len(lines) == 10
    assert len(page.all("desc")) == len(page.all("title")) - 1 == 10
    assert [each["data-points"] for each in lines] == ["12"] * 4 + ["6"] * 6
    assert [len(re.findall("[ML]", each["d"] or "")) for each in lines] == [12] * 4 + [6] * 6


def test_losses_that_are_no_numbers_break_the_line_and_are_told(mine: Run) -> None:
    lose(mine, {3: math.nan, 4: math.inf})
    page = Page(html.render(summary.document(mine)))
    line = next(each for each in page.all("path") if each.get("data-points"))

    assert (line["d"] or "").count("M") == 2
    assert len(re.findall("M", page.all("path", **{"class": "bad"})[0]["d"] or "")) == 2
    assert "nan" not in (line["d"] or "").lower()
    assert "not a finite number at 2 steps: 3, 4" in page.text


def test_a_run_in_which_no_loss_is_a_number_is_drawn_all_the_same(mine: Run) -> None:
    lose(mine, dict.fromkeys(range(1, 13), math.nan))
    page = Page(html.render(summary.document(mine)))

    assert "not a finite number at 12 steps: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ..." in page.text
    assert len(page.all("path", **{"class": "bad"})) == 1


def test_a_set_of_questions_is_told_with_every_phase_and_export(mine: Run) -> None:
    def other(found: dict[str, Any]) -> None:
        said = [{"text": row["phases"]["aligned"]["text"], "finish": "stop"} for row in summary.answers(mine)]
        said[1]["text"] = "It is Elsewhere."
        found["answers"] = said

    edit_json(mine, "compare/bundle.json", other)
    document = summary.document(mine)
    first, second = document["answers"][:2]
    page = Page(html.render(document))

    assert first["exports"]["bundle"] == {"text": first["phases"]["aligned"]["text"], "finish": "stop", "correct": True}
    assert second["exports"]["bundle"] == {"text": "It is Elsewhere.", "finish": "stop", "correct": False}
    assert page.text.count("It is Elsewhere.") == 1
    assert page.text.count("the same: merged") == 1
    assert page.text.count("the same: all 2") == len(document["answers"]) - 1
    assert all("answers" not in hop for hop in document["exports"])


def test_export_answers_that_no_evidence_has_are_not_made_up(mine: Run) -> None:
    edit_json(mine, "compare/bundle.json", lambda found: found.update(answers=[]))
    rows = summary.document(mine)["answers"]

    assert len(rows) > 15
    assert all(list(row["exports"]) == ["merged"] for row in rows)
    assert "not recorded: bundle" in Page(html.render(summary.document(mine))).text


def test_parts_that_a_run_lacks_are_left_out_or_said(mine: Run) -> None:
    _bare(mine)
    (mine.path / "verdicts.json").unlink()
    text = Page(html.render(summary.document(mine))).text

    for said in ("Not verified yet", "No training step was logged", "No question was asked", "no manifest"):
        assert said in text
    assert "Exports" not in text


def test_the_command_to_reproduce_is_quoted_and_names_commit_and_versions(mine: Run, tmp_path: Path) -> None:
    spaced = Run(mine.path.rename(tmp_path / "my runs"))
    manifest = {**spaced.manifest(), "git": {"sha": "0123abcd", "dirty": True}, "packages": {"torch": "2.13.0+cpu"}}
    write_json(spaced.path / "manifest.json", manifest)
    found = summary.reproduce(spaced, spaced.manifest())

    assert found["command"] == f"finetune run '{spaced.path}/recipe.yaml' --run '{spaced.path}-again'"
    assert found["install"].startswith("python -m pip install finetune==")
    assert found["install"].endswith(" torch==2.13.0")
    text = Page(html.render(summary.document(spaced))).text
    assert "0123abcd, which had uncommitted changes" in text


# -- curves and charts -------------------------------------------------------------------------------------------------


def steps(count: int, **at: float) -> list[dict[str, Any]]:
    return [
        {"step": n, "loss": at.get(f"s{n}", 5 - n / count), "grad_norm": 1.0, "seconds": 0.5, "tokens": 100}
        for n in range(1, count + 1)
    ]


def test_thousands_of_steps_are_thinned_and_keep_what_stands_out() -> None:
    found = curves.curve(steps(20_000, s777=99.0, s12_345=math.nan, s15000=-3.0))
    kept = {point["step"] for point in found["points"]}

    assert found["steps"] == 20_000
    assert found["shown"] == len(kept) <= 6 * curves.BUCKETS
    assert {1, 777, 15_000, 20_000} <= kept
    assert found["ends"]["loss"]["highest"] == {"step": 777, "value": 99.0}


def test_a_step_without_a_number_survives_the_thinning() -> None:
    found = curves.curve(steps(20_000, s12345=math.nan))

    assert 12_345 in {point["step"] for point in found["points"]}
    assert found["not_finite"]["loss"] == {"count": 1, "steps": [12_345]}


def test_a_few_steps_are_all_kept() -> None:
    found = curves.curve(steps(100))

    assert (found["steps"], found["shown"]) == (100, 100)
    assert found["points"][0]["tokens_per_second"] == 200.0


def test_a_long_run_makes_no_giant_page(mine: Run) -> None:
    events = [{"event": "step", "stage": "train", **records.step(each["step"], each["loss"])} for each in steps(9000)]
    edit_rows(mine, "events.jsonl", lambda rows: [*[row for row in rows if row["event"] != "step"], *events])
    text = html.render(summary.document(mine))

    assert len(text) < 200_000
    assert re.search(r"[0-9]+ of 9,000 steps are drawn", text)


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.01, 2.3, ["3", "2", "1", "0"]),
        (100.0, 101.0, ["101", "100.75", "100.5", "100.25", "100"]),
        (0.0, 5e-4, ["6e-4", "4e-4", "2e-4", "0"]),
        (1e-4, 1e-4, ["1.5e-4", "1.25e-4", "1e-4", "7.5e-5", "5e-5"]),
        (3.0, 3.0, ["5", "4", "3", "2", "1"]),
        (-2.0, 3.0, ["4", "2", "0", "-2"]),
        (0.0, 2e6, ["2e6", "1.5e6", "1e6", "500,000", "0"]),
        (0.0, 0.0, ["0.5", "0.25", "0", "-0.25", "-0.5"]),
    ],
)
def test_axes_have_round_numbers(low: float, high: float, labels: list[str]) -> None:
    found = charts.chart("c", "t", "d", [("a", "a", [(1, low), (2, high)])])

    assert found is not None
    assert list(found.y_labels) == labels


@pytest.mark.parametrize(
    ("first", "last", "labels"),
    [
        (1, 12, ["1", "4", "6", "8", "10", "12"]),
        (1, 6, ["1", "2", "3", "4", "5", "6"]),
        (1, 60, ["1", "10", "20", "30", "40", "50", "60"]),
        (51, 20_000, ["51", "5,000", "10,000", "15,000", "20,000"]),
    ],
)
def test_steps_are_labelled_where_they_are(first: int, last: int, labels: list[str]) -> None:
    found = charts.chart("c", "t", "d", [("a", "a", [(first, 1.0), (last, 2.0)])])

    assert found is not None
    assert [text for _, _, text in found.x_labels] == labels
    for place, _, text in found.x_labels:
        assert float(place) == pytest.approx(100 * (int(text.replace(",", "")) - first) / (last - first), abs=0.06)
    assert [anchor for _, anchor, _ in found.x_labels] == ["start", *["middle"] * (len(labels) - 2), "end"]


def test_a_single_step_is_drawn_as_a_dot() -> None:
    found = charts.chart("c", "t", "d", [("a", "a", [(7, 1.5)])])

    assert found is not None
    assert found.lines[0].dots == "M500 250h0"
    assert found.x_labels == (("50", "middle", "7"),)
    assert charts.chart("c", "t", "d", [("a", "a", [])]) is None


# -- words -------------------------------------------------------------------------------------------------------------


def test_metrics_are_worded_for_people(proved: Run) -> None:
    told = {report.stage: wording.result(report) for report in summary.reports(proved)}

    assert wording.metric("trained_correct_base").label == "right answers, asked as trained, before"
    assert wording.metric("perplexity_aligned").label == "perplexity of held-out text, after alignment"
    assert told["evaluate"].startswith("right answers: as trained 0 to 100 %, in other words 0 to ")
    assert re.fullmatch(r"loss [\d.]+ to [\d.]+, 12 steps, [\d,.]+ tokens/s", told["train"])
    assert told["measure"] == "answers of a fresh process, LoRA against full, stop and resume, answers of a server"
    assert len(told) == 10
    assert all(told.values())
    assert not re.search(r"correct|_", " ".join(told.values()))


def test_a_stage_without_words_of_its_own_tells_its_numbers() -> None:
    report = Report(
        stage="quantize", fingerprint="", started="", seconds=1, metrics={"size_bytes": 2048, "deep_ratio": 0.5}
    )

    assert wording.result(report) == "size 2.0 KiB, deep ratio 0.5"


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (0.004, "0.4 %"), (0.5, "50 %"), (0.996, "99.6 %"), (1, "100 %"), (math.nan, "not a number")],
)
def test_a_share_never_rounds_to_all_or_nothing(share: float, text: str) -> None:
    assert wording.percent(share) == text


def test_the_terminal_tells_of_a_stage_that_failed(mine: Run) -> None:
    _stopped(mine)

    assert "the stage 'merge' failed: no space" in terminal.render(summary.document(mine))


# -- two runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def other(failed: Run) -> Run:
    """Another run: asked otherwise, two verdicts refuted and one open, one answer lost."""
    text = (failed.path / "recipe.yaml").read_text(encoding="utf-8")
    write_text(failed.path / "recipe.yaml", text.replace("max_steps: 12", "max_steps: 13"))
    lose(failed, {12: 9.0})

    def forget(rows: list[dict[str, Any]]) -> None:
        rows[0]["phases"]["aligned"] |= {"text": f"No idea {NASTY}", "correct": False}

    edit_rows(failed, "evaluate/answers.jsonl", forget)
    edit_json(failed, "train/report.json", lambda report: report["metrics"].update(last_loss=9.0))
    return failed


def test_a_comparison_tells_what_differs_and_nothing_else(proved: Run, other: Run) -> None:
    found = compare.compare(proved, other)

    assert found["recipe"] == [{"key": "train.max_steps", "a": 12, "b": 13}]
    assert [(each["name"], each["a"], each["b"]) for each in found["verdicts"]] == [
        ("loss_end", "proved", "refuted"),
        ("learned_net", "proved", "not examined"),
        ("learned_parity[bundle]", "proved", "refuted"),
    ]
    assert [(each["change"], each["a"]["correct"], each["b"]["correct"]) for each in found["answers"]] == [
        ("lost", True, False)
    ]
    differing = [each for each in found["metrics"] if each["difference"] != 0]
    assert [(each["group"], each["name"], each["better"]) for each in differing] == [("train", "last_loss", "a")]
    assert len(found["metrics"]) > 50
    assert found["versions"] == []


def test_a_run_compared_with_itself_differs_in_nothing(proved: Run) -> None:
    found = compare.compare(proved, proved)

    assert (found["recipe"], found["verdicts"], found["answers"], found["versions"]) == ([], [], [], [])
    assert {each["difference"] for each in found["metrics"]} == {0}
    assert Page(compare.render(found)).text.count("None") >= 3


def test_the_page_of_two_runs_overlays_their_losses_and_escapes(proved: Run, other: Run) -> None:
    text = compare.render(compare.compare(proved, other))
    page = Page(text)
    first = [each for each in page.all("path") if each.get("data-points")][:2]

    assert [each["class"] for each in first] == ["line a", "line b"]
    assert first[0]["d"] != first[1]["d"]
    assert "<script>alert" not in text
    assert len(page.all("script")) == 1
    assert "No idea <script>" in page.text


def test_a_comparison_fits_80_columns(proved: Run, other: Run) -> None:
    text = terminal.render_comparison(compare.compare(proved, other))
    paths = (str(proved.path), str(other.path))

    lines = [line for line in text.splitlines() if not any(path in line for path in paths)]
    assert max(len(line.rstrip()) for line in lines) <= 80
    for said in ("train.max_steps", "loss_end", "last loss", "Answers that differ at the end: 1", "\x1b[31m"):
        assert (said in text) == (said != "\x1b[31m"), said


def test_two_runs_are_written_as_a_page_here(proved: Run, other: Run, here: Path) -> None:
    result = call("report", proved.path, other.path)

    assert result.exit_code == 0, result.output
    assert "Recipe keys that differ" in result.stdout
    assert f"to look at: {here / 'town-vs-mine.html'}" in result.stdout
    assert (here / "town-vs-mine.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_two_runs_as_json(proved: Run, other: Run, here: Path) -> None:
    lose(other, {2: math.nan})
    found = json.loads(call("report", proved.path, other.path, "--json", "--out", here / "x" / "y.html").stdout)

    assert found["recipe"] == [{"key": "train.max_steps", "a": 12, "b": 13}]
    assert found["curves"]["train"]["b"]["points"][1]["loss"] == "NaN"
    assert (here / "x" / "y.html").is_file()


# -- the commands ------------------------------------------------------------------------------------------------------


def test_report_writes_four_files_and_says_where_to_look(mine: Run) -> None:
    result = call("report", mine.path)

    assert result.exit_code == 0, result.output
    assert "all " in result.stdout
    assert f"to look at: {mine.path / 'report.html'}" in result.stdout
    assert all((mine.path / name).is_file() for name in FILES)


def test_report_as_json_prints_what_it_wrote(mine: Run) -> None:
    lose(mine, {2: math.nan})
    result = call("report", mine.path, "--json")

    assert json.loads(result.stdout) == json.loads((mine.path / "report.json").read_text(encoding="utf-8"))
    assert result.stderr == ""


def test_out_writes_the_page_alone_and_elsewhere(mine: Run, here: Path) -> None:
    result = call("report", mine.path, "--out", "page.html")

    assert f"to look at: {here / 'page.html'}" in result.stdout
    assert not any((mine.path / name).exists() for name in FILES)
    assert call("report", mine.path, "--out", here).exit_code == 2


def test_a_run_that_cannot_be_written_into_is_shown_all_the_same(mine: Run) -> None:
    (mine.path / "report.json").mkdir()  # nothing can take its place, whoever asks
    result = call("report", mine.path)

    assert result.exit_code == 0
    assert "checks proved" in result.stdout
    assert "to look at" not in result.stdout
    assert f"the report could not be stored in {mine.path}" in result.stderr
    assert f"finetune report {mine.path} --out report.html" in result.stderr


def test_report_takes_at_most_two_runs(mine: Run) -> None:
    result = call("report", mine.path, mine.path, mine.path)

    assert result.exit_code == 2
    assert "two to compare; 3 were given" in result.stderr


@pytest.fixture
def small(town: Path, here: Path) -> Path:
    """A recipe file that only trains."""
    path = here / "small.yaml"
    path.write_text(dump(only_training(town, here / "runs", name="small")), encoding="utf-8")
    return path


def test_a_run_leaves_its_files_when_all_is_well_and_when_a_check_fails(small: Path, here: Path) -> None:
    assert call("run", small).exit_code == 0
    assert all((here / "runs" / "small" / name).is_file() for name in FILES)
    result = call("run", small, "--set", "train.learning_rate=0.0")
    found = json.loads((here / "runs" / "small" / "report.json").read_text(encoding="utf-8"))

    assert result.exit_code == 1
    assert found["passed"] is False
    assert found["conclusion"].startswith(
        "train.learning_rate is 0, so no weight moves: set it to 2e-4 (this explains "
    )
    assert "loss_convergence" in found["conclusion"]
    assert "<failure" in (here / "runs" / "small" / "junit.xml").read_text(encoding="utf-8")


def test_a_run_whose_stage_fails_leaves_a_report_of_what_is_there(
    small: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(recipe: Any, run: Run) -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("finetune.stages.merge.run", fail)
    result = call("run", small)
    found = json.loads((here / "runs" / "small" / "report.json").read_text(encoding="utf-8"))

    assert result.exit_code == 4
    assert "error: No space left on device" in result.stderr
    assert "to look at:" in result.stderr
    assert (found["passed"], found["stopped"]["stage"], found["stopped"]["how"]) == (None, "merge", "failed")
    assert [stage["stage"] for stage in found["stages"]] == ["fetch", "prepare", "train", "evaluate"]


def test_what_goes_wrong_with_that_report_does_not_hide_why_the_run_failed(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> dict[str, Any]:
        raise ValueError("broken")

    monkeypatch.setattr("finetune.stages.merge.run", fail)
    monkeypatch.setattr(files, "render", fail)
    result = call("run", small)

    assert result.exit_code == 4
    assert "unexpected ValueError: broken" in result.stderr
    assert "no report of what there is could be written" in result.stderr


def test_a_run_that_another_process_works_in_is_left_alone(small: Path, here: Path) -> None:
    call("run", small)
    run = Run(here / "runs" / "small")
    before = (run.path / "report.json").read_bytes()
    with run.locked():
        run.event("stage_started", stage="train", fingerprint="x")
        result = call("run", small, "--force")

    assert "in use by another finetune process" in result.stderr
    assert (run.path / "report.json").read_bytes() == before
