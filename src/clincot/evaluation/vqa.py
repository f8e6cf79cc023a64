"""Two scoring protocols for visual question answering, as pure functions over strings.

`strict` asks for the reference answer and nothing else: exact match after normalisation, token-set F1 and the
answer's length. `llava-med` is the scorer that published medical VQA tables use (LLaVA-Med v1.0, its
`eval_metrics`); its numbers are needed beside other people's and are easy to game:

- open recall counts every repetition of a shared word: "lung lung lung lung" against "left lung" scores 4/5;
- open recall has no price for length: naming every word of the training answers scores 1;
- closed looks for substrings: "normal" contains "no", so it is right where the answer is "no";
- a closed answer that is neither yes nor no ("left") is wrong even when it is right.

So both protocols are always reported, by name, beside the blind baseline.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

from clincot.records import Question, Reference
from clincot.text import normalize_text

# ---------------------------------------------------------------------------------------------- strict


def is_correct(prediction: str, answer: str, kind: Literal["closed", "open"]) -> bool:
    """Strict protocol: the normalised prediction *is* the normalised reference answer.

    The same rule holds for closed and open questions ("yes, clearly" is not "yes": an answer in another form is
    counted off format, not guessed at); an unknown `kind` raises ValueError.
    """
    if kind not in ("closed", "open"):  # a report is not right or wrong: clincot.evaluation.report_text.report_scorer
        raise ValueError(f"a question is 'closed' or 'open', got {kind!r}")
    return normalize_text(prediction) == normalize_text(answer)


def grade_answer(prediction: str, question: Question, reference: Reference) -> bool | None:
    """is_correct of an answer to a question; None for a report, which is scored as a text and by its findings."""
    return None if question.kind == "report" else is_correct(prediction, reference.answer, question.kind)


def token_set_f1(prediction: str, answer: str) -> float:
    """2 |P ∩ A| / (|P| + |A|) over the *sets* of normalised words, in [0, 1]: repeating a word gains nothing."""
    predicted, wanted = set(normalize_text(prediction).split()), set(normalize_text(answer).split())
    if not predicted or not wanted:
        return 0.0
    return 2 * len(predicted & wanted) / (len(predicted) + len(wanted))


def answer_length(text: str) -> int:
    """Words between white space, as written. Reported because llava-med recall rewards long answers."""
    return len(text.split())


def says_yes(prediction: str) -> bool:
    """Whether an answer begins with yes, in whatever form: what a hallucination probe counts."""
    return normalize_text(prediction).split()[:1] == ["yes"]


# ------------------------------------------------------------------------------------------- llava-med


@dataclass(frozen=True)
class OpenScore:
    """llava-med's scores of one open answer, each in [0, 1]."""

    recall: float
    precision: float
    f1: float


def score_llava_med_open(prediction: str, answer: str) -> OpenScore:
    """Recall, precision and F1 over the union of word types, counted as LLaVA-Med's scorer counts.

    tp = sum of the *candidate's* counts of shared words, fp = candidate-only counts, fn = reference-only counts;
    recall = tp / (tp + fn), precision = tp / (tp + fp). No shared word scores 0.
    """
    predicted, wanted = Counter(normalize_text(prediction).split()), Counter(normalize_text(answer).split())
    tp = sum(count for word, count in predicted.items() if word in wanted)
    fp = sum(count for word, count in predicted.items() if word not in wanted)
    fn = sum(count for word, count in wanted.items() if word not in predicted)
    if tp == 0:
        return OpenScore(recall=0.0, precision=0.0, f1=0.0)
    recall, precision = tp / (tp + fn), tp / (tp + fp)
    return OpenScore(recall=recall, precision=precision, f1=2 * precision * recall / (precision + recall))


def score_llava_med_closed(prediction: str, answer: str) -> bool:
    """Right iff "yes" or "no" is a substring of the normalised prediction, and the reference is one too."""
    predicted = normalize_text(prediction)
    return ("yes" in predicted or "no" in predicted) and normalize_text(answer) in predicted
