"""Findings with negation and side, by example and against radiologists' own labels."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from clincot.evaluation.report_text import findings
from clincot.evaluation.report_text.findings import count_findings, extract_mentions
from tests.support import material

needs_radlabels = pytest.mark.skipif(importlib.util.find_spec("radlabels") is None, reason="radlabels is not installed")


@needs_radlabels
@pytest.mark.parametrize(
    ("report", "stated"),
    [
        ("Small right pleural effusion.", {("pleural_effusion", "right")}),
        ("Small left pleural effusion.", {("pleural_effusion", "left")}),
        ("Right and left effusions.", {("pleural_effusion", "left"), ("pleural_effusion", "right")}),
        ("Bilateral pleural effusions.", {("pleural_effusion", "left"), ("pleural_effusion", "right")}),
        ("Pleural effusion.", {("pleural_effusion", "")}),
        ("No pleural effusion, pneumothorax or focal consolidation.", set()),
        ("No pneumothorax, but a small left effusion.", {("pleural_effusion", "left")}),
        ("Pneumothorax is not seen.", set()),
        ("The left pneumothorax has resolved.", set()),
        ("No change in the left effusion.", {("pleural_effusion", "left")}),  # "no change" denies nothing
        ("The heart is not enlarged.", set()),
        ("Heart size is normal.", set()),
        ("The cardiac silhouette is mildly enlarged.", {("cardiomegaly", "")}),
        ("Cardiomegaly with left effusion.", {("cardiomegaly", ""), ("pleural_effusion", "left")}),  # a midline organ
        ("Possible right pneumothorax.", set()),
        ("Pneumonia cannot be excluded.", set()),
        ("Pericardial effusion.", set()),
        ("Right effusion. The effusion is small.", {("pleural_effusion", "right")}),  # the same one again
        ("No right effusion. There is a left effusion.", {("pleural_effusion", "left")}),
        ("Left pneumothorax and right effusion.", {("pneumothorax", "left"), ("pleural_effusion", "right")}),
        ("Effusion and pneumothorax on the left.", {("pneumothorax", "left"), ("pleural_effusion", "left")}),
        ("", set()),
    ],
)
def test_findings(report: str, stated: set[tuple[str, str]]) -> None:
    assert findings.extract_findings(report) == stated


@needs_radlabels
def test_sides_differ_and_negated_findings_do_not_count() -> None:
    """The same finding on the other side is another finding, and a negated finding is none."""
    assert count_findings("Right effusion.", "Left effusion.") == [0, 1, 1]
    assert count_findings("Left effusion.", "Left effusion.") == [1, 1, 1]
    assert count_findings("Left effusion.", "No left effusion.") == [0, 1, 0]
    assert count_findings("Left effusion.", "Bilateral effusions.") == [1, 1, 2]


@needs_radlabels
def test_uncertain_findings_count_where_they_are_asked_for() -> None:
    assert findings.extract_findings("Possible right pneumothorax.", uncertain=True) == {("pneumothorax", "right")}
    assert [mention.status for mention in extract_mentions("Pneumothorax may be present.")] == ["uncertain"]


def test_precision_recall_and_f1_of_summed_counts() -> None:
    """2 findings agree of 3 stated and 5 wanted: 2/3, 2/5, 4/8."""
    totals = np.array([2.0, 3.0, 5.0])
    assert findings.finding_precision(totals) == pytest.approx(2 / 3)
    assert findings.finding_recall(totals) == pytest.approx(2 / 5)
    assert findings.micro_f1(totals) == pytest.approx(0.5)
    nothing = np.zeros(3)
    assert (findings.finding_precision(nothing), findings.finding_recall(nothing), findings.micro_f1(nothing)) == (
        None,
        None,
        None,
    )


@needs_radlabels
@pytest.mark.parametrize(
    ("label", "mesh", "least"),
    [
        ("cardiomegaly", "Cardiomegaly", 0.93),
        ("pleural_effusion", "Pleural Effusion", 0.84),
        ("atelectasis", "Pulmonary Atelectasis", 0.90),
        ("pneumothorax", "Pneumothorax", 0.84),
        ("hiatus_hernia", "Hernia, Hiatal", 0.95),
    ],
)
def test_agreement_with_radiologists_labels_of_iu(label: str, mesh: str, least: float) -> None:
    """F1 over all IU reports, and the side wherever the label has one."""
    both = stated = wanted = same_side = sided = 0
    for (_, labels), found in zip(material.iu_reports(), iu_findings(), strict=True):
        ours = {side for name, side in found if name == label}
        theirs = [entry.split("/")[1:] for entry in labels if entry.split("/")[0].strip() == mesh]
        both, stated, wanted = both + bool(ours and theirs), stated + bool(ours), wanted + bool(theirs)
        told = {word.strip() for entry in theirs for word in entry} & {"left", "right", "bilateral"}
        if ours and told:
            sided += 1
            same_side += ours == ({"left", "right"} if "bilateral" in told else told)
    assert 2 * both / (stated + wanted) >= least
    assert wanted > 20
    if sided > 10:
        assert same_side / sided >= 0.85


_IU: list[frozenset[tuple[str, str]]] = []


def iu_findings() -> list[frozenset[tuple[str, str]]]:
    """Read once: about a millisecond a report."""
    if not _IU:
        _IU.extend(findings.extract_findings(text) for text, _ in material.iu_reports())
    return _IU
