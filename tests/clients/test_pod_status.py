"""Why a pod cannot start, and that waiting for it ends then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.cli.app import main
from clincot.clients.pod_status import explain_failing_pod
from clincot.storage.s3 import S3Store
from clincot.storage.store import StoreFailed
from tests.support.kube_api_server import ApiServer, api_server

Json = dict[str, Any]


def failing(reason: str, message: str = "") -> Json:
    """A pod whose init container failed, as in a kubelet's status: the message is that of the ended container."""
    ended = {"terminated": {"exitCode": 1, "reason": "Error", "message": message}}
    own = {"name": "check-volume", "state": {"waiting": {"reason": reason}}, "lastState": ended}
    return {"metadata": {"name": "store-0"}, "status": {"phase": "Pending", "initContainerStatuses": [own]}}


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (failing("CrashLoopBackOff", "cannot write\n"), "check-volume: CrashLoopBackOff (exit code 1): cannot write"),
        (failing("CrashLoopBackOff"), "check-volume: CrashLoopBackOff (exit code 1): no message"),
        (failing("PodInitializing"), ""),
        (failing("ImagePullBackOff"), ""),
        ({"metadata": {"name": "store-0"}, "status": {"phase": "Pending"}}, ""),
    ],
)
def test_only_lasting_failures_are_reasons(pod: Json, reason: str) -> None:
    assert explain_failing_pod(pod).removeprefix("container ") == reason


def refuse_connection(store: S3Store) -> bool:
    raise StoreFailed("connection refused")


@pytest.mark.parametrize("forbidden", [False, True])
def test_waiting_for_a_store_ends_when_its_pod_cannot_start(
    forbidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store does not answer. Without the permission to read the pod, the whole wait passes."""
    server = ApiServer()
    server.objects["/api/v1/namespaces/clincot/pods/store-0"] = failing(
        "CrashLoopBackOff", "cannot write to the volume"
    )
    if forbidden:
        server.forbidden.add(("GET", "/pods/"))
    monkeypatch.setattr("clincot.cli.store_commands.PAUSE_S", 0.05)
    monkeypatch.setattr(S3Store, "create_bucket", refuse_connection)
    for name, value in {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "KUBECONFIG": str(tmp_path / "kubeconfig"),
    }.items():
        monkeypatch.setenv(name, value)
    with api_server(server):
        config = {
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": server.url}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "users": [{"name": "it", "user": {}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        assert main(["store", "create", "s3://b/x", "--wait=1", "--pod=clincot/store-0"]) == 1
    said = capsys.readouterr().err
    assert ("the pod clincot/store-0 cannot start: container check-volume" in said) is not forbidden
    assert ("cannot write to the volume" in said) is not forbidden


def test_a_pod_is_named_with_its_namespace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    assert main(["store", "create", "s3://b/x", "--pod=store-0"]) == 1
    assert "--pod: expected NAMESPACE/POD, got 'store-0'" in capsys.readouterr().err
