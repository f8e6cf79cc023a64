import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from clincot.evaluation.benchmark import BadBenchmark, Benchmark
from clincot.evaluation.benchmark_report import build_benchmark_reports, render_metrics_table
from clincot.evaluation.blind_baseline import BlindBaseline
from clincot.jsonl import read_records, write_records
from clincot.records import BenchmarkReport, Interval, Outcome
from tests.support.benchmark_builders import BOX, asked, benchmark_of, outcome_of, study_of

# Three films of two patients:
#   film a (patient p): presence yes, with a box; presence no
#   film b (patient p): which margin -> "smooth lobe" (open, with a box)
#   film c (no patient given): presence no; which side -> "left" (closed)
A, B, C = study_of("a", patient="p"), study_of("b", patient="p"), study_of("c")
PAIRS = {
    "present": asked(A, "Is there a nodule?", "yes", topic="presence", boxes=(BOX,)),
    "absent": asked(A, "Is there an effusion?", "no", topic="presence"),
    "margin": asked(B, "Which margin?", "smooth edge", kind="open", topic="margin", boxes=(BOX,)),
    "absent too": asked(C, "Is there an effusion?", "no", topic="presence"),
    "side": asked(C, "Left or right?", "left", topic="side"),
}
BENCHMARK = Benchmark.from_records([q for q, _ in PAIRS.values()], [r for _, r in PAIRS.values()], [A, B, C])


def outcome(
    name: str,
    answer: str | None,
    *,
    arm: str = "written",
    policy: str = "policy",
    hit: bool | None = None,
    iou: float | None = None,
    off_format: bool = False,
) -> Outcome:
    question = PAIRS[name][0].id
    return outcome_of(BENCHMARK, question, answer, arm=arm, policy=policy, hit=hit, iou=iou, off_format=off_format)


ANSWERS = [
    outcome("present", "yes", hit=True, iou=0.5),
    outcome("absent", "Yes, large", off_format=True),  # hallucinated
    outcome("margin", "edge edge edge", hit=False, iou=0.1),
    outcome("absent too", "normal"),  # llava-med calls this "no"
    outcome("side", "left"),  # and this wrong
]


def metrics_of(outcomes: list[Outcome], arm: str = "written") -> dict[str, Interval]:
    (report,) = build_benchmark_reports(outcomes, BENCHMARK, seed=0, resamples=200)
    return report.metrics[arm]


def values_of(outcomes: list[Outcome]) -> dict[str, float | None]:
    return {name: interval.value for name, interval in metrics_of(outcomes).items()}


def test_every_metric_of_an_arm_by_hand() -> None:
    values = values_of(ANSWERS)
    assert values == {
        "accuracy": 0.4,  # present and side, of 5
        "closed_accuracy": 0.5,  # the same, of 4
        "open_accuracy": 0.0,
        "accuracy/presence": pytest.approx(1 / 3, abs=1e-6),
        "accuracy/margin": 0.0,
        "accuracy/side": 1.0,
        # present 1; {yes, large} against {no} 0; {edge} against {smooth, edge} 2/3; {normal} 0; side 1
        "token_f1": pytest.approx((1 + 0 + 2 / 3 + 0 + 1) / 5, abs=1e-6),
        "llava_med_closed_accuracy": 0.5,  # present and "normal", of 4
        "llava_med_open_recall": 0.75,  # tp 3, fn 1
        # of present, absent ("Yes, large": wrong) and side; "normal" is no statement about an effusion: unscored
        "parsed_accuracy": pytest.approx(2 / 3, abs=1e-6),
        "hit_rate": 0.5,  # of the 2 with boxes
        "iou": 0.3,
        "hallucination": 0.5,  # of the 2 absent findings
        "off_format": 0.2,
        "answer_length": 1.6,  # (1 + 2 + 3 + 1 + 1) / 5
    }


def test_intervals_are_clustered_by_patient_else_by_study() -> None:
    """The study is the cluster if the patient is unknown."""
    metrics = metrics_of(ANSWERS)
    assert metrics["accuracy"].clusters == 2  # p and film c, of three films
    # p: 1 of 3, film c: 1 of 2; residuals 1 - .4·3 = -.2 and 1 - .4·2 = .2, variance 2·.08/25 = .0064, so that
    # n_eff = .24/.0064 = 37.5; Wilson with t = 12.706 on one degree of freedom: .4812 ∓ .4488
    assert metrics["accuracy"].low == pytest.approx(0.0324, abs=1e-4)
    assert metrics["accuracy"].high == pytest.approx(0.9300, abs=2e-4)
    # both boxes are patient p's: a value, but no interval from one patient
    assert (metrics["hit_rate"].value, metrics["hit_rate"].low, metrics["hit_rate"].clusters) == (0.5, None, 1)


def test_an_unreadable_answer_is_unscored_and_not_zero() -> None:
    """An unreadable answer is counted as unscored and never as zero."""
    unread = [outcome("side", None, off_format=True) if o is ANSWERS[-1] else o for o in ANSWERS]
    metrics = metrics_of(unread)
    accuracy = metrics["accuracy"]
    assert (accuracy.value, accuracy.n, accuracy.n_unscored) == (0.25, 4, 1)  # present, of the 4 read
    assert (metrics["accuracy/side"].value, metrics["accuracy/side"].n_unscored) == (None, 1)
    assert (metrics["llava_med_closed_accuracy"].n, metrics["llava_med_closed_accuracy"].n_unscored) == (3, 1)
    assert (metrics["off_format"].value, metrics["off_format"].n_unscored) == (0.4, 0)  # seen, and off format
    assert metrics["answer_length"].n_unscored == 1


def test_an_unanswered_question_is_unscored_in_its_metrics() -> None:
    """An evaluation that died half way must not look like a complete one on fewer questions."""
    metrics = metrics_of(ANSWERS[:1])
    assert {name: (m.n, m.n_unscored) for name, m in metrics.items()} == {
        "accuracy": (1, 4),
        "closed_accuracy": (1, 3),
        "open_accuracy": (0, 1),
        "accuracy/presence": (1, 2),
        "accuracy/margin": (0, 1),
        "accuracy/side": (0, 1),
        "token_f1": (1, 4),
        "llava_med_closed_accuracy": (1, 3),
        "llava_med_open_recall": (0, 1),
        "parsed_accuracy": (1, 3),  # the margin is no question of its kinds
        "hit_rate": (1, 1),
        "iou": (1, 1),
        "hallucination": (0, 2),
        "off_format": (1, 4),
        "answer_length": (1, 4),
    }


def test_one_report_a_policy_with_all_its_arms() -> None:
    mixed = [
        outcome("side", "left", policy="base"),
        outcome("side", "right", policy="trained"),
        outcome("side", "right", policy="base", arm="oracle"),
    ]
    base, trained = build_benchmark_reports(mixed, BENCHMARK, resamples=50)
    assert (base.policy, list(base.metrics)) == ("base", ["written", "oracle"])
    assert (trained.policy, list(trained.metrics)) == ("trained", ["written"])
    assert base.metrics["written"]["accuracy"].value == 1.0
    assert base.metrics["oracle"]["accuracy"].value == 0.0
    assert base.benchmark == trained.benchmark == BENCHMARK.digest


def test_equal_outcomes_from_a_stream_give_equal_reports(tmp_path: Path) -> None:
    path = tmp_path / "outcomes.jsonl"
    write_records(path, ANSWERS)

    def report() -> BenchmarkReport:
        (only,) = build_benchmark_reports(read_records(path, Outcome), BENCHMARK, seed=3)
        return only

    assert report().model_dump_json() == report().model_dump_json()
    assert BenchmarkReport.model_validate(json.loads(report().model_dump_json())) == report()


def test_foreign_or_repeated_outcomes_are_refused() -> None:
    """Outcomes of another answer key or benchmark are refused, and so are repeated ones."""
    foreign_benchmark = benchmark_of(1)
    foreign = outcome_of(foreign_benchmark, next(iter(foreign_benchmark.questions)), "yes")
    with pytest.raises(BadBenchmark, match=f"{foreign.id} is of question {foreign.question}, not one of this"):
        build_benchmark_reports([foreign], BENCHMARK)
    stale = ANSWERS[0].model_copy(update={"reference": "reference-of-an-older-key"})
    with pytest.raises(BadBenchmark, match="scored with reference reference-of-an-older-key; the answer key has"):
        build_benchmark_reports([stale], BENCHMARK)
    with pytest.raises(BadBenchmark, match=f"question {ANSWERS[0].question} has two outcomes of policy policy"):
        build_benchmark_reports([ANSWERS[0], ANSWERS[0]], BENCHMARK)
    with pytest.raises(BadBenchmark, match="has no questions"):
        build_benchmark_reports([], Benchmark.from_records([], [], []))


def blind_outcomes() -> Iterator[Outcome]:
    question, reference = asked(study_of("train"), "Is there an effusion?", "no")
    return BlindBaseline.fit([question], [reference]).iter_outcomes(BENCHMARK)


class TestTable:
    def rows(self, text: str) -> list[list[str]]:
        lines = [line for line in text.splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    def test_shows_value_interval_and_counts_and_names_the_protocols(self) -> None:
        text = render_metrics_table(
            build_benchmark_reports(ANSWERS, BENCHMARK, resamples=200), names={"policy": "base"}
        )
        head, row = self.rows(text)
        cells = dict(zip(head, row, strict=True))
        assert (cells["policy"], cells["region"], cells["n"]) == ("base", "written", "5")
        assert cells["accuracy (strict)"] == "0.400 [0.032, 0.930]"
        assert cells["open recall (llava-med)"] == "0.750 (1)"  # one question, one patient: no interval
        assert cells["region hit-rate"] == "0.500 (2)"
        assert "closed (llava-med)" in cells

    def test_unscored_are_shown(self) -> None:
        head, row = self.rows(render_metrics_table(build_benchmark_reports(ANSWERS[:1], BENCHMARK, resamples=50)))
        cells = dict(zip(head, row, strict=True))
        assert cells["n"] == "1, 4 unscored"
        assert cells["open recall (llava-med)"] == "– (0, 1 unscored)"

    def test_the_blind_row_has_no_region_metrics(self) -> None:
        with_blind = render_metrics_table(
            build_benchmark_reports([*ANSWERS, *blind_outcomes()], BENCHMARK, resamples=50)
        )
        head, _, row = self.rows(with_blind)
        cells = dict(zip(head, row, strict=True))
        assert cells["region"] == "blind"
        assert cells["region hit-rate"] == "–"
        assert cells["accuracy (strict)"].startswith("0.400")  # "no" to everything: right on 2 of 5
        assert "blind baseline is not in this table" not in with_blind
        assert "blind baseline is not in this table" in render_metrics_table(
            build_benchmark_reports(ANSWERS, BENCHMARK, resamples=50)
        )

    def test_few_patients_are_said_to_be_few(self) -> None:
        assert "Below 40 patients they are approximate" in render_metrics_table(
            build_benchmark_reports(ANSWERS, BENCHMARK, resamples=50)
        )
        many = benchmark_of(40)
        outcomes = [outcome_of(many, question, "yes") for question in many.questions]
        text = render_metrics_table(build_benchmark_reports(outcomes, many, resamples=50))
        assert "clustered by patient (40 patients)" in text
        assert "approximate" not in text

    def test_columns_can_be_chosen(self) -> None:
        reports = build_benchmark_reports(ANSWERS, BENCHMARK, resamples=50)
        head, row = self.rows(render_metrics_table(reports, metrics=["accuracy/margin", "accuracy/none"]))
        assert head[3:] == ["accuracy/margin", "accuracy/none"]
        assert row[3:] == ["0.000 (1)", "–"]

    def test_columns_line_up_in_a_terminal(self) -> None:
        lines = render_metrics_table(
            build_benchmark_reports([*ANSWERS, *blind_outcomes()], BENCHMARK, resamples=50)
        ).splitlines()[:4]
        assert len({len(line) for line in lines}) == 1
        assert lines[1].replace("-", "").replace("|", "") == ""

    def test_reports_of_different_benchmarks_are_refused(self) -> None:
        other = benchmark_of(2)
        here = build_benchmark_reports(ANSWERS, BENCHMARK, resamples=50)
        there = build_benchmark_reports([outcome_of(other, q, "yes") for q in other.questions], other, resamples=50)
        with pytest.raises(BadBenchmark, match="one benchmark, got reports of 2"):
            render_metrics_table([*here, *there])
        with pytest.raises(BadBenchmark, match="got reports of 0"):
            render_metrics_table([])
