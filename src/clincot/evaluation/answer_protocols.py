"""The protocol on which a decision rests, as pure functions of the answers: strict, llava-med or parsed.

An `Outcome` holds the answer itself and its strict grade. The gate grades the answer by the protocol of its recipe
(`decide.protocol`), in the gain and in every guard:

- `strict`: exact match, for policies that answer in the words of the answer key;
- `llava-med`: substring match of closed answers and token recall of open ones, which are easy to game (vqa.py);
- `parsed`: what an answer in sentences commits itself to (parsed_answers.py). An open answer of another kind counts if
  a panel graded it with the reference at hand (open_answers.py); otherwise the question is not part of the accuracy.

A grade is a share in [0, 1], and None where an answer is unscored. Questions that ask for a report have no grade.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from clincot.evaluation.parsed_answers import can_parse, grade_parsed, parse_yes_no, read_yes_no
from clincot.evaluation.vqa import says_yes, score_llava_med_closed, score_llava_med_open, token_set_f1
from clincot.records import Outcome, Question, Reference
from clincot.text import normalize_text

AnswerProtocol = Literal["strict", "llava-med", "parsed"]
# The metric of a report that comes first with each protocol (benchmark_report.py).
_HEADLINES: dict[AnswerProtocol, str] = {
    "strict": "accuracy",
    "llava-med": "llava_med_closed_accuracy",
    "parsed": "parsed_accuracy",
}
PANEL_RIGHT = 0.5  # the mean P(right) from which a panel calls an open answer right


def choose_headline(protocol: AnswerProtocol, measured: Collection[str]) -> str:
    """The metric that reports show first: that of the recipe's protocol, or accuracy if it was not measured."""
    wanted = _HEADLINES[protocol]
    return wanted if wanted in measured else "accuracy"


def is_gradable(protocol: AnswerProtocol, question: Question, reference: Reference, *, paneled: bool) -> bool:
    """Whether a question belongs to the accuracy of a protocol. paneled: a panel graded its answers."""
    if protocol != "parsed" or question.kind in ("report", "choice"):
        return True
    return can_parse(question.text, reference.answer) or (question.kind == "open" and paneled)


def grade_by_protocol(
    protocol: AnswerProtocol, outcome: Outcome, question: Question, reference: Reference
) -> float | None:
    """The grade of an answer in [0, 1]; None if it is unscored."""
    if outcome.correct is None:
        return None
    if protocol == "strict" or question.kind == "choice":  # a letter or an option has one reading
        return float(outcome.correct)
    if protocol == "llava-med":
        if question.kind == "closed":
            return float(score_llava_med_closed(outcome.answer, reference.answer))
        return score_llava_med_open(outcome.answer, reference.answer).recall
    if can_parse(question.text, reference.answer):
        right = grade_parsed(outcome.answer, question.text, reference.answer)
        return None if right is None else float(right)
    return grade_by_panel(outcome)


def grade_by_panel(outcome: Outcome) -> float | None:
    """1 if the panel calls the answer right, 0 if it calls it wrong; None if it gave no score."""
    return None if outcome.panel_score is None else float(outcome.panel_score >= PANEL_RIGHT)


def measure_open_answer(
    protocol: AnswerProtocol, outcome: Outcome, question: Question, reference: Reference
) -> float | None:
    """What the guard of open answers compares: token-set F1 if strict, else the protocol's own grade.

    Under `parsed` token-set F1 stands in where neither the protocol nor a panel reads the answer.
    """
    if outcome.correct is None:
        return None
    if protocol == "strict":
        return token_set_f1(outcome.answer, reference.answer)
    if is_gradable(protocol, question, reference, paneled=bool(outcome.graders)):
        return grade_by_protocol(protocol, outcome, question, reference)
    return token_set_f1(outcome.answer, reference.answer)


def claims_presence(protocol: AnswerProtocol, answer: str, question: Question) -> bool:
    """Whether an answer says yes to a question; the hallucination rate counts such answers."""
    return parse_yes_no(answer, question.text) == "yes" if protocol == "parsed" else says_yes(answer)


def is_off_format(protocol: AnswerProtocol, outcome: Outcome, question: Question, reference: Reference) -> bool:
    """Whether an answer is in no form that the protocol expects.

    Under `parsed` every answer that says something is on format: one that commits itself to nothing is unscored, which
    decide.max_unscored limits. A policy that wrote no readable region is off format by any protocol.
    """
    if protocol == "strict" or question.kind == "report":
        return outcome.off_format
    answer = normalize_text(outcome.answer)
    if outcome.no_region or not answer:
        return True
    return protocol == "llava-med" and question.kind == "closed" and "yes" not in answer and "no" not in answer


def read_commitment(protocol: AnswerProtocol, answer: str, question: Question, reference: Reference) -> str:
    """What an answer comes to, to tell apart a policy that says the same to every question, in whatever words."""
    if protocol == "parsed" and read_yes_no(reference.answer):
        return parse_yes_no(answer, question.text) or "nothing"
    return normalize_text(answer)
