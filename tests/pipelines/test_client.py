"""submit, upload, schedule and status, by the real kfp.Client against an API that keeps state and checks the bodies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clincot.cli import app
from clincot.config import Params
from clincot.errors import InvalidInput
from clincot.pipelines import round as round_module
from clincot.pipelines import submit as submitting
from clincot.pipelines.client import Connection, PipelinesFailed, connect_pipelines
from clincot.pipelines.recurring import RunSchedule, delete_recurring_runs, list_recurring_runs, reconcile_recurring_run
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.status import format_run_status, format_schedule_status
from clincot.pipelines.submit import submit_run, upload_pipeline
from tests.support.kfp_stub import PipelinesStub, serving

PLAN = RoundPlan(
    params=Params.model_validate({"publish": {"store": "s3://models/platform"}}),
    data="s3://data/train/abc",
    benchmark="s3://data/test/def",
)
NIGHTLY = RunSchedule(cron="0 0 2 * * *")


@pytest.fixture(autouse=True, scope="module")
def _compiled_once() -> Iterator[None]:
    """The same pipeline is compiled once for all of these tests: it takes a second."""
    made: dict[str, bytes] = {}

    def compile_once(plan: RoundPlan, out: Path) -> None:
        key = repr(plan)
        if key not in made:
            round_module.compile_round(plan, out)
            made[key] = out.read_bytes()
        out.write_bytes(made[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submitting, "compile_round", compile_once)
        yield


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PipelinesStub]:
    for name in ("KFP_ENDPOINT", "KFP_TOKEN", "KFP_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    with serving(PipelinesStub()) as running:
        yield running


@pytest.fixture
def connection(stub: PipelinesStub) -> Connection:
    return connect_pipelines(stub.url)


def test_a_run_is_submitted_and_its_address_printed(stub: PipelinesStub, connection: Connection) -> None:
    run = submit_run(connection, PLAN, name="tonight")
    assert run.url == f"{stub.url}/#/runs/details/{run.id}"
    (sent,) = stub.runs
    assert sent["display_name"] == "tonight"
    inputs = sent["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert inputs["data"]["defaultValue"] == "s3://data/train/abc"
    assert inputs["train"]["defaultValue"]["lr"] == PLAN.params.train.lr
    stub.runs[0]["state"] = "FAILED"
    assert "tonight: FAILED" in format_run_status(connection, run.id)
    with pytest.raises(PipelinesFailed, match="no run has the id run-99"):
        format_run_status(connection, "run-99")


def test_the_same_pipeline_is_uploaded_once(stub: PipelinesStub, connection: Connection) -> None:
    first, again = upload_pipeline(connection, PLAN), upload_pipeline(connection, PLAN)
    assert (first.name, first.pipeline_id) == (again.name, again.pipeline_id)
    uploaded = [version["display_name"] for version in stub.versions]
    assert uploaded == [first.name]
    changed = replace(PLAN, shards=4)
    assert upload_pipeline(connection, changed).name != first.name


def test_a_schedule_that_is_reconciled_twice_changes_nothing(stub: PipelinesStub, connection: Connection) -> None:
    (said,) = reconcile_recurring_run(connection, PLAN, NIGHTLY)
    assert said.startswith("created clincot-round-")
    (one,) = stub.recurring
    assert one["trigger"]["cron_schedule"]["cron"] == "0 0 2 * * *"
    changes = list(stub.changes)
    (said,) = reconcile_recurring_run(connection, PLAN, NIGHTLY)
    assert "is up to date" in said
    assert stub.changes == changes
    assert "ENABLED, cron 0 0 2 * * *" in format_schedule_status(connection)


def test_another_schedule_takes_the_old_ones_place(stub: PipelinesStub, connection: Connection) -> None:
    """The new one first: at no moment is there none."""
    reconcile_recurring_run(connection, PLAN, NIGHTLY)
    old = stub.recurring[0]["recurring_run_id"]
    before = len(stub.changes)
    reconcile_recurring_run(connection, PLAN, RunSchedule(interval_s=3600))
    made = [change for change in stub.changes[before:] if "recurring" in change]
    assert made == [
        "POST /recurringruns",
        f"POST /recurringruns/{old}:disable",
        f"DELETE /recurringruns/{old}",
    ]
    (new,) = stub.recurring
    assert new["trigger"]["periodic_schedule"]["interval_second"] in (3600, "3600")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_it_heals_after_it_was_interrupted_before_any_step(
    step: int, stub: PipelinesStub, connection: Connection
) -> None:
    """Steps of a change of timing: 1 create, 2 disable the old one, 3 delete it."""
    reconcile_recurring_run(connection, PLAN, NIGHTLY)
    stub.break_before = len(stub.changes) + step
    with pytest.raises(PipelinesFailed, match="no answer"):
        reconcile_recurring_run(connection, PLAN, RunSchedule(interval_s=3600))
    assert stub.recurring, "there is one at every moment"
    stub.break_before = 0
    reconcile_recurring_run(connection, PLAN, RunSchedule(interval_s=3600))
    (left,) = stub.recurring
    assert left["mode"] == "ENABLE"
    assert "periodic_schedule" in left["trigger"]


def test_two_of_the_same_name_become_one_and_a_disabled_one_is_enabled(
    stub: PipelinesStub, connection: Connection
) -> None:
    """Two callers may both have seen none."""
    reconcile_recurring_run(connection, PLAN, NIGHTLY)
    stub.recurring.append({**stub.recurring[0], "recurring_run_id": "twin", "created_at": "2026-02-01T00:00:00Z"})
    stub.recurring[0] |= {"mode": "DISABLE", "status": "DISABLED"}
    reconcile_recurring_run(connection, PLAN, NIGHTLY)
    (left,) = stub.recurring
    assert (left["recurring_run_id"] != "twin", left["mode"]) == (True, "ENABLE")


def test_remove_leaves_what_others_made(stub: PipelinesStub, connection: Connection) -> None:
    reconcile_recurring_run(connection, PLAN, NIGHTLY)
    stub.recurring.append({**stub.recurring[0], "recurring_run_id": "theirs", "display_name": "nightly backup"})
    assert len(delete_recurring_runs(connection)) == 1
    assert [one["display_name"] for one in stub.recurring] == ["nightly backup"]
    assert delete_recurring_runs(connection) == []
    assert list_recurring_runs(connection, connection.ensure_experiment()) == []


def test_an_expired_token_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("KFP_TOKEN", raising=False)
    with serving(PipelinesStub(token="new")) as stub:
        (tmp_path / "token").write_text("stale-5f3\n")
        arguments = ["pipeline", "status", "--endpoint", stub.url, "--token-file", str(tmp_path / "token")]
        assert app.main(arguments) == 1
        said = capsys.readouterr().err
        assert f"the token of {tmp_path / 'token'} has expired" in said
        assert "stale-5f3" not in said
        (tmp_path / "token").write_text("new\n")
        assert app.main(arguments) == 0
        connection = connect_pipelines(stub.url, token_file=tmp_path / "token")
        stub.token = "newer"  # it expires in the middle
        with pytest.raises(PipelinesFailed, match="HTTP 401, access denied"):
            reconcile_recurring_run(connection, PLAN, NIGHTLY)


def test_a_wrong_endpoint_is_told(stub: PipelinesStub) -> None:
    with pytest.raises(PipelinesFailed, match=r"is --endpoint .* right"):
        connect_pipelines("http://127.0.0.1:9")
    with pytest.raises(PipelinesFailed, match="HTTP 404, not an answer of Kubeflow Pipelines"):
        connect_pipelines(f"{stub.url}/pipeline")
    with pytest.raises(InvalidInput, match="must start with http"):
        connect_pipelines("kubeflow.example")
    with pytest.raises(InvalidInput, match="KFP_ENDPOINT"):
        connect_pipelines("")


def test_a_multi_user_installation_needs_a_namespace() -> None:
    with serving(PipelinesStub(multi_user=True)) as stub:
        with pytest.raises(InvalidInput, match="--namespace"):
            connect_pipelines(stub.url)
        submit_run(connect_pipelines(stub.url, namespace="team"), PLAN)
        assert stub.experiments[0]["namespace"] == "team"
        assert connect_pipelines(stub.url, profile="kubeflow-user").namespace == "kubeflow-user"
    with serving(PipelinesStub()) as stub:
        assert connect_pipelines(stub.url, profile="kubeflow-user").namespace == "", "others know no namespaces"


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (replace(PLAN, data=""), "--data is missing"),
        (replace(PLAN, data="runs/data"), "pods cannot read folders of this machine"),
        (replace(PLAN, params=Params()), "publish.store is empty"),
    ],
)
def test_what_every_run_would_fail_of_is_refused(plan: RoundPlan, told: str, connection: Connection) -> None:
    with pytest.raises(InvalidInput, match=told):
        submit_run(connection, plan)


def test_an_unknown_parameter_is_refused_before_anything_is_sent(
    stub: PipelinesStub, capsys: pytest.CaptureFixture[str]
) -> None:
    code = app.main(["pipeline", "submit", "--endpoint", stub.url, "--set", "train.learning_rate=1e-5"])
    assert (code, stub.changes) == (1, [])
    assert "train.learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize("timing", [{}, {"cron": "0 2 * * *"}, {"cron": "0 0 2 * * *", "interval_s": 5}])
def test_a_timing_is_one_and_whole(timing: dict[str, object]) -> None:
    with pytest.raises(InvalidInput):
        RunSchedule(**timing)  # type: ignore[arg-type]
