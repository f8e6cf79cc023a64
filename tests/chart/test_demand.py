"""Profiles run on the cluster that they name: all that they request at the same time fits into it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import yaml

from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.service_settings import load_service_settings
from clincot.pipelines.cluster_settings import load_cluster_settings
from tests.chart.demand import Demand, Json, add_up, find_peak_of_run, parse_quantity, read_cluster, read_pod
from tests.chart.rendering import CHART, SHIPPED, containers, joined, of_kind, pods, rendered, settings_of
from tests.chart.run_pipeline import compile_run
from tests.support.recordings import read_recording

# A rollout of the first model, which the person who installs a profile may ask for.
FIRST = ("--set", "server.first.enabled=true,server.first.checkpoint=s3://clincot/models/base")


def count_shard_tasks(profile: str) -> int:
    """Return how many tasks of a run process shards at once."""
    objects = rendered(profile)
    (job,) = of_kind(objects, "Job", "clincot-pipeline")
    words = job["spec"]["template"]["spec"]["initContainers"][0]["args"]
    (shards,) = [int(word.partition("=")[2]) for word in words if word.startswith("--shards=")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(settings_of(objects)["cluster.yaml"])
        return min(shards, load_cluster_settings(path).count_shard_tasks())


def list_servers(objects: tuple[Json, ...], folder: Path) -> dict[str, Demand]:
    """Return what servers and the first rollout request, with all replicas.

    While a challenger is rolled out, the policy is there twice.
    """
    found = {}
    for name, pod in pods(objects):
        kind, _, own = name.partition(" ")
        if kind in ("Deployment", "StatefulSet") or own.startswith("clincot-rollout-"):
            found[name] = read_pod(pod)
        elif kind == "InferenceService":
            (service,) = of_kind(objects, kind, own)
            replicas = service["spec"]["predictor"]["minReplicas"]
            found[name] = add_up([read_pod(pod)] * replicas)
    (folder / "service.yaml").write_text(settings_of(objects)["service.yaml"])
    service = load_service_settings(folder / "service.yaml")
    manifest = build_inference_service(service, "4f" * 32, "s3://clincot/platform/x", mode="Standard")
    policy = read_pod(joined(manifest["spec"]["predictor"], objects))
    return found | {"champion": add_up([policy] * service.replicas), "challenger": add_up([policy] * service.replicas)}


@pytest.mark.slow
@pytest.mark.kfp
@pytest.mark.parametrize("profile", SHIPPED)
def test_a_profile_fits_the_cluster_that_it_names(profile: str, tmp_path: Path) -> None:
    """The servers, the first and another rollout, and a run at its widest point, at the same time."""
    objects = rendered(profile, *FIRST)
    cluster = read_cluster((CHART / f"values-{profile}.yaml").read_text())
    servers = list_servers(objects, tmp_path)
    run = find_peak_of_run(compile_run(profile), count_shard_tasks(profile))
    wanted = add_up([*servers.values(), run])
    report = "; ".join(f"{name} {dict(one)}" for name, one in {**servers, "run": run, "all": wanted}.items())
    assert {name: wanted[name] for name in cluster if wanted[name] > cluster[name]} == {}, report


@pytest.mark.slow
@pytest.mark.kfp
def test_the_trials_gpu_is_used_by_runs_only(tmp_path: Path) -> None:
    objects = rendered("trial")
    assert add_up(list(list_servers(objects, tmp_path).values()))["gpu"] == 0
    assert find_peak_of_run(compile_run("trial"), count_shard_tasks("trial"))["gpu"] == 1


def test_the_widest_point_of_a_run() -> None:
    """b and c run beside each other after a; the loop d runs up to two of its three items at once, beside b and c.

    CPUs: a = 4; b + c + 2 * d = 1 + 2 + 2 * 3 = 9.
    """

    def container(cpu: str, **more: Json) -> Json:
        return {"container": {"resources": {"resourceCpuRequest": cpu, "resourceMemoryRequest": "1Gi", **more}}}

    def task(component: str, *after: str, **more: Json) -> Json:
        return {"componentRef": {"name": component}, "dependentTasks": list(after), **more}

    loop = {"parameterIterator": {}, "iteratorPolicy": {"parallelismLimit": 2}}
    spec = {
        "root": {
            "dag": {"tasks": {"a": task("a"), "b": task("b", "a"), "c": task("c", "a"), "d": task("d", "a", **loop)}}
        },
        "components": {
            **{name: {"executorLabel": name} for name in "abc"},
            "d": {"dag": {"tasks": {"e": task("e")}}},
            "e": {"executorLabel": "e"},
        },
        "deploymentSpec": {
            "executors": {
                "a": container("4"),
                "b": container("1000m", accelerator={"resourceCount": "1"}),
                "c": container("2"),
                "e": container("3"),
            }
        },
    }
    assert find_peak_of_run(spec, 3) == {"cpu": 9, "memory": 4 * 2**30, "gpu": 1}


@pytest.mark.slow
@pytest.mark.kfp
def test_a_run_fits_into_the_quota_of_its_namespace() -> None:
    """Pods of runs and their claim are all that a profile with a quota has in the namespace."""
    objects = rendered("production")
    (quota,) = of_kind(objects, "ResourceQuota")
    hard = {name: parse_quantity(size) for name, size in quota["spec"]["hard"].items()}
    run = find_peak_of_run(compile_run("production"), count_shard_tasks("production"))
    names = {"cpu": "requests.cpu", "memory": "requests.memory", "gpu": "requests.nvidia.com/gpu"}
    assert {name: run[name] for name, key in names.items() if run[name] > hard[key]} == {}
    namespace = quota["metadata"]["namespace"]
    assert len(of_kind(objects, "PersistentVolumeClaim", namespace=namespace)) <= hard["persistentvolumeclaims"]
    assert {one for one, _ in pods(objects) if of_kind(objects, *one.split(), namespace)} == {"Pod clincot-preflight"}


def list_missing(container: Json, hard: Json, limit_range: Json | None) -> set[str]:
    """Return what a quota wants a container to say and it does not, after the defaults of a LimitRange.

    (podEvaluator).Constraints in pkg/quota/v1/evaluator/core/pods.go of kubernetes/kubernetes v1.34: a quota of
    requests.cpu, requests.memory, limits.cpu or limits.memory needs the same of every container. A LimitRange gives
    `defaultRequest` and `default` (mergeContainerResources in plugin/pkg/admission/limitranger/admission.go), and a
    limit without a request is the request, too.
    """
    given = limit_range["spec"]["limits"][0] if limit_range else {}
    limits = given.get("default", {}) | container.get("resources", {}).get("limits", {})
    requests = given.get("defaultRequest", {}) | limits | container.get("resources", {}).get("requests", {})
    said = {f"requests.{name}" for name in requests} | {f"limits.{name}" for name in limits}
    wanted = {f"{kind}.{name}" for kind in ("requests", "limits") for name in ("cpu", "memory")}
    return (wanted & set(hard)) - said


@pytest.mark.parametrize("more", [(), ("--set-json", 'quota.hard={"limits.cpu":"64","limits.memory":"512Gi"}')])
def test_a_quota_admits_the_pods_of_runs(more: tuple[str, ...]) -> None:
    """Argo's containers in the recorded pods request nothing, so the quota alone would refuse every pod of a run."""
    objects = rendered("production", *more)
    (quota,), (limit_range,) = of_kind(objects, "ResourceQuota"), of_kind(objects, "LimitRange")
    assert limit_range["metadata"]["namespace"] == quota["metadata"]["namespace"] == "clincot-runs"
    recorded = [one for pod in read_recording("run-pods") for one in containers(pod)]
    hard = quota["spec"]["hard"]
    assert {one["name"] for one in recorded if list_missing(one, hard, None)} >= {"init", "wait"}
    assert [one["name"] for one in recorded if list_missing(one, hard, limit_range)] == []
    assert not of_kind(rendered("trial"), "LimitRange")


@pytest.mark.parametrize("profile", SHIPPED)
def test_budgets_never_block_a_drain(profile: str) -> None:
    """Every PodDisruptionBudget leaves at least one replica that may be evicted."""
    objects = rendered(profile, "--set", "judgePdb.minAvailable=1")
    replicas = {"clincot": yaml.safe_load(settings_of(objects)["service.yaml"])["replicas"]}
    for one in of_kind(objects, "InferenceService"):
        replicas[one["metadata"]["name"]] = one["spec"]["predictor"]["minReplicas"]
    budgets = of_kind(objects, "PodDisruptionBudget")
    for one in budgets:
        (selected,) = one["spec"]["selector"]["matchLabels"].values()
        assert one["spec"]["minAvailable"] < replicas[selected], selected
    assert len(budgets) == (3 if profile == "production" else 0)  # the server and the judges with two replicas


def test_judges_run_on_a_schedule() -> None:
    """KEDA's ScaledObject sets the replicas of the Deployment that KServe makes, which KServe then leaves alone.

    Deployment.Replicas is ignored unless the class is none: deployment_reconciler.go of kserve/kserve aaac4e2.
    """
    objects = rendered("production", "--set", "judgeDefaults.schedule.enabled=true")
    judges = of_kind(objects, "InferenceService")
    scaled = {one["spec"]["scaleTargetRef"]["name"]: one["spec"] for one in of_kind(objects, "ScaledObject")}
    assert set(scaled) == {f"{one['metadata']['name']}-predictor" for one in judges}
    classes = {one["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] for one in judges}
    assert classes == {"external"}
    assert {spec["minReplicaCount"] for spec in scaled.values()} == {0}
    (trigger,) = scaled["clincot-judge-med-a-predictor"]["triggers"]
    assert (trigger["type"], trigger["metadata"]["desiredReplicas"]) == ("cron", "2")
    assert not of_kind(rendered("production"), "ScaledObject")
