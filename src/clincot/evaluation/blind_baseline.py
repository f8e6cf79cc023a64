"""The blind baseline: the most frequent answer to the same question text, without looking at any image.

On SLAKE it is level with published models (evaluation tables of LLaVA-Med and its successors), so every results
table has it: a model that does not beat it has learnt nothing from images.
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
    """Majority answers, normalised; of equally frequent ones the alphabetically first. Of reports, the most frequent
    one as it is written: always to report what most reports say."""

    by_text: dict[str, str]  # {normalised question text: answer}
    by_kind: dict[str, str]  # for a question never asked before
    overall: str  # for a kind never seen before

    @classmethod
    def fit(cls, questions: Iterable[Question], references: Iterable[Reference]) -> BlindBaseline:
        """Count the answers of a training split; raises ValueError when it is empty or lacks a reference."""
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
        """Identifies the baseline where a policy's digest stands in other rows."""
        return "blind-" + hash_json([self.by_text, self.by_kind, self.overall])[:20]

    def answer_question(self, question: Question) -> str:
        """The majority answer to this question's text, or of its kind, or of all."""
        known = self.by_text.get(normalize_text(question.text))
        return known if known is not None else self.by_kind.get(question.kind, self.overall)

    def iter_outcomes(self, benchmark: Benchmark) -> Iterator[Outcome]:
        """Its answers to a benchmark, scored like any policy's (arm "blind"; it looks nowhere, so hit is None)."""
        for question in benchmark.questions.values():
            reference, answer = benchmark.references[question.id], self.answer_question(question)
            yield Outcome(
                question=question.id,
                policy=self.digest,
                arm=BLIND_ARM,
                box=WHOLE_IMAGE,
                answer=answer,
                reference=reference.id,
                correct=grade_answer(answer, question, reference),
            )


def _pick_majority(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
