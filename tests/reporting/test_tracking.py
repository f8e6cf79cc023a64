"""Metrics of rounds in experiment trackers: what is logged, once, and without secrets."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from clincot.clients.trackers import TrackedRun, check_trackers, flatten_params
from clincot.config import Params, TrackingConfig
from clincot.errors import InvalidInput
from clincot.jsonl import write_json
from clincot.records import BenchmarkReport, Interval
from clincot.reporting import tracking
from clincot.reporting.tracking import TrackedFiles, collect_metrics, describe_tracked_run, track_step


class Notebook:
    """A tracker that keeps what it is given in a list."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.failing = False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.failing:
            raise ConnectionError("the server is away")
        self.lines.append((step, dict(metrics)))

    def close(self) -> None:
        pass


@pytest.fixture
def files(tmp_path: Path) -> TrackedFiles:
    """A report with one arm, and a training log of 20 steps."""
    report = BenchmarkReport(
        benchmark="b",
        policy="p",
        protocol="strict",
        metrics={"written": {"accuracy": Interval(value=0.6, low=0.5, high=0.7, n=10)}, "whole": {}},
    )
    (tmp_path / "report.json").write_text(report.model_dump_json())
    log = [{"step": n, "loss": 1.0 / n, "margin_share": 0.1, "preference_share": 0.5} for n in range(1, 21)]
    write_json(tmp_path / "train_log.json", log)
    write_json(tmp_path / "pairs.report.json", {"pairs": 48})
    return TrackedFiles(
        tmp_path / "report.json", train_log=tmp_path / "train_log.json", pair_report=tmp_path / "pairs.report.json"
    )


def test_metrics_of_a_round(files: TrackedFiles) -> None:
    """The last tenth of 20 steps are steps 19 and 20: (1/19 + 1/20) / 2."""
    assert collect_metrics(files) == {
        "benchmark/written/accuracy": 0.6,
        "benchmark/written/accuracy/low": 0.5,
        "benchmark/written/accuracy/high": 0.7,
        "training/loss": pytest.approx((1 / 19 + 1 / 20) / 2),
        "training/preference_share": 0.5,
        "training/margin_share": pytest.approx(0.1),
        "training/steps": 20.0,
        "pairs": 48.0,
    }


def test_a_resumed_round_is_logged_once_and_a_changed_one_again(
    files: TrackedFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = Notebook()
    monkeypatch.setattr(tracking, "open_tracker", lambda name, run: notebook)
    monkeypatch.setattr(tracking, "check_trackers", lambda names, setting: None)
    run = TrackedRun("clincot", "night", tmp_path)
    config = TrackingConfig(to=("mlflow",))
    for _ in range(2):
        track_step(config, run, files, step=1, marker=tmp_path / "tracked.json")
    assert [step for step, _ in notebook.lines] == [1]
    write_json(tmp_path / "pairs.report.json", {"pairs": 50})
    track_step(config, run, files, step=1, marker=tmp_path / "tracked.json")
    assert [metrics["pairs"] for _, metrics in notebook.lines] == [48.0, 50.0]


def test_a_tracker_that_is_away_is_a_warning_unless_required(
    files: TrackedFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    notebook = Notebook()
    notebook.failing = True
    monkeypatch.setattr(tracking, "open_tracker", lambda name, run: notebook)
    monkeypatch.setattr(tracking, "check_trackers", lambda names, setting: None)
    run, marker = TrackedRun("clincot", "night", tmp_path), tmp_path / "tracked.json"
    with caplog.at_level(logging.WARNING):
        track_step(TrackingConfig(to=("mlflow",)), run, files, step=2, marker=marker)
    assert "round 2 was not logged to mlflow: ConnectionError: the server is away" in caplog.text
    with pytest.raises(InvalidInput, match="round 2 was not logged to mlflow"):
        track_step(TrackingConfig(to=("mlflow",), required=True), run, files, step=2, marker=marker)
    notebook.failing = False  # the next attempt logs it
    track_step(TrackingConfig(to=("mlflow",)), run, files, step=2, marker=marker)
    assert [step for step, _ in notebook.lines] == [2]


def test_parameters_hold_no_credentials(tmp_path: Path) -> None:
    """An address with a password loses it; the names of environment variables stay."""
    params = Params.model_validate(
        {
            "version": {"repository": "https://ann:secret-0123@git.example/data.git"},
            "judge": {"judges": [{"name": "a", "url": "http://judge/v1", "api_key_env": "JUDGE_KEY"}], "quorum": 1},
        }
    )
    run = describe_tracked_run(params, name="night", folder=tmp_path)
    assert run.params["version.repository"] == "https://git.example/data.git"
    assert "secret-0123" not in json.dumps(dict(run.params))
    assert "JUDGE_KEY" in run.params["judge.judges"]
    assert run.params["recipe.name"] == "neutral"
    assert flatten_params({"a": {"b": 1, "c": {}}}) == {"a.b": "1", "a.c": "{}"}


def test_tracking_changes_no_digest() -> None:
    tracked = Params.model_validate({"tracking": {"to": ["mlflow"], "experiment": "lungs"}})
    assert tracked.digest == Params().digest


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"tracking.to has wandb, .* pip install 'clincot\[tracking\]'"):
        check_trackers(["wandb"], setting="tracking.to")
