"""Pods comply with Pod Security "restricted", and secrets are only in Secrets.

Also checked: resources, probes and service accounts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.service_settings import load_service_settings
from tests.chart.rendering import PROFILES, Json, containers, joined, of_kind, pods, rendered, settings_of

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
        policy = build_inference_service(service, "4f" * 32, "s3://b/x", mode="Standard")
        runtimes = {one["metadata"]["name"]: one for one in of_kind(objects, "ServingRuntime")}
        found.append((f"{profile}: policy", joined(policy["spec"]["predictor"], runtimes)))
    return found


def test_every_pod_is_restricted(tmp_path: Path) -> None:
    """Every control of the Pod Security standard "restricted" holds.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    """
    allowed = {"configMap", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    found = every_pod(tmp_path)
    assert {name.partition(": ")[2].split()[0] for name, _ in found} == {
        "Deployment",
        "InferenceService",
        "Job",
        "Pod",
        "StatefulSet",
        "policy",
    }
    for name, pod in found:
        of_pod = pod.get("securityContext", {})
        assert not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")), name
        for volume in pod.get("volumes", ()):
            assert set(volume) - {"name"} <= allowed, (name, volume)
        for container in containers(pod):
            own, where = container.get("securityContext", {}), (name, container["name"])
            assert own["allowPrivilegeEscalation"] is False, where
            assert own["capabilities"] == {"drop": ["ALL"]}, where
            assert own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is True, where
            assert own.get("runAsUser", of_pod.get("runAsUser", 10001)) == 10001, where
            assert (own.get("seccompProfile") or of_pod["seccompProfile"])["type"] == "RuntimeDefault", where
            assert own["readOnlyRootFilesystem"] is True, where  # not required by "restricted"
            assert {"privileged", "procMount"}.isdisjoint(own), where
            assert not any("hostPort" in port for port in container.get("ports", ())), where


def test_containers_can_write_to_tmp(tmp_path: Path) -> None:
    """Their root file system is read-only."""
    for name, pod in every_pod(tmp_path):
        for container in containers(pod):
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
        for container in containers(pod):
            if container.get("ports") or "policy" in name:
                serving += 1
                assert {"startupProbe", "readinessProbe"} <= set(container), (name, container["name"])
    assert serving > len(PROFILES)


def test_no_pod_runs_as_the_default_account(tmp_path: Path) -> None:
    """Only accounts that call the API server have a token for it."""
    callers = {"clincot-runner", "clincot-deployer"}
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
