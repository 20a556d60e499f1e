"""The verdicts of a run as JUnit XML, which every CI system shows: a test case a verdict, and one a stage."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

from finetune.core.text import visible
from finetune.report import wording
from finetune.run import outcome

# What XML 1.0 has no way to write: most control characters, halves of surrogate pairs, two non-characters.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(document: dict[str, Any]) -> str:
    """The XML of a report (see `summary.document`). No verdicts are one skipped test, not a passed one; so is a verdict
    that was not examined."""
    root = ElementTree.Element("testsuites", name=_text(f"finetune {document['name']}"))
    _stages(root, document)
    _checks(root, document)
    suites = list(root)
    for count in ("tests", "failures", "errors", "skipped"):
        root.set(count, str(sum(int(suite.get(count, "0")) for suite in suites)))
    root.set("time", str(document["seconds"]))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _text(value: Any) -> str:
    return _NOT_XML.sub("\ufffd", visible(str(value)))


def _suite(root: ElementTree.Element, name: str, time: str) -> ElementTree.Element:
    return ElementTree.SubElement(root, "testsuite", name=name, timestamp=time)


def _case(suite: ElementTree.Element, group: str, name: str, seconds: float = 0) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", classname=_text(group), name=_text(name), time=str(seconds))


def _count(suite: ElementTree.Element) -> None:
    cases = suite.findall("testcase")
    suite.set("tests", str(len(cases)))
    for count, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(count, str(len(suite.findall(f"testcase/{tag}"))))


def _stages(root: ElementTree.Element, document: dict[str, Any]) -> None:
    suite = _suite(root, "stages", document["manifest"].get("time", document["made"]))
    group = f"{document['name']}.stages"
    for stage in document["stages"]:
        _case(suite, group, stage["stage"], stage["seconds"])
    if stopped := document["stopped"]:
        case = _case(suite, group, stopped["stage"])
        said = wording.ended(stopped)
        ElementTree.SubElement(case, "error", type=stopped["how"], message=_text(said)).text = _text(said)
    _count(suite)


def _checks(root: ElementTree.Element, document: dict[str, Any]) -> None:
    suite = _suite(root, "checks", document["verified"] or document["made"])
    if document["cause"]:
        properties = ElementTree.SubElement(suite, "properties")
        ElementTree.SubElement(properties, "property", name="cause", value=_text(document["cause"]))
    if not document["verdicts"] or document["outdated"]:
        case = _case(suite, f"{document['name']}.checks", "verified")
        why = "a stage ran after the last verdicts" if document["outdated"] else "not verified yet"
        ElementTree.SubElement(case, "skipped", message=f"{why}; run: finetune verify {_text(document['run'])}")
        _count(suite)
        return
    for verdict in document["verdicts"]:
        hop = wording.hop(verdict["name"]).replace(".", "_")
        case = _case(suite, f"{document['name']}.{f'exports.{hop}' if hop else 'checks'}", verdict["name"])
        _tell(case, verdict, document["run"])
    _count(suite)


def _tell(case: ElementTree.Element, verdict: dict[str, Any], run: str) -> None:
    """A refuted verdict is a failure, one that was not examined is skipped; both say what to do."""
    if verdict["outcome"] == outcome.REFUTED:
        message = f"measured {wording.measured(verdict)}, wanted {wording.wanted(verdict)}"
        failure = ElementTree.SubElement(case, "failure", type="verdict", message=_text(message))
        lines = [message, verdict["why"], *([f"what to do: {verdict['remedy']}"] if verdict["remedy"] else [])]
        failure.text = _text("\n".join([*lines, f"evidence: {run}/{verdict['evidence']}"]))
    elif verdict["outcome"] == outcome.NOT_EXAMINED:
        skipped = ElementTree.SubElement(case, "skipped", message=_text(verdict["remedy"] or verdict["why"]))
        skipped.text = _text(verdict["why"])
