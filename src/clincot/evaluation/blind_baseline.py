"""The blind baseline: the most frequent training answer to a question's text, without the image.

On SLAKE it scores as high as published models (see the tables of LLaVA-Med and its successors), so every results
table includes it: a model that does not beat the blind baseline has learnt nothing from images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from clincot.errors import InvalidInput
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.vqa import grade_answer
from clincot.geometry import WHOLE_IMAGE
from clincot.records import Outcome, Question, Reference, hash_json
from clincot.text import normalize_text

BLIND_ARM = "blind"


@dataclass(frozen=True)
class BlindBaseline:
    """Majority answers, normalised; ties go to the alphabetically first answer.

    Reports are counted as they are written, so the baseline always gives the most frequent report.
    """

    by_text: dict[str, str]  # {normalised question text: answer}
    by_kind: dict[str, str]  # {kind: answer}, for a question text that the training split lacks
    overall: str  # for a kind that the training split lacks

    @classmethod
    def fit(cls, questions: Iterable[Question], references: Iterable[Reference]) -> BlindBaseline:
        """Count the answers of a training split; raises InvalidInput if it is empty or lacks a reference."""
        answers = {reference.question: reference.answer for reference in references}
        by_text: defaultdict[str, Counter[str]] = defaultdict(Counter)
        by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
        overall: Counter[str] = Counter()
        for question in questions:
            if question.id not in answers:
                raise InvalidInput(f"question {question.id} has no reference to fit the blind baseline on")
            answer = answers[question.id]
            answer = answer.strip() if question.kind == "report" else normalize_text(answer)
            by_text[normalize_text(question.text)][answer] += 1
            by_kind[question.kind][answer] += 1
            overall[answer] += 1
        if not overall:
            raise InvalidInput("the blind baseline needs at least one question with its reference, got none")
        return cls(
            by_text={text: _pick_majority(counts) for text, counts in by_text.items()},
            by_kind={kind: _pick_majority(counts) for kind, counts in by_kind.items()},
            overall=_pick_majority(overall),
        )

    @property
    def digest(self) -> str:
        """Digest of the majority answers; it takes the place of a policy's digest in outcomes and reports."""
        return "blind-" + hash_json([self.by_text, self.by_kind, self.overall])[:20]

    def answer_question(self, question: Question) -> str:
        """Return the majority answer to the question's text, else of its kind, else of all questions."""
        answer = self.by_text.get(normalize_text(question.text))
        return answer if answer is not None else self.by_kind.get(question.kind, self.overall)

    def iter_outcomes(self, benchmark: Benchmark) -> Iterator[Outcome]:
        """Answer a benchmark and score the answers like a policy's, in the arm "blind"; hit and IoU stay None."""
        policy = self.digest  # of all answers, so it is computed once
        for question in benchmark.questions.values():
            reference, answer = benchmark.references[question.id], self.answer_question(question)
            yield Outcome(
                question=question.id,
                policy=policy,
                arm=BLIND_ARM,
                box=WHOLE_IMAGE,
                answer=answer,
                reference=reference.id,
                correct=grade_answer(answer, question, reference),
            )


def _pick_majority(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
