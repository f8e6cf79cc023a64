"""The gate on answers in sentences, graded by each protocol, in the gain and in the guards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from clincot.config import DecideConfig
from clincot.evaluation.benchmark import Benchmark
from clincot.jsonl import write_json
from clincot.judging.agreement import KrippendorffAlpha
from clincot.judging.combination import JudgeReport, PanelReport
from clincot.promotion.gate import Comparison, GateResult, run_gate
from clincot.promotion.judge_health import check_graders
from clincot.records import Outcome, PromotionCheck
from tests.support.benchmark_builders import asked, outcome_of, study_of

SECTION = DecideConfig(resamples=50, protocol="parsed")
YES, NO, HEDGE = (
    "Yes, there is a nodule of {n} mm.",
    "On film {n} there is no nodule.",
    "A nodule may be there, {n} mm.",
)


def said(benchmark: Benchmark, texts: list[str], *, policy: str, **fields: Any) -> list[Outcome]:
    """One answer a question; the strict evaluator calls every sentence off format."""
    outcomes = []
    for number, (question, text) in enumerate(zip(benchmark.questions, texts, strict=True)):
        outcome = outcome_of(benchmark, question, text.format(n=number), policy=policy, off_format=True)
        outcomes.append(Outcome.model_validate(outcome.model_dump(exclude={"id"}) | fields))
    return outcomes


def gated(
    benchmark: Benchmark, champion: list[Outcome], challenger: list[Outcome], config: DecideConfig = SECTION
) -> GateResult:
    blind = [outcome_of(benchmark, question, "no", policy="blind", arm="blind") for question in benchmark.questions]
    case = Comparison("old", "new", champion, challenger, blind)
    return run_gate(case, benchmark, config)


def check_named(result: GateResult, name: str) -> PromotionCheck:
    return next(check for check in result.decision.checks if check.name == name)


def presence_benchmark(patients: int, answers: tuple[str, ...] = ("yes",)) -> Benchmark:
    """One question a patient; the answers take turns."""
    studies = [study_of(f"film-{n}", patient=f"patient-{n}") for n in range(patients)]
    rows = [asked(s, "Is there a nodule?", answers[n % len(answers)], topic="presence") for n, s in enumerate(studies)]
    return Benchmark.from_records([q for q, _ in rows], [r for _, r in rows], studies)


BENCHMARK = presence_benchmark(120)
CHAMPION = said(BENCHMARK, [YES] * 60 + [NO] * 60, policy="old")
CHALLENGER = said(BENCHMARK, [YES] * 90 + [NO] * 30, policy="new")


def test_sentences_are_promoted_under_parsed_and_not_under_strict() -> None:
    parsed = gated(BENCHMARK, CHAMPION, CHALLENGER)
    assert parsed.decision.verdict == "promote"
    assert parsed.decision.metric == "accuracy (parsed), arm written"
    # 60 and 90 of 120 say yes; the closed guard has the same numbers
    for name in ("accuracy", "closed_accuracy"):
        check = check_named(parsed, name)
        assert (check.other, check.challenger, check.n) == (0.5, 0.75, 120)
    off = next(f for f in parsed.decision.findings if f.name == "off format")
    assert (off.value, off.severity) == (0.0, "ok")

    strict = gated(BENCHMARK, CHAMPION, CHALLENGER, SECTION.model_copy(update={"protocol": "strict"}))
    assert strict.decision.verdict == "keep"
    assert check_named(strict, "accuracy").challenger == 0.0  # no sentence is "yes"
    off = next(f for f in strict.decision.findings if f.name == "off format")
    assert off.value == 1.0


def test_an_answer_that_commits_to_nothing_is_unscored_and_counted() -> None:
    """Hedging on 4 of 120: on format, unscored (3.3 % of 5 % allowed), and an abstention; on 12, it blocks."""
    hedging = said(BENCHMARK, [HEDGE] * 4 + [YES] * 90 + [NO] * 26, policy="new")
    result = gated(BENCHMARK, CHAMPION, hedging)
    unscored = next(f for f in result.decision.findings if f.name == "challenger unscored")
    assert (unscored.value, unscored.severity) == (pytest.approx(4 / 120, abs=1e-6), "ok")
    assert next(f for f in result.decision.findings if f.name == "off format").value == 0.0
    assert check_named(result, "accuracy").n == 116
    assert check_named(result, "abstention").challenger == pytest.approx(4 / 120, abs=1e-6)

    blocked = gated(BENCHMARK, CHAMPION, said(BENCHMARK, [HEDGE] * 12 + [YES] * 108, policy="new"))
    assert blocked.decision.verdict == "blocked"


def test_a_policy_without_a_region_is_off_format_whatever_it_says() -> None:
    lost = said(BENCHMARK, [YES] * 90 + [NO] * 30, policy="new", no_region=True)
    result = gated(BENCHMARK, CHAMPION, lost)
    assert result.decision.verdict == "keep"
    assert next(f for f in result.decision.findings if f.name == "off format").value == 1.0


def test_one_answer_in_many_words_is_one_answer() -> None:
    """Half of the key is "no"; the challenger says yes 40 times, in 40 different sentences."""
    benchmark = presence_benchmark(40, ("yes", "no"))
    result = gated(benchmark, said(benchmark, [YES, NO] * 20, policy="old"), said(benchmark, [YES] * 40, policy="new"))
    finding = next(f for f in result.decision.findings if f.name == "challenger one answer")
    assert (finding.severity, finding.value) == ("block", 1.0)


def test_absent_findings_called_present_are_counted_in_sentences_and_in_chinese() -> None:
    studies = [study_of(f"film-{n}", patient=f"patient-{n}") for n in range(40)]
    rows = [asked(s, "有胸腔积液吗？", "没有", topic="presence") for s in studies]
    benchmark = Benchmark.from_records([q for q, _ in rows], [r for _, r in rows], studies)
    champion = said(benchmark, ["没有胸腔积液。"] * 30 + ["有胸腔积液。"] * 10, policy="old")
    challenger = said(benchmark, ["未见胸腔积液。"] * 38 + ["可见胸腔积液。"] * 2, policy="new")
    result = gated(benchmark, champion, challenger)
    hallucination = check_named(result, "hallucination")
    assert (hallucination.other, hallucination.challenger) == (0.25, 0.05)
    assert check_named(result, "accuracy").challenger == 0.95


def open_benchmark() -> Benchmark:
    studies = [study_of(f"film-{n}", patient=f"patient-{n}") for n in range(60)]
    rows = [asked(s, "Is there a nodule?", "yes") for s in studies]
    rows += [asked(s, "What is the diagnosis?", "pneumonia", kind="open") for s in studies]
    return Benchmark.from_records([q for q, _ in rows], [r for _, r in rows], studies)


def paneled(benchmark: Benchmark, policy: str, right: int) -> list[Outcome]:
    """Yes to everything closed; a panel calls the first `right` of 60 open answers right."""
    outcomes = said(benchmark, [YES] * 60 + ["Consolidation, likely infectious."] * 60, policy=policy)
    graded = []
    for number, outcome in enumerate(outcomes):
        panel = {"panel_score": 0.9 if number - 60 < right else 0.1, "graders": ("judge-a",)} if number >= 60 else {}
        graded.append(Outcome.model_validate(outcome.model_dump(exclude={"id"}) | panel))
    return graded


def test_a_panel_grades_what_the_protocol_cannot_read() -> None:
    """60 closed answers, all right on both sides, and 60 open ones: 20 right, then 50."""
    benchmark = open_benchmark()
    result = gated(benchmark, paneled(benchmark, "old", 20), paneled(benchmark, "new", 50))
    accuracy = check_named(result, "accuracy")
    assert (accuracy.n, accuracy.other, accuracy.challenger) == (120, round(80 / 120, 6), round(110 / 120, 6))
    assert check_named(result, "open_f1").challenger == pytest.approx(50 / 60, abs=1e-6)
    # no panel: the diagnosis is no part of the accuracy, since exact match would call every sentence wrong
    without = gated(
        benchmark,
        said(benchmark, [YES] * 60 + ["Pneumonia."] * 60, policy="old"),
        said(benchmark, [YES] * 60 + ["Effusion."] * 60, policy="new"),
    )
    assert check_named(without, "accuracy").n == 60
    assert check_named(without, "open_f1").other == 1.0


def test_graders_that_made_the_pairs_block(tmp_path: Path) -> None:
    undefined = KrippendorffAlpha(value=None, units=0, reason="one judge")
    judges = (
        JudgeReport(
            name="med-lm",
            digest="judge-a",
            weight=1,
            calibration="c",
            scored=1,
            unscored={},
            mean_raw=None,
            mean_calibrated=None,
        ),
    )
    report = PanelReport(
        quorum=1,
        candidates=1,
        scored=1,
        unscored={},
        judges=judges,
        alpha_raw=undefined,
        alpha_calibrated=undefined,
        mean_spread=None,
    )
    write_json(tmp_path / "panel.json", report.model_dump(mode="json"))
    outcomes = paneled(open_benchmark(), "new", 50)
    (finding,) = check_graders(outcomes, [None, tmp_path / "panel.json"])
    assert finding.severity == "block"
    assert "med-lm" in finding.reason
    others = [o.model_copy(update={"graders": ("judge-b",)}) for o in outcomes]
    (finding,) = check_graders(others, [tmp_path / "panel.json"])
    assert finding.severity == "ok"
    assert check_graders(CHALLENGER, [tmp_path / "panel.json"]) == []
