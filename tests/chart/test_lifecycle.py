"""Install, roll out, upgrade, test and uninstall the chart on a cluster stub.

Helm is the real one.
"""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.service_settings import ServiceSettings
from tests.chart.rendering import CHART, GIVEN, HELMS, run
from tests.support.chart_kube_server import KubeServer, kube_server

Helm = Callable[..., subprocess.CompletedProcess[str]]
TRIAL = ("--values", str(CHART / "values-trial.yaml"), *GIVEN["trial"])
BUCKET = "store create s3://clincot/platform"  # run by the rollout's init container and by a hook
POLICY = "/apis/serving.kserve.io/v1beta1/namespaces/clincot/inferenceservices/clincot"


@pytest.fixture
def server() -> KubeServer:
    return KubeServer()


@pytest.fixture(params=HELMS)
def helm(request: pytest.FixtureRequest, server: KubeServer, tmp_path: Path) -> Iterator[Helm]:
    with kube_server(server, tmp_path) as config:
        yield lambda *words: run(
            "helm", request.param, *words, "--namespace", "clincot", "--kubeconfig", str(config), "--timeout", "40s"
        )


def list_commands(server: KubeServer) -> list[str]:
    """Return the commands that ran, without their options."""
    commands = [" ".join(word for word in words if not word.startswith("--")) for words in server.ran]
    return [f"{one} --remove" if "--remove" in words else one for one, words in zip(commands, server.ran, strict=True)]


def test_from_install_to_uninstall(helm: Helm, server: KubeServer) -> None:
    """A rollout of a round survives upgrade and uninstall; hooks run at their time."""
    done = helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL)
    assert done.returncode == 0, done.stderr
    assert list_commands(server) == [BUCKET, "deploy", BUCKET, "pipeline upload", "pipeline schedule --remove"]

    first = server.names("jobs")

    # a round deploys: it owns the InferenceService, which has a canary in progress
    server.objects[POLICY] = build_inference_service(
        ServiceSettings(namespace="clincot"), "4f" * 32, "s3://b/x", mode="Standard"
    )
    server.objects[POLICY]["spec"]["canary"] = [{"trafficPercent": 10, "predictor": {"name": "r5e5e5e5e5e"}}]
    before = copy.deepcopy(server.objects[POLICY])
    server.ran.clear()
    server.written.clear()
    data = "pipeline.data=s3://data/train,pipeline.benchmark=s3://data/test"
    scheduled = (
        "--set",
        data,
        "--set",
        "pipeline.schedule.enabled=true,server.resources.limits.memory=64Gi,line=chest",
    )
    done = helm("upgrade", "clincot", str(CHART), *TRIAL, *scheduled)
    assert done.returncode == 0, done.stderr
    assert list_commands(server) == [BUCKET, "deploy", BUCKET, "pipeline upload", "pipeline schedule"]
    assert server.objects[POLICY] == before
    assert not [path for _, path in server.written if path.startswith(POLICY)]
    # Jobs of hooks and of the first revision, whose settings were others, are deleted
    (rollout,) = server.names("jobs")
    assert rollout.startswith("clincot-rollout-")
    assert rollout not in first

    server.ran.clear()
    assert helm("test", "clincot").returncode == 0
    assert list_commands(server) == ["preflight", "deploy"]
    server.ran.clear()
    done = helm("uninstall", "clincot")
    assert done.returncode == 0, done.stderr
    assert list_commands(server) == ["pipeline schedule --remove"]
    assert server.objects.pop(POLICY) == before  # it keeps serving
    assert {path.split("/")[-2] for path in server.objects} == {
        "namespaces",
        "pods",
    }  # the pods of `helm test` stay for their logs


@pytest.mark.parametrize("run_namespace", ["kubeflow", "clincot"])
def test_the_notes_show_the_logs_of_the_tests(
    helm: Helm, server: KubeServer, tmp_path: Path, run_namespace: str
) -> None:
    """`helm test --logs` reads pods of the release's namespace only, so it fails if runs use another one.

    GetPodLogs() in pkg/action/release_testing.go of helm/helm v3.17.2 and v4.3.1.
    """
    done = helm(
        "install", "clincot", str(CHART), "--create-namespace", *TRIAL, "--set", f"kfp.runNamespace={run_namespace}"
    )
    written = [line.strip() for line in done.stdout.partition("Next steps:")[2].splitlines()]
    commands = [line for line in written if line.startswith("helm test") or "logs clincot-" in line]
    tested = helm("test", "clincot", *(("--logs",) if "--logs" in commands[0] else ()))
    assert tested.returncode == 0, tested.stderr
    logs = tested.stdout
    for command in commands[1:]:
        words = command.split()[1:]
        shown = run("kubectl", "4", *words, "--kubeconfig", str(tmp_path / "kubeconfig"))
        assert shown.returncode == 0, shown.stderr
        logs += shown.stdout
    assert logs.count("said by the pod") == 2
    assert helm("test", "clincot", "--logs").returncode == (0 if run_namespace == "clincot" else 1)


def test_a_failed_hook_shows_its_log_and_leaves_nothing(
    helm: Helm, server: KubeServer, request: pytest.FixtureRequest
) -> None:
    """Helm 3.17 cannot show the log, so Jobs stay until their time to live has passed."""
    shows_logs = request.node.callspec.params["helm"] == "4"
    server.failing = frozenset({"clincot-pipeline"})
    done = helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL)
    assert done.returncode != 0
    assert ("said by the pod" in done.stdout + done.stderr) is shows_logs
    hooks = {"clincot-bucket", "clincot-pipeline"}
    left = [one for one in server.objects.values() if one["kind"] == "Job" and one["metadata"]["name"] in hooks]
    assert {one["metadata"]["name"] for one in left} == (set() if shows_logs else hooks)
    assert all(one["spec"]["ttlSecondsAfterFinished"] == 86400 for one in left)
    assert helm("uninstall", "clincot").returncode == 0
    kept = {one["metadata"]["name"] for one in server.objects.values() if one["kind"] in ("Job", "Pod")}
    assert kept == (set() if shows_logs else {*hooks, "clincot-pipeline-x1"})


def test_rollback_and_upgrade_run_the_hooks(helm: Helm, server: KubeServer) -> None:
    """A rollback uploads the earlier pipeline again, and keeps or removes the recurring run as it was."""
    helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL)
    data = "pipeline.data=s3://data/train,pipeline.benchmark=s3://data/test"
    done = helm("upgrade", "clincot", str(CHART), *TRIAL, "--set", f"{data},pipeline.schedule.enabled=true")
    assert done.returncode == 0, done.stderr
    server.ran.clear()
    done = helm("rollback", "clincot", "1")
    assert done.returncode == 0, done.stderr
    assert list_commands(server)[-3:] == [BUCKET, "pipeline upload", "pipeline schedule --remove"]


def test_nothing_is_installed_without_kserve_and_pipelines(helm: Helm, server: KubeServer) -> None:
    """The error names both missing APIs, and the cluster stays unchanged."""
    server.absent = frozenset({"serving.kserve.io", "argoproj.io"})
    done = helm("install", "clincot", str(CHART), *TRIAL)
    assert done.returncode != 0
    for kind in ("serving.kserve.io/v1beta1/InferenceService", "argoproj.io/v1alpha1/Workflow"):
        assert f"{kind} is not served by this cluster" in done.stderr
    assert server.written == []
