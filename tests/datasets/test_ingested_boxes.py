"""Boxes that come with a data set reach hit-rate and IoU of the evaluation: those of SLAKE, and those of JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from clincot.cli.app import main
from clincot.config import EvaluateConfig
from clincot.datasets.folder import StudyIndex
from clincot.datasets.jsonl_vqa import ingest_jsonl
from clincot.datasets.slake import ingest_slake
from clincot.evaluation.benchmark_report import build_benchmark_reports
from clincot.evaluation.evaluator import evaluate_policy
from clincot.evaluation.read_benchmark import read_benchmark
from clincot.records import BenchmarkReport, Outcome
from tests.datasets.test_slake import release, row
from tests.evaluation.test_evaluator import Reader

# The heart of 100 x 80 pixels is [40, 30, 20, 30] in pixels, [0.4, 0.375, 0.6, 0.75] as a box.
HEART = [0.4, 0.375, 0.6, 0.75]


def slake(tmp_path: Path) -> Path:
    rows = [
        row(1, 0, question="Where is the heart?", answer="Center", answer_type="OPEN"),
        row(2, 0, question="Is this a CT?", answer="No"),
    ]
    ingest_slake(release(tmp_path / "slake", test=rows), tmp_path / "out")
    return tmp_path / "out" / "test"


def jsonl(tmp_path: Path) -> Path:
    Image.new("L", (100, 80), 90).save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "question": "Where is the heart?", "answer": "center", "boxes": [HEART], "finding": "heart"},
        {"image": "a.png", "question": "Is this a CT?", "answer": "no"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    ingest_jsonl(tmp_path / "rows.jsonl", tmp_path / "out")
    return tmp_path / "out"


def evaluated(folder: Path, region: str) -> tuple[list[Outcome], BenchmarkReport]:
    benchmark = read_benchmark(folder)
    config = EvaluateConfig.model_validate({"arms": ["written", "oracle"], "max_new_tokens": 4})
    outcomes = list(evaluate_policy(Reader(region), benchmark, StudyIndex(folder), folder, config))
    (report,) = build_benchmark_reports(outcomes, benchmark)
    return outcomes, report


@pytest.mark.parametrize("source", [slake, jsonl])
def test_a_region_on_the_box_hits_and_one_beside_it_does_not(tmp_path: Path, source) -> None:  # type: ignore[no-untyped-def]
    """The policy writes [40, 38, 60, 75]: shown is the square of its height, 0.37 x 80 = 29.6 pixels, which is 0.296
    of the width: [0.352, 0.38, 0.648, 0.75]. It has 98.7 % of the heart in it. The square that looks at the heart
    is half the height, 40 pixels: [0.3, 0.3125, 0.7, 0.8125]. IoU = 0.296 * 0.37 / 0.2 = 0.5476."""
    folder = source(tmp_path)
    outcomes, report = evaluated(folder, "[40, 38, 60, 75]")
    asked, other = (outcome for outcome in outcomes if outcome.arm == "written")
    assert asked.hit is True
    assert asked.iou == pytest.approx(0.5476, abs=2e-4)
    assert (other.hit, other.iou) == (None, None)  # no box, no verdict
    assert report.metrics["written"]["hit_rate"].value == 1.0
    assert report.metrics["written"]["hit_rate"].n == 1
    assert report.metrics["written"]["iou"].value == pytest.approx(0.5476, abs=2e-4)
    assert report.metrics["oracle"]["hit_rate"].value == 1.0
    outcomes, report = evaluated(folder, "[0, 0, 25, 25]")
    assert outcomes[0].hit is False
    assert report.metrics["written"]["hit_rate"].value == 0.0


# The blind baseline of any data set


def test_blind_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two of three training answers to "Is it normal?" are yes, so both test rows get yes: one of two is right."""
    train = [row(n, n, question="Is it normal?", answer=answer) for n, answer in enumerate(["Yes", "No", "Yes"])]
    test = [row(10 + n, 10 + n, question="Is it normal?", answer=answer) for n, answer in enumerate(["Yes", "No"])]
    ingest_slake(release(tmp_path / "slake", train=train, test=test), tmp_path / "out")
    assert main(["blind", "--data", str(tmp_path / "out")]) == 0
    one = capsys.readouterr().out
    assert "blind" in one
    assert "0.500 [" in one
    assert main(["blind", "--train", str(tmp_path / "out/train"), "--test", str(tmp_path / "out/test")]) == 0
    assert capsys.readouterr().out == one


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--data", "DATA"], "expected the folders train and test in it. Ingest it with a split"),
        (["--data", "DATA", "--train", "DATA"], "either --data or both --train and --test"),
        (["--train", "DATA"], "either --data or both --train and --test"),
        ([], "either --data or both --train and --test"),
    ],
)
def test_blind_says_what_it_needs(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = jsonl(tmp_path)
    assert main(["blind", *(one.replace("DATA", str(folder)) for one in arguments)]) == 1
    assert says in capsys.readouterr().err
