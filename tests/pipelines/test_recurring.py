"""Several model lines and installations on one Kubeflow Pipelines, renames, and recurring runs over many nights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from clincot.config import Params
from clincot.errors import InvalidInput
from clincot.pipelines.client import Connection, PipelinesFailed, connect_pipelines
from clincot.pipelines.ownership import Owner, find_owner, read_owner, write_description
from clincot.pipelines.recurring import RunSchedule, delete_recurring_runs, reconcile_recurring_run
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.status import format_schedule_status
from clincot.pipelines.submit import submit_run, upload_pipeline
from tests.support.kfp_stub import PipelinesStub, name_next_run, name_scheduled_workflow

pytestmark = pytest.mark.usefixtures("compiled_once")
NIGHTLY, HOURLY = RunSchedule(cron="0 0 2 * * *"), RunSchedule(interval_s=3600)
STORE, OTHER_STORE = "s3://models/platform", "s3://elsewhere/platform"


def plan_of(line: str = "clincot", store: str = STORE) -> RoundPlan:
    return RoundPlan(
        params=Params.model_validate({"publish": {"store": store, "name": line}}),
        data="s3://data/train/abc",
        benchmark="s3://data/test/def",
    )


def connect(
    stub: PipelinesStub, line: str = "clincot", store: str = STORE, installation: str = "", pipeline: str = ""
) -> Connection:
    return connect_pipelines(stub.url, owner=Owner(line, store, installation), pipeline=pipeline)


def list_kept(stub: PipelinesStub) -> list[tuple[str, str]]:
    """The model line and the store of each recurring run."""
    owners = [read_owner(one["description"]) for one in stub.recurring]
    return sorted((owner.line, owner.store) for owner in owners if owner is not None)


def test_two_model_lines_do_not_touch_each_other(stub: PipelinesStub) -> None:
    for line in ("clincot", "nodules"):
        submit_run(connect(stub, line), plan_of(line))
        reconcile_recurring_run(connect(stub, line), plan_of(line), NIGHTLY)
    assert [one["name"] for one in stub.pipelines] == ["clincot-round", "nodules-round"]
    assert [one["display_name"] for one in stub.experiments] == ["clincot", "nodules"]
    assert list_kept(stub) == [("clincot", STORE), ("nodules", STORE)]
    changes = list(stub.changes)
    for line in ("nodules", "clincot") * 5:
        (said,) = reconcile_recurring_run(connect(stub, line), plan_of(line), NIGHTLY)
        assert "is up to date" in said
    assert stub.changes == changes
    shown = format_schedule_status(connect(stub, "nodules"))
    assert shown.splitlines()[0] == "nodules: ENABLED, cron 0 0 2 * * *"
    assert [line.split()[2] for line in shown.splitlines()[1:]] == ["nodules-round"]
    assert len(delete_recurring_runs(connect(stub, "nodules"))) == 1
    assert list_kept(stub) == [("clincot", STORE)]


def test_two_installations_of_a_line_do_not_touch_each_other(stub: PipelinesStub) -> None:
    """Two releases of the chart with the same line and other stores: the second has to name its pipeline."""
    first, second = "ward-1/clincot", "ward-2/clincot"
    reconcile_recurring_run(connect(stub, installation=first), plan_of(), NIGHTLY)
    with pytest.raises(
        PipelinesFailed, match=r"the pipeline clincot-round belongs to .* \(installation ward-1/clincot\)"
    ):
        upload_pipeline(connect(stub, store=OTHER_STORE, installation=second), plan_of(store=OTHER_STORE))
    named = connect(stub, store=OTHER_STORE, installation=second, pipeline="ward-2")
    for _ in range(2):
        reconcile_recurring_run(named, plan_of(store=OTHER_STORE), NIGHTLY)
        assert list_kept(stub) == [("clincot", OTHER_STORE), ("clincot", STORE)]
    assert len(delete_recurring_runs(named)) == 1
    assert list_kept(stub) == [("clincot", STORE)]


def test_two_installations_with_stores_of_the_same_address_do_not_touch_each_other(stub: PipelinesStub) -> None:
    """Two trials, each with a store of its own: the addresses are equal, the endpoints are not."""
    for release, pipeline in (("ward-1/clincot", "ward-1"), ("ward-2/clincot", "ward-2")):
        reconcile_recurring_run(connect(stub, installation=release, pipeline=pipeline), plan_of(), NIGHTLY)
    assert len(stub.recurring) == 2
    assert len(delete_recurring_runs(connect(stub, installation="ward-2/clincot"))) == 1
    assert len(stub.recurring) == 1


def test_a_renamed_line_leaves_no_recurring_run_behind(stub: PipelinesStub) -> None:
    """The same release, after helm upgrade --set line=nodules: pipeline and experiment have other names, too."""
    release = "ward-1/clincot"
    reconcile_recurring_run(connect(stub, installation=release), plan_of(), NIGHTLY)
    old = stub.recurring[0]["recurring_run_id"]
    done = reconcile_recurring_run(connect(stub, "nodules", installation=release), plan_of("nodules"), NIGHTLY)
    assert [line.split()[0] for line in done] == ["created", "removed"]
    assert old in done[1]
    assert list_kept(stub) == [("nodules", STORE)]


def test_a_renamed_pipeline_and_experiment_leave_no_recurring_run_behind(stub: PipelinesStub) -> None:
    reconcile_recurring_run(connect(stub), plan_of(), NIGHTLY)
    renamed = replace(connect(stub), pipeline="rounds", experiment="rounds")
    assert len(reconcile_recurring_run(renamed, plan_of(), NIGHTLY)) == 2
    (left,) = stub.recurring
    assert left["experiment_id"] == stub.experiments[-1]["experiment_id"]


def test_a_recurring_run_of_an_earlier_release_is_replaced(stub: PipelinesStub) -> None:
    """Its description says only when it starts; its pipeline says on which line and store it works."""
    for line in ("clincot", "nodules"):
        reconcile_recurring_run(connect(stub, line), plan_of(line), NIGHTLY)
    for one in stub.recurring:
        one |= {"description": "cron 0 0 2 * * *", "display_name": "clincot-round-0fbbc5fb7adf"}
    done = reconcile_recurring_run(connect(stub), plan_of(), NIGHTLY)
    assert [line.split()[0] for line in done] == ["created", "removed"]
    assert len(stub.recurring) == 2, "that of the line nodules stays"


def test_a_recurring_run_that_a_person_made_stays(stub: PipelinesStub) -> None:
    """Of the same pipeline, with a name and a description of their own."""
    reconcile_recurring_run(connect(stub), plan_of(), NIGHTLY)
    stub.recurring.append(stub.recurring[0] | {"recurring_run_id": "hers", "display_name": "ada", "description": ""})
    reconcile_recurring_run(connect(stub), plan_of(), HOURLY)
    delete_recurring_runs(connect(stub))
    assert [one["recurring_run_id"] for one in stub.recurring] == ["hers"]


def test_an_installation_without_a_schedule_removes_only_its_own(stub: PipelinesStub) -> None:
    """As the hook of a release does whose schedule is off, while another release keeps the same line elsewhere."""
    first, second = "ward-1/clincot", "ward-2/clincot"
    reconcile_recurring_run(connect(stub, installation=first), plan_of(), NIGHTLY)
    for store in ("", OTHER_STORE):
        assert delete_recurring_runs(connect(stub, store=store, installation=second)) == []
    assert len(delete_recurring_runs(connect(stub, "renamed", store="", installation=first))) == 1


def test_removal_without_a_store_is_refused_if_it_is_not_clear(stub: PipelinesStub) -> None:
    reconcile_recurring_run(connect(stub), plan_of(), NIGHTLY)
    assert len(delete_recurring_runs(connect(stub, store=""))) == 1
    reconcile_recurring_run(connect(stub), plan_of(), NIGHTLY)
    reconcile_recurring_run(connect(stub, store=OTHER_STORE), plan_of(store=OTHER_STORE), NIGHTLY)
    with pytest.raises(InvalidInput, match=r"for several stores \(s3://elsewhere/platform, s3://models/platform\)"):
        delete_recurring_runs(connect(stub, store=""))
    assert len(stub.recurring) == 2


@pytest.mark.parametrize("line", ["clincot", "nodules", "chest-xray-nodules"])
def test_pods_of_a_recurring_run_have_names_for_a_host(line: str) -> None:
    """63 characters; a driver's pod: workflow, template and ten digits (2.17.0, argocompiler/container.go)."""
    workflow = name_next_run(name_scheduled_workflow(Owner(line).recurring_name), 9999)
    assert len(f"{workflow}-system-container-driver-4294967295") <= 63
    assert line.startswith(Owner(line).recurring_name)


def test_a_round_that_takes_longer_than_its_interval_is_not_overlapped(stub: PipelinesStub) -> None:
    """The recurring run of every hour; the first round takes three and a half."""
    reconcile_recurring_run(connect(stub), plan_of(), HOURLY)
    started = {hour: len(stub.tick(hour * 3600)) for hour in (1, 2, 3, 4)}
    assert started == {1: 1, 2: 0, 3: 0, 4: 0}
    stub.runs[0]["state"] = "FAILED"
    assert [len(stub.tick(4 * 3600 + 1800)), len(stub.tick(4 * 3600 + 1801))] == [1, 0], "missed hours are one run"


def test_a_change_while_a_run_goes_on_leaves_the_run_alone(stub: PipelinesStub) -> None:
    """A new recurring run does not know the old one's runs: both may run for a while, on the same round."""
    reconcile_recurring_run(connect(stub), plan_of(), HOURLY)
    stub.tick(3600)
    reconcile_recurring_run(connect(stub), plan_of(), RunSchedule(interval_s=1800))
    assert [run["state"] for run in stub.runs] == ["RUNNING"]
    assert len(stub.tick(3600)) == 1


def test_owners_survive_descriptions_and_specs() -> None:
    owner = Owner("nodules", STORE, "ward-1/clincot")
    assert read_owner(write_description("Rounds.", owner, content="abc")) == owner
    assert [read_owner(text) for text in (None, "", "cron 0 0 2 * * *", "clincot: no JSON")] == [None] * 4
    publish = {"defaultValue": {"name": "nodules", "store": STORE}}
    spec = {"root": {"inputDefinitions": {"parameters": {"publish": publish}}}}
    assert find_owner(spec) == find_owner({"pipeline_spec": spec}) == Owner("nodules", STORE)
    assert find_owner(spec, {"publish": {"name": "nodules", "store": OTHER_STORE}}) == Owner("nodules", OTHER_STORE)
    assert find_owner({"root": {}}) is None
    typed = {"publish": {"defaultValue": {}}, "store": {}, "model": {"defaultValue": "nodules"}}
    assert find_owner({"root": {"inputDefinitions": {"parameters": typed}}}, {"store": STORE}) == Owner(
        "nodules", STORE
    )
