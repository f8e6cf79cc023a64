"""`clincot plan` as text and as JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clincot.cli.app import main

SIZES = ["--questions", "60", "--images", "20", "--benchmark-questions", "30"]
RECIPE = ["plan", "--recipe", "medgemma-4b", *SIZES]


def test_the_plan_names_stages_totals_sources_and_assumptions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, "--rounds", "2"]) == 0
    printed = capsys.readouterr().out
    for stage in ("propose", "answer", "judge", "pair", "train", "evaluate", "base policy: evaluate"):
        assert f"| {stage} " in printed
    assert "4.3 billion weights, prompts estimated (config.json of google/medgemma-4b-it at 290cda5)" in printed
    assert "15 questions a round, 20 images in all (given)" in printed
    assert "GPU-hours (A100 80 GB) for 2 rounds" in printed
    assert "| prefill_utilization " in printed
    assert "at USD 1.50 to 3.00 an hour (https://" in printed


def test_json_has_the_same_totals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, "--rounds", "2"]) == 0
    text = capsys.readouterr().out
    assert main([*RECIPE, "--rounds", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert f"total: {plan['total']['gpu_hours']:,.1f} GPU-hours" in text
    rounds = sum(row["gpu_hours"] for row in plan["stages"])
    assert plan["total"]["gpu_hours_first_round"] == pytest.approx(rounds)
    assert {row["stage"] for row in plan["stages"]} == {"propose", "answer", "judge", "pair", "train", "evaluate"}
    assert plan["assumptions"]["answer_share"]["value"] == 1.0


def test_a_price_and_a_gpu_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice the peak and twice the bandwidth of an A100, and no time on the CPU: half of the hours."""
    table = tmp_path / "gpus.yaml"
    table.write_text(
        "One: {bf16_tflops: 312, bandwidth_gbs: 2039, memory_gb: 80}\n"
        "Two: {bf16_tflops: 624, bandwidth_gbs: 4078, memory_gb: 80}\n"
    )
    host = [f"--assume={name}=0" for name in ("layer_s", "request_s", "picture_s", "draw_s")]
    costs = []
    for gpu in ("One", "Two"):
        words = [*RECIPE, "--gpus", str(table), "--gpu", gpu, "--price", "2", "--json", *host]
        assert main(words) == 0
        total = json.loads(capsys.readouterr().out)["total"]
        assert total["cost_usd"] == [pytest.approx(2 * total["gpu_hours"])] * 2
        costs.append(total["cost_usd"][0])
    assert costs[0] == pytest.approx(2 * costs[1])


def test_without_a_price_the_cost_is_left_open(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, "--gpu", "L40S"]) == 0
    assert "cost: no price of L40S 48 GB is known; give one with --price" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected either --data, a folder of questions, or --questions, their number"),
        (["--questions", "5", "--images", "6"], "expected 1 to 5 images for as many questions, got 6"),
        ([*SIZES, "--gpu", "T4"], "no GPU is called 'T4'"),
        ([*SIZES, "--price", "0"], "--price must be above 0"),
        ([*SIZES, "--sample", "0"], "--sample must be at least 1"),
        ([*SIZES, "--like", "nowhere"], "nowhere: expected the folder of a finished round, such as runs/NAME/round-01"),
        ([*SIZES, "--policy", "nowhere"], "policy: nowhere is no folder with a config.json"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--recipe", "medgemma-4b", *words]) == 1
    assert message in capsys.readouterr().err
