"""Reports go through the same loop: regions, reports, judges, pairs, training, and an evaluation by report metrics.

The checkpoints are untrained and write nonsense; what is proved is that the loop carries reports, not that these models
can write any.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clincot.bench.benchmark import BadBenchmark
from clincot.bench.blind import BlindBaseline
from clincot.bench.report import benchmark_reports, table
from clincot.bench.report_metrics import report_metrics
from clincot.config import Params
from clincot.conversation import Views, prompt_digest
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.datasets.report_questions import make_report_questions
from clincot.jsonl import read_records
from clincot.records import BenchmarkReport, Candidate, Outcome, PreferencePair, Region
from clincot.stages import read_benchmark, run_stage
from tests import tiny

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
        judges, answer={**lengths, "batch_size": 32}, evaluate={**lengths, "arms": ["whole", "oracle"], "resamples": 20}
    )


@pytest.fixture(scope="module")
def done(data: Path, params: Params, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """propose, answer, judge, pair, train and evaluate on the report questions."""
    out = tmp_path_factory.mktemp("round")
    policy = Path(params.judge.judges[0].path).parent / "policy"
    made = {
        name: out / f"{name}.jsonl" for name in ("questions", "regions", "candidates", "judgements", "scores", "pairs")
    }
    made |= {"panel_report": out / "panel.json", "pair_report": out / "pair.json", "checkpoint": out / "policy"}
    given = {"data": data, "policy": policy, "benchmark": data, **made}

    def run(name: str, inputs: str, outputs: str) -> None:
        run_stage(
            name, getattr(params, name), {n: given[n] for n in inputs.split()}, {n: given[n] for n in outputs.split()}
        )

    run("prepare", "data", "questions")
    run("propose", "data questions policy", "regions")
    run("answer", "data questions regions policy", "candidates")
    run("judge", "data questions regions candidates", "judgements scores panel_report")
    run("pair", "candidates scores", "pairs pair_report")
    run("train", "data questions regions candidates pairs policy", "checkpoint")
    run_stage(
        "evaluate", params.evaluate,
        {"benchmark": data, "policy": made["checkpoint"], "train_reports": data / "reports.jsonl"},
        {"outcomes": out / "outcomes.jsonl", "report": out / "report.json"},
    )  # fmt: skip
    return out


def test_a_candidate_is_a_report_from_a_region_and_may_be_longer_than_an_answer(done: Path) -> None:
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
    assert "BLEU-4 (r2gen)" in table([report])


def test_the_blind_baseline_writes_the_most_frequent_report(data: Path) -> None:
    """3 of 6 reports name the right lung, 2 the left. Written for all of them, it agrees with the 3 word for word."""
    benchmark = read_benchmark(data)
    blind = BlindBaseline.fit(load_questions(data), load_references(data))
    assert {o.answer for o in blind.outcomes(benchmark)} == {"There is a nodule in the right lung. No effusion."}
    (report,) = benchmark_reports(blind.outcomes(benchmark), benchmark, reports=report_metrics(), resamples=20)
    metrics = report.metrics["blind"]
    # 9 words: 1.0 for three, 8 of 9 for the two that name the other side, and none shared with "Clear lungs."
    assert metrics["raw/rouge_l"].value == pytest.approx((3 + 2 * 8 / 9) / 6, abs=1e-6)
    if "finding_f1" in metrics:  # 3 nodules on the right side agree, of 6 stated and 5 wanted
        assert metrics["finding_f1"].value == pytest.approx(6 / 11, abs=1e-6)


def test_report_metrics_must_be_given_for_report_questions(data: Path) -> None:
    with pytest.raises(BadBenchmark, match="ask for reports, and no metrics of reports were given"):
        benchmark_reports([], read_benchmark(data))


def test_a_reports_prompt_is_told_from_an_answers() -> None:
    assert prompt_digest(Views(), report=True) != prompt_digest(Views())
