"""Negation and hedges in reports: 84 constructions, each with four findings, are 336 sentences read by a person.

The constructions are those that radiologists write; the status was decided by reading, before the rules were run.
"""

from __future__ import annotations

import importlib.util

import pytest

from clincot.evaluation.report_text.findings import count_findings, extract_mentions

pytestmark = pytest.mark.skipif(importlib.util.find_spec("radlabels") is None, reason="radlabels is not installed")

FINDINGS = {
    "pneumothorax": "pneumothorax",
    "pleural effusion": "pleural_effusion",
    "pulmonary edema": "pulmonary_edema",
    "consolidation": "consolidation",
}

PRESENT = """
There is {}.
There is a small {}.
{} is present.
{} is seen.
Persistent {}.
Stable {}.
Unchanged {}.
No change in the {}.
No significant change in the {}.
Without significant change in the {}.
No interval improvement of the {}.
The {} has not resolved.
The {} has not changed.
The {} has not yet resolved.
The {} has increased.
The {} has not decreased.
The {} is not increased.
The {} has partially resolved.
{} is again seen.
Interval development of {}.
New {}.
Worsening {}.
Consistent with {}.
Findings of {}.
No fracture, but there is {}.
No fracture and a small {}.
No fracture; {} is seen.
No fracture. There is {}.
No resolution of the {}.
There is {} without shift.
Not only {} is seen.
Residual {} remains.
""".strip().splitlines()
ABSENT = """
No {}.
No evidence of {}.
No {} is seen.
No {} is identified.
There is no {}.
There is no evidence of {}.
Without {}.
Without evidence of {}.
Negative for {}.
Free of {}.
Absence of {}.
{}: none.
{}: absent.
{}: negative.
{}: no.
{} is absent.
{} is not seen.
{} is not present.
{} is no longer seen.
{} is no longer visible.
{} was not identified.
{} is not clearly seen.
{} is unlikely.
{} has resolved.
{} has completely resolved.
{} has been ruled out.
{} is excluded.
Resolution of the {}.
Resolved {}.
Neither fracture nor {}.
No fracture or {}.
No fracture, mass or {}.
No suspicious finding and no {}.
No new {}.
No definite {}.
No large {}.
Lungs are clear of {}.
The {} has disappeared.
""".strip().splitlines()
UNCERTAIN = """
Possible {}.
Possibly {}.
{} cannot be excluded.
{} cannot be ruled out.
{} could not be entirely excluded.
Cannot exclude {}.
{} is not excluded.
Questionable {}.
Concerning for {}.
Suspicious for {}.
Suspicion of {}.
There may be {}.
{} versus artifact.
Equivocal {}.
""".strip().splitlines()
SENTENCES = [
    (template.format(phrase if not template.startswith("{}") else phrase.capitalize()), label, status)
    for status, templates in (("present", PRESENT), ("absent", ABSENT), ("uncertain", UNCERTAIN))
    for template in templates
    for phrase, label in FINDINGS.items()
]


def read_status(sentence: str, label: str) -> set[str]:
    return {mention.status for mention in extract_mentions(sentence) if mention.label == label}


def test_the_sentences_are_read_as_a_person_reads_them() -> None:
    assert len(SENTENCES) == 4 * 84
    wrong = [
        f"{sentence} -> {sorted(read_status(sentence, label))}, expected {status}"
        for sentence, label, status in SENTENCES
        if read_status(sentence, label) != {status}
    ]
    assert not wrong, "\n".join(wrong)


def test_two_styles_of_one_statement_agree() -> None:
    """Telegraphic and full style of the same report share every finding; the F1 was .333."""
    full = "There is no pneumothorax. The left pleural effusion has not resolved. Pulmonary edema is no longer seen."
    short = "Pneumothorax: none. Persistent left pleural effusion. Pulmonary edema: resolved."
    both, stated, expected = count_findings(full, short)
    assert (both, stated, expected) == (1.0, 1.0, 1.0)


def test_a_negation_ends_where_a_statement_begins() -> None:
    mentions = {m.label: (m.status, m.sides) for m in extract_mentions("No pneumothorax and a small left effusion.")}
    assert mentions == {"pneumothorax": ("absent", ()), "pleural_effusion": ("present", ("left",))}
