"""Two scoring protocols for visual question answering, as pure functions of strings.

`strict` accepts the reference answer only: exact match after normalisation, token-set F1 and the answer's length.
`llava-med` is the scorer behind the published medical VQA tables (`eval_metrics` of LLaVA-Med v1.0). Its numbers are
needed for comparison with those tables, but they are easy to game:

- open recall counts every repetition of a shared word: "lung lung lung lung" against "left lung" scores 4/5;
- open recall does not penalise length: an answer with every word of the training answers scores 1;
- closed accuracy looks for substrings: "normal" contains "no", so it is right if the answer is "no";
- a closed answer other than yes or no ("left") is always wrong, even if it is the reference answer.

Both protocols know the words for yes and no of other languages (clincot.datasets.closed_answers). For Chinese and
Japanese, which have no spaces, they count characters where they count words of other languages.

Reports therefore always show both protocols by name, together with the blind baseline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clincot.datasets.closed_answers import (
    begins_with_yes,
    is_same_closed_word,
    list_closed_words,
    read_choice,
    split_unspaced,
    split_words,
)
from clincot.records import Question, Reference
from clincot.text import normalize_text

# ---------------------------------------------------------------------------------------------- strict


def is_correct(prediction: str, answer: str, kind: Literal["closed", "open"]) -> bool:
    """Whether the normalised prediction equals the normalised reference answer (strict protocol).

    The same rule holds for closed and open questions: "yes, clearly" is not "yes". An answer in another form counts
    as off format; no attempt is made to interpret it. One addition for closed questions: a language's words for the
    same side are equal, since Chinese has several (是, 是的, 有). Raises ValueError on any other `kind`.
    """
    if kind not in ("closed", "open"):  # reports are scored by clincot.evaluation.report_text.report_scorer
        raise ValueError(f"a question is 'closed' or 'open', got {kind!r}")
    if normalize_text(prediction) == normalize_text(answer):
        return True
    return kind == "closed" and is_same_closed_word(prediction, answer)


def is_chosen(prediction: str, answer: str, options: Sequence[str]) -> bool:
    """Whether a prediction names the option that the reference answer names, by its letter, its text or both."""
    chosen = read_choice(prediction, options)
    return chosen is not None and chosen == read_choice(answer, options)


def grade_answer(prediction: str, question: Question, reference: Reference) -> bool | None:
    """Grade an answer with `is_correct` or, if there are options, with `is_chosen`.

    None for a report, which is scored by its text and findings instead.
    """
    if question.kind == "report":
        return None
    if question.kind == "choice":
        return is_chosen(prediction, reference.answer, question.options)
    return is_correct(prediction, reference.answer, question.kind)


def token_set_f1(prediction: str, answer: str) -> float:
    """Compute 2 |P ∩ A| / (|P| + |A|) over the *sets* of normalised words, in [0, 1].

    Repeating a word gains nothing. 0 if either set is empty.
    """
    predicted, expected = set(split_words(prediction)), set(split_words(answer))
    if not predicted or not expected:
        return 0.0
    return 2 * len(predicted & expected) / (len(predicted) + len(expected))


def answer_length(text: str) -> int:
    """Count the words of the raw text; reported because llava-med recall rewards long answers.

    A character of Chinese or Japanese counts as a word.
    """
    return sum(len(split_unspaced(word)) for word in text.split())


def says_yes(prediction: str) -> bool:
    """Whether an answer begins with a word for yes, in any format; the hallucination rate counts such answers."""
    return begins_with_yes(prediction)


# ------------------------------------------------------------------------------------------- llava-med


@dataclass(frozen=True)
class OpenScore:
    """The llava-med scores of one open answer, each in [0, 1]."""

    recall: float
    precision: float
    f1: float


def score_llava_med_open(prediction: str, answer: str) -> OpenScore:
    """Compute recall, precision and F1 over words, counted as LLaVA-Med's scorer counts them.

    tp is the sum of the *prediction's* counts of shared words, fp of its other words, and fn the sum of the
    reference's counts of words that the prediction lacks; recall = tp / (tp + fn), precision = tp / (tp + fp). All
    three are 0 without a shared word.
    """
    predicted, expected = Counter(split_words(prediction)), Counter(split_words(answer))
    tp = sum(count for word, count in predicted.items() if word in expected)
    fp = sum(count for word, count in predicted.items() if word not in expected)
    fn = sum(count for word, count in expected.items() if word not in predicted)
    if tp == 0:
        return OpenScore(recall=0.0, precision=0.0, f1=0.0)
    recall, precision = tp / (tp + fn), tp / (tp + fp)
    return OpenScore(recall=recall, precision=precision, f1=2 * precision * recall / (precision + recall))


def score_llava_med_closed(prediction: str, answer: str) -> bool:
    """Whether the normalised prediction contains "yes" or "no" and the reference answer, each as a substring.

    If the reference is a word for yes or no of another language, that language's words take the place of the two.
    """
    predicted = normalize_text(prediction)
    words = list_closed_words(answer) or {"yes", "no"}
    return any(word in predicted for word in words) and normalize_text(answer) in predicted
