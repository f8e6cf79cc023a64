"""submit, upload, schedule and status, by the real kfp.Client against an API that keeps state and checks the bodies."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from clincot.cli import app
from clincot.config import Params
from clincot.errors import InvalidInput
from clincot.pipelines import client as client_module
from clincot.pipelines.client import Connection, PipelinesFailed, connect_pipelines
from clincot.pipelines.recurring import RunSchedule, delete_recurring_runs, list_recurring_runs, reconcile_recurring_run
from clincot.pipelines.round_plan import RoundPlan
from clincot.pipelines.status import format_run_status, format_schedule_status
from clincot.pipelines.submit import submit_run, upload_pipeline
from tests.support.certificates import write_certificate
from tests.support.kfp_stub import RECORDED, PipelinesStub, serving

PLAN = RoundPlan(
    params=Params.model_validate({"publish": {"store": "s3://models/platform"}}),
    data="s3://data/train/abc",
    benchmark="s3://data/test/def",
)
NIGHTLY = RunSchedule(cron="0 0 2 * * *")


pytestmark = pytest.mark.usefixtures("compiled_once")


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
    assert uploaded == ["clincot-round", first.name], "the upload of a pipeline makes its first version"
    changed = replace(PLAN, shards=4)
    assert upload_pipeline(connection, changed).name != first.name


def test_a_schedule_that_is_reconciled_twice_changes_nothing(stub: PipelinesStub, connection: Connection) -> None:
    (said,) = reconcile_recurring_run(connection, PLAN, NIGHTLY)
    assert said.startswith("created clincot (")
    (one,) = stub.recurring
    assert one["display_name"] == "clincot"
    assert one["description"].startswith("Rounds of the model line clincot, cron 0 0 2 * * *.")
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
    theirs = {"recurring_run_id": "theirs", "display_name": "nightly backup", "description": "by hand"}
    stub.recurring.append({**stub.recurring[0], **theirs})
    assert len(delete_recurring_runs(connection)) == 1
    assert [one["display_name"] for one in stub.recurring] == ["nightly backup"]
    assert delete_recurring_runs(connection) == []
    assert list_recurring_runs(connection) == []


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


def test_every_upload_in_a_profile_after_the_first_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """kubeflow/pipelines 2.17.0, backend/src/apiserver/server/pipeline_server.go (listPipelines): a list without a
    namespace does not hold the pipelines of a profile."""
    with serving(PipelinesStub(multi_user=True)) as stub:
        for profile in ("team-a", "team-b"):
            upload_pipeline(connect_pipelines(stub.url, namespace=profile), PLAN)
            reconcile_recurring_run(connect_pipelines(stub.url, namespace=profile), PLAN, NIGHTLY)
            changes = list(stub.changes)
            for _ in range(9):
                connection = connect_pipelines(stub.url, namespace=profile)
                upload_pipeline(connection, PLAN)
                (line,) = reconcile_recurring_run(connection, PLAN, NIGHTLY)
                assert "is up to date" in line
            assert stub.changes == changes
        assert [(one["namespace"], one["name"]) for one in stub.pipelines] == [
            ("team-a", "clincot-round"),
            ("team-b", "clincot-round"),
        ]
    assert caplog.records == []


def test_two_releases_take_turns_in_a_profile(capsys: pytest.CaptureFixture[str]) -> None:
    """Each compiles a pipeline of its own. The first release did not yet say in the description whose it is."""
    with serving(PipelinesStub(multi_user=True)) as stub:
        releases = (PLAN, replace(PLAN, shards=4))
        connection = connect_pipelines(stub.url, namespace="team-a")
        names = [upload_pipeline(connection, plan).name for plan in releases]
        stub.pipelines[0]["description"] = ""
        changes = list(stub.changes)
        capsys.readouterr()
        for plan in releases * 5:
            connection = connect_pipelines(stub.url, namespace="team-a")
            assert upload_pipeline(connection, plan).name in names
        assert stub.changes == changes
        assert [one["display_name"] for one in stub.versions] == ["clincot-round", *names]
        assert capsys.readouterr() == ("", "")
        for number in range(10):
            run = submit_run(connection, PLAN, name=f"run {number}")
        assert [run["namespace"] for run in stub.runs] == ["team-a"] * 10
        assert len(stub.experiments) == 1
        assert "run 9: PENDING" in format_run_status(connection, run.id)
        assert format_schedule_status(connect_pipelines(stub.url, namespace="team-b")) == "no recurring run"


def test_a_shared_pipeline_of_the_same_name_is_not_touched() -> None:
    with serving(PipelinesStub(multi_user=True)) as stub:
        stub.pipelines.append(
            {"pipeline_id": "shared", "namespace": "", "name": "clincot-round", "display_name": "clincot-round"}
        )
        version = upload_pipeline(connect_pipelines(stub.url, namespace="team-a"), PLAN)
        assert version.pipeline_id != "shared"
        assert {one["pipeline_id"] for one in stub.versions} == {version.pipeline_id}


def test_a_pipeline_created_by_another_caller_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both callers find no pipeline and no version; the slower one gets HTTP 409 for each."""
    with serving(PipelinesStub(multi_user=True)) as stub:
        first = upload_pipeline(connect_pipelines(stub.url, namespace="team-a"), PLAN)
        slower = connect_pipelines(stub.url, namespace="team-a")
        for method, page in (
            ("list_pipelines", SimpleNamespace(pipelines=None)),
            ("list_pipeline_versions", SimpleNamespace(pipeline_versions=None, next_page_token="")),
        ):
            real, before = getattr(slower.client, method), iter([page])
            monkeypatch.setattr(
                slower.client,
                method,
                lambda *a, _real=real, _before=before, **options: next(_before, None) or _real(*a, **options),
            )
        assert upload_pipeline(slower, PLAN) == first
        assert (len(stub.pipelines), len(stub.versions)) == (1, 2)


@pytest.mark.parametrize("version", ["2.15.0", "2.16.1", "v2.16.0", "1.8.5"])
def test_a_server_that_ignores_the_platform_spec_is_refused(version: str) -> None:
    """kubeflow/pipelines api/v2alpha1/pipeline_spec.proto: PipelineConfig has our fields from 2.17.0 on."""
    with serving(PipelinesStub(version=version)) as stub:
        connection = connect_pipelines(stub.url)
        for action in (
            lambda: submit_run(connection, PLAN),
            lambda: upload_pipeline(connection, PLAN),
            lambda: reconcile_recurring_run(connection, PLAN, NIGHTLY),
        ):
            with pytest.raises(PipelinesFailed, match=f"Kubeflow Pipelines is {version}, expected 2.17 or later"):
                action()
        assert stub.changes == []
        assert format_schedule_status(connection) == "no recurring run", "what exists can still be looked at"


@pytest.mark.parametrize("version", ["2.17.0", "v2.17.1", "2.20.1", "3.0.0", "unknown"])
def test_supported_and_unknown_server_versions_are_used(version: str, caplog: pytest.LogCaptureFixture) -> None:
    """An image that was built without a tag reports "unknown" (kfp_answers.json, both health checks)."""
    with serving(PipelinesStub(version=version)) as stub:
        connection = connect_pipelines(stub.url)
        assert upload_pipeline(connection, PLAN).id
        assert submit_run(connection, PLAN).id
    assert caplog.records == []


@pytest.mark.parametrize("understands", ["2.15.2", "2.16.1"])
def test_an_unknown_server_that_drops_the_platform_spec_is_refused(understands: str) -> None:
    """Nothing but what such a server stores shows what it is; no run starts."""
    with serving(PipelinesStub(version="unknown", understands=understands)) as stub:
        connection = connect_pipelines(stub.url)
        for action in (
            lambda: submit_run(connection, PLAN),
            lambda: upload_pipeline(connection, PLAN),
            lambda: reconcile_recurring_run(connection, PLAN, NIGHTLY),
        ):
            with pytest.raises(PipelinesFailed, match=r"without its Kubernetes settings: it is older than 2\.17"):
                action()
        assert (stub.runs, stub.recurring) == ([], [])


def test_a_version_that_an_older_server_stored_is_refused_after_the_upgrade() -> None:
    """The name is a hash of the content, so the version would be found, and run without Secrets and volumes."""
    with serving(PipelinesStub(version="unknown", understands="2.16.1")) as stub:
        with pytest.raises(PipelinesFailed):
            upload_pipeline(connect_pipelines(stub.url), PLAN)
        stub.version, stub.release = "2.17.0", "2.17.0"
        with pytest.raises(PipelinesFailed, match="an older release stored it; delete the version clincot-round-"):
            upload_pipeline(connect_pipelines(stub.url), PLAN)
        stub.versions.clear()
        assert upload_pipeline(connect_pipelines(stub.url), PLAN).id


def test_a_redirect_to_a_login_is_told(stub: PipelinesStub, connection: Connection) -> None:
    """Istio with oauth2-proxy or Dex redirects a request without a session; its login page is no answer."""
    stub.redirect = "https://kubeflow.example/dex/auth?client_id=kubeflow"
    told = "the gateway redirects to a login: .* has expired or is not accepted; get a new one and set KFP_TOKEN"
    with pytest.raises(PipelinesFailed, match=f"HTTP 302, {told}"):
        connect_pipelines(stub.url)
    with pytest.raises(PipelinesFailed, match=f"HTTP 302, {told}"):
        connection.ensure_experiment()
    assert stub.changes == []


def test_a_login_page_instead_of_an_answer_is_told(stub: PipelinesStub, connection: Connection) -> None:
    """With HTTP 200; kfp would read it as an experiment without an id."""
    stub.refusal = (200, "<!DOCTYPE html>\n<html><body>Log in to Your Account</body></html>")
    with pytest.raises(PipelinesFailed, match="HTTP 200, a web page instead of an answer, such as that of a login"):
        connection.ensure_experiment()


def test_a_server_that_does_not_answer_is_told(
    stub: PipelinesStub, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes the request and says nothing for longer than the time limit."""
    monkeypatch.setattr(client_module, "REQUEST_S", 1.0)
    released = threading.Event()
    stub.before_change = lambda change: released.wait(10)
    with pytest.raises(PipelinesFailed, match="no answer from Kubeflow Pipelines within 1 s"):
        connection.ensure_experiment()
    released.set()


def test_a_server_that_is_gone_is_told(connection: Connection) -> None:
    connection.client._run_api.api_client.configuration.host = "http://127.0.0.1:9"
    with pytest.raises(PipelinesFailed, match=r"no answer from Kubeflow Pipelines \(NewConnectionError\); try again"):
        connection.ensure_experiment()


def test_a_token_file_is_read_again_for_every_request(tmp_path: Path) -> None:
    """Kubernetes rotates a projected token before it expires, while `submit --wait` goes on."""
    with serving(PipelinesStub(token="one", multi_user=True)) as stub:
        path = tmp_path / "token"
        path.write_text("one\n")
        connection = connect_pipelines(stub.url, token_file=path, namespace="team-a")
        stub.token = "two"
        path.write_text("two\n")
        assert connection.ensure_experiment()
        path.write_text("")
        with pytest.raises(InvalidInput, match="is empty, expected a bearer token"):
            connection.ensure_experiment()


def test_an_existing_token_goes_before_files_and_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFP_TOKEN", "stale")
    with serving(PipelinesStub(token="given-7c1")) as stub:
        arguments = ["pipeline", "status", "--endpoint", stub.url]
        assert app.main([*arguments, "--existing-token", "given-7c1"]) == 0
        assert capsys.readouterr().out == "no recurring run\n"
        assert stub.experiments == [], "looking creates nothing"
        assert app.main([*arguments, "--existing-token", "wrong-5f3"]) == 1
        told = capsys.readouterr().err
    assert "the token of --existing-token has expired or is not accepted" in told
    assert "wrong-5f3" not in told


def test_the_token_that_is_projected_into_a_pod_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KFP_TOKEN", "KFP_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(client_module, "POD_TOKEN", tmp_path / "token")
    (tmp_path / "token").write_text("projected")
    with serving(PipelinesStub(token="projected")) as stub:
        assert connect_pipelines(stub.url).ensure_experiment()


def test_an_account_without_a_role_is_told_although_the_server_says_400() -> None:
    """kubeflow/pipelines 2.17.0, backend/src/apiserver/server/pipeline_upload_server.go: uploadPipeline."""
    with serving(PipelinesStub(multi_user=True)) as stub:
        stub.allowed = {"team-b"}
        with pytest.raises(PipelinesFailed, match="HTTP 403, access denied"):  # the look-up comes first
            upload_pipeline(connect_pipelines(stub.url, namespace="team-a"), PLAN)
        connection = connect_pipelines(stub.url, namespace="team-b")
        stub.before_change = lambda change: stub.allowed.clear() if stub.allowed else None
        with pytest.raises(PipelinesFailed, match="the token may not create pipelines in the namespace team-b"):
            upload_pipeline(connection, PLAN)


def test_an_experiment_created_by_another_caller_is_found(stub: PipelinesStub, connection: Connection) -> None:
    """Both look and find none; the slower one gets HTTP 409."""

    def create_first(change: str) -> None:
        if change == "POST /experiments" and not stub.experiments:
            about = {"namespace": "", "display_name": "clincot", "description": ""}
            stub.experiments.append({"experiment_id": "theirs", **about})

    stub.before_change = create_first
    assert connection.ensure_experiment() == "theirs"


GATEWAY_PAGE = "<html>\n<head><title>503 Service Temporarily Unavailable</title></head>\n</html>"


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (
            401,
            json.dumps(RECORDED["no identity, multi-user (401)"]),
            "HTTP 401, access denied: the token, if there is one, has expired or is not accepted; get a new one and set"
            " KFP_TOKEN, KFP_TOKEN_FILE or --token-file (Failed to check authorization. User identity is empty in the "
            "request header)",
        ),
        (
            403,
            json.dumps(RECORDED["a user of a profile deletes a shared pipeline (403)"]),
            "HTTP 403, access denied: the token, if there is one, has expired or lacks permission (User "
            "'user@example.com' is not authorized); check --namespace and the roles of the account, or get a new token",
        ),
        (
            404,
            json.dumps(RECORDED["a run that does not exist (404)"]),
            "HTTP 404, not found (Run 00000000-0000-0000-0000-000000000000 not found); check the id or name and "
            "--namespace",
        ),
        (
            409,
            json.dumps(RECORDED["upload of a name that exists (409)"]),
            "HTTP 409, something of this name exists already (Failed to create a pipeline and a pipeline version); "
            "repeat the command, or choose another name",
        ),
        (
            500,
            json.dumps({"error_message": "Failed to create a pipeline", "error_details": "x\ngithub.com/x.go:1"}),
            "HTTP 500, Kubeflow Pipelines has failed or is not ready (Failed to create a pipeline); try again, or read "
            "the log of ml-pipeline",
        ),
        (
            503,
            GATEWAY_PAGE,
            "HTTP 503, Kubeflow Pipelines has failed or is not ready; try again, or read the log of ml-pipeline",
        ),
        (
            503,
            "no healthy upstream",
            "HTTP 503, Kubeflow Pipelines has failed or is not ready (no healthy upstream); try again, or read the log"
            " of ml-pipeline",
        ),
    ],
)
def test_an_error_of_the_server_is_one_sentence(
    status: int, body: str, sentence: str, stub: PipelinesStub, connection: Connection
) -> None:
    stub.refusal = (status, body)
    with pytest.raises(PipelinesFailed) as caught:
        connection.ensure_experiment()
    assert str(caught.value) == f"{stub.url}: {sentence}"


def test_a_conflict_that_cannot_be_found_names_the_pipeline(
    stub: PipelinesStub, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_pipeline(connection, PLAN)
    monkeypatch.setattr(connection.client, "list_pipelines", lambda **_: SimpleNamespace(pipelines=None))
    with pytest.raises(PipelinesFailed, match="HTTP 409, a pipeline named clincot-round exists already") as caught:
        upload_pipeline(connection, PLAN)
    assert "github.com" not in str(caught.value)


def test_the_cas_of_the_environment_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook gets SSL_CERT_FILE, as every pod of the chart does; kfp's own client would read only certifi's CAs."""
    bundle = write_certificate(tmp_path / "cabundle.crt", "127.0.0.1")
    with serving(PipelinesStub(), bundle) as stub:
        with pytest.raises(PipelinesFailed, match="CERTIFICATE_VERIFY_FAILED"):
            connect_pipelines(stub.url)
        monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
        assert upload_pipeline(connect_pipelines(stub.url), PLAN).pipeline_id


def test_the_proxy_of_the_environment_is_used(stub: PipelinesStub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub is the proxy: it gets the request for another host, whose name has no address."""
    monkeypatch.setenv("HTTP_PROXY", stub.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,.svc")
    for url, proxy in (
        ("http://kfp.example:8888", stub.url),
        ("http://ml-pipeline.kubeflow.svc:8888", None),
        (stub.url, None),
        ("https://kfp.example", None),
    ):
        assert client_module._find_proxy(url) == proxy, url
