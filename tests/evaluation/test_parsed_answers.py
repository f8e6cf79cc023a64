"""The protocol `parsed` against sentences that a person read, and against references of every kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from clincot.evaluation.parsed_answers import (
    can_parse,
    grade_parsed,
    parse_alternative,
    parse_quantity,
    parse_side,
    parse_yes_no,
)

SENTENCES = Path(__file__).parent / "parsed_sentences.tsv"


class Sentence(NamedTuple):
    kind: str
    question: str
    answer: str
    reading: str

    def parse(self) -> str:
        """The reading of the protocol, written as in the file."""
        kind, _, alternatives = self.kind.partition(":")
        if kind == "quantity":
            quantity = parse_quantity(self.answer)
            return "-" if quantity is None else f"{quantity[0]} {quantity[1]:g}"
        if kind == "alternative":
            return parse_alternative(self.answer, alternatives.split("|")) or "-"
        if kind == "side":
            return parse_side(self.answer) or "-"
        return parse_yes_no(self.answer, self.question) or "-"


def read_sentences() -> Iterator[Sentence]:
    for line in SENTENCES.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield Sentence(*line.split("\t"))


def test_the_reading_of_200_sentences() -> None:
    """At least 97 % as the person read them, and none scored that commits itself to nothing."""
    sentences = list(read_sentences())
    wrong = [(s.answer, s.reading, s.parse()) for s in sentences if s.parse() != s.reading]
    counts = Counter(s.reading == "-" for s in sentences)
    print(f"{len(sentences)} sentences, {counts[True]} of them ambiguous, {len(wrong)} read differently: {wrong}")
    assert len(sentences) >= 200
    assert counts[True] >= 50
    assert [w for w in wrong if w[1] == "-"] == []
    assert len(wrong) <= 0.03 * len(sentences)


@pytest.mark.parametrize(
    ("answer", "question", "reference", "right"),
    [
        ("Yes, there is an effusion.", "Is there an effusion?", "yes", True),
        ("There is no effusion.", "Is there an effusion?", "Yes", False),
        ("Unclear.", "Is there an effusion?", "yes", None),
        ("The left lung.", "Which lung is affected?", "left", True),
        ("Both lungs.", "Which lung is affected?", "left", False),
        ("The nodule is smooth.", "Is the nodule smooth, spiculated or cavitating?", "spiculated", False),
        ("The nodule is spiculated.", "Is the nodule smooth, spiculated or cavitating?", "spiculated", True),
        ("30 mm", "How large is it?", "3 cm", True),
        ("3", "How large is it?", "3 cm", None),  # of what?
        ("There are three.", "How many are there?", "3", True),
        ("There are four.", "How many are there?", "three", False),
        ("Pneumonia in the right lung.", "What is the diagnosis?", "pneumonia", None),  # for exact match or a panel
        ("T2", "What is the weighting?", "T2", None),
        ("有", "有胸腔积液吗？", "有", True),
        ("未见胸腔积液。", "有胸腔积液吗？", "有", False),
        ("左肺", "哪个肺异常？", "左肺", None),
        ("左侧", "病变在哪一侧？", "左侧", True),
    ],
)
def test_an_answer_is_graded_by_what_it_commits_itself_to(
    answer: str, question: str, reference: str, right: bool | None
) -> None:
    assert grade_parsed(answer, question, reference) is right


@pytest.mark.parametrize(
    ("question", "reference", "readable"),
    [
        ("Is there an effusion?", "No", True),
        ("Is it on the left or the right?", "Left", True),
        ("Is this a CT or an MRI?", "CT", True),
        ("Is this a CT or an MRI?", "ultrasound", False),  # not offered
        ("Are both used, oral or IV?", "both", False),  # it would not be graded as right itself
        ("What is the diagnosis?", "pneumonia", False),
        ("How large is it?", "2 x 3 cm", False),
    ],
)
def test_a_reference_is_read_only_if_it_is_right_itself(question: str, reference: str, readable: bool) -> None:
    assert can_parse(question, reference) is readable


def test_a_strict_answer_is_graded_as_before() -> None:
    """What `strict` scores, `parsed` scores alike, for every kind of reference that it reads."""
    question = "Is the nodule smooth, spiculated or cavitating?"
    for reference in ("yes", "no", "left", "right", "smooth", "spiculated", "cavitating"):
        assert grade_parsed(reference, question, reference) is True
    assert grade_parsed("no", "Is it?", "yes") is False
