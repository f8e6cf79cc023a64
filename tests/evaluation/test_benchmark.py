import pytest

from clincot.evaluation.benchmark import BadBenchmark, Benchmark
from clincot.records import Reference
from tests.support.benchmark_builders import asked, study_of


def test_joins_questions_with_their_key_and_their_patient() -> None:
    known, unknown = study_of("a", patient="p-7"), study_of("b")
    (q1, r1), (q2, r2) = asked(known, "Effusion?", "yes"), asked(unknown, "Effusion?", "no")
    benchmark = Benchmark.from_records([q1, q2], [r2, r1], [known, unknown])
    assert benchmark.references == {q1.id: r1, q2.id: r2}
    assert benchmark.clusters == {q1.id: "p-7", q2.id: unknown.id}  # without a patient the study is the cluster


def test_digest_is_of_content_not_of_order() -> None:
    study = study_of("a")
    (q1, r1), (q2, r2) = asked(study, "Effusion?", "yes"), asked(study, "Nodule?", "no")
    digest = Benchmark.from_records([q1, q2], [r1, r2], [study]).digest
    assert Benchmark.from_records([q2, q1], [r2, r1], [study]).digest == digest
    assert Benchmark.from_records([q1], [r1, r2], [study]).digest != digest
    other_key = Reference(question=q2.id, answer="yes")
    assert Benchmark.from_records([q1, q2], [r1, other_key], [study]).digest != digest


def test_references_and_studies_of_other_splits_are_ignored() -> None:
    here, elsewhere = study_of("a"), study_of("b")
    (q1, r1), (_, r2) = asked(here, "Effusion?", "yes"), asked(elsewhere, "Nodule?", "no")
    benchmark = Benchmark.from_records([q1], [r1, r2], [here, elsewhere])
    assert set(benchmark.references) == {q1.id}


def test_what_does_not_belong_together_is_named() -> None:
    study = study_of("a")
    question, reference = asked(study, "Effusion?", "yes")
    with pytest.raises(BadBenchmark, match=f"question {question.id} is in the benchmark twice"):
        Benchmark.from_records([question, question], [reference], [study])
    with pytest.raises(BadBenchmark, match=f"question {question.id} has no reference"):
        Benchmark.from_records([question], [], [study])
    with pytest.raises(BadBenchmark, match=f"question {question.id} has two references"):
        Benchmark.from_records([question], [reference, Reference(question=question.id, answer="no")], [study])
    with pytest.raises(BadBenchmark, match=f"about study {study.id}, which is not given"):
        Benchmark.from_records([question], [reference], [])
