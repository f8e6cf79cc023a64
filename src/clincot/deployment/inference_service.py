"""The InferenceService of a checkpoint.

vLLM is its predictor, and `clincot serve` its transformer. By default the transformer is collocated: it is a container
of the predictor's pod (KServe's `transformer-container`) and reaches vLLM at `--predictor_host=localhost:…`. This has
three advantages:

- The second turn of a chain reaches the same vLLM, which has the first turn in its prefix cache.
- While two revisions share the traffic, both turns are answered by the same checkpoint.
- `spec.canary[]` works. KServe routes a canary's share directly to the canary's *predictor* (applyCanaryWeights in
  kserve's httproute_reconciler.go) and so bypasses a separate transformer.
"""

from __future__ import annotations

from typing import Any

from clincot.config.server_settings import TRACES_PATH
from clincot.deployment.service_settings import ServiceSettings

GROUP, VERSION, PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
CRD_NAME = f"{PLURAL}.{GROUP}"
MODE_ANNOTATION = "serving.kserve.io/deploymentMode"
AUTOSCALER_ANNOTATION = "serving.kserve.io/autoscalerClass"
TAG_ROUTING_ANNOTATION = "serving.kserve.io/enable-tag-routing"
REPLICAS_ANNOTATION = (
    "clincot/replicas"  # annotation, while a canary exists: replicas of the stable predictor without it
)
INSTANCE_LABEL = "app.kubernetes.io/instance"
SERVICE_LABEL = "clincot/service"  # label of all objects of a service, including its pods
RELEASE_LABEL = "clincot/release"  # label: the Helm release that owns the service, see former_services.py
MODEL_FORMATS = {"vllm": "vLLM", "clincot": "clincot"}  # engine -> the format that its ServingRuntime supports
DIGEST_ANNOTATION = "clincot/checkpoint"  # annotation: the checkpoint of the last finished rollout
MODELS_PATH = "/mnt/models"  # where KServe's storage initializer downloads the checkpoint to
PORT, GRPC_PORT, VLLM_PORT = 8080, 8081, 8085
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
_PERIOD_S = 10
_END_S = 10  # for a container to end after its last request

# The kubelet ends the containers of a pod at the same time, and vLLM aborts its requests on SIGTERM. So vLLM waits
# until the transformer has had no open call for three seconds. The rows of /proc/net/tcp are: number, local address,
# remote address, state (01: established), in hexadecimal digits; only the pod's own calls come to a loopback address.
WAIT_FOR_CALLS = """sleep {drain}; quiet=0
while [ "$quiet" -lt 3 ]; do
  if grep -Eqs ': (0100007F|0{{24}}01000000|0{{16}}FFFF00000100007F):{port:04X} [0-9A-F]+:[0-9A-F]+ 01 ' \
    /proc/net/tcp /proc/net/tcp6; then quiet=0; else quiet=$((quiet + 1)); fi
  sleep 1
done"""

Json = dict[str, Any]


def build_revision_name(digest: str) -> str:
    """The predictor's name, derived from its checkpoint.

    Kubernetes requires a letter as its first character.
    """
    return f"r{digest[:10]}"


def build_inference_service(settings: ServiceSettings, digest: str, uri: str, *, name: str = "", mode: str) -> Json:
    """Build the InferenceService with one predictor.

    mode: "Standard" or "Knative", KServe's deployment modes.
    """
    annotations = {MODE_ANNOTATION: mode}
    if mode == "Standard":
        # The number of replicas is fixed; KServe's default class creates a HorizontalPodAutoscaler for every revision.
        annotations[AUTOSCALER_ANNOTATION] = "none"
    if mode == "Knative":
        # gives a revision without traffic its own address, which the smoke test needs
        annotations[TAG_ROUTING_ANNOTATION] = "true"
    spec: Json = {"predictor": build_predictor(settings, digest, uri, mode=mode)}
    if settings.transformer == "separate":
        transformer = _build_transformer(settings, name="kserve-container")
        # KServe gives a checkpoint to the predictor's pods only, unless a custom transformer asks for one in this way
        # (CustomTransformer.GetStorageUri in pkg/apis/serving/v1beta1/transformer_custom.go of kserve/kserve@0217bda).
        transformer["env"] = [*transformer["env"], {"name": "STORAGE_URI", "value": uri}]
        spec["transformer"] = {
            "minReplicas": settings.replicas,
            "containers": [transformer],
            **_build_pod_fields(settings),
        }
        if mode == "Standard":
            spec["transformer"] |= _build_grace_period(settings)
            _add_pre_stop(transformer, f"sleep {settings.drain_s}")
        spec["transformer"] = _apply_pod_settings(settings, spec["transformer"])
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "InferenceService",
        "metadata": {
            "name": name or settings.name,
            "namespace": settings.namespace,
            "annotations": annotations,
            "labels": build_labels(settings),
        },
        "spec": spec,
    }


def build_labels(settings: ServiceSettings) -> dict[str, str]:
    """Labels that KServe copies to pods and Services.

    The chart's network policies, disruption budgets and monitors select by them.
    """
    labels = {
        "app.kubernetes.io/managed-by": "clincot",
        "app.kubernetes.io/part-of": "clincot",
        "app.kubernetes.io/component": "server",
        SERVICE_LABEL: settings.name,
    }
    if settings.instance:
        labels[INSTANCE_LABEL] = settings.instance
    if settings.release is not None:
        labels[RELEASE_LABEL] = settings.release.name
    return labels


def count_canary_replicas(replicas: int, percent: int) -> int:
    """The replicas that a share of the traffic needs, at least one."""
    return max(1, -(-replicas * percent // 100))


def build_canary(settings: ServiceSettings, digest: str, uri: str, percent: int, *, replicas: int = 1) -> Json:
    """Build one entry of spec.canary[], a second predictor with a traffic share.

    minReplicas is set explicitly, because KServe's default is ceil(stable * percent / 100), which is 0 at 0 %. The
    schema requires the model container's name here, but KServe refuses a name in the stable predictor; an empty name
    is valid in both.
    """
    predictor = build_predictor(settings, digest, uri, mode="Standard")
    predictor["model"]["name"] = ""
    predictor["minReplicas"] = replicas
    return {"trafficPercent": percent, "predictor": predictor}


def build_predictor(settings: ServiceSettings, digest: str, uri: str, *, mode: str) -> Json:
    """Build spec.predictor; in Standard mode it is named after the checkpoint."""
    if settings.engine == "clincot":
        model, transformers = _build_embedded_model(settings, uri), []
    else:
        collocated = settings.transformer == "collocated"
        model = _build_vllm_model(settings, uri, VLLM_PORT if collocated else PORT)
        host = f"--predictor_host=localhost:{VLLM_PORT}"
        transformers = [_build_transformer(settings, host, name="transformer-container")] if collocated else []
    if settings.runtime:
        model["runtime"] = settings.runtime
    out: Json = {"minReplicas": settings.replicas, "model": model, **_build_pod_fields(settings)}
    if mode == "Standard":  # Knative drains by itself, and its webhook refuses these fields
        out |= _build_grace_period(settings)
        _add_pre_stop(model, f"sleep {settings.drain_s}")
        if transformers:
            _add_pre_stop(model, WAIT_FOR_CALLS.format(drain=settings.drain_s, port=VLLM_PORT))
            _add_pre_stop(transformers[0], f"sleep {settings.drain_s}")
    out["volumes"] = [
        {"name": "devshm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
        *out.get("volumes", ()),
    ]
    if mode == "Standard":
        # Promotion moves the canary to the stable predictor under the same name, so its running pods are kept.
        out["name"] = build_revision_name(digest)
        out["securityContext"] = {"seccompProfile": {"type": "RuntimeDefault"}}  # Knative allows it only on containers
    if transformers:
        out["containers"] = transformers
    if settings.storage_container:
        out["storageContainerName"] = settings.storage_container
    return _apply_pod_settings(settings, out)


def _apply_pod_settings(settings: ServiceSettings, component: Json) -> Json:
    return settings.pod.apply_to_spec(component, {SERVICE_LABEL: settings.name})


def _build_vllm_model(settings: ServiceSettings, uri: str, port: int) -> Json:
    return {
        "modelFormat": {"name": MODEL_FORMATS["vllm"]},
        "storageUri": uri,
        "args": [
            f"--port={port}",
            *_build_trace_arguments(settings),
            *settings.vllm_args,
        ],  # appended to the runtime's own; vLLM uses the last value of an option
        "resources": {kind: dict(sizes) for kind, sizes in settings.resources.items()},
        "startupProbe": _build_probe("/v1/models", port, failures=-(-settings.startup_s // _PERIOD_S)),
        "readinessProbe": _build_probe("/v1/models", port, failures=3),
        "livenessProbe": _build_probe("/health", port, failures=6),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "devshm", "mountPath": "/dev/shm"}],
        "env": [*_build_environment(settings), *_build_trace_environment(settings)],
    }


def _build_trace_arguments(settings: ServiceSettings) -> list[str]:
    """The arguments with which vLLM sends its spans where `clincot serve` sends its own; they continue its traces.

    vLLM needs the whole address, and the packages of OpenTelemetry, which are among its requirements since
    vllm-project/vllm#34466; without them it does not start.
    """
    endpoint = settings.traces_endpoint
    return [f"--otlp-traces-endpoint={endpoint.rstrip('/')}{TRACES_PATH}"] if endpoint else []


def _build_trace_environment(settings: ServiceSettings) -> list[Json]:
    """vLLM sends spans over gRPC unless this variable says otherwise (get_span_exporter in vllm/tracing/otel.py)."""
    if not settings.traces_endpoint:
        return []
    return [
        {"name": "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "value": "http/protobuf"},
        {"name": "OTEL_SERVICE_NAME", "value": f"{settings.name}-vllm"},
    ]


def _build_embedded_model(settings: ServiceSettings, uri: str) -> Json:
    """`clincot serve` as the model's container.

    KServe appends these arguments to those of the runtime, which has only the subcommand.
    """
    container = _build_transformer(settings, name="")
    shared = ("resources", "readinessProbe", "livenessProbe", "startupProbe", "securityContext", "env", "volumeMounts")
    out = {
        "modelFormat": {"name": MODEL_FORMATS["clincot"]},
        "storageUri": uri,
        **{key: container[key] for key in shared},
    }
    if settings.grpc:
        out["ports"] = container["ports"]  # otherwise those of the runtime
    out["resources"] = {kind: dict(sizes) for kind, sizes in settings.resources.items()}
    out["args"] = container["args"][1:]  # without the subcommand, which the runtime contains
    return out


def _build_transformer(settings: ServiceSettings, *args: str, name: str) -> Json:
    mounts = []
    if settings.ca_config_map:
        mounts.append({"name": "ca", "mountPath": "/etc/clincot/ca", "readOnly": True})
    keys = []
    if settings.api_keys_secret:
        mounts.append({"name": "api-keys", "mountPath": "/etc/clincot/keys", "readOnly": True})
        keys = ["--api-keys=/etc/clincot/keys"]
    return {
        "name": name,
        "image": settings.image,
        "args": [
            "serve",
            f"--checkpoint={MODELS_PATH}",
            f"--host={settings.listen}",
            f"--port={PORT}",
            f"--model_name={settings.name}",
            f"--set=grace_s={settings.grace_s}",
            *([f"--grpc-port={GRPC_PORT}"] if settings.grpc else []),
            *args,
            *keys,
            *settings.list_serve_arguments(),
        ],
        "ports": _build_ports(settings),
        "resources": {kind: dict(sizes) for kind, sizes in settings.transformer_resources.items()},
        "readinessProbe": _build_probe("/v2/health/ready", PORT, failures=3),
        "livenessProbe": _build_probe("/v2/health/live", PORT, failures=6),
        "startupProbe": _build_probe("/v2/health/ready", PORT, failures=-(-settings.startup_s // _PERIOD_S)),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "env": _build_environment(settings),
        "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],
    }


def _build_ports(settings: ServiceSettings) -> list[Json]:
    """The ports of `clincot serve`.

    KServe's Service has the first one as port 80 and the others as they are, with their names (createDefaultSvc in
    pkg/controller/v1beta1/inferenceservice/reconcilers/service/service_reconciler.go of kserve/kserve@00217d1).
    """
    if not settings.grpc:
        return [{"containerPort": PORT, "protocol": "TCP"}]
    return [
        {"name": "http", "containerPort": PORT, "protocol": "TCP"},
        {"name": "grpc", "containerPort": GRPC_PORT, "protocol": "TCP"},
    ]


def _build_pod_fields(settings: ServiceSettings) -> Json:
    """Fields that the pods of predictor and transformer share."""
    volumes: list[Json] = [{"name": "tmp", "emptyDir": {}}]
    if settings.ca_config_map:
        volumes.append({"name": "ca", "configMap": {"name": settings.ca_config_map}})
    if settings.api_keys_secret:
        volumes.append({"name": "api-keys", "secret": {"secretName": settings.api_keys_secret}})
    pod: Json = {"volumes": volumes, "automountServiceAccountToken": False}  # servers do not use the Kubernetes API
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    return pod


def _build_grace_period(settings: ServiceSettings) -> Json:
    """The time from a pod's deletion until its containers are killed: the preStop hook, and the server's own time."""
    return {"terminationGracePeriodSeconds": settings.drain_s + settings.grace_s + _END_S}


def _add_pre_stop(container: Json, command: str) -> None:
    """Run a command before SIGTERM; meanwhile the pod's address leaves the Services, so that no new request comes."""
    container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", command]}}}


def _build_environment(settings: ServiceSettings) -> list[Json]:
    proxies = dict(settings.proxies)
    if proxies:  # images go from the transformer to vLLM in the same pod
        excepted = [*filter(None, proxies.get("NO_PROXY", "").split(",")), *_LOCAL_HOSTS]
        proxies["NO_PROXY"] = ",".join(dict.fromkeys(excepted))
    env = [{"name": name, "value": value} for name, value in sorted(proxies.items())]
    if settings.ca_config_map:
        env.append({"name": "SSL_CERT_FILE", "value": "/etc/clincot/ca/cabundle.crt"})
    return env


def _build_probe(path: str, port: int, *, failures: int) -> Json:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": _PERIOD_S,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def build_storage_secret(
    settings: ServiceSettings, *, secret: str, endpoint: str, region: str, verify: bool = True
) -> tuple[Json, Json]:
    """Build the Secret and the ServiceAccount with which KServe reads from S3.

    The operator adds the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY to the Secret (KServe reads
    `awsAccessKeyID` and `awsSecretAccessKey` unless its ConfigMap names others); clincot never sees them.
    """
    scheme, _, host = endpoint.partition("://")
    annotations = {
        "serving.kserve.io/s3-endpoint": host,
        "serving.kserve.io/s3-usehttps": "1" if scheme == "https" else "0",
        "serving.kserve.io/s3-region": region,
        "serving.kserve.io/s3-verifyssl": "1" if verify else "0",
    }
    if settings.ca_config_map:
        annotations["serving.kserve.io/s3-cabundle-configmap"] = settings.ca_config_map
        annotations["serving.kserve.io/s3-cabundle"] = "/etc/ssl/custom-certs/cabundle.crt"
    at = {"namespace": settings.namespace}
    return (
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": secret, **at, "annotations": annotations},
            "type": "Opaque",
        },
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": settings.service_account, **at},
            "secrets": [{"name": secret}],
        },
    )
