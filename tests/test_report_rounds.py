"""A round on report questions: regions, reports, judges, pairs, training, and evaluation by report metrics.

The checkpoints are untrained and write nonsense. The tests show that the loop handles reports, not that these models
can write them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clincot.config import Params
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.report_questions import make_report_questions
from clincot.evaluation.benchmark import BadBenchmark
from clincot.evaluation.benchmark_report import build_benchmark_reports, render_metrics_table
from clincot.evaluation.blind_baseline import BlindBaseline
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.evaluation.report_text.report_scorer import build_report_metrics
from clincot.jsonl import read_records
from clincot.prompts import PromptFormat, hash_prompt
from clincot.records import BenchmarkReport, Candidate, Decision, Outcome, PreferencePair, Region
from clincot.reporting.page import write_page
from clincot.rounds import Plan, run_rounds
from clincot.rounds import render_results_table as rounds_table
from tests.support import tiny

pytestmark = pytest.mark.slow

LONG, SHORT = 9, 2  # tokens of a report, and of any other answer


@pytest.fixture(scope="module", autouse=True)
def no_wordnet(tmp_path_factory: pytest.TempPathFactory) -> object:
    """METEOR is tested elsewhere; reading WordNet takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLINCOT_WORDNET", str(tmp_path_factory.mktemp("none")))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reports")
    source = tiny.write_set(folder / "films", studies=6)
    with (source / "reports.jsonl").open("w") as file:
        for number, study in enumerate(StudyIndex(source)):
            side = "left" if number % 2 else "right"
            text = "Clear lungs." if number == 5 else f"There is a nodule in the {side} lung. No effusion."
            file.write(json.dumps({"study": study, "text": text}) + "\n")
    make_report_questions(source, folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Params:
    models = tmp_path_factory.mktemp("models")
    judges = [tiny.write_model(models / name, seed) for seed, name in ((1, "a"), (2, "b"))]
    tiny.write_model(models / "policy", 0)
    lengths = {"max_new_tokens": SHORT, "report_max_new_tokens": LONG}
    return tiny.params(
        judges,
        answer={**lengths, "batch_size": 32},
        evaluate={**lengths, "arms": ["whole", "oracle"], "resamples": 20},
        decide={"arm": "oracle", "resamples": 20},
    )


@pytest.fixture(scope="module")
def run(data: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One round on the report questions, which are also the benchmark."""
    folder = tmp_path_factory.mktemp("run")
    policy = Path(params.judge.judges[0].path).parent / "policy"
    plan = Plan(run=folder, data=data, benchmark=data, policy=policy, params=params, count=1)
    results = run_rounds(plan)
    assert "| policy | ROUGE-L: own region |" in rounds_table(results)
    return folder


@pytest.fixture(scope="module")
def done(run: Path) -> Path:
    return run / "round-01"


def test_the_run_has_a_page_and_a_decision_that_promotes_nothing(run: Path, tmp_path: Path) -> None:
    """The gate compares accuracies; reports have none."""
    write_page(run, tmp_path / "page.html", title="reports")
    assert "BLEU-4 (raw)" in (tmp_path / "page.html").read_text()
    (decision,) = read_records(run / "round-01" / "decision.json", Decision)
    assert decision.verdict == "blocked"


def test_a_candidate_is_a_report_and_may_be_longer(done: Path) -> None:
    """One report per region, longer than other answers may be."""
    regions = {region.id for region in read_records(done / "regions.jsonl", Region)}
    candidates = list(read_records(done / "candidates.jsonl", Candidate))
    assert {candidate.region for candidate in candidates} == regions
    assert len(regions) > 6  # more than the whole image of each study
    assert max(len(candidate.token_logprobs) for candidate in candidates) > SHORT
    assert all(len(candidate.token_logprobs) <= LONG for candidate in candidates)


def test_judged_reports_become_pairs_and_train_a_policy(done: Path) -> None:
    pairs = list(read_records(done / "pairs.jsonl", PreferencePair))
    assert pairs
    assert all(pair.gap > 0 for pair in pairs)
    assert (done / "policy" / "record.json").is_file()


def test_the_evaluation_has_report_metrics_and_no_accuracy(done: Path) -> None:
    report = BenchmarkReport.model_validate_json((done / "report.json").read_text())
    outcomes = list(read_records(done / "outcomes.jsonl", Outcome))
    assert {outcome.correct for outcome in outcomes} == {None}
    assert set(report.metrics) == {"whole", "oracle"}
    for arm in report.metrics.values():
        assert arm["raw/bleu_1"].n == arm["r2gen/rouge_l"].n == arm["report_words"].n == 6
        assert arm["raw/rouge_l"].clusters == 6
        assert not [name for name in arm if "accuracy" in name or "meteor" in name]
    assert report.metrics["oracle"]["hit_rate"].value == 1.0  # the boxes of the films' own answer key
    assert "bleu: sacrebleu" in report.protocol
    assert "absent: meteor (WordNet not found" in report.protocol
    assert "BLEU-4 (r2gen)" in render_metrics_table([report])


def test_the_blind_baseline_writes_the_most_frequent_report(data: Path) -> None:
    """3 of 6 reports name the right lung, 2 the left. Written for all of them, it agrees with the 3 word for word."""
    benchmark = read_benchmark(data)
    blind = BlindBaseline.fit(load_questions(data), load_references(data))
    assert {o.answer for o in blind.iter_outcomes(benchmark)} == {"There is a nodule in the right lung. No effusion."}
    (report,) = build_benchmark_reports(
        blind.iter_outcomes(benchmark), benchmark, reports=build_report_metrics(), resamples=20
    )
    metrics = report.metrics["blind"]
    # 10 words: 1.0 for three, 9 of 10 for the two that name the other side, and none shared with "Clear lungs."
    assert metrics["raw/rouge_l"].value == pytest.approx((3 + 2 * 9 / 10) / 6, abs=1e-6)
    if "finding_f1" in metrics:  # 3 nodules on the right side agree, of 6 stated and 5 wanted
        assert metrics["finding_f1"].value == pytest.approx(6 / 11, abs=1e-6)


def test_report_metrics_must_be_given_for_report_questions(data: Path) -> None:
    with pytest.raises(BadBenchmark, match="ask for reports, but no report metrics were passed"):
        build_benchmark_reports([], read_benchmark(data))


def test_a_reports_prompt_is_told_from_an_answers() -> None:
    assert hash_prompt(PromptFormat(), report=True) != hash_prompt(PromptFormat())
