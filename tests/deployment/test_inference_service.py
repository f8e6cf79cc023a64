"""The InferenceService against KServe's own CRD, if that file is available."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
from pathlib import Path

import httpx
import pytest
from jsonschema import Draft202012Validator

from clincot.config import load_params
from clincot.config.server_settings import ServeSettings, load_serve_settings
from clincot.deployment.crd import InvalidResource, build_validator, forbid_unknown_fields, validate_manifest
from clincot.deployment.inference_service import (
    WAIT_FOR_CALLS,
    build_canary,
    build_inference_service,
    build_revision_name,
    build_storage_secret,
)
from clincot.deployment.pod_settings import PodSettings
from clincot.deployment.service_settings import ServiceSettings, load_service_settings
from clincot.jsonl import InvalidRecord
from tests.support.crds import load_validator
from tests.support.http_server import serving

DIGEST = "4f" * 32
URI = f"s3://models/clincot/models/chest/{DIGEST}"
FULL = ServiceSettings(
    name="chest",
    namespace="serving",
    service_account="clincot-models",
    storage_container="large",
    replicas=2,
    runtime="kserve-vllmserver",
    pod=PodSettings(node_selector={"pool": "gpu"}, tolerations=({"key": "gpu", "operator": "Exists"},)),
    ca_config_map="corporate-ca",
    proxies={"HTTPS_PROXY": "http://proxy:3128"},
    api_keys_secret="clincot-keys",
    service_url="http://{service}.{namespace}.svc.cluster.local",
)


@pytest.fixture(scope="module")
def kserve() -> Draft202012Validator:
    return load_validator("InferenceService")


@pytest.mark.parametrize("mode", ["Standard", "Knative"])
@pytest.mark.parametrize("transformer", ["collocated", "separate"])
@pytest.mark.parametrize("settings", [ServiceSettings(), FULL], ids=["defaults", "full"])
def test_every_manifest_is_valid(
    kserve: Draft202012Validator, mode: str, transformer: str, settings: ServiceSettings
) -> None:
    settings = settings.model_copy(update={"transformer": transformer})
    manifest = build_inference_service(settings, DIGEST, URI, mode=mode)
    validate_manifest(manifest, kserve)
    if (mode, transformer) == ("Standard", "collocated"):
        manifest["spec"]["canary"] = [build_canary(settings, DIGEST, URI, 0)]
        validate_manifest(manifest, kserve)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "predictor", "minReplicass"), 2, "'minReplicass' was unexpected"),
        (("spec", "predictor", "minReplicas"), "abc", "spec.predictor.minReplicas: 'abc' is not of type 'integer'"),
        (("spec", "predictor", "model", "storageURI"), URI, "'storageURI' was unexpected"),
        (("spec", "predictors"), {}, "'predictors' was unexpected"),
        (("spec", "predictor", "model", "readinessProbe", "httpGet", "path"), 7, "7 is not of type 'string'"),
    ],
)
def test_a_misspelt_or_mistyped_field_is_named(
    kserve: Draft202012Validator, path: tuple[str, ...], value: object, message: str
) -> None:
    manifest = copy.deepcopy(build_inference_service(FULL, DIGEST, URI, mode="Standard"))
    place = manifest
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(InvalidResource) as refused:
        validate_manifest(manifest, kserve)
    assert message in str(refused.value)


def test_open_parts_of_a_schema_stay_open() -> None:
    schema = {
        "type": "object",
        "properties": {
            "metadata": {"type": "object"},
            "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True, "properties": {}},
            "map": {"type": "object", "additionalProperties": {"type": "string"}},
            "port": {"anyOf": [{"type": "integer"}, {"type": "string"}], "x-kubernetes-int-or-string": True},
        },
    }
    crd = {"spec": {"versions": [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]}}
    kind = build_validator(crd, "v1")
    validate_manifest({"metadata": {"name": "x"}, "free": {"any": 1}, "map": {"a": "b"}, "port": "http"}, kind)
    with pytest.raises(InvalidResource, match=r"map\.a: 1 is not of type 'string'"):
        validate_manifest({"map": {"a": 1}}, kind)
    assert forbid_unknown_fields({"type": "string", "nullable": True}) == {
        "anyOf": [{"type": "string"}, {"type": "null"}]
    }


def test_the_predictor_has_vllm_and_a_collocated_transformer() -> None:
    """1800 s of start-up with a probe every 10 s allow 180 failures."""
    spec = build_inference_service(FULL, DIGEST, URI, mode="Standard")["spec"]["predictor"]
    assert spec["model"]["storageUri"] == URI
    assert spec["model"]["startupProbe"]["failureThreshold"] == 180
    assert spec["model"]["startupProbe"]["httpGet"] == {"path": "/v1/models", "port": 8085}
    assert {"name": "devshm", "mountPath": "/dev/shm"} in spec["model"]["volumeMounts"]
    (container,) = spec["containers"]
    assert container["name"] == "transformer-container"
    assert "--predictor_host=localhost:8085" in container["args"]
    assert spec["name"] == build_revision_name(DIGEST) == "r" + DIGEST[:10]
    assert spec["serviceAccountName"] == "clincot-models"


@pytest.mark.parametrize("given", ["", "store.example", "store.example,localhost"])
def test_a_proxy_is_never_between_transformer_and_vllm(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are in one pod, and images go from one to the other; httpx, the server's client, reads the variables."""
    with serving(lambda request: (502, b"proxy")) as proxy, serving(lambda request: (200, b"vLLM")) as vllm:
        proxies = {"HTTP_PROXY": proxy.url} | ({"NO_PROXY": given} if given else {})
        settings = FULL.model_copy(update={"proxies": proxies})
        spec = build_inference_service(settings, DIGEST, URI, mode="Standard")["spec"]["predictor"]
        for container in (spec["model"], *spec["containers"]):
            for one in container["env"]:
                if one["name"].endswith("_PROXY"):
                    monkeypatch.setenv(one["name"], one["value"])
            assert os.environ["NO_PROXY"].startswith(given)
            for host in ("localhost", "127.0.0.1"):
                assert httpx.get(vllm.url.replace("127.0.0.1", host)).text == "vLLM"
            assert httpx.get("http://elsewhere.example").text == "proxy"
    without = build_inference_service(FULL.model_copy(update={"proxies": {}}), DIGEST, URI, mode="Standard")
    assert "NO_PROXY" not in json.dumps(without)


@pytest.mark.parametrize("mode", ["Standard", "Knative"])
def test_fixed_replicas_have_no_autoscaler(mode: str) -> None:
    """In Standard mode, KServe's default class `hpa` would create a HorizontalPodAutoscaler for every revision.

    The classes are in pkg/constants/constants.go of kserve/kserve (main); with `none`, createRawDefaultDeployment in
    reconcilers/deployment/deployment_reconciler.go takes the number of replicas from minReplicas.
    """
    manifest = build_inference_service(FULL, DIGEST, URI, mode=mode)
    autoscaler = manifest["metadata"]["annotations"].get("serving.kserve.io/autoscalerClass")
    assert autoscaler == ("none" if mode == "Standard" else None)
    assert manifest["spec"]["predictor"]["minReplicas"] == 2


def test_manifests_contain_no_store_keys() -> None:
    secret, account = build_storage_secret(FULL, secret="store", endpoint="https://s3.example:9000", region="eu-1")
    assert secret["metadata"]["annotations"]["serving.kserve.io/s3-endpoint"] == "s3.example:9000"
    assert secret["metadata"]["annotations"]["serving.kserve.io/s3-usehttps"] == "1"
    assert secret["metadata"]["annotations"]["serving.kserve.io/s3-cabundle-configmap"] == "corporate-ca"
    assert "data" not in secret
    assert "stringData" not in secret
    assert account["secrets"] == [{"name": "store"}]


def test_engine_clincot_needs_no_vllm_container(kserve: Draft202012Validator) -> None:
    """On a cluster without GPUs: the chart's ServingRuntime runs `clincot serve`, without a second container."""
    small = FULL.model_copy(update={"engine": "clincot", "runtime": "clincot-serve"})
    for mode in ("Standard", "Knative"):
        validate_manifest(build_inference_service(small, DIGEST, URI, mode=mode), kserve)
    predictor = build_inference_service(small, DIGEST, URI, mode="Standard")["spec"]["predictor"]
    assert "containers" not in predictor
    assert predictor["model"]["modelFormat"] == {"name": "clincot"}
    assert predictor["model"]["runtime"] == "clincot-serve"
    assert predictor["model"]["args"][0] == "--checkpoint=/mnt/models"
    assert predictor["model"]["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": 8080}
    stable = build_inference_service(small, DIGEST, URI, mode="Standard")
    stable["spec"]["canary"] = [build_canary(small, "5e" * 32, URI, 10)]
    validate_manifest(stable, kserve)
    with pytest.raises(ValueError, match="engine clincot needs runtime"):
        ServiceSettings(engine="clincot")
    with pytest.raises(ValueError, match="no separate transformer"):
        ServiceSettings(engine="clincot", runtime="clincot-serve", transformer="separate")


@pytest.mark.parametrize("engine", ["vllm", "clincot"])
def test_measured_settings_reach_the_server(kserve: Draft202012Validator, engine: str) -> None:
    """The server reads from its arguments exactly what the gate measured, and what the deployment adds.

    Recipe (section serve) -> manifest of the checkpoint -> InferenceService -> arguments -> settings of the server.
    """
    measured = load_params(
        None, ("serve.max_new_tokens=40", "serve.max_images=2", 'serve.propose.grounders={"windows": 3}')
    ).serve
    own = {"abstain_below": 0.4, "running": 16, "abstain_refusal": "{{.Name}} é: $(HOME)"}
    settings = FULL.model_copy(update={"engine": engine, "runtime": "clincot-serve", "serve": own})
    manifest = build_inference_service(settings.with_measured(measured), DIGEST, URI, mode="Standard")
    validate_manifest(manifest, kserve)
    predictor = manifest["spec"]["predictor"]
    container = predictor["model"] if engine == "clincot" else predictor["containers"][0]
    overrides = tuple(arg.removeprefix("--set=") for arg in container["args"] if arg.startswith("--set="))
    server = load_serve_settings(overrides)
    assert server == ServeSettings.model_validate(measured.model_dump() | own)
    assert server.answer_digest == measured.answer_digest
    assert server.max_images == 2
    assert not [arg for arg in container["args"] if "{{" in arg or "$(" in arg]  # KServe and Kubernetes fill these in
    assert len({arg.partition("=")[0] + arg.split("=")[1] for arg in container["args"] if "=" in arg}) == len(
        [arg for arg in container["args"] if "=" in arg]
    )  # no argument twice: KServe appends them to the runtime's


@pytest.mark.parametrize(
    ("serve", "why"),
    [
        ({"max_new_tokens": 160}, r"serve\.max_new_tokens decides the answers, so a deployment cannot change it"),
        ({"grace_s": 20}, r"serve\.grace_s has to fit the time that Kubernetes gives the pod; set grace_s"),
        ({"propose": {"grounders": {"windows": 9}}}, r"serve\.propose decides the answers"),
        ({"abstain_under": 0.4}, "abstain_under"),
        ({"running": 0}, "running"),
        ({"deadline_s": 120}, r"grace_s is 75, but a request may take serve\.deadline_s, which is 120 seconds"),
    ],
)
def test_settings_of_the_server_are_checked_with_the_service(serve: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        ServiceSettings(serve=serve)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("replicass: 2\n")
    with pytest.raises(InvalidRecord, match=r"service\.yaml: replicass"):
        load_service_settings(path)
    path.write_text("proxies: {HTTPS_PROXY: 'http://me:hunter2@proxy'}\n")
    with pytest.raises(InvalidRecord, match="contains credentials") as refused:
        load_service_settings(path)
    assert "hunter2" not in str(refused.value)


def test_a_pod_has_the_time_that_its_server_needs_to_end() -> None:
    """5 s until no new request comes, 75 s of the server for those that it has, and 10 s: KServe's default is 30 s."""
    settings = FULL.model_copy(update={"drain_s": 5, "grace_s": 75})
    predictor = build_inference_service(settings, DIGEST, URI, mode="Standard")["spec"]["predictor"]
    assert predictor["terminationGracePeriodSeconds"] == 5 + 75 + 10
    (transformer,) = predictor["containers"]
    assert transformer["lifecycle"]["preStop"]["exec"]["command"] == ["/bin/sh", "-c", "sleep 5"]
    assert "--set=grace_s=75" in transformer["args"]
    assert load_serve_settings(("grace_s=75",)).grace_s == 75  # the server takes the argument
    separate = settings.model_copy(update={"transformer": "separate"})
    spec = build_inference_service(separate, DIGEST, URI, mode="Standard")["spec"]
    assert spec["transformer"]["terminationGracePeriodSeconds"] == 90
    assert spec["transformer"]["containers"][0]["lifecycle"] == transformer["lifecycle"]


def test_a_transformer_in_pods_of_its_own_gets_the_checkpoint(kserve: Draft202012Validator) -> None:
    """KServe gives a checkpoint to the predictor's pods, and to a custom transformer's with this variable only.

    Reconcile in pkg/controller/v1beta1/inferenceservice/components/transformer.go of kserve/kserve@0217bda asks the
    CustomTransformer for its storage, which is this variable (GetStorageUri). A collocated one must not have it
    (test_a_collocated_transformer_has_no_storage).
    """
    separate = FULL.model_copy(update={"transformer": "separate"})
    manifest = build_inference_service(separate, DIGEST, URI, mode="Standard")
    validate_manifest(manifest, kserve)
    (container,) = manifest["spec"]["transformer"]["containers"]
    assert {"name": "STORAGE_URI", "value": URI} in container["env"]
    assert "--checkpoint=/mnt/models" in container["args"]  # where KServe's initializer puts it
    assert "STORAGE_URI" not in json.dumps(build_inference_service(FULL, DIGEST, URI, mode="Standard"))


@pytest.mark.parametrize("engine", ["vllm", "clincot"])
def test_grpc_has_a_port_of_its_own(kserve: Draft202012Validator, engine: str) -> None:
    """The first port is HTTP's, because KServe's Service has the first one as port 80."""
    settings = FULL.model_copy(update={"grpc": True, "engine": engine, "runtime": "clincot-serve"})
    manifest = build_inference_service(settings, DIGEST, URI, mode="Standard")
    manifest["spec"]["canary"] = [build_canary(settings, "5e" * 32, URI, 10)]
    validate_manifest(manifest, kserve)
    predictor = manifest["spec"]["predictor"]
    container = predictor["model"] if engine == "clincot" else predictor["containers"][0]
    assert [(port["name"], port["containerPort"]) for port in container["ports"]] == [("http", 8080), ("grpc", 8081)]
    assert "--grpc-port=8081" in container["args"]
    off = json.dumps(build_inference_service(settings.model_copy(update={"grpc": False}), DIGEST, URI, mode="Standard"))
    assert "grpc" not in off


@pytest.mark.parametrize("transformer", ["collocated", "separate"])
def test_vllm_sends_its_spans_where_the_transformer_does(transformer: str) -> None:
    """OTLP over HTTP below the same address, because vLLM's default is gRPC (get_span_exporter, vllm/tracing)."""
    traced = FULL.model_copy(
        update={"serve": {"traces_endpoint": "http://otel.tools:4318/"}, "transformer": transformer}
    )
    spec = build_inference_service(traced, DIGEST, URI, mode="Standard")["spec"]
    assert "--otlp-traces-endpoint=http://otel.tools:4318/v1/traces" in spec["predictor"]["model"]["args"]
    env = {one["name"]: one["value"] for one in spec["predictor"]["model"]["env"]}
    assert env["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf"
    assert env["OTEL_SERVICE_NAME"] == "chest-vllm"
    parts = [*spec["predictor"].get("containers", ()), *spec.get("transformer", {}).get("containers", ())]
    assert '--set=traces_endpoint="http://otel.tools:4318/"' in parts[0]["args"]
    off = json.dumps(build_inference_service(FULL, DIGEST, URI, mode="Standard"))
    assert "otlp" not in off.lower()


def test_knative_gets_no_fields_that_its_webhook_refuses() -> None:
    """knative/serving (main), pkg/apis/serving/fieldmask.go: PodSpecMask and ContainerMask do not have them."""
    text = json.dumps(build_inference_service(FULL, DIGEST, URI, mode="Knative"))
    assert "terminationGracePeriodSeconds" not in text
    assert "lifecycle" not in text


def test_every_container_has_a_liveness_probe() -> None:
    small = FULL.model_copy(update={"engine": "clincot", "runtime": "clincot-serve"})
    separate = FULL.model_copy(update={"transformer": "separate"})
    for settings in (FULL, separate, small):
        spec = build_inference_service(settings, DIGEST, URI, mode="Standard")["spec"]
        parts = [spec["predictor"], spec.get("transformer", {})]
        containers = [container for part in parts for container in part.get("containers", [])]
        for container in (spec["predictor"]["model"], *containers):
            assert container["livenessProbe"]["httpGet"]["path"] in ("/health", "/v2/health/live")


def test_vllm_waits_for_the_calls_of_its_transformer() -> None:
    """The very command of the preStop hook, with an open connection in place of a call, on a port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        command = WAIT_FOR_CALLS.format(drain=0, port=port)
        with socket.create_connection(("127.0.0.1", port)):
            hook = subprocess.Popen(["/bin/sh", "-c", command])
            with pytest.raises(subprocess.TimeoutExpired):
                hook.wait(timeout=5)  # longer than the three quiet seconds
        assert hook.wait(timeout=60) == 0
