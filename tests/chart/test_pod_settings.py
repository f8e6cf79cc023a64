"""Every pod of a release takes the same block of settings, and applies all of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.pod_settings import PodSettings
from clincot.deployment.service_settings import load_service_settings
from tests.chart.params_schema import POD_KEYS, SCHEMA
from tests.chart.rendering import Json, containers, joined, of_kind, pods, rendered, settings_of, template
from tests.support.pod_security import explain_denial

AFFINITY = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
        }
    }
}
BLOCK: Json = {
    "annotations": {"team": "imaging"},
    "labels": {"cost-center": "radiology"},
    "nodeSelector": {"pool": "own"},
    "tolerations": [{"key": "own", "operator": "Exists"}],
    "affinity": AFFINITY,
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "priorityClassName": "high",
    "runtimeClassName": "kata",
    "imagePullSecrets": ["pull"],
    "env": [{"name": "OWN", "value": "1"}],
    "volumes": [{"name": "own", "configMap": {"name": "own"}}],
    "volumeMounts": [{"name": "own", "mountPath": "/own"}],
    "securityContext": {"fsGroup": 2000, "supplementalGroups": [7]},
    "containerSecurityContext": {"runAsGroup": 3000},
}
# one value for each workload, all of which take the block
WORKLOADS = (
    "pipeline.hook.pod",
    "server.first.pod",
    "monitoring.pod",
    "seaweedfs.pod",
    "tests.pod",
    "judgeDefaults.pod",
    "server.pod",
)
EVERYTHING = (
    *("--set", "server.first.enabled=true,server.first.checkpoint=assets/policy"),
    *("--set", "monitoring.serviceMonitor=true"),
    *("--set-json", 'judges=[{"name":"med","modelUri":"s3://m/med"},{"name":"big","modelUri":"s3://m/big","gpus":4}]'),
)


def every_template(objects: tuple[Json, ...], folder: Path) -> dict[str, Json]:
    """Return {name: pod with metadata and spec} of the chart's workloads and of the policy."""
    found = {}
    (folder / "service.yaml").write_text(settings_of(objects)["service.yaml"])
    service = load_service_settings(folder / "service.yaml")
    policy = build_inference_service(service, "4f" * 32, "s3://clincot/platform/x", mode="Standard")
    for one in (*objects, policy):
        name = f"{one['kind']} {one['metadata']['name']}"
        if one["kind"] == "Pod":
            found[name] = one
        elif one["kind"] in ("Job", "StatefulSet", "Deployment"):
            found[name] = one["spec"]["template"]
        elif one["kind"] == "InferenceService":
            predictor = one["spec"]["predictor"]
            metadata = {key: predictor.get(key, {}) for key in ("labels", "annotations")}
            found[name] = {"metadata": metadata, "spec": joined(predictor, objects)}
    return found


def own_containers(pod: Json) -> list[Json]:
    return [one for one in containers(pod["spec"]) if one["name"] != "storage-initializer"]


def test_the_block_has_the_same_keys_everywhere() -> None:
    schema = json.loads(SCHEMA.read_text())
    assert set(schema["definitions"]["pod"]["properties"]) == set(BLOCK) == set(POD_KEYS)
    written = PodSettings().model_dump(mode="json")
    assert set(written) == set(BLOCK)
    for workload in (*WORKLOADS, "podDefaults"):
        part = schema
        for key in workload.split("."):
            part = part["properties"][key]
        assert part == {"$ref": "#/definitions/pod"}, workload


@pytest.mark.parametrize("engine", ["vllm", "clincot"])
def test_every_pod_applies_every_setting(engine: str, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    blocks: Json = {}
    for workload in WORKLOADS:
        part = blocks
        *above, last = workload.split(".")
        for key in above:
            part = part.setdefault(key, {})
        part[last] = BLOCK
    values.write_text(yaml.safe_dump(blocks))
    gpus = int(engine == "vllm")
    engines = f"server.engine={engine},server.gpus={gpus}"
    objects = rendered("trial", *EVERYTHING, "--values", str(values), "--set", engines)
    found = every_template(objects, tmp_path)
    assert {name.split()[0] for name in found} == {"Job", "Pod", "Deployment", "StatefulSet", "InferenceService"}
    assert (
        len(found) == 4 + 2 + 1 + 1 + 3
    )  # Jobs of hooks and rollout, tests, monitor, store, two judges and the policy
    for name, pod in found.items():
        spec, metadata = pod["spec"], pod["metadata"]
        assert BLOCK["labels"].items() <= metadata["labels"].items(), name
        assert metadata["labels"]["sidecar.istio.io/inject"] == "false", name
        assert BLOCK["annotations"].items() <= metadata["annotations"].items(), name
        for key in ("nodeSelector", "affinity", "priorityClassName", "runtimeClassName"):
            assert spec[key] == BLOCK[key], (name, key)
        if name != "InferenceService clincot" or engine == "vllm":
            assert spec["tolerations"] == BLOCK["tolerations"], name
        (spread,) = spec["topologySpreadConstraints"]
        assert BLOCK["topologySpreadConstraints"][0].items() <= spread.items(), name
        assert spec["imagePullSecrets"] == [{"name": "pull"}], name
        assert spec["securityContext"]["fsGroup"] == 2000, name
        assert spec["securityContext"]["supplementalGroups"] == [7], name
        assert BLOCK["volumes"][0] in spec["volumes"], name
        for container in own_containers(pod):
            assert BLOCK["env"][0] in container["env"], name
            assert BLOCK["volumeMounts"][0] in container["volumeMounts"], name
            assert container["securityContext"]["runAsGroup"] == 3000, name
        assert explain_denial(spec) == "", name


def test_labels_that_select_pods_cannot_be_changed(tmp_path: Path) -> None:
    """A network policy or a Service would otherwise lose the pod."""
    label = "podDefaults.labels.app\\.kubernetes\\.io/component=else"
    for one in of_kind(rendered("trial", "--set", label), "Job"):
        labels = one["spec"]["template"]["metadata"]["labels"]
        assert labels["app.kubernetes.io/component"] in ("hook", "bucket", "deployer")


def test_a_workload_replaces_single_settings_of_the_defaults() -> None:
    defaults = "podDefaults.nodeSelector.pool=cpu,podDefaults.priorityClassName=low"
    objects = rendered("trial", "--set", f"{defaults},tests.pod.priorityClassName=high")
    for name, pod in pods(objects):
        if not name.startswith("InferenceService"):
            assert pod["nodeSelector"] == {"pool": "cpu"}, name
            assert pod["priorityClassName"] == ("high" if name.startswith("Pod ") else "low"), name


def test_the_platform_may_assign_the_user(tmp_path: Path) -> None:
    """OpenShift takes user and fsGroup from the range of the namespace and refuses others (SCC restricted-v2)."""
    objects = rendered("trial", *EVERYTHING, "--set", "podSecurity.user=0")
    for name, pod in every_template(objects, tmp_path).items():
        parts = [pod["spec"].get("securityContext", {}), *(one["securityContext"] for one in own_containers(pod))]
        for part in parts:
            assert not {"runAsUser", "runAsGroup", "fsGroup"} & set(part), name
        assert explain_denial(pod["spec"]) == "", name
    assert yaml.safe_load(settings_of(objects)["cluster.yaml"])["security"]["user"] == 0


def test_a_judge_has_settings_arguments_and_gpus_of_its_own() -> None:
    judges = [
        {"name": "one", "modelUri": "s3://m/one", "pod": {"nodeSelector": {"gpu": "l4"}}},
        {"name": "four", "modelUri": "s3://m/four", "gpus": 4, "args": ["--max-model-len=4096"]},
        {"name": "own", "modelUri": "s3://m/own", "gpus": 4, "args": ["--tensor-parallel-size=2"]},
        {"name": "mig", "modelUri": "s3://m/mig", "gpuType": "nvidia.com/mig-1g.10gb"},
    ]
    flags = ("--set-json", f"judges={json.dumps(judges)}", "--set", "server.pod.nodeSelector.gpu=h100")
    predictors = {
        one["metadata"]["name"].removeprefix("clincot-judge-"): one["spec"]["predictor"]
        for one in of_kind(rendered("default", *flags), "InferenceService")
    }
    assert predictors["one"]["nodeSelector"] == {"gpu": "l4"}
    assert predictors["one"]["tolerations"][0]["key"] == "nvidia.com/gpu"  # kept from judgeDefaults.pod
    assert "nodeSelector" not in predictors["four"]  # that of the server is the server's alone
    assert "args" not in predictors["one"]["model"]
    assert predictors["four"]["model"]["args"] == ["--tensor-parallel-size=4", "--max-model-len=4096"]
    assert predictors["own"]["model"]["args"] == ["--tensor-parallel-size=2"]
    assert predictors["mig"]["model"]["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == "1"


def test_the_policys_affinity_is_not_that_of_judges(tmp_path: Path) -> None:
    """Judges share the policy's runtime, so the runtime has no affinity."""
    objects = rendered("production")
    assert all("affinity" not in one["spec"] for one in of_kind(objects, "ServingRuntime"))
    found = every_template(objects, tmp_path)
    assert "affinity" not in found["InferenceService clincot-judge-med-a"]["spec"]
    assert "podAntiAffinity" in found["InferenceService clincot"]["spec"]["affinity"]  # two replicas
    parallel = rendered("default", "--set", "server.gpus=2", "--set-json", 'server.args=["--max-model-len=8192"]')
    (tmp_path / "service.yaml").write_text(settings_of(parallel)["service.yaml"])
    service = load_service_settings(tmp_path / "service.yaml")
    assert service.vllm_args == ("--tensor-parallel-size=2", "--max-model-len=8192")


def test_extended_resources_are_accepted() -> None:
    limits = {"cpu": "8", "memory": "48Gi", "ephemeral-storage": "100Gi", "rdma/hca": "1", "hugepages-2Mi": "1Gi"}
    resources = json.dumps({"requests": {"cpu": "1", "memory": "32Gi"}, "limits": limits})
    objects = rendered("default", "--set-json", f"server.resources={resources}")
    service = yaml.safe_load(settings_of(objects)["service.yaml"])
    assert service["resources"]["limits"] == limits | {"nvidia.com/gpu": "1"}
    refused = template("--set", "store.existingSecret=s3", "--set", "server.resources.limits.gpu=1")
    assert refused.returncode != 0
    assert "gpu" in refused.stderr


@pytest.mark.parametrize("value", ["podDefaults.nodeSelector", "podDefaults.labels", "podDefaults.annotations"])
@pytest.mark.parametrize(
    ("prefix", "allowed"),
    [
        ("nvidia.com", True),
        ("feature.node.kubernetes.io", True),  # of Node Feature Discovery
        ("nginx.ingress.kubernetes.io", True),
        (".".join(["a" * 40] * 6), True),
        (".".join(["a" * 63] * 4), False),  # 4 * 63 + 3 = 255, and Kubernetes allows 253
        ("-a.example", False),
    ],
)
def test_keys_may_have_long_prefixes(value: str, prefix: str, allowed: bool) -> None:
    done = template("--set", "store.existingSecret=s3", "--set-json", f'{value}={{"{prefix}/key":"x"}}')
    assert (done.returncode == 0) is allowed, done.stderr
