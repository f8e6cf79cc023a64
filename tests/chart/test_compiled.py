"""The settings that the chart renders make a pipeline: compiled by the hook's own arguments, read task by task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.cli import main
from tests.chart.rendering import CHART, PROFILES, of_kind, rendered, settings_of

CA = ("--set", "customCA.configMap=hospital-ca")
Json = dict[str, Any]


def compiled(profile: str, folder: Path, *flags: str) -> tuple[Json, Json]:
    """{task: container}, {task: Kubernetes settings} of the pipeline, with the arguments of the hook's container."""
    objects = rendered(profile, *flags)
    (job,) = of_kind(objects, "Job", "clincot-pipeline")
    settings = folder / "settings"
    settings.mkdir()
    for name, content in settings_of(objects).items():
        (settings / name).write_text(content)
    words = job["spec"]["template"]["spec"]["initContainers"][0]["args"]
    kept = [word.replace("/etc/clincot/settings", str(settings)) for word in words[2:]
            if word.partition("=")[0] not in ("--pipeline", "--experiment", "--namespace")]  # fmt: skip
    out = folder / "round.yaml"
    assert main(["pipeline", "compile", *kept, "--out", str(out)]) == 0
    spec, platform = yaml.load_all(out.read_text(), Loader=yaml.CSafeLoader)
    executors = spec["deploymentSpec"]["executors"]
    tasks = {name.removeprefix("exec-"): one["container"] for name, one in executors.items()}
    pods = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return tasks, {name.removeprefix("exec-"): one for name, one in pods.items()}


@pytest.mark.parametrize("profile", PROFILES)
def test_what_the_hook_uploads(profile: str, tmp_path: Path) -> None:
    tasks, pods = compiled(profile, tmp_path, *CA)
    assert {"preflight", "judge", "train", "decide"} <= set(tasks)
    values = yaml.safe_load((CHART / f"values-{profile}.yaml").read_text())
    gpus = values["pipeline"].get("gpu", {}).get("count", 1)
    asked = int(tasks["train"].get("resources", {}).get("accelerator", {}).get("resourceCount", 0))
    assert asked == (4 if profile == "production" else gpus)
    assert "accelerator" not in tasks["decide"]["resources"]
    assert tasks["train"]["image"] == f"clincot-{'cuda' if gpus else 'cpu'}:0.1.0"
    for name, pod in pods.items():
        labels = pod["podMetadata"]["labels"]
        assert labels["app.kubernetes.io/component"] == "run", name  # what the network policies select
        assert pod["securityContext"]["runAsUser"] == "10001", name
        assert {one["configMapName"] for one in pod["configMapAsVolume"]} == {"hospital-ca"}, name
        assert "clincot-cache" in str(pod["pvcMount"]), name
        assert "AWS_SECRET_ACCESS_KEY" in str(pod["secretAsEnv"]), name
    seen = {name for name, pod in pods.items() if "clincot-git" in str(pod.get("secretAsEnv", ""))}
    assert {name.partition("-")[0] for name in seen} == ({"preflight", "version"} if profile == "production" else set())
