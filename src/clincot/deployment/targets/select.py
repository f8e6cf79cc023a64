"""The choice of a traffic mode by what the cluster supports.

canary       Standard mode with the Gateway API: spec.canary[], a second predictor with its own share
knative      Knative mode: canaryTrafficPercent; the previous revision keeps the rest
blue-green   Standard mode without the Gateway API (where KServe silently ignores canaryTrafficPercent), or with a
             separate transformer: a second InferenceService, and a front Service of ours that selects one of the two
"""

from __future__ import annotations

import json
from typing import Literal

from jsonschema import Draft202012Validator

from clincot.clients import kubernetes
from clincot.clients.kubernetes import Cluster, ClusterFailed, Forbidden, ObjectNotFound
from clincot.deployment.inference_service import Json
from clincot.deployment.rollout import TargetFailed
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.targets.blue_green import BlueGreenTarget
from clincot.deployment.targets.kserve import CanaryTarget, KnativeTarget, KServeTarget, kserve_errors
from clincot.registry.manifest import Manifest

TrafficMode = Literal["canary", "knative", "blue-green"]
TARGET_CLASSES: dict[TrafficMode, type[KServeTarget]] = {
    "canary": CanaryTarget,
    "knative": KnativeTarget,
    "blue-green": BlueGreenTarget,
}


def build_kserve_target(
    cluster: Cluster,
    settings: ServiceSettings,
    manifest: Manifest,
    steps: tuple[int, ...],
    validator: Draft202012Validator | None = None,
) -> KServeTarget:
    """Build the target of a checkpoint for this cluster. Raises TargetFailed."""
    if not manifest.uri.startswith("s3://"):
        raise TargetFailed(
            f"a cluster cannot read {manifest.uri}; publish to an S3 store, or deploy with --target local"
        )
    mode, why = choose_traffic_mode(cluster, settings)
    return TARGET_CLASSES[mode](
        cluster,
        settings.with_measured(manifest.serve),
        manifest.sha256,
        manifest.uri,
        steps,
        validator=validator,
        how=f"{mode}, {why}",
    )


def choose_traffic_mode(cluster: Cluster, settings: ServiceSettings) -> tuple[TrafficMode, str]:
    """Choose the traffic mode, and return it with the reason.

    Raises TargetFailed if the cluster does not support the requested mode.
    """
    with kserve_errors():
        knative = cluster.has_api("serving.knative.dev", "v1")
    separate = settings.transformer == "separate"
    refused = explain_knative_rules(settings)
    if settings.mode == "knative" or (
        settings.mode == "auto" and not refused and knative and _read_default_mode(cluster, settings) == "Knative"
    ):
        if not knative:
            raise TargetFailed("mode knative was requested, but the cluster does not serve serving.knative.dev/v1")
        if refused:
            raise TargetFailed(refused)
        return "knative", "KServe runs in Knative mode: canaryTrafficPercent"
    if settings.mode == "blue-green":
        return "blue-green", "as asked for"
    gateway, why = _check_gateway_api(cluster, settings)
    if separate:
        why = "KServe sends a canary's share past a transformer of its own; set transformer: collocated for steps"
    elif gateway:
        return "canary", f"{why}: spec.canary[]"
    if settings.mode == "standard":
        raise TargetFailed(f"mode standard was requested, but spec.canary[] would have no effect here: {why}")
    return "blue-green", f"{why}; all of the traffic moves at once"


def explain_knative_rules(settings: ServiceSettings) -> str:
    """Why Knative would refuse the service's pods, or route them wrongly; "" if it accepts them.

    Knative's webhook allows one port in all containers of a pod (validateContainersPorts in
    pkg/apis/serving/k8s_validation.go of knative/serving@98e5ef9), and probes of a container without a port only if its
    feature multi-container-probing is on, which it is not by default (validateSidecarContainer, same file). vLLM has
    probes, and KServe merges the ports of its ServingRuntime into the predictor.
    """
    if settings.grpc:
        return (
            "Knative allows one port in a pod, so its services have HTTP or gRPC, not both; set grpc: false, or mode: "
            "standard or blue-green"
        )
    if settings.engine != "vllm":
        return ""
    if settings.transformer == "separate":
        return (
            "in Knative mode each request of a separate transformer may reach another revision of the predictor; set "
            "mode: standard or blue-green"
        )
    return (
        "Knative allows one port in a pod, and no probes of a container without a port, so it refuses vLLM with "
        "`clincot serve` in front of it; set mode: standard or blue-green, or engine: clincot"
    )


def _read_default_mode(cluster: Cluster, settings: ServiceSettings) -> str:
    mode = _read_kserve_config(cluster, settings, "deploy").get("defaultDeploymentMode", "Standard")
    return "Knative" if mode in ("Knative", "Serverless") else "Standard"


def _check_gateway_api(cluster: Cluster, settings: ServiceSettings) -> tuple[bool, str]:
    """Whether KServe routes through the Gateway API, and how that is known."""
    if settings.gateway_api != "auto":
        return settings.gateway_api == "yes", f"gateway_api is set to {settings.gateway_api}"
    with kserve_errors():
        if not cluster.has_api("gateway.networking.k8s.io", "v1"):
            return False, "the cluster has no Gateway API (gateway.networking.k8s.io/v1)"
    if _read_kserve_config(cluster, settings, "ingress").get("enableGatewayApi") is not True:
        return False, "KServe does not use the Gateway API (enableGatewayApi is not true in inferenceservice-config)"
    return True, "KServe routes through the Gateway API"


def _read_kserve_config(cluster: Cluster, settings: ServiceSettings, part: str) -> Json:
    """Read one entry of KServe's ConfigMap. Raises TargetFailed."""
    path = kubernetes.resource_path("", "v1", settings.kserve_namespace, "configmaps", "inferenceservice-config")
    try:
        content: Json = json.loads(cluster.get(path).get("data", {}).get(part, "{}"))
    except ObjectNotFound:
        raise TargetFailed(f"{path}: KServe's configuration does not exist; check kserve_namespace") from None
    except Forbidden as error:
        raise TargetFailed(f"{error}; or set mode and gateway_api in the service's settings") from None
    except ClusterFailed as error:
        raise TargetFailed(str(error)) from None
    except ValueError as error:
        raise TargetFailed(f"{path}: {part} is not JSON: {error}") from None
    return content
