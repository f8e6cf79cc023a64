import pytest

from clincot.evaluation.benchmark import BadBenchmark
from clincot.evaluation.paired import compare_outcomes
from tests.support.benchmark_builders import benchmark_of, outcome_of

BENCHMARK = benchmark_of(10)
QUESTIONS = list(BENCHMARK.questions)


def test_compares_by_question_in_whatever_order_they_come() -> None:
    # a is right on all 10, b on the first 7
    a = [outcome_of(BENCHMARK, question, "yes") for question in reversed(QUESTIONS)]
    b = [outcome_of(BENCHMARK, question, "yes" if i < 7 else "no") for i, question in enumerate(QUESTIONS)]
    interval = compare_outcomes(a, b, BENCHMARK.clusters, seed=0)
    assert (interval.value, interval.n, interval.clusters) == (0.3, 10, 10)
    assert compare_outcomes(b, a, BENCHMARK.clusters, seed=0).value == -0.3


def test_hit_and_iou_count_only_where_both_have_them() -> None:
    a = [
        outcome_of(BENCHMARK, question, "yes", hit=i < 4, iou=0.5) if i < 8 else outcome_of(BENCHMARK, question, "yes")
        for i, question in enumerate(QUESTIONS)
    ]
    b = [outcome_of(BENCHMARK, question, "yes", hit=False, iou=0.25) for question in QUESTIONS]
    hits = compare_outcomes(a, b, BENCHMARK.clusters, metric="hit", seed=0)
    assert (hits.value, hits.n, hits.n_unscored) == (0.5, 8, 2)  # 4 of 8
    assert compare_outcomes(a, b, BENCHMARK.clusters, metric="iou", seed=0).value == 0.25


def test_sides_over_different_questions_are_refused_by_name() -> None:
    full = [outcome_of(BENCHMARK, question, "yes") for question in QUESTIONS]
    with pytest.raises(BadBenchmark, match=rf"second side gave no answer to 1 question: {QUESTIONS[-1]}\."):
        compare_outcomes(full, full[:-1], BENCHMARK.clusters, seed=0)
    with pytest.raises(BadBenchmark, match=rf"first side answered twice 1 question: {QUESTIONS[0]}\."):
        compare_outcomes([*full, full[0]], full, BENCHMARK.clusters, seed=0)
    without_last = {question: BENCHMARK.clusters[question] for question in QUESTIONS[:-1]}
    with pytest.raises(BadBenchmark, match=f"first side answered outside the benchmark 1 question: {QUESTIONS[-1]}"):
        compare_outcomes(full, full, without_last, seed=0)


def test_many_questions_are_named_in_part_and_counted() -> None:
    with pytest.raises(BadBenchmark, match=f"10 questions: {', '.join(QUESTIONS[:3])} and 7 more"):
        compare_outcomes([], [], BENCHMARK.clusters, seed=0)
