"""The stand-in for Kubeflow Pipelines refuses what the server refuses, and answers as the server was recorded.

Rules are those of kubeflow/pipelines at 2.17.0, backend/src/apiserver, where tests/support/kfp_stub.py names no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml

from tests.support.kfp_stub import (
    RECORDED,
    Json,
    PipelinesStub,
    load_recording,
    name_next_run,
    name_scheduled_workflow,
    serving,
)

SPEC = {
    "pipelineInfo": {"name": "round"},
    "schemaVersion": "2.1.0",
    "root": {
        "inputDefinitions": {
            "parameters": {
                "data": {"parameterType": "STRING"},
                "shards": {"parameterType": "NUMBER_INTEGER", "isOptional": True, "defaultValue": 1},
            }
        },
        "dag": {"tasks": {}},
    },
}
CONFIG_2_17 = {"activeDeadlineSeconds": 60, "resourceTtlOnCompletion": 60}
PLATFORM = {"platforms": {"kubernetes": {"deploymentSpec": {"executors": {}}, "pipelineConfig": CONFIG_2_17}}}
DATA = {"parameters": {"data": "s3://b/data"}}


class Api:
    """Requests to a stub, as the server gets them."""

    def __init__(self, stub: PipelinesStub) -> None:
        self._stub = stub

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, f"{self._stub.url}/apis/v2beta1{path}", **options)

    def upload(self, name: str, namespace: str = "", *documents: Any) -> httpx.Response:
        text = yaml.safe_dump_all(documents or (SPEC, PLATFORM))
        query = {"name": name} | ({"namespace": namespace} if namespace else {})
        return self.ask("POST", "/pipelines/upload", params=query, files={"uploadfile": ("round.yaml", text)})

    def upload_version(self, name: str, pipeline: str) -> httpx.Response:
        text = yaml.safe_dump_all((SPEC, PLATFORM))
        query = {"name": name, "pipelineid": pipeline}
        return self.ask("POST", "/pipelines/upload_version", params=query, files={"uploadfile": ("round.yaml", text)})

    def create_experiment(self, name: str = "e", namespace: str = "") -> httpx.Response:
        return self.ask("POST", "/experiments", json={"display_name": name, "namespace": namespace})

    def create_run(self, **fields: Any) -> httpx.Response:
        spec = {"pipeline_spec": SPEC, "platform_spec": PLATFORM}
        body = {"display_name": "r", "pipeline_spec": spec, "runtime_config": DATA} | fields
        return self.ask("POST", "/runs", json=body)

    def create_recurring_run(self, **fields: Any) -> httpx.Response:
        body = {
            "display_name": "nightly",
            "pipeline_spec": {"pipeline_spec": SPEC, "platform_spec": PLATFORM},
            "runtime_config": DATA,
            "max_concurrency": 1,
            "no_catchup": True,
            "mode": "ENABLE",
            "trigger": {"cron_schedule": {"cron": "0 */5 * * * *"}},
        } | fields
        return self.ask("POST", "/recurringruns", json=body)


@pytest.fixture
def profiles() -> Iterator[PipelinesStub]:
    with serving(PipelinesStub(multi_user=True)) as running:
        yield running


def test_pipelines_belong_to_a_namespace_and_a_name(profiles: PipelinesStub, stub: PipelinesStub) -> None:
    """model/pipeline.go, server/pipeline_server.go (listPipelines), resource_manager.go (ReplaceNamespace)."""

    def list_namespaces(api: Api, namespace: str) -> list[str]:
        query = {"namespace": namespace} if namespace else {}
        return [one["namespace"] for one in api.ask("GET", "/pipelines", params=query).json()["pipelines"]]

    api = Api(profiles)
    made = [api.upload("round", namespace) for namespace in ("team-a", "team-b", "", "team-a")]
    assert [one.status_code for one in made] == [200, 200, 200, 409]
    assert made[-1].json() == RECORDED["upload of a name that exists (409)"]
    assert [list_namespaces(api, name) for name in ("team-a", "team-b", "", "team-c")] == [
        ["team-a"],
        ["team-b"],
        [""],
        [],
    ]
    api = Api(stub)
    assert [api.upload("round", name).status_code for name in ("team-a", "team-b")] == [200, 409]
    assert list_namespaces(api, "team-c") == [""], "a single-user server ignores namespaces"


def test_an_upload_makes_the_first_version(stub: PipelinesStub) -> None:
    """resource_manager.go: CreatePipelineAndPipelineVersion; model/pipeline_version.go: names are unique."""
    api = Api(stub)
    pipeline = api.upload("round").json()["pipeline_id"]
    made = [api.upload_version(name, pipeline).status_code for name in ("round", "two", "two")]
    assert made == [409, 200, 409]
    versions = api.ask("GET", f"/pipelines/{pipeline}/versions").json()["pipeline_versions"]
    assert [one["display_name"] for one in versions] == ["two", "round"]
    assert api.upload_version("three", "nothing").status_code == 400, "the upload server says 400, not 404"


@pytest.mark.parametrize(
    ("version", "kept"), [("2.15.2", False), ("2.16.1", False), ("2.17.0", True), ("unknown", True)]
)
def test_older_servers_drop_a_platform_spec_that_they_do_not_know(version: str, kept: bool) -> None:
    """template/v2_template.go: IsPlatformSpecWithKubernetesConfig; api_util.go: YamlStringToPipelineSpecStruct."""
    with serving(PipelinesStub(version=version)) as stub:
        pipeline = Api(stub).upload("round").json()["pipeline_id"]
        (version_,) = Api(stub).ask("GET", f"/pipelines/{pipeline}/versions").json()["pipeline_versions"]
    assert ("platform_spec" in version_["pipeline_spec"]) is kept
    spec = version_["pipeline_spec"]["pipeline_spec"] if kept else version_["pipeline_spec"]
    assert spec["pipelineInfo"] == {"name": "round"}


def test_a_pipeline_spec_with_an_unknown_field_is_refused(stub: PipelinesStub) -> None:
    """template/v2_template.go: NewV2SpecTemplate."""
    assert Api(stub).upload("round", "", SPEC | {"colour": "red"}).status_code == 400
    assert Api(stub).upload("round", "", PLATFORM).status_code == 400, "a platform spec alone is no pipeline"
    assert stub.pipelines == []


def test_names_have_a_greatest_length(stub: PipelinesStub) -> None:
    """validation/length.go: pipelines 128, versions 127, experiments 128."""
    api = Api(stub)
    assert [api.upload("p" * chars).status_code for chars in (129, 128)] == [400, 200]
    pipeline = stub.pipelines[0]["pipeline_id"]
    assert [api.upload_version("v" * chars, pipeline).status_code for chars in (128, 127)] == [400, 200]
    assert [api.create_experiment("e" * chars).status_code for chars in (129, 128)] == [400, 200]


def test_a_user_acts_only_in_profiles_that_are_open_to_them(profiles: PipelinesStub) -> None:
    """resource_manager.go: IsAuthorized; pipeline_upload_server.go says 400 instead of 403."""
    profiles.allowed = {"team-a"}
    api = Api(profiles)
    assert [api.upload("round", name).status_code for name in ("team-a", "team-b", "")] == [200, 400, 400]
    assert [api.create_experiment("e", name).status_code for name in ("team-a", "team-b", "")] == [200, 403, 400]
    listed = [api.ask("GET", "/pipelines", params={"namespace": name}).status_code for name in ("team-a", "team-b")]
    assert listed == [200, 403]
    assert api.ask("GET", "/pipelines").status_code == 200, "everybody may read the shared ones"
    assert api.ask("GET", "/recurringruns", params={"namespace": "team-b"}).status_code == 403
    assert api.ask("GET", "/runs").status_code == 400, "there are no shared runs"
    profiles.pipelines.append({"pipeline_id": "shared", "namespace": "", "name": "x", "display_name": "x"})
    refused = api.ask("DELETE", "/pipelines/shared")
    assert (refused.status_code, refused.json()) == (
        403,
        RECORDED["a user of a profile deletes a shared pipeline (403)"],
    )


def test_experiments_have_unique_names(stub: PipelinesStub) -> None:
    """storage/experiment_store.go."""
    assert [Api(stub).create_experiment(name).status_code for name in ("e", "e", "f")] == [200, 409, 200]


def test_a_run_needs_an_experiment_and_arguments_of_the_right_type(stub: PipelinesStub) -> None:
    """server/run_server.go: createRun; template/v2_template.go: validatePipelineJobInputs."""
    api = Api(stub)
    experiment = api.create_experiment().json()["experiment_id"]
    for fields, status in (
        ({"experiment_id": experiment}, 200),
        ({"experiment_id": "nothing"}, 404),
        ({"experiment_id": experiment, "display_name": ""}, 400),
        ({"experiment_id": experiment, "colour": "red"}, 400),
        ({"experiment_id": experiment, "runtime_config": {"parameters": {}}}, 400),  # data has no default
        ({"experiment_id": experiment, "runtime_config": {"parameters": {"data": 3}}}, 400),
        ({"experiment_id": experiment, "runtime_config": {"parameters": {"data": "s3://b/d", "other": 1}}}, 200),
    ):
        assert api.create_run(**fields).status_code == status, fields
    assert stub.runs[0]["service_account"] == "pipeline-runner", "template/template.go: setDefaultServiceAccount"


def test_an_unknown_run_is_told_as_recorded(stub: PipelinesStub) -> None:
    unknown = "00000000-0000-0000-0000-000000000000"
    answer = Api(stub).ask("GET", f"/runs/{unknown}")
    recorded = RECORDED["a run that does not exist (404)"]
    assert (answer.status_code, answer.json()["code"], answer.json()["details"]) == (404, 5, recorded["details"])


def test_a_run_from_a_version_does_not_show_its_spec(stub: PipelinesStub) -> None:
    """server/api_converter.go: toApiRun."""
    api = Api(stub)
    experiment = api.create_experiment().json()["experiment_id"]
    pipeline = api.upload("round").json()["pipeline_id"]
    source = {"pipeline_id": pipeline, "pipeline_version_id": stub.versions[0]["pipeline_version_id"]}
    from_version = api.create_run(experiment_id=experiment, pipeline_version_reference=source).json()
    from_spec = api.create_run(experiment_id=experiment).json()
    assert ("pipeline_spec" in from_version, "pipeline_spec" in from_spec) == (False, True)


def test_a_terminated_run_is_canceling_until_its_workflow_has_ended(stub: PipelinesStub) -> None:
    """storage/run_store.go: TerminateRun; the recorded run ended as FAILED, not as CANCELED."""
    api = Api(stub)
    run = api.create_run(experiment_id=api.create_experiment().json()["experiment_id"]).json()["run_id"]
    assert api.ask("POST", f"/runs/{run}:terminate").status_code == 200
    assert api.ask("GET", f"/runs/{run}").json()["state"] == "CANCELING"
    assert api.ask("POST", f"/runs/{run}:terminate").status_code == 500
    stub.replay_run(run, load_recording("run-terminated"))
    states = [one["state"] for one in api.ask("GET", f"/runs/{run}").json()["state_history"]]
    assert states == ["RUNNING", "CANCELING", "FAILED"]


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"max_concurrency": 0}, 400),
        ({"max_concurrency": 11}, 400),
        ({"max_concurrency": 10}, 200),
        ({"trigger": {"cron_schedule": {"cron": "every night"}}}, 400),
        ({"trigger": {"periodic_schedule": {"interval_second": "0"}}}, 400),
        ({"display_name": ""}, 500),
        ({"runtime_config": {"parameters": {}}}, 400),
        ({"paused": True}, 400),
    ],
)
def test_a_recurring_run_is_checked(fields: dict[str, Any], status: int, stub: PipelinesStub) -> None:
    """server/api_converter.go: toModelJob; resource_manager.go: CreateJob."""
    experiment = Api(stub).create_experiment().json()["experiment_id"]
    assert Api(stub).create_recurring_run(experiment_id=experiment, **fields).status_code == status
    assert len(stub.recurring) == (status == 200)


def test_a_recurring_run_has_the_fields_of_the_recorded_one(profiles: PipelinesStub) -> None:
    """Two may have the same name; without an account, Kubeflow's manifests set default-editor in a profile."""
    api = Api(profiles)
    experiment = api.create_experiment("e", "team-a").json()["experiment_id"]
    pipeline = api.upload("round", "team-a").json()["pipeline_id"]
    source = {"pipeline_id": pipeline, "pipeline_version_id": profiles.versions[0]["pipeline_version_id"]}
    for _ in range(2):
        api.create_recurring_run(
            experiment_id=experiment, description="d", pipeline_version_reference=source, pipeline_spec=None
        )
    answer = api.ask("GET", "/recurringruns", params={"namespace": "team-a"}).json()
    recorded = load_recording("recurring-runs")
    assert set(answer) == set(recorded)
    (one, other), (seen,) = answer["recurringRuns"], recorded["recurringRuns"]
    assert set(one) - set(seen) == {"pipeline_spec", "runtime_config"}, "given in this request"
    assert set(seen) <= set(one)
    for name in ("max_concurrency", "mode", "status", "no_catchup", "namespace", "trigger"):
        assert one[name] == seen[name], name
    assert (one["display_name"], one["service_account"]) == (other["display_name"], "default-editor")


def test_recurring_runs_are_enabled_disabled_and_deleted(stub: PipelinesStub) -> None:
    """resource_manager.go: ChangeJobMode, DeleteJob: also an enabled one can be deleted."""
    api = Api(stub)
    experiment = api.create_experiment().json()["experiment_id"]
    one = api.create_recurring_run(experiment_id=experiment).json()["recurring_run_id"]
    for verb, mode, status in (("disable", "DISABLE", "DISABLED"), ("enable", "ENABLE", "ENABLED")):
        assert api.ask("POST", f"/recurringruns/{one}:{verb}").status_code == 200
        (shown,) = api.ask("GET", "/recurringruns").json()["recurringRuns"]
        assert (shown["mode"], shown["status"]) == (mode, status)
    assert [api.ask("DELETE", f"/recurringruns/{one}").status_code for _ in range(2)] == [200, 404]
    assert api.ask("POST", f"/recurringruns/{one}:enable").status_code == 404


def test_lists_have_pages_and_refuse_other_filters(stub: PipelinesStub) -> None:
    """list/list.go: 20 a page by default, 200 at most."""
    api = Api(stub)
    for number in range(21):
        api.create_experiment(f"e{number}")
    first = api.ask("GET", "/experiments").json()
    rest = api.ask("GET", "/experiments", params={"page_token": first["next_page_token"]}).json()
    assert (len(first["experiments"]), len(rest["experiments"]), rest["total_size"]) == (20, 1, 21)
    assert "next_page_token" not in rest
    colour = {"filter": '{"predicates": [{"key": "colour", "operation": "EQUALS", "stringValue": "red"}]}'}
    assert api.ask("GET", "/experiments", params=colour).status_code == 400


@pytest.mark.parametrize("multi_user", [False, True])
def test_the_health_check_answers_as_recorded(multi_user: bool) -> None:
    with serving(PipelinesStub(multi_user=multi_user, version="unknown")) as stub:
        answer = Api(stub).ask("GET", "/healthz").json()
    assert answer == RECORDED["healthz, multi-user" if multi_user else "healthz, single-user"]


@pytest.mark.parametrize(
    ("name", "entries", "unnamed", "open_entries"),
    [
        ("run-succeeded", 106, 2, 0),
        ("run-succeeded-record-incomplete", 93, 12, 8),
        ("run-failed-in-decide", 96, 9, 8),
        ("run-failed-in-preflight", 44, 0, 0),
        ("run-terminated", 86, 4, 0),
    ],
)
def test_recorded_runs_are_replayed(
    name: str, entries: int, unnamed: int, open_entries: int, stub: PipelinesStub
) -> None:
    """The shape of task_details: entries without a name, and records that stop early with open states."""
    api = Api(stub)
    run = api.create_run(experiment_id=api.create_experiment().json()["experiment_id"]).json()["run_id"]
    stub.replay_run(run, load_recording(name))
    tasks = api.ask("GET", f"/runs/{run}").json()["run_details"]["task_details"]
    assert len(tasks) == entries
    assert sum("display_name" not in task for task in tasks) == unnamed
    assert sum(task.get("state") in ("RUNNING", "PENDING") for task in tasks) == open_entries
    assert {task["end_time"][:4] for task in tasks if task.get("state") in ("RUNNING", "PENDING")} <= {"0001"}


def test_an_unreadable_log_is_an_error_behind_http_200(stub: PipelinesStub) -> None:
    """server/run_log_server.go: ReadRunLogV1."""
    api = Api(stub)
    run = api.create_run(experiment_id=api.create_experiment().json()["experiment_id"]).json()["run_id"]
    stub.logs["pod-1"] = "all is well\n"
    url = f"{stub.url}/apis/v1alpha1/runs/{run}/nodes"
    assert httpx.get(f"{url}/pod-1/log").text == "all is well\n"
    missing = httpx.get(f"{url}/pod-2/log")
    assert (missing.status_code, "error_message" in missing.json()) == (200, True)


def test_without_a_token_nobody_is_let_in() -> None:
    with serving(PipelinesStub(token="right", multi_user=True)) as stub:
        refused = Api(stub).ask("GET", "/healthz")
        assert (refused.status_code, refused.json()) == (401, RECORDED["no identity, multi-user (401)"])
        assert Api(stub).ask("GET", "/healthz", headers={"Authorization": "Bearer right"}).status_code == 200


def test_the_name_of_a_scheduled_run_is_that_of_the_recorded_one() -> None:
    """The recurring run was called clincot-round-0fbbc5fb7adf (26 characters, of which 25 are kept)."""
    scheduled_workflow = name_scheduled_workflow(load_recording("recurring-runs")["recurringRuns"][0]["display_name"])
    assert scheduled_workflow == "clincot-round-0fbbc5fb7adq9q94"
    assert name_next_run(scheduled_workflow, 1) == load_recording("run-terminated")["display_name"]


@pytest.fixture
def hourly(stub: PipelinesStub) -> Json:
    """A recurring run of every hour, created at second 0."""
    api = Api(stub)
    pipeline = api.upload("round").json()["pipeline_id"]
    source = {"pipeline_id": pipeline, "pipeline_version_id": stub.versions[0]["pipeline_version_id"]}
    api.create_recurring_run(
        experiment_id=api.create_experiment().json()["experiment_id"],
        trigger={"periodic_schedule": {"interval_second": "3600"}},
        pipeline_version_reference=source,
    )
    return stub.recurring[0]


def test_a_scheduled_run_waits_for_the_one_before(stub: PipelinesStub, hourly: Json) -> None:
    """util/scheduled_workflow.go: GetNextScheduledEpoch: no more than max_concurrency at a time."""
    started = [len(stub.tick(now)) for now in (3599, 3600, 7200, 7300)]
    assert started == [0, 1, 0, 0], "the first run is not over"
    stub.runs[0]["state"] = "SUCCEEDED"
    assert len(stub.tick(7400)) == 1
    stub.runs[1]["state"] = "SUCCEEDED"
    assert (len(stub.tick(7500)), len(stub.tick(10800))) == (0, 1), "the next one is due at 10,800"


def test_missed_times_are_one_run_without_catch_up(stub: PipelinesStub, hourly: Json) -> None:
    """util/periodic_schedule.go: GetNextScheduledEpochNoCatchup. With it, there are five: 3600, 7200, ... 18000."""

    def count_runs(now: int) -> int:
        before = len(stub.runs)
        while stub.tick(now):
            stub.runs[-1]["state"] = "SUCCEEDED"
        return len(stub.runs) - before

    assert count_runs(5 * 3600) == 1
    hourly |= {"no_catchup": False, "last": 0}
    assert count_runs(5 * 3600) == 5


def test_a_disabled_recurring_run_starts_nothing(stub: PipelinesStub, hourly: Json) -> None:
    Api(stub).ask("POST", f"/recurringruns/{hourly['recurring_run_id']}:disable")
    assert stub.tick(3600) == []
    Api(stub).ask("POST", f"/recurringruns/{hourly['recurring_run_id']}:enable")
    assert len(stub.tick(3600)) == 1
