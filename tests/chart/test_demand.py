"""Profiles run on the cluster that they name: all that they request at the same time fits into it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import pytest
import yaml

from clincot.cli.app import main
from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.service_settings import load_service_settings
from tests.chart.demand import Demand, Json, add_up, find_peak_of_run, read_cluster, read_pod
from tests.chart.rendering import CHART, PROFILES, joined, of_kind, pods, rendered, settings_of


@cache
def compile_run(profile: str) -> Json:
    """Return the pipeline that the hook uploads."""
    with tempfile.TemporaryDirectory() as folder:
        return _compile_run(rendered(profile), Path(folder))


def _compile_run(objects: tuple[Json, ...], folder: Path) -> Json:
    settings = folder / "settings"
    settings.mkdir()
    for name, content in settings_of(objects).items():
        (settings / name).write_text(content)
    (job,) = of_kind(objects, "Job", "clincot-pipeline")
    words = job["spec"]["template"]["spec"]["initContainers"][0]["args"][2:]
    left_out = ("--pipeline", "--experiment", "--namespace")
    kept = [word for word in words if word.partition("=")[0] not in left_out]
    arguments = [word.replace("/etc/clincot/settings", str(settings)) for word in kept]
    out = folder / "round.yaml"
    assert main(["pipeline", "compile", *arguments, "--out", str(out)]) == 0
    spec: Json = next(iter(yaml.load_all(out.read_text(), Loader=yaml.CSafeLoader)))
    return spec


def list_servers(objects: tuple[Json, ...], folder: Path) -> dict[str, Demand]:
    """Return what servers request, with all replicas; while a challenger is rolled out, the policy is there twice."""
    found = {}
    for name, pod in pods(objects):
        kind, _, own = name.partition(" ")
        if kind in ("Deployment", "StatefulSet"):
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
@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_fits_the_cluster_that_it_names(profile: str, tmp_path: Path) -> None:
    """The servers, a rollout and a run at its widest point, at the same time."""
    objects = rendered(profile)
    text = (CHART / f"values-{profile}.yaml").read_text()
    cluster, shards = read_cluster(text), yaml.safe_load(text)["pipeline"]["shards"]
    servers = list_servers(objects, tmp_path)
    run = find_peak_of_run(compile_run(profile), shards)
    wanted = add_up([*servers.values(), run])
    report = "; ".join(f"{name} {dict(one)}" for name, one in {**servers, "run": run, "all": wanted}.items())
    assert {name: wanted[name] for name in cluster if wanted[name] > cluster[name]} == {}, report


@pytest.mark.slow
@pytest.mark.kfp
def test_the_trials_gpu_is_used_by_runs_only(tmp_path: Path) -> None:
    objects = rendered("trial")
    assert add_up(list(list_servers(objects, tmp_path).values()))["gpu"] == 0
    assert find_peak_of_run(compile_run("trial"), 2)["gpu"] == 1


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


@pytest.mark.parametrize("profile", PROFILES)
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
