"""Small real records for the bench tests: patients, their questions, the key, and what a policy answered."""

from __future__ import annotations

import hashlib

from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.vqa import is_correct
from clincot.geometry import WHOLE_IMAGE, Box
from clincot.records import Outcome, Question, Reference, Study

BOX = Box(x0=0.2, y0=0.2, x1=0.4, y1=0.4)


def study_of(name: str, patient: str = "") -> Study:
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return Study(image=f"{name}.png", sha256=sha256, width=256, height=256, patient=patient)


def asked(
    study: Study, text: str, answer: str, *, kind: str = "closed", topic: str = "", boxes: tuple[Box, ...] = ()
) -> tuple[Question, Reference]:
    question = Question.model_validate({"study": study.id, "text": text, "kind": kind, "topic": topic})
    return question, Reference(question=question.id, answer=answer, boxes=boxes)


def benchmark_of(patients: int, *, per_patient: int = 1, answer: str = "yes") -> Benchmark:
    """So many patients with so many closed questions each, all with the same answer."""
    studies = [study_of(f"film-{number}", patient=f"patient-{number}") for number in range(patients)]
    pairs = [
        asked(study, f"Is finding {number} there?", answer, topic="presence")
        for study in studies
        for number in range(per_patient)
    ]
    return Benchmark.from_records([question for question, _ in pairs], [reference for _, reference in pairs], studies)


def outcome_of(
    benchmark: Benchmark,
    question: str,
    answer: str | None,
    *,
    policy: str = "policy",
    arm: str = "written",
    hit: bool | None = None,
    iou: float | None = None,
    off_format: bool = False,
) -> Outcome:
    """What the evaluate stage records; answer None: nothing could be read."""
    reference = benchmark.references[question]
    kind = benchmark.questions[question].kind
    correct = None if answer is None else is_correct(answer, reference.answer, kind)
    return Outcome(
        question=question,
        policy=policy,
        arm=arm,
        box=WHOLE_IMAGE,
        answer=answer or "",
        reference=reference.id,
        correct=correct,
        hit=hit,
        iou=iou,
        off_format=off_format,
    )
