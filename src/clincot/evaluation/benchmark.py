"""A benchmark: questions, their answer key, and the patient that each belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from clincot.errors import InvalidInput
from clincot.records import Question, Reference, Study, hash_json


class BadBenchmark(InvalidInput):
    """Questions, references, studies or outcomes that do not belong together; names the record."""


@dataclass(frozen=True)
class Benchmark:
    """Everything a scorer looks up, by question id."""

    questions: Mapping[str, Question]
    references: Mapping[str, Reference]
    clusters: Mapping[str, str]  # the patient, or the study where the patient is not known
    digest: str  # of the questions' and references' ids, in any order

    @classmethod
    def from_records(
        cls, questions: Iterable[Question], references: Iterable[Reference], studies: Iterable[Study]
    ) -> Benchmark:
        """Join the three files. References and studies of other questions may be among them (other splits).

        Raises BadBenchmark on a repeated question, a question with no or two references, or an unknown study.
        """
        patient = {study.id: study.patient or study.id for study in studies}
        asked: dict[str, Question] = {}
        for question in questions:
            if question.id in asked:
                raise BadBenchmark(f"question {question.id} is in the benchmark twice")
            if question.study not in patient:
                raise BadBenchmark(f"question {question.id} is about study {question.study}, which is not given")
            asked[question.id] = question
        key: dict[str, Reference] = {}
        for reference in references:
            if reference.question not in asked:
                continue
            if reference.question in key:
                raise BadBenchmark(f"question {reference.question} has two references in the answer key")
            key[reference.question] = reference
        for question_id in asked:
            if question_id not in key:
                raise BadBenchmark(f"question {question_id} has no reference in the answer key")
        return cls(
            questions=asked,
            references=key,
            clusters={question_id: patient[question.study] for question_id, question in asked.items()},
            digest=hash_json(sorted([*asked, *(reference.id for reference in key.values())])),
        )
