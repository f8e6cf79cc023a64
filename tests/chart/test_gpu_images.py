"""A container that gets a GPU has an image that can use it, and no other one has that image, which is larger by GBs.

Of a pod with vLLM and `clincot serve`, only vLLM's container gets the GPU, so this is checked container by container.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.service_settings import load_service_settings
from tests.chart.demand import read_cluster
from tests.chart.rendering import (
    CHART,
    SHIPPED,
    Json,
    containers,
    find_pod,
    joined,
    of_kind,
    pods,
    rendered,
    settings_of,
    template,
)
from tests.chart.run_pipeline import compile_run

FIRST = ("--set", "server.first.enabled=true,server.first.checkpoint=s3://clincot/models/base")
JUDGE = ("--set-json", 'judges=[{"name":"med","modelUri":"s3://m/med"},{"name":"far","url":"https://j.example/v1"}]')
TESTED_ON_GPU = ("--set-json", 'tests.resources.limits={"memory":"4Gi","nvidia.com/mig-1g.10gb":"1"}')
OWN = {"chrislusf/seaweedfs", "localhost/storage-initializer"}  # images of others, which use no GPU


def count_gpus(container: Json) -> int:
    return sum(int(size) for name, size in container["resources"].get("limits", {}).items() if "nvidia.com/" in name)


def list_containers(objects: tuple[Json, ...], folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (where, image without tag, GPUs) of every container of a release, the policy's included."""
    (folder / "service.yaml").write_text(settings_of(objects)["service.yaml"])
    service = load_service_settings(folder / "service.yaml")
    policy = build_inference_service(service, "4f" * 32, "s3://clincot/platform/x", mode="Standard")
    for name, pod in (*pods(objects), ("policy", joined(policy["spec"]["predictor"], objects))):
        for one in containers(pod):
            yield f"{name}: {one['name']}", one["image"].rpartition(":")[0].removeprefix("docker.io/"), count_gpus(one)


def explain_wrong_image(image: str, gpus: int) -> str:
    if gpus and image != "clincot-cuda":
        return f"{image} cannot use {gpus} GPUs"
    return "clincot-cuda without a GPU" if image == "clincot-cuda" and not gpus else ""


@pytest.mark.parametrize("profile", SHIPPED)
@pytest.mark.parametrize("more", [(), FIRST, (*FIRST, *JUDGE, *TESTED_ON_GPU)], ids=["", "first", "judges"])
def test_the_release_has_the_gpu_image_where_it_has_gpus(profile: str, more: tuple[str, ...], tmp_path: Path) -> None:
    found = list(list_containers(rendered(profile, *more), tmp_path))
    assert {image for _, image, _ in found} <= OWN | {"clincot-cpu", "clincot-cuda", "clincot-serve"}
    wrong = {where: explain_wrong_image(image, gpus) for where, image, gpus in found}
    assert {where: problem for where, problem in wrong.items() if problem} == {}


@pytest.mark.slow
@pytest.mark.kfp
@pytest.mark.parametrize("profile", SHIPPED)
def test_a_run_has_the_gpu_image_where_it_has_gpus(profile: str) -> None:
    executors = compile_run(profile)["deploymentSpec"]["executors"]
    wrong = {}
    for name, one in executors.items():
        gpus = int(one["container"]["resources"].get("accelerator", {}).get("resourceCount", 0))
        if problem := explain_wrong_image(one["container"]["image"].rpartition(":")[0], gpus):
            wrong[name] = problem
    assert wrong == {}
    used = {one["container"]["image"] for one in executors.values()}
    assert ("clincot-cuda:0.1.0" in used) is (read_cluster((CHART / f"values-{profile}.yaml").read_text())["gpu"] > 0)


def find_rollout(*arguments: str, profile: str = "production") -> Json:
    """Return the pod of the Job that rolls out the first model."""
    (job,) = [one for one in of_kind(rendered(profile, *arguments), "Job") if "rollout" in one["metadata"]["name"]]
    pod = find_pod(job, ())
    assert pod is not None
    return pod


def test_the_first_rollout_is_sized_for_the_model_that_it_loads() -> None:
    """It answers the golden questions with the model, so it gets a GPU, the memory of a server and a disk."""
    pod = find_rollout("--set", "server.first.enabled=true,server.first.checkpoint=s3://clincot/models/base")
    (deploy,) = pod["containers"]
    assert deploy["image"] == "clincot-cuda:0.1.0"
    assert deploy["resources"] == {
        "requests": {"cpu": "4", "memory": "32Gi"},
        "limits": {"cpu": "8", "memory": "48Gi", "nvidia.com/gpu": "1"},
    }
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    (tmp,) = [one for one in pod["volumes"] if one["name"] == "tmp"]
    assert tmp["emptyDir"] == {"sizeLimit": "64Gi"}


def test_a_rollout_that_loads_nothing_is_small() -> None:
    """A Job without a checkpoint only rolls out what a round has published."""
    pod = find_rollout("--set", "server.first.enabled=true")
    (deploy,) = pod["containers"]
    assert (deploy["image"], deploy["resources"]["limits"]) == ("clincot-cpu:0.1.0", {"cpu": "2", "memory": "4Gi"})
    assert "tolerations" not in pod


@pytest.mark.parametrize(
    ("flags", "image", "gpus"),
    [
        ("server.gpus=2", "clincot-cuda", 2),
        ("server.first.gpus=4", "clincot-cuda", 4),
        ("server.first.gpus=0", "clincot-cpu", 0),
        ("server.engine=clincot,server.gpus=0", "clincot-cpu", 0),
    ],
)
def test_the_gpus_of_the_first_rollout_are_a_value(flags: str, image: str, gpus: int) -> None:
    base = "server.first.enabled=true,server.first.checkpoint=s3://clincot/models/base,server.first.tmpSize=200Gi"
    pod = find_rollout("--set", f"{base},{flags}")
    (deploy,) = pod["containers"]
    assert (deploy["image"], count_gpus(deploy)) == (f"{image}:0.1.0", gpus)
    assert {"name": "tmp", "emptyDir": {"sizeLimit": "200Gi"}} in pod["volumes"]
    assert ("tolerations" in pod) is (gpus > 0)


def test_the_rollout_goes_where_its_values_say() -> None:
    """server.first.pod is stronger than the nodes of tasks with GPUs, and these than podDefaults."""
    flags = (
        *("--set", "server.first.enabled=true,server.first.checkpoint=s3://b/x"),
        *("--set", "podDefaults.nodeSelector.pool=small,pipeline.gpu.nodeSelector.pool=gpus"),
    )
    assert find_rollout(*flags)["nodeSelector"] == {"pool": "gpus"}
    assert find_rollout(*flags, "--set", "server.first.pod.nodeSelector.pool=own")["nodeSelector"] == {"pool": "own"}
    assert find_rollout(*flags, "--set", "server.first.gpus=0")["nodeSelector"] == {"pool": "small"}


MIG = "nvidia\\.com/mig-1g\\.10gb"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (f"--set-string pipeline.hook.resources.limits.{MIG}=1", "pipeline.hook.resources requests a GPU"),
        (f"--set-string server.frontResources.limits.{MIG}=1", "server.frontResources requests a GPU"),
        (f"--set-string server.engine=clincot,server.resources.limits.{MIG}=1", "or server.engine=vllm"),
        (
            "--set-string pipeline.gpu.type=amd.com/gpu,monitoring.resources.limits.amd\\.com/gpu=1",
            "monitoring.resources requests a GPU",
        ),
        ("--set server.gpus=0", "server.gpus is 0, but the chart's vLLM runs on GPUs only"),
        ("--set judgeDefaults.gpus=0", "gpus of the judge med is 0, but the chart's vLLM runs on GPUs only"),
        ("--set server.gpus=0,judgeDefaults.gpus=0,servingRuntime.create=false,servingRuntime.name=vllm-cpu", ""),
        (f"--set server.gpus=0 --set-string server.resources.limits.{MIG}=1", ""),
        (f"--set-string pipeline.hook.resources.limits.{MIG}=0", ""),
        ("--set-string monitoring.resources.limits.rdma/hca=1", ""),
    ],
)
def test_a_gpu_that_nothing_uses_is_refused(flags: str, message: str) -> None:
    done = template(
        *("--set", "store.existingSecret=s3", "--set-json", 'judges=[{"name":"med","modelUri":"s3://m/med"}]'),
        *flags.split(),
    )
    assert (message in done.stderr) if message else (done.returncode == 0), done.stderr
    assert (done.returncode != 0) is bool(message)
