"""The benchmark: questions, their answer key, and the patient of each question."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from clincot.errors import InvalidInput
from clincot.records import Question, Reference, Study, hash_json


class BadBenchmark(InvalidInput):
    """Questions, references, studies or outcomes do not match; the message names the record."""


@dataclass(frozen=True)
class Benchmark:
    """Everything that a scorer looks up, by question id."""

    questions: Mapping[str, Question]
    references: Mapping[str, Reference]
    clusters: Mapping[str, str]  # the patient, or the study if the patient is unknown
    digest: str  # hash of the sorted ids of all questions and references

    @classmethod
    def from_records(
        cls, questions: Iterable[Question], references: Iterable[Reference], studies: Iterable[Study]
    ) -> Benchmark:
        """Join the three files; ignore references and studies of other questions (those of other splits).

        Raises BadBenchmark on a repeated question, a question without a reference or with two, or an unknown study.
        """
        patient = {study.id: study.patient or study.id for study in studies}
        by_id: dict[str, Question] = {}
        for question in questions:
            if question.id in by_id:
                raise BadBenchmark(f"question {question.id} is in the benchmark twice")
            if question.study not in patient:
                raise BadBenchmark(f"question {question.id} is about study {question.study}, which is not given")
            by_id[question.id] = question
        key: dict[str, Reference] = {}
        for reference in references:
            if reference.question not in by_id:
                continue
            if reference.question in key:
                raise BadBenchmark(f"question {reference.question} has two references in the answer key")
            key[reference.question] = reference
        for question_id in by_id:
            if question_id not in key:
                raise BadBenchmark(f"question {question_id} has no reference in the answer key")
        return cls(
            questions=by_id,
            references=key,
            clusters={question_id: patient[question.study] for question_id, question in by_id.items()},
            digest=hash_json(sorted([*by_id, *(reference.id for reference in key.values())])),
        )
