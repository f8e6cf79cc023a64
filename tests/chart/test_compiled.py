"""The hook compiles the right pipeline from the rendered settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.cli.app import parse
from clincot.pipelines.params import decode_params
from clincot.training.launch_settings import load_launch_settings
from tests.chart.rendering import CHART, PROFILES, of_kind, rendered
from tests.chart.run_pipeline import compile_pipeline

CA = ("--set", "customCA.configMap=hospital-ca")
Json = dict[str, Any]


def compiled(profile: str, folder: Path, *flags: str) -> tuple[Json, Json, Json]:
    """Compile the pipeline with the arguments of the hook's container.

    Returns {task: container}, {task: Kubernetes settings} and {parameter: default}.
    """
    spec, platform = compile_pipeline(rendered(profile, *flags), folder)
    executors = spec["deploymentSpec"]["executors"]
    tasks = {name.removeprefix("exec-"): one["container"] for name, one in executors.items()}
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    defaults = {name: one.get("defaultValue") for name, one in parameters.items()}
    return tasks, {name.removeprefix("exec-"): one for name, one in pods.items()}, defaults


@pytest.mark.parametrize("profile", PROFILES)
def test_the_hook_uploads_a_pipeline_with_the_settings(profile: str, tmp_path: Path) -> None:
    """Images, resources, labels, CAs, cache and secrets are those of the values."""
    tasks, pods, defaults = compiled(profile, tmp_path, *CA)
    assert defaults["launch"]["how"] == "auto"
    assert {"preflight", "generate", "train", "decide"} <= set(tasks)
    values = yaml.safe_load((CHART / f"values-{profile}.yaml").read_text())
    gpus = values["pipeline"].get("gpu", {}).get("count", 1)
    requested = int(tasks["train"].get("resources", {}).get("accelerator", {}).get("resourceCount", 0))
    assert requested == (4 if profile == "production" else gpus)
    assert "accelerator" not in tasks["decide"]["resources"]
    assert tasks["train"]["image"] == f"clincot-{'cuda' if gpus else 'cpu'}:0.1.0"
    for name, pod in pods.items():
        labels = pod["podMetadata"]["labels"]
        assert labels["app.kubernetes.io/component"] == "run", name  # the network policies select it
        assert pod["securityContext"]["runAsUser"] == "10001", name
        assert {one["configMapName"] for one in pod["configMapAsVolume"]} == {"hospital-ca"}, name
        assert "clincot-cache" in str(pod["pvcMount"]), name
        assert "AWS_SECRET_ACCESS_KEY" in str(pod["secretAsEnv"]), name
    seen = {name for name, pod in pods.items() if "clincot-git" in str(pod.get("secretAsEnv", ""))}
    assert {name.partition("-")[0] for name in seen} == ({"preflight", "version"} if profile == "production" else set())


def test_a_train_jobs_nodes_get_the_resources_of_train(tmp_path: Path) -> None:
    """Each node of the TrainJob has the resources of production's `stages.train`.

    These are 4 GPUs, 32Gi of shared memory and 172800 s. The waiting task needs none of it. Both mount the cache at
    the same path.
    """
    flags = ("--set", "pipeline.trainJobs=true,pipeline.launch.sharding=fsdp,pipeline.launch.job.nodes=3")
    tasks, pods, defaults = compiled("production", tmp_path, *flags, "--set", "pipeline.queue=gpus")
    launch = load_launch_settings(tmp_path / "settings" / "launch.yaml")
    assert decode_params(defaults["launch"]) == launch.model_dump(mode="json")
    job = launch.job
    assert job is not None
    assert (launch.how, launch.sharding, job.nodes, job.processes_per_node) == ("train-job", "fsdp", 3, 4)
    assert (job.image, job.namespace, job.queue, job.shm) == ("clincot-cuda:0.1.0", "clincot-runs", "gpus", "32Gi")
    assert job.resources["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "4"}
    assert job.tolerations == ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},)
    (mount,) = pods["train"]["pvcMount"]
    assert (mount["constant"], mount["mountPath"]) == (job.claim, str(job.mount))
    assert "accelerator" not in tasks["train"]["resources"]
    assert tasks["train"]["resources"] == tasks["decide"]["resources"]
    assert pods["train"]["emptyDirMounts"] == pods["decide"]["emptyDirMounts"]  # no shared memory
    assert "tolerations" not in pods["train"]
    assert pods["train"]["activeDeadlineSeconds"] == str(job.timeout_s) == "172800"


@pytest.mark.parametrize("profile", PROFILES)
def test_the_hooks_say_whose_the_recurring_run_is(profile: str) -> None:
    """The model line and the release; names of pipeline and experiment only if they are set."""
    objects = rendered(profile, "--set", "line=nodules,pipeline.experiment=ward")
    for name in ("clincot-pipeline", "clincot-unschedule"):
        (job,) = of_kind(objects, "Job", name)
        spec = job["spec"]["template"]["spec"]
        for container in (*spec.get("initContainers", []), *spec["containers"]):
            words = container["args"]
            assert "--line=nodules" in words
            assert f"--installation={job['metadata']['namespace']}/clincot" in words
            assert "--experiment=ward" in words
            assert "--pipeline=clincot-nodules-round" in words
            parse(words)
