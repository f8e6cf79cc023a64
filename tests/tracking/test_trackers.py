"""A run of rounds in real trackers: MLflow with SQLite, TensorBoard's event files, W&B offline; all is read back.

`make test-tracking` runs these in an environment with the trackers' packages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from clincot.clients.trackers import TrackedRun, open_tracker
from clincot.rounds import Plan, run_rounds
from tests.support import tiny

pytest.importorskip("mlflow", reason="`make test-tracking` has the trackers")

SECRET = "git-secret-0123"


@dataclass(frozen=True)
class TrackedRounds:
    plan: Plan
    database: str  # address of MLflow's


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> TrackedRounds:
    """One round of the tiny models with SFT beside it; resumed once, which must not log anything twice."""
    folder = tmp_path_factory.mktemp("tracked")
    database = f"sqlite:///{folder}/mlflow.db"
    policy, *judges = (tiny.write_model(folder / name, seed) for seed, name in enumerate(("policy", "a", "b")))
    params = tiny.params(judges)
    content = params.model_dump(mode="json") | {
        "tracking": {"to": ["mlflow", "tensorboard", "wandb"], "experiment": "lungs", "required": True}
    }
    content["train"] |= {"report_to": ["mlflow", "tensorboard"]}
    content["publish"] |= {"store": f"https://ann:{SECRET}@store.example/models"}
    plan = Plan(
        run=folder / "night",
        data=tiny.write_set(folder / "data", key=False),
        policy=policy,
        params=type(params).model_validate(content),
        benchmark=tiny.write_set(folder / "benchmark", seed=1, studies=3),
        count=1,
        comparisons=("sft",),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", database)
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "lungs-training")
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        run_rounds(plan)
        run_rounds(replace(plan))
    return TrackedRounds(plan, database)


def read_runs(tracked: TrackedRounds, experiment: str) -> dict[str, Any]:
    """{name of a run: the run} of an experiment in MLflow."""
    from mlflow import MlflowClient  # type: ignore[import-not-found]

    client = MlflowClient(tracked.database)
    found = client.get_experiment_by_name(experiment)
    runs = client.search_runs([found.experiment_id])
    return {run.info.run_name: run for run in runs}


def read_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """{name: [(step, value)]} of TensorBoard's event files."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-not-found]
        EventAccumulator,
    )

    events = EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def test_mlflow_has_the_benchmark_of_every_round(tracked: TrackedRounds) -> None:
    """One run named after the run's folder; the base is step 0, round 1 step 1, each logged once."""
    from mlflow import MlflowClient

    (run,) = read_runs(tracked, "lungs").values()
    assert (run.info.run_name, run.info.status) == ("night", "FINISHED")
    history = MlflowClient(tracked.database).get_metric_history(run.info.run_id, "benchmark/written/hit_rate")
    reports = [json.loads((tracked.plan.run / name / "report.json").read_text()) for name in ("base", "round-01")]
    values = [report["metrics"]["written"]["hit_rate"]["value"] for report in reports]
    assert [(point.step, point.value) for point in history] == list(enumerate(values))
    decision = json.loads((tracked.plan.run / "round-01" / "decision.json").read_text())
    assert run.data.metrics.get("decision/difference") == decision["difference"]["value"]
    assert run.data.metrics["decision/promote"] == 0.0
    pairs = json.loads((tracked.plan.run / "round-01" / "pairs.report.json").read_text())["pairs"]
    assert run.data.metrics["pairs"] == pairs
    assert 0 < run.data.metrics["training/preference_share"] <= 1
    assert run.data.params["pair.per_question"] == str(tracked.plan.params.pair.per_question)


def test_trainings_log_every_step(tracked: TrackedRounds) -> None:
    """`train.report_to`: margin-DPO by the trainer's own integration, SFT by the loop; as many points as steps."""
    from mlflow import MlflowClient

    runs = read_runs(tracked, "lungs-training")
    assert set(runs) == {"night/round-01/policy", "round-01/sft/policy"}
    client = MlflowClient(tracked.database)
    log = json.loads((tracked.plan.run / "round-01" / "policy" / "train_log.json").read_text())
    losses = client.get_metric_history(runs["night/round-01/policy"].info.run_id, "loss")
    assert [(point.step, pytest.approx(point.value)) for point in losses] == [
        (entry["step"], entry["loss"]) for entry in log
    ]
    log = json.loads((tracked.plan.run / "round-01" / "sft" / "policy" / "train_log.json").read_text())
    losses = client.get_metric_history(runs["round-01/sft/policy"].info.run_id, "train/loss")
    assert [(point.step, point.value) for point in losses] == [(entry["step"], entry["loss"]) for entry in log]


def test_tensorboard_has_rounds_and_trainings(tracked: TrackedRounds) -> None:
    run = tracked.plan.run
    rounds = read_events(run / "tracking" / "night")
    assert [step for step, _ in rounds["benchmark/written/hit_rate"]] == [0, 1]
    training = read_events(run / "round-01" / "policy.tensorboard")
    log = json.loads((run / "round-01" / "policy" / "train_log.json").read_text())
    assert [value for _, value in training["train/nll"]] == pytest.approx([entry["nll"] for entry in log])


def test_wandb_wrote_its_offline_files(tracked: TrackedRounds) -> None:
    """The base's and the round's; both of the same run, so that `wandb sync` joins them."""
    written = sorted((tracked.plan.run / "tracking" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 2
    assert len({path.name for path in written}) == 1
    assert all(b"benchmark/written/hit_rate" in path.read_bytes() for path in written)


def test_no_tracker_has_a_secret(tracked: TrackedRounds) -> None:
    """The store's address has a password, which params.yaml holds and no tracker may."""
    assert SECRET in (tracked.plan.run / "params.yaml").read_text()
    database = Path(tracked.database.removeprefix("sqlite:///"))
    shown = [database, *(tracked.plan.run / "tracking").rglob("*"), *tracked.plan.run.glob("round-01/*.tensorboard/*")]
    for path in shown:
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_a_run_is_continued_by_a_later_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened twice, MLflow has one run with both steps, and the params of the first opening."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/ml.db")
    for step, params in enumerate(({"a": "1"}, {"a": "2"})):
        tracker = open_tracker("mlflow", TrackedRun("lungs", "night's", tmp_path, params))
        tracker.log({"pairs": float(step), "nan": float("nan")}, step)
        tracker.close()
    client = MlflowClient(f"sqlite:///{tmp_path}/ml.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lungs").experiment_id])
    assert run.data.params == {"a": "1"}
    assert run.data.metrics == {"pairs": 1.0}
