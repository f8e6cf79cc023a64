"""A TrainJob from its manifest to its checkpoint, with the real client against a stub of the API server."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.clients.kubernetes import AdmissionDenied, Cluster, ClusterFailed
from clincot.config import TrainConfig
from clincot.deployment.crd import InvalidResource, validate_manifest
from clincot.errors import InvalidInput
from clincot.models.checkpoint import hash_checkpoint
from clincot.preflight import cluster as cluster_checks
from clincot.stages.runner import run_stage
from clincot.training import trainjob_watch
from clincot.training.job import TrainingFailed, TrainingJob, locate_failure_file
from clincot.training.kubeflow_trainer import (
    build_train_job,
    copy_to_volume,
    derive_job_name,
    list_job_permissions,
    train_on_nodes,
)
from clincot.training.launch_settings import LaunchSettings, SecretKey, TrainJobSettings
from clincot.training.trainjob_watch import run_train_job
from clincot.training.worker import train_in_process
from tests.support.crds import load_validator
from tests.support.kube_api_server import Json, api_server
from tests.support.pair_files import write_work
from tests.support.recordings import read_recording
from tests.support.trainer_server import TrainerServer, pod
from tests.support.trainer_webhook import deny_train_job, list_replicated_jobs

pytestmark = pytest.mark.slow


def settings(mount: Path, **fields: Any) -> TrainJobSettings:
    given = {
        "image": "registry.example/clincot:1",
        "claim": "shared",
        "mount": mount,
        "namespace": "clinic",
        "poll_s": 0.01,
        "schedule_s": 5.0,
        "timeout_s": 60,
    }
    return TrainJobSettings.model_validate(given | fields)


ALL_OF_IT = {
    "env": {"NCCL_DEBUG": "WARN"},
    "secret_env": {"HF_TOKEN": SecretKey(secret="hub", key="token")},
    "sub_path": "rounds",
    "node_selector": {"gpu": "a100"},
    "service_account": "trainer",
    "pod_labels": {"app.kubernetes.io/part-of": "clincot"},
    "queue": "clinic",
    "tolerations": ({"key": "nvidia.com/gpu", "operator": "Exists"},),
    "image_pull_secrets": ("registry",),
    "nodes": 4,
    "processes_per_node": 8,
    "runtime_kind": "TrainingRuntime",
    "runtime": "ours",
}


def manifest(mount: Path = Path("/shared"), **fields: Any) -> Json:
    return build_train_job("clincot-train-0123456789ab", mount / "work.json", settings(mount, **fields))


# --- the manifest


@pytest.fixture(scope="module")
def schema() -> Any:
    return load_validator("TrainJob")


@pytest.mark.parametrize("fields", [pytest.param({}, id="least"), pytest.param(ALL_OF_IT, id="all of it")])
def test_the_manifest_is_one_that_the_crd_knows(fields: dict[str, Any], schema: Any) -> None:
    validate_manifest(manifest(**fields), schema)


def test_the_schema_refuses_what_it_does_not_know(schema: Any) -> None:
    """podTemplateOverrides was the name before runtimePatches; a cluster would drop it in silence."""
    wrong = manifest()
    wrong["spec"]["podTemplateOverrides"] = wrong["spec"].pop("runtimePatches")
    wrong["spec"]["trainer"]["numNode"] = 2
    with pytest.raises(InvalidResource, match=r"numNode.*podTemplateOverrides|podTemplateOverrides.*numNode"):
        validate_manifest(wrong, schema)


def test_what_the_manifest_says() -> None:
    spec = manifest(**ALL_OF_IT)["spec"]
    trainer = spec["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (4, 8, "registry.example/clincot:1")
    assert trainer["command"][-1] == "clincot.training.worker"
    assert trainer["args"] == ["/shared/work.json"]
    secret = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    assert trainer["env"] == [{"name": "NCCL_DEBUG", "value": "WARN"}, secret]
    assert spec["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "ours"}
    (replicated,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    inside = replicated["template"]["spec"]["template"]["spec"]
    mounts = {mount["mountPath"]: mount for mount in inside["containers"][0]["volumeMounts"]}
    assert mounts["/shared"]["subPath"] == "rounds"
    assert "/dev/shm" in mounts
    assert inside["nodeSelector"] == {"gpu": "a100"}
    # Pod Security "restricted": a user that is not root, no escalation, no capabilities, the runtime's seccomp profile
    assert (inside["securityContext"]["runAsNonRoot"], inside["securityContext"]["runAsUser"]) == (True, 10001)
    assert inside["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    container = inside["containers"][0]["securityContext"]
    restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert container == {**restricted, "readOnlyRootFilesystem": True}
    assert mounts["/tmp"] == {"name": "tmp", "mountPath": "/tmp"}
    assert {"name": "tmp", "emptyDir": {}} in inside["volumes"]
    assert replicated["template"]["spec"]["template"]["metadata"]["labels"] == ALL_OF_IT["pod_labels"]
    assert "metadata" not in yaml.safe_dump(manifest()["spec"])
    assert manifest(**ALL_OF_IT)["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "clinic"


# --- one job's life


@pytest.fixture
def server() -> TrainerServer:
    return TrainerServer()


@pytest.fixture
def cluster(server: TrainerServer) -> Iterator[Cluster]:
    with api_server(server) as connected:
        yield connected


def jobs(server: TrainerServer) -> list[str]:
    return [path.rpartition("/")[2] for path in server.objects]


def test_a_job_is_started_and_waited_for(server: TrainerServer, cluster: Cluster) -> None:
    run_train_job(cluster, manifest(), settings(Path("/shared")))
    assert jobs(server) == ["clincot-train-0123456789ab"]
    assert server.looks >= 3


def test_the_same_job_is_not_started_twice(server: TrainerServer, cluster: Cluster) -> None:
    """Whoever waited was killed: the next one waits for the job that is there, running or complete."""
    run_train_job(cluster, manifest(), settings(Path("/shared")))
    server.ends_after = 8
    run_train_job(cluster, manifest(), settings(Path("/shared")))
    assert len([one for one in server.requests if one[0] == "DELETE"]) == 0
    assert len(server.history) == 1  # written once


def test_a_failed_job_reports_its_log_and_is_replaced(server: TrainerServer, cluster: Cluster) -> None:
    """A failed job's log is in the error, and the next call replaces the job."""
    server.fails = "jobset failed: node-0 exited with 1"
    server.pods = [pod("job-node-0-0-x", "Succeeded"), pod("job-node-0-1-y", "Failed")]
    server.logs = {"job-node-0-1-y": "Traceback …\nRuntimeError: NCCL timeout\n"}
    with pytest.raises(TrainingFailed, match="node-0 exited with 1") as caught:
        run_train_job(cluster, manifest(), settings(Path("/shared")))
    assert "NCCL timeout" in str(caught.value)
    assert any("labelSelector=jobset" in path for _, path in server.requests)
    assert jobs(server) == ["clincot-train-0123456789ab"]  # still there, to be looked at
    server.fails = ""
    run_train_job(cluster, manifest(), settings(Path("/shared")))
    assert server.created == 3  # the first, the second (409: it is there), and again once the failed one is gone
    assert len(server.history) == 2


def test_a_failed_job_whose_log_may_not_be_read_says_so(server: TrainerServer, cluster: Cluster) -> None:
    server.fails = "jobset failed"
    server.pods = [pod("job-node-0-0-x", "Failed")]
    server.forbidden = {("GET", "/log")}
    with pytest.raises(TrainingFailed, match=r"jobset failed .*its log cannot be read: .*needs a Role"):
        run_train_job(cluster, manifest(), settings(Path("/shared")))


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        pytest.param(
            {"pods": [pod("a", "Pending", unschedulable="0/3 nodes: insufficient nvidia.com/gpu")]},
            "insufficient nvidia.com/gpu",
            id="no node",
        ),
        pytest.param({"pods": [pod("a", "Pending", waiting="no such tag")]}, "BackOff: no such tag", id="image"),
        pytest.param({"suspended": True}, "have enough free quota", id="queue"),
        pytest.param({}, "is Kubeflow Trainer's controller running", id="no controller"),
    ],
)
def test_a_job_that_is_never_scheduled_is_given_up_and_says_why(
    state: dict[str, Any], expected: str, server: TrainerServer, cluster: Cluster
) -> None:
    server.runs = False
    for name, value in state.items():
        setattr(server, name, value)
    with pytest.raises(TrainingFailed, match=r"did not all run within 0\.2 s") as caught:
        run_train_job(cluster, manifest(), settings(Path("/shared"), schedule_s=0.2))
    assert expected in str(caught.value)
    assert jobs(server) == []  # nothing waits for GPUs that nobody waits for


def test_a_job_without_end_is_given_up(server: TrainerServer, cluster: Cluster) -> None:
    server.ends_after = 10**9
    with pytest.raises(TrainingFailed, match="did not end within 1 s"):
        run_train_job(cluster, manifest(), settings(Path("/shared"), timeout_s=1, schedule_s=0.1))
    assert jobs(server) == []


def test_a_job_is_deleted_when_its_pod_is_told_to_end(server: TrainerServer, cluster: Cluster) -> None:
    """SIGTERM is how Kubernetes ends the pod of a step that was cancelled."""
    server.ends_after = 10**9
    before = signal.getsignal(signal.SIGTERM)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit, match="143"):
        run_train_job(cluster, manifest(), settings(Path("/shared")))
    assert jobs(server) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_that_someone_deletes_is_no_success(server: TrainerServer, cluster: Cluster) -> None:
    server.ends_after = 10**9
    threading.Timer(0.2, server.objects.clear).start()
    with pytest.raises(TrainingFailed, match="deleted by someone else"):
        run_train_job(cluster, manifest(), settings(Path("/shared")))


def test_an_api_server_that_is_away_does_not_end_the_job(
    server: TrainerServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five looks in a row get a 503: the job goes on. Away for too long: the error, and the job is still there."""
    monkeypatch.setattr("clincot.clients.kubernetes.READ_RETRY_S", 0.0)
    server.broken = 5
    run_train_job(cluster, manifest(), settings(Path("/shared")))
    monkeypatch.setattr(trainjob_watch, "API_OUTAGE_S", 0.1)
    server.ends_after, server.broken = 10**9, 10**9
    with pytest.raises(ClusterFailed, match="503"):
        run_train_job(cluster, manifest(), settings(Path("/shared")))
    assert jobs(server) == ["clincot-train-0123456789ab"]


def test_a_denied_admission_is_not_a_missing_role(server: TrainerServer, cluster: Cluster) -> None:
    job = manifest()
    job["spec"]["runtimePatches"][0]["manager"] = "clincot"
    with pytest.raises(AdmissionDenied, match=r"403: admission webhook .*must be a domain-prefixed path") as refused:
        run_train_job(cluster, job, settings(Path("/shared")))
    assert "needs a Role" not in str(refused.value)
    assert jobs(server) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"runtimeRef": {"kind": "TrainingRuntime", "name": "ours"}}, r'"ours\" not found.* must be created before'),
        ({"runtimeRef": {"kind": "Runtime", "name": "ours"}}, "unsupported runtime: Runtime"),
        ({"initializer": {"dataset": {}}}, "must have dataset-initializer job"),
        ({"trainer": {"env": [{"name": "PET_NNODES"}]}}, r"must not have reserved envs.*\[PET_NNODES\]"),
        ({"job": "launcher"}, "must not have replicated job that doesn't exist in the runtime"),
        ({"container": {"name": "sidecar"}}, "must not have container that doesn't exist in the runtime job node"),
        ({"container": {"name": "node", "env": [{"name": "A"}]}}, "must not have envs for the"),
    ],
)
def test_the_stand_in_denies_what_trainers_webhook_denies(change: Json, message: str) -> None:
    job = manifest()
    (replicated,) = list_replicated_jobs(job["spec"]["runtimePatches"][0])
    replicated["name"] = change.pop("job", replicated["name"])
    if "container" in change:
        replicated["template"]["spec"]["template"]["spec"]["containers"] = [change.pop("container")]
    job["spec"] |= change
    assert deny_train_job(manifest()) == ""
    assert re.search(message, deny_train_job(job))


def test_the_stand_in_admits_the_job_that_ran() -> None:
    """A recorded TrainJob, which Trainer 2.3.0 admitted and completed."""
    assert deny_train_job(read_recording("trainjob-complete")) == ""


def test_a_cluster_that_knows_a_field_no_longer_refuses_it(server: TrainerServer, cluster: Cluster) -> None:
    server.strict["trainjobs"] = lambda body: 'unknown field "spec.runtimePatches"' if "spec" in body else ""
    with pytest.raises(ClusterFailed, match=r"400.*unknown field"):
        run_train_job(cluster, manifest(), settings(Path("/shared")))


# --- from the stage to the checkpoint


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> TrainingJob:
    config = TrainConfig(batch_size=4, lr=1e-3, nll_weight=0.2)
    return write_work(tmp_path_factory.mktemp("work"), config, studies=3, extra=0)


@pytest.fixture
def kubeconfig(server: TrainerServer, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `connect` finds: the stub."""
    path = tmp_path / "kubeconfig"
    path.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "stub",
                "clusters": [{"name": "stub", "cluster": {"server": server.url}}],
                "users": [{"name": "me", "user": {}}],
                "contexts": [{"name": "stub", "context": {"cluster": "stub", "user": "me"}}],
            }
        )
    )
    monkeypatch.setenv("KUBECONFIG", str(path))


def as_a_pod_does(job: Json) -> None:
    """The worker that the manifest names, on the volume: here one process instead of one a GPU."""
    (place,) = job["spec"]["trainer"]["args"]
    there = TrainingJob.model_validate_json(Path(place).read_bytes())
    metrics = train_in_process(there)
    there.result.write_text(json.dumps(metrics))


@pytest.mark.usefixtures("kubeconfig")
def test_training_over_nodes_gives_the_bytes_of_one_process(
    work: TrainingJob, server: TrainerServer, tmp_path: Path
) -> None:
    mount = tmp_path / "mnt"
    mount.mkdir()
    job = settings(mount, processes_per_node=2)
    (tmp_path / "launch.yaml").write_text(yaml.safe_dump({"how": "train-job", "job": job.model_dump(mode="json")}))
    server.work = as_a_pod_does
    inputs = {name: getattr(work, name) for name in ("data", "questions", "regions", "candidates", "pairs", "policy")}
    here, there = tmp_path / "here", tmp_path / "there"
    run_stage("train", work.config, inputs, {"checkpoint": here})
    metrics = run_stage("train", work.config, {**inputs, "launch": tmp_path / "launch.yaml"}, {"checkpoint": there})
    assert metrics["pairs"] == 12
    assert hash_checkpoint(here) == hash_checkpoint(there)
    assert (there / "record.json").is_file()
    assert server.created == 1
    # the launch is no part of what was done: without it nothing is done again
    assert run_stage("train", work.config, inputs, {"checkpoint": there}) == metrics
    assert server.created == 1


@pytest.mark.usefixtures("kubeconfig")
def test_process_errors_come_before_the_job_status(work: TrainingJob, server: TrainerServer, tmp_path: Path) -> None:
    """The errors of the processes come before the status of the job in the message."""
    job = settings(tmp_path)
    there = copy_to_volume(work, tmp_path / "jobs" / derive_job_name(work, job), tmp_path)
    server.fails = "jobset failed"
    server.runs = True
    original = server._reconcile

    def failing(thing: Json) -> None:
        locate_failure_file(there, 1).write_text("step 3: the loss is not finite for 1 of 4 pairs: pair-1")
        original(thing)

    server._reconcile = failing  # type: ignore[method-assign]
    told = r"^step 3: the loss is not finite .*: TrainJob .* failed: .*jobset failed"
    with pytest.raises(TrainingFailed, match=told):
        train_on_nodes(work, job)


@pytest.mark.usefixtures("kubeconfig")
def test_a_complete_job_without_result_names_the_volume(work: TrainingJob, tmp_path: Path) -> None:
    """A complete job without a result means that its pods do not mount the shared volume."""
    with pytest.raises(TrainingFailed, match="do the job's pods mount shared"):
        train_on_nodes(work, settings(tmp_path))


def test_what_is_refused_before_a_job_is_made(work: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"batch_size is 4, which 3 processes \(3 nodes x 1\)"):
        train_on_nodes(work, settings(tmp_path, nodes=3))
    with pytest.raises(InvalidInput, match="is not mounted here"):
        train_on_nodes(work, settings(tmp_path / "gone"))


def test_inputs_are_copied_to_the_volume_unless_they_are_on_it(work: TrainingJob, tmp_path: Path) -> None:
    there = copy_to_volume(work, tmp_path / "jobs" / "x", tmp_path)
    assert there.pairs == tmp_path / "jobs" / "x" / "inputs" / "pairs"
    assert there.pairs.read_bytes() == work.pairs.read_bytes()
    assert hash_checkpoint(there.policy) == hash_checkpoint(work.policy)
    assert there.digest == work.digest  # so is the job's name
    assert copy_to_volume(there, tmp_path / "jobs" / "x", tmp_path).pairs == there.pairs


def test_preflight_looks_at_the_job_before_it_is_needed(server: TrainerServer, cluster: Cluster) -> None:
    job = settings(Path("/shared"))
    found = list(cluster_checks.check_trainjob(cluster, job))
    assert {check.name: check.state for check in found} == {
        "cluster: TrainJob": "pass",
        "cluster: TrainJob permissions": "pass",
        "cluster: TrainJob dry run": "pass",
    }
    assert server.objects == {}
    server.denied = {("create", "trainjobs"), ("get", "pods/log")}
    server.strict["trainjobs"] = lambda body: 'unknown field "spec.runtimePatches"'
    _, may, dry = cluster_checks.check_trainjob(cluster, job)
    assert "create trainjobs.trainer.kubeflow.org in clinic, get pods/log in clinic" in may.result
    assert "unknown field" in dry.result
    server.groups = set()
    (absent,) = cluster_checks.check_trainjob(cluster, job)
    assert absent.remedy == "install Kubeflow Trainer v2"
    assert len(list_job_permissions(job)) == 5


def test_a_launch_of_a_job_needs_its_settings() -> None:
    assert LaunchSettings(how="train-job", job=settings(Path("/shared"))).job is not None
    with pytest.raises(ValueError, match="expected an absolute path as mount"):
        settings(Path("shared"))
