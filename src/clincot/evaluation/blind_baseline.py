"""The blind baseline: the most frequent answer to the same question text, without looking at any image.

On SLAKE it is level with published models (evaluation tables of LLaVA-Med and its successors), so every results
table has it: a model that does not beat it has learnt nothing from images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from clincot.errors import BadInput
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.vqa import verdict
from clincot.geometry import WHOLE
from clincot.records import Outcome, Question, Reference, digest_of
from clincot.text import normalise

ARM = "blind"


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
                raise BadInput(f"question {question.id} has no reference to fit the blind baseline on")
            answer = answers[question.id]
            answer = answer.strip() if question.kind == "report" else normalise(answer)
            by_text[normalise(question.text)][answer] += 1
            by_kind[question.kind][answer] += 1
            overall[answer] += 1
        if not overall:
            raise BadInput("the blind baseline needs at least one question with its reference, got none")
        return cls(
            by_text={text: _majority(counts) for text, counts in by_text.items()},
            by_kind={kind: _majority(counts) for kind, counts in by_kind.items()},
            overall=_majority(overall),
        )

    @property
    def digest(self) -> str:
        """Identifies the baseline where a policy's digest stands in other rows."""
        return "blind-" + digest_of([self.by_text, self.by_kind, self.overall])[:20]

    def answer(self, question: Question) -> str:
        """The majority answer to this question's text, or of its kind, or of all."""
        known = self.by_text.get(normalise(question.text))
        return known if known is not None else self.by_kind.get(question.kind, self.overall)

    def outcomes(self, benchmark: Benchmark) -> Iterator[Outcome]:
        """Its answers to a benchmark, scored like any policy's (arm "blind"; it looks nowhere, so hit is None)."""
        for question in benchmark.questions.values():
            reference, answer = benchmark.references[question.id], self.answer(question)
            yield Outcome(
                question=question.id,
                policy=self.digest,
                arm=ARM,
                box=WHOLE,
                answer=answer,
                reference=reference.id,
                correct=verdict(answer, question, reference),
            )


def _majority(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
