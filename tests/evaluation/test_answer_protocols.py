"""How the protocols of the gate grade one answer."""

from __future__ import annotations

from typing import get_args

import pytest

from clincot.evaluation.answer_protocols import AnswerProtocol, grade_by_protocol, is_gradable
from clincot.geometry import WHOLE_IMAGE
from clincot.records import Outcome, Question, Reference


@pytest.mark.parametrize("protocol", get_args(AnswerProtocol))
@pytest.mark.parametrize(("answer", "right"), [("A", True), ("left", True), ("B", False)])
def test_a_chosen_option_is_graded_alike_by_every_protocol(protocol: AnswerProtocol, answer: str, right: bool) -> None:
    """A letter commits itself to one option; read as a sentence, it would be unscored or have no word in common."""
    question = Question(study="s", text="On which side is the mass?", kind="choice", options=("left", "right"))
    reference = Reference(question=question.id, answer="left")
    outcome = Outcome(
        question=question.id,
        policy="p",
        arm="served",
        box=WHOLE_IMAGE,
        answer=answer,
        reference=reference.id,
        correct=right,
        off_format=False,
    )
    assert is_gradable(protocol, question, reference, paneled=False)
    assert grade_by_protocol(protocol, outcome, question, reference) == float(right)
