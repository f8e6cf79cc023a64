"""Pods comply with Pod Security "restricted", and secrets are only in Secrets.

Also checked: resources, probes and service accounts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.service_settings import load_service_settings
from clincot.training.kubeflow_trainer import build_train_job
from clincot.training.launch_settings import load_launch_settings
from tests.chart.rendering import (
    PROFILES,
    Json,
    containers,
    joined,
    of_kind,
    pods,
    rendered,
    settings_of,
)
from tests.support.pod_security import explain_denial
from tests.support.recordings import read_recording
from tests.support.trainer_webhook import build_node_pod

HIDDEN = "hunter2-never-shown"
TRIAL = ("--set", f"store.accessKey={HIDDEN},store.secretKey={HIDDEN}")
FIRST = ("--set", "server.first.enabled=true,server.first.checkpoint=assets/policy")
JUDGE = ("--set-json", 'judges=[{"name":"med","modelUri":"s3://m/med"}]')
# (profile, flags) that render every kind of pod in every profile
EVERY = [(profile, (*FIRST, *more)) for profile in ("default", *PROFILES) for more in ((), JUDGE)]


def every_pod(tmp_path: Path) -> list[tuple[str, Json]]:
    """Return every pod, including the policy's, which `clincot deploy` creates."""
    found = []
    for profile, flags in EVERY:
        objects = rendered(profile, *flags)
        found += [(f"{profile}: {name}", pod) for name, pod in pods(objects)]
        path = tmp_path / "service.yaml"
        path.write_text(settings_of(objects)["service.yaml"])
        service = load_service_settings(path)
        policy = build_inference_service(service, "4f" * 32, "s3://clincot/platform/x", mode="Standard")
        found.append((f"{profile}: policy", joined(policy["spec"]["predictor"], objects)))
    return found


def own_containers(pod: Json) -> list[Json]:
    """Return the containers of a pod except KServe's, which has an image of its own."""
    return [one for one in containers(pod) if one["name"] != "storage-initializer"]


def test_pods_of_the_release_pass_restricted(tmp_path: Path) -> None:
    found = every_pod(tmp_path)
    assert {name.partition(": ")[2].split()[0] for name, _ in found} == {
        "Deployment",
        "InferenceService",
        "Job",
        "Pod",
        "StatefulSet",
        "policy",
    }
    assert {name: explain_denial(pod) for name, pod in found if explain_denial(pod)} == {}
    downloading = [name for name, pod in found if "storage-initializer" in str(pod.get("initContainers"))]
    assert len(downloading) >= 2 * len(PROFILES)


def test_kserves_own_initializer_is_refused_as_recorded() -> None:
    """Without the chart's ClusterStorageContainer, the pod of the recorded cluster was forbidden."""
    recorded = read_recording("podsecurity-events")[0]["message"]
    assert recorded.partition(" is forbidden: ")[2] == explain_denial(read_recording("inferenceservice-pod")["spec"])
    flags = (*JUDGE, "--set", "server.storageInitializer.create=false")
    ((_, judge),) = [pod for pod in pods(rendered("cpu", *flags)) if pod[0].startswith("InferenceService")]
    assert 'container "storage-initializer" must set' in explain_denial(judge)


def test_pods_of_a_train_job_pass_restricted(tmp_path: Path) -> None:
    """The runtime torch-distributed sets no security context, so the patch has to be enough."""
    objects = rendered("trial", "--set", "pipeline.trainJobs=true,pipeline.cache.accessMode=ReadWriteMany")
    (tmp_path / "launch.yaml").write_text(settings_of(objects)["launch.yaml"])
    job = load_launch_settings(tmp_path / "launch.yaml").job
    assert job is not None
    manifest = build_train_job("clincot-train-0", Path("/cache/work.json"), job)
    pod = build_node_pod(manifest)["spec"]
    assert explain_denial(pod) == ""
    assert pod["serviceAccountName"] == "clincot-trainer"
    (node,) = pod["containers"]
    assert node["securityContext"]["readOnlyRootFilesystem"] is True
    without = build_node_pod({"spec": manifest["spec"] | {"runtimePatches": []}})["spec"]
    assert 'container "node" must set securityContext.allowPrivilegeEscalation=false' in explain_denial(without)


def test_run_pods_pass_restricted_as_recorded() -> None:
    """Kubeflow Pipelines 2.17.0 adds what the compiled pipeline cannot say; the pipeline sets user and group."""
    users = set()
    for one in read_recording("run-pods"):
        spec = {"securityContext": one["securityContext"], "containers": one["containers"]}
        assert explain_denial(spec) == "", one["node-name"]
        own = [container for container in one["containers"] if container["image"].startswith("clincot-")]
        users |= {container["securityContext"]["runAsUser"] for container in own}
    assert users == {10001}


def test_changing_the_owner_of_the_stores_disk_needs_root() -> None:
    """seaweedfs.changeOwner says so; everything else of the pod stays restricted."""
    (pod,) = [pod for name, pod in pods(rendered("trial", "--set", "seaweedfs.changeOwner=true")) if "Stateful" in name]
    changing, *others = pod["initContainers"]
    assert changing["name"] == "change-owner"
    assert changing["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert "runAsUser=0" in explain_denial(pod)
    assert explain_denial(pod | {"initContainers": others}) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hostNetwork": True}, "host namespaces (hostNetwork=true)"),
        ({"volumes": [{"name": "x", "hostPath": {"path": "/"}}]}, "restricted volume types"),
        ({"securityContext": {"runAsNonRoot": True}}, 'pod or container "c" must set securityContext.seccompProfile'),
        ({"securityContext": {"runAsNonRoot": False, "seccompProfile": {"type": "Localhost"}}}, "pod must not set"),
        ({"securityContext": {"runAsNonRoot": True, "runAsUser": 0}}, "runAsUser=0 (pod must not set runAsUser=0)"),
        ({"ports": [{"containerPort": 80, "hostPort": 80}]}, "hostPort"),
        ({"livenessProbe": {"httpGet": {"path": "/", "port": 80, "host": "10.0.0.1"}}}, "probe or lifecycle host"),
        ({"privileged": True}, "must not set securityContext.privileged=true"),
        ({"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}, "unrestricted capabilities"),
        ({"capabilities": {"drop": ["NET_RAW"]}}, 'securityContext.capabilities.drop=["ALL"]'),
        ({"seLinuxOptions": {"type": "spc_t"}}, "seLinuxOptions"),
        ({"procMount": "Unmasked"}, "procMount"),
    ],
)
def test_what_restricted_forbids_is_found(change: Json, reason: str) -> None:
    """A change of the pod, of its container, or of the container's security context."""
    own = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL", "NET_RAW"]}}
    container: Json = {"name": "c", "securityContext": own}
    pod: Json = {"containers": [container], "securityContext": {"runAsNonRoot": True}}
    pod["securityContext"]["seccompProfile"] = {"type": "RuntimeDefault"}
    assert explain_denial(pod) == ""
    (key,) = change
    if key in ("hostNetwork", "volumes", "securityContext"):
        pod |= change
    elif key in ("ports", "livenessProbe"):
        container |= change
    else:
        container["securityContext"] = own | change
    assert reason in explain_denial(pod)


def test_own_containers_have_a_read_only_root_and_one_user(tmp_path: Path) -> None:
    """Neither is required by "restricted"."""
    for name, pod in every_pod(tmp_path):
        of_pod = pod.get("securityContext", {})
        for container in own_containers(pod):
            own, where = container["securityContext"], (name, container["name"])
            assert own.get("runAsUser", of_pod.get("runAsUser", 10001)) == 10001, where
            assert own["readOnlyRootFilesystem"] is True, where


def test_containers_can_write_to_tmp(tmp_path: Path) -> None:
    """Their root file system is read-only."""
    for name, pod in every_pod(tmp_path):
        for container in own_containers(pod):
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounted, (name, container["name"])
            volumes = {volume["name"] for volume in pod["volumes"]} | {"data"}  # data is the StatefulSet's claim
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name


def test_every_container_has_requests_and_limits(tmp_path: Path) -> None:
    for name, pod in every_pod(tmp_path):
        for container in containers(pod):
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][kind]), (name, container["name"], kind)


def test_servers_have_probes(tmp_path: Path) -> None:
    serving = 0
    for name, pod in every_pod(tmp_path):
        for container in own_containers(pod):
            if container.get("ports") or "policy" in name:
                serving += 1
                assert {"startupProbe", "readinessProbe"} <= set(container), (name, container["name"])
    assert serving > len(PROFILES)


def test_no_pod_runs_as_the_default_account(tmp_path: Path) -> None:
    """Only accounts that call the API server have a token for it."""
    callers = {"clincot-runner", "clincot-deployer", "clincot-bucket"}
    for name, pod in every_pod(tmp_path):
        account = pod["serviceAccountName"]
        assert account.startswith("clincot-"), name
        assert pod["automountServiceAccountToken"] is (account in callers), name
    for profile, flags in EVERY:
        objects = rendered(profile, *flags)
        accounts = {one["metadata"]["name"] for one in of_kind(objects, "ServiceAccount")}
        assert {pod["serviceAccountName"] for _, pod in pods(objects)} <= accounts


@pytest.mark.parametrize("profile", ["trial", "cpu"])
def test_secret_values_are_only_in_secrets(profile: str) -> None:
    """Keys set as values are in no ConfigMap, environment, argument or annotation."""
    flags = (*TRIAL, "--set", f"git.url=https://g.example/d.git,git.username=me,git.password={HIDDEN}")
    holding = [one for one in rendered(profile, *flags, *FIRST) if HIDDEN in yaml.safe_dump(one)]
    assert {one["kind"] for one in holding} == {"Secret"}
    assert {one["metadata"]["name"] for one in holding} == {"clincot-store", "clincot-git", "clincot-seaweedfs"}


def test_environments_refer_to_secrets() -> None:
    for profile, flags in EVERY:
        for name, pod in pods(rendered(profile, *flags)):
            for container in containers(pod):
                for variable in container.get("env", ()):
                    if any(word in variable["name"] for word in ("KEY", "TOKEN", "PASSWORD", "SECRET")):
                        assert "secretKeyRef" in variable["valueFrom"], (name, variable["name"])
                        assert "value" not in variable
