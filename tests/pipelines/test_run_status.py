"""What `clincot pipeline status` shows of recorded runs (tests/support/kfp_recordings), and what `submit --wait` does.

The recorded pipeline is of an earlier release, so its tasks have plain names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from clincot.cli import app
from clincot.pipelines import submit as submitting
from clincot.pipelines.client import Connection, PipelinesFailed, connect_pipelines
from clincot.pipelines.status import format_run_status, watch_run_status
from clincot.pipelines.submit import SubmittedRun, wait_for_run
from clincot.records import StartingPolicy
from clincot.runs.history import begin_round, record_round_outputs
from clincot.runs.round_records import RoundOutputs
from clincot.storage.folder_store import FolderStore
from tests.support.kfp_stub import Json, PipelinesStub, load_recording

A = "a" * 64
RECORDED_RUNS = (
    "run-succeeded",
    "run-succeeded-record-incomplete",
    "run-failed-in-decide",
    "run-failed-in-preflight",
    "run-terminated",
)
# Names of Argo's nodes that stand for no task
INTERNALS = re.compile(r"executor$|driver|root|exit-handler|onExit|iteration|for-loop|condition-|None|\(0\)")


def add_run(stub: PipelinesStub, recording: str, store: str = "", *, from_version: bool = False) -> str:
    """Add a recorded run of the recorded pipeline; return its id."""
    pipeline, run = load_recording("pipeline"), load_recording(recording)
    publish = pipeline["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]["publish"]["defaultValue"]
    publish["store"] = store
    source: Json = {"pipeline_spec": pipeline}
    if from_version:
        stub.pipelines.append({"pipeline_id": "p", "namespace": "", "name": "clincot-round"})
        stub.versions.append({"pipeline_version_id": "v", "pipeline_id": "p", "name": "v", "pipeline_spec": pipeline})
        source = {"pipeline_version_reference": {"pipeline_id": "p", "pipeline_version_id": "v"}}
    stub.experiments.append({"experiment_id": "e", "namespace": "", "display_name": "clincot", "description": ""})
    fields = {"experiment_id": "e", "namespace": "", "run_id": run["run_id"], "display_name": run["display_name"]}
    stub.runs.append({**fields, **source})
    stub.replay_run(run["run_id"], run)
    return str(run["run_id"])


def test_the_tasks_come_in_time_order_with_state_and_duration(stub: PipelinesStub, connection: Connection) -> None:
    """106 entries are 16 tasks. preflight ran from 20:07:14 to 20:07:34; ten tasks came from the cache."""
    run = add_run(stub, "run-succeeded")
    assert format_run_status(connection, run).splitlines() == [
        "ui-4: SUCCEEDED, took 4 min 3 s, ended 2026-11-29 20:10:47 UTC",
        f"{stub.url}/#/runs/details/{run}",
        "",
        "STARTED   TASK        STATE      TOOK",
        "20:07:14  preflight   succeeded  20 s",
        "20:07:45  evaluate    cached",
        "20:07:45  prepare     cached",
        "20:08:25  propose     cached",
        "20:08:35  answer      cached",
        "20:08:45  judge       cached",
        "20:08:55  merge       cached",
        "20:09:05  pair        cached",
        "20:09:15  version     cached",
        "20:09:26  train       cached",
        "20:09:36  evaluate-2  cached",
        "20:09:46  decide      succeeded  10 s",
        "20:10:06  page        succeeded  20 s",
        "20:10:36  finish      succeeded  11 s",
        "          publish     skipped",
        "          deploy      skipped",
    ]


@pytest.mark.parametrize("recording", RECORDED_RUNS)
def test_no_node_of_argo_is_shown(recording: str, stub: PipelinesStub, connection: Connection) -> None:
    shown = format_run_status(connection, add_run(stub, recording))
    assert not [line for line in shown.splitlines()[2:] if INTERNALS.search(line)]
    rows = shown.split("STARTED")[1].split("\n\n")[0].splitlines()[1:]
    assert len(rows) == 16


def test_a_record_that_stops_early_is_told(stub: PipelinesStub, connection: Connection) -> None:
    """The run SUCCEEDED, but the record says for ever that train-driver is RUNNING, and nothing of what followed."""
    shown = format_run_status(connection, add_run(stub, "run-succeeded-record-incomplete"))
    assert "20:07" not in shown
    assert "19:42:25  train       not recorded" in shown
    assert "          page        not recorded" in shown
    assert "running" not in shown.lower().split("the server's record")[0]
    assert (
        "The server's record of this run stops at 'train', although the run SUCCEEDED: all tasks that it needed ran."
        in shown
    )


def test_a_failure_that_is_not_recorded_is_told(stub: PipelinesStub, connection: Connection) -> None:
    """The run failed in decide, of which the record knows nothing."""
    shown = format_run_status(connection, add_run(stub, "run-failed-in-decide"))
    assert "stops at 'evaluate-2', although the run FAILED: which task failed is not recorded" in shown
    assert "The server does not say which task failed; look at the run in the UI" in shown


def test_a_failed_task_shows_the_end_of_its_log(stub: PipelinesStub, connection: Connection) -> None:
    """The pod: workflow, template and the number of Argo's node, which the entry `executor` lists as its child."""
    run = add_run(stub, "run-failed-in-preflight")
    log = "\n".join(f"line {number}" for number in range(1, 30))
    stub.logs["clincot-round-hqdwf-metadata-0-3-retry-system-container-impl-2613796817"] = log
    shown = format_run_status(connection, run)
    assert "19:48:19  preflight   failed       1 min 1 s" in shown
    assert "          evaluate    not reached" in shown
    end = shown.split("preflight failed. The end of its log:\n")[1]
    assert end.splitlines() == [f"  | line {number}" for number in range(18, 30)]


def test_the_archived_log_is_found_by_the_id_of_the_node(stub: PipelinesStub, connection: Connection) -> None:
    """The pod is gone an hour after the run; Argo keeps its log as an artifact of the node."""
    run = add_run(stub, "run-failed-in-preflight")
    stub.logs["clincot-round-hqdwf-2613796817"] = "error: not allowed: create inferenceservices"
    assert "  | error: not allowed: create inferenceservices" in format_run_status(connection, run)


def test_a_log_is_read_with_the_token_and_behind_the_gateway(stub: PipelinesStub, tmp_path: Path) -> None:
    """The gateway leads to the UI, which does not pass the API's request for a log on, but has one of its own."""
    stub.token, stub.behind_gateway = "secret", True
    (tmp_path / "token").write_text("secret")
    run = add_run(stub, "run-failed-in-preflight")
    stub.logs["clincot-round-hqdwf-metadata-0-3-retry-system-container-impl-2613796817"] = "the reason"
    assert "  | the reason" in format_run_status(connect_pipelines(stub.url, token_file=tmp_path / "token"), run)


def test_a_log_that_is_gone_is_told(stub: PipelinesStub, connection: Connection) -> None:
    shown = format_run_status(connection, add_run(stub, "run-failed-in-preflight"))
    assert "preflight failed; the server has no log of it any more." in shown


def test_a_terminated_run_says_so(stub: PipelinesStub, connection: Connection) -> None:
    """It was terminated while the driver of judge ran, which Argo calls FAILED."""
    shown = format_run_status(connection, add_run(stub, "run-terminated"))
    assert "FAILED (terminated), took 5 min 7 s" in shown
    assert "20:19:53  judge       stopped" in shown
    assert "judge failed" not in shown
    assert "Somebody terminated the run. The next run resumes its round." in shown


def test_the_tasks_of_a_run_from_a_version_are_found(stub: PipelinesStub, connection: Connection) -> None:
    """The API does not return the spec of such a run, so it is read from the version."""
    run = add_run(stub, "run-succeeded", from_version=True)
    assert "20:09:46  decide      succeeded  10 s" in format_run_status(connection, run)
    stub.versions.clear()
    assert "The server does not hold the pipeline of this run any more" in format_run_status(connection, run)


def test_the_decision_is_read_from_the_store_of_the_run(
    stub: PipelinesStub, connection: Connection, tmp_path: Path
) -> None:
    run = add_run(stub, "run-succeeded", str(tmp_path))
    assert f"decision: none; the run recorded no result of a round of clincot in {tmp_path}" in format_run_status(
        connection, run
    )
    store = FolderStore(tmp_path)
    begun = StartingPolicy(line="clincot", uri="s3://m/a", sha256=A, round=0, source="champion", published=True)
    begin_round(store, begun, run=run)
    outputs = RoundOutputs(number=1, digests={"pairs": A}, decision="decision-1", verdict="keep")
    record_round_outputs(store, "clincot", outputs, run=run)
    assert format_run_status(connection, run).endswith("decision: keep (round 1 of clincot, decision-1)")


def test_a_run_is_watched_until_it_ends(stub: PipelinesStub, connection: Connection) -> None:
    """While it runs, tasks that have not begun are waiting, and the one that runs shows for how long."""
    run = add_run(stub, "run-succeeded-record-incomplete")
    stub.runs[0]["state"], stub.runs[0]["finished_at"] = "RUNNING", "0001-01-01T00:00:00Z"
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        stub.replay_run(run, load_recording("run-succeeded"))

    first, last = watch_run_status(connection, run, sleep=sleep)
    assert waits == [10.0]
    assert "RUNNING, started 2026-11-29 19:37:47 UTC" in first
    assert re.search(r"19:42:25  train       running +\d", first)
    assert "          decide      waiting" in first
    assert "20:09:46  decide      succeeded  10 s" in last


def test_shards_are_one_row_and_rounds_are_told_apart(stub: PipelinesStub, connection: Connection) -> None:
    """Two rounds of two shards: each round's entries began within that round's own node."""

    def entry(name: str, begin: int, end: int, state: str = "SUCCEEDED") -> Json:
        return {
            "display_name": name,
            "state": state,
            "start_time": f"2026-01-01T00:{begin:02d}:00Z",
            "end_time": f"2026-01-01T00:{end:02d}:00Z",
        }

    def task(component: str, **more: Any) -> Json:
        return {"componentRef": {"name": component}, "taskInfo": {"name": component}} | more

    rounds = {"round-1": task("a"), "round-2": task("a", dependentTasks=["round-1"])}
    loop = {"loop": task("l", parameterIterator={}), "train": task("train challenger", dependentTasks=["loop"])}
    components = {
        "a": {"dag": {"tasks": loop}},
        "l": {"dag": {"tasks": {"propose": task("propose regions")}}},
        "propose regions": {"executorLabel": "p"},
        "train challenger": {"executorLabel": "t"},
    }
    run = add_run(stub, "run-succeeded")
    stub.runs[0]["pipeline_spec"] = {"components": components, "root": {"dag": {"tasks": rounds}}}
    stub.runs[0]["run_details"] = {
        "task_details": [
            entry("propose", 33, 35, "FAILED"),
            entry("round-2", 30, 50),
            entry("propose", 1, 3),
            entry("propose", 2, 5),
            entry("train", 6, 9),
            entry("round-1", 1, 10),
            entry("propose", 31, 34),
        ]
    }
    shown = format_run_status(connection, run).split("TOOK\n")[1].split("\n\n")[0]
    assert [re.split(" {2,}", line.strip()) for line in shown.splitlines()] == [
        ["00:01:00", "round 1: propose regions (2 parts)", "succeeded", "4 min 0 s"],
        ["00:06:00", "round 1: train challenger", "succeeded", "3 min 0 s"],
        ["00:31:00", "round 2: propose regions (2 parts)", "failed", "4 min 0 s"],
        ["round 2: train challenger", "not reached"],
    ]


SUBMIT = ("--data", "s3://data/train/abc", "--benchmark", "s3://data/test/def", "--set", "publish.store=s3://models/a")


@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize(
    ("recording", "code", "told"),
    [("run-succeeded", 0, "SUCCEEDED, took"), ("run-failed-in-preflight", 1, "preflight failed")],
)
def test_submit_waits_and_tells_how_the_run_ended(
    recording: str,
    code: int,
    told: str,
    stub: PipelinesStub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The stub lets the run end while the command waits."""

    def end_run(seconds: float) -> None:
        stub.runs[0]["pipeline_spec"] = load_recording("pipeline")
        stub.replay_run(stub.runs[0]["run_id"], load_recording(recording))

    monkeypatch.setattr(submitting.time, "sleep", end_run)
    assert app.main(["pipeline", "submit", "--endpoint", stub.url, *SUBMIT, "--wait", "60"]) == code
    assert told in capsys.readouterr().out


def test_waiting_outlasts_a_server_that_is_away(
    stub: PipelinesStub, connection: Connection, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its pod is moved to another node: HTTP 503 for a while. The run goes on."""
    run = SubmittedRun(add_run(stub, "run-succeeded"), "http://ui/run")
    stub.refusal = (503, "no healthy upstream")

    def come_back(seconds: float) -> None:
        stub.refusal = None

    monkeypatch.setattr(submitting.time, "sleep", come_back)
    assert wait_for_run(connection, run, seconds=60) == "SUCCEEDED"
    assert ["HTTP 503" in one.message for one in caplog.records] == [True]
    stub.refusal = (503, "no healthy upstream")
    shown = list(watch_run_status(connection, run.id, sleep=come_back))
    assert ["HTTP 503" in one for one in shown] == [True, False]
    stub.runs[0]["state"] = "RUNNING"
    with pytest.raises(PipelinesFailed, match="http://ui/run: RUNNING after 0 s; the run goes on"):
        wait_for_run(connection, run, seconds=0)


def test_watch_needs_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["pipeline", "status", "--watch", "--endpoint", "http://127.0.0.1:9"]) == 1
    assert "--watch needs the id of a run" in capsys.readouterr().err
