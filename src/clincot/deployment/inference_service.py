"""The InferenceService of a checkpoint: vLLM as predictor, `clincot serve` as transformer in front of it.

By default the transformer is collocated: a container of the predictor's pod (KServe's `transformer-container`), which
reaches vLLM by `--predictor_host=localhost:…`. A chain's second turn then meets the vLLM that has the first in its
prefix cache, and, while two revisions share the traffic, never one of another checkpoint. It is also what makes
`spec.canary[]` right: KServe sends a canary's share from the top route straight to the canary's *predictor*
(applyCanaryWeights in kserve's httproute_reconciler.go), past a transformer of its own.
"""

from __future__ import annotations

from typing import Any

from clincot.deployment.service_settings import ServiceSettings

GROUP, VERSION, PLURAL = "serving.kserve.io", "v1beta1", "inferenceservices"
CRD_NAME = f"{PLURAL}.{GROUP}"
MODE_ANNOTATION = "serving.kserve.io/deploymentMode"
TAG_ROUTING_ANNOTATION = "serving.kserve.io/enable-tag-routing"
SERVICE_LABEL = "clincot/service"  # label of everything that serves one service, its pods too
DIGEST_ANNOTATION = "clincot/checkpoint"  # annotation, set when a rollout is finished: what has all of the traffic
MODELS_PATH = "/mnt/models"  # where KServe's storage initialiser puts a checkpoint
PORT, VLLM_PORT = 8080, 8085
_PERIOD_S = 10

Json = dict[str, Any]


def build_revision_name(digest: str) -> str:
    """A predictor's name: its checkpoint's. Names of Kubernetes begin with a letter here."""
    return f"r{digest[:10]}"


def build_inference_service(settings: ServiceSettings, digest: str, uri: str, *, name: str = "", mode: str) -> Json:
    """The whole object with one predictor. mode: Standard or Knative, as KServe writes them."""
    annotations = {MODE_ANNOTATION: mode}
    if mode == "Knative":
        annotations[TAG_ROUTING_ANNOTATION] = (
            "true"  # gives a revision without traffic an address for its smoke requests
        )
    spec: Json = {"predictor": build_predictor(settings, digest, uri, mode=mode)}
    if settings.transformer == "separate":
        spec["transformer"] = {
            "minReplicas": settings.replicas,
            "containers": [_build_transformer(settings, named="kserve-container")],
            **_build_pod_fields(settings),
        }
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
    """KServe hands them on to pods and Services: the chart's network policies, budgets and monitors select by them."""
    return {
        "app.kubernetes.io/managed-by": "clincot",
        "app.kubernetes.io/part-of": "clincot",
        "app.kubernetes.io/component": "server",
        SERVICE_LABEL: settings.name,
    }


def build_canary(settings: ServiceSettings, digest: str, uri: str, percent: int) -> Json:
    """One entry of spec.canary[]: a predictor beside the stable one, with a share of the traffic.

    Its replicas are said outright: left out, KServe makes ceil(stable * percent / 100) of them, which is none at 0 %.
    Its schema wants the model container's name, which KServe refuses in the stable predictor: an empty one suits both.
    """
    new = build_predictor(settings, digest, uri, mode="Standard")
    new["model"]["name"] = ""
    return {"trafficPercent": percent, "predictor": new}


def build_predictor(settings: ServiceSettings, digest: str, uri: str, *, mode: str) -> Json:
    """spec.predictor; in Standard mode with a name of its own."""
    if settings.engine == "clincot":
        model, front = _build_embedded_model(settings, uri), []
    else:
        collocated = settings.transformer == "collocated"
        model = _build_vllm_model(settings, uri, VLLM_PORT if collocated else PORT)
        host = f"--predictor_host=localhost:{VLLM_PORT}"
        front = [_build_transformer(settings, host, named="transformer-container")] if collocated else []
    if settings.runtime:
        model["runtime"] = settings.runtime
    out: Json = {"minReplicas": settings.replicas, "model": model, **_build_pod_fields(settings)}
    out["volumes"] = [
        {"name": "devshm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
        *out.get("volumes", ()),
    ]
    if mode == "Standard":
        out["name"] = build_revision_name(digest)  # promotion keeps the running pods: only this name moves
        out["securityContext"] = {"seccompProfile": {"type": "RuntimeDefault"}}  # Knative allows it on containers alone
    if front:
        out["containers"] = front
    if settings.storage_container:
        out["storageContainerName"] = settings.storage_container
    return out


def _build_vllm_model(settings: ServiceSettings, uri: str, port: int) -> Json:
    return {
        "modelFormat": {"name": "vLLM"},
        "storageUri": uri,
        "args": [f"--port={port}", *settings.vllm_args],  # after the runtime's own; vLLM takes the last
        "resources": {kind: dict(sizes) for kind, sizes in settings.resources.items()},
        "startupProbe": _build_probe("/v1/models", port, failures=-(-settings.startup_s // _PERIOD_S)),
        "readinessProbe": _build_probe("/v1/models", port, failures=3),
        "livenessProbe": _build_probe("/health", port, failures=6),
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "devshm", "mountPath": "/dev/shm"}],
        "env": _build_environment(settings),
    }


def _build_embedded_model(settings: ServiceSettings, uri: str) -> Json:
    """`clincot serve` as the model's container. Its command is the runtime's; KServe adds these arguments to it."""
    served = _build_transformer(settings, named="")
    keep = ("resources", "readinessProbe", "startupProbe", "securityContext", "env", "volumeMounts")
    out = {"modelFormat": {"name": "clincot"}, "storageUri": uri, **{key: served[key] for key in keep}}
    out["resources"] = {kind: dict(sizes) for kind, sizes in settings.resources.items()}
    out["args"] = served["args"][1:]  # without the subcommand, which the runtime gives
    return out


def _build_transformer(settings: ServiceSettings, *args: str, named: str) -> Json:
    mounts = []
    if settings.ca_config_map:
        mounts.append({"name": "ca", "mountPath": "/etc/clincot/ca", "readOnly": True})
    keys = []
    if settings.api_keys_secret:
        mounts.append({"name": "api-keys", "mountPath": "/etc/clincot/keys", "readOnly": True})
        keys = ["--api-keys=/etc/clincot/keys"]
    return {
        "name": named,
        "image": settings.image,
        "args": [
            "serve",
            f"--checkpoint={MODELS_PATH}",
            "--host=0.0.0.0",
            f"--port={PORT}",
            f"--model_name={settings.name}",
            *args,
            *keys,
        ],
        "ports": [{"containerPort": PORT, "protocol": "TCP"}],
        "resources": {kind: dict(sizes) for kind, sizes in settings.transformer_resources.items()},
        "readinessProbe": _build_probe("/v2/health/ready", PORT, failures=3),
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


def _build_pod_fields(settings: ServiceSettings) -> Json:
    """What the pods of both components share."""
    volumes: list[Json] = [{"name": "tmp", "emptyDir": {}}]
    if settings.ca_config_map:
        volumes.append({"name": "ca", "configMap": {"name": settings.ca_config_map}})
    if settings.api_keys_secret:
        volumes.append({"name": "api-keys", "secret": {"secretName": settings.api_keys_secret}})
    pod: Json = {"volumes": volumes, "automountServiceAccountToken": False}  # a server asks the API server nothing
    if settings.service_account:
        pod["serviceAccountName"] = settings.service_account
    if settings.node_selector:
        pod["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        pod["tolerations"] = [dict(one) for one in settings.tolerations]
    return pod


def _build_environment(settings: ServiceSettings) -> list[Json]:
    env = [{"name": name, "value": value} for name, value in sorted(settings.proxies.items())]
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
    """The Secret (without its keys) and the ServiceAccount by which KServe reaches an S3 endpoint.

    The keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY are put into the Secret by the operator (KServe reads
    `awsAccessKeyID` and `awsSecretAccessKey` unless its ConfigMap names others); they pass through nothing of ours.
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
