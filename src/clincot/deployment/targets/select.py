"""How traffic is moved on a cluster, by what the cluster offers.

canary       Standard mode, Gateway API: spec.canary[], a second predictor with its share
knative      Knative mode: canaryTrafficPercent, the revision before keeps the rest
blue-green   Standard mode without Gateway API (KServe ignores canaryTrafficPercent there in silence), or with a
             transformer of its own: a second InferenceService, and a Service of ours in front that selects one
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
    """The target for a checkpoint, as the cluster can. Raises TargetFailed."""
    if not manifest.uri.startswith("s3://"):
        raise TargetFailed(
            f"a cluster cannot read {manifest.uri}; publish to an S3 store, or deploy with --target local"
        )
    mode, why = choose_traffic_mode(cluster, settings)
    return TARGET_CLASSES[mode](
        cluster, settings, manifest.sha256, manifest.uri, steps, validator=validator, how=f"{mode}, {why}"
    )


def choose_traffic_mode(cluster: Cluster, settings: ServiceSettings) -> tuple[TrafficMode, str]:
    """How traffic is moved here, and why so. Raises TargetFailed where what was asked for cannot be had."""
    with kserve_errors():
        knative = cluster.has_api("serving.knative.dev", "v1")
    separate = settings.transformer == "separate"
    if settings.mode == "knative" or (
        settings.mode == "auto" and knative and _read_default_mode(cluster, settings) == "Knative"
    ):
        if not knative:
            raise TargetFailed("mode knative was asked for, but the cluster does not serve serving.knative.dev/v1")
        if separate:
            raise TargetFailed(
                "in Knative mode each request of a transformer of its own may meet another revision of the predictor; "
                "set transformer: collocated"
            )
        return "knative", "KServe runs in Knative mode: canaryTrafficPercent"
    if settings.mode == "blue-green":
        return "blue-green", "as asked for"
    gateway, why = _check_gateway_api(cluster, settings)
    if separate:
        why = "KServe sends a canary's share past a transformer of its own; set transformer: collocated for steps"
    elif gateway:
        return "canary", f"{why}: spec.canary[]"
    if settings.mode == "standard":
        raise TargetFailed(f"mode standard was asked for, but spec.canary[] would do nothing here: {why}")
    return "blue-green", f"{why}; all of the traffic moves at once"


def _read_default_mode(cluster: Cluster, settings: ServiceSettings) -> str:
    found = _read_kserve_config(cluster, settings, "deploy").get("defaultDeploymentMode", "Standard")
    return "Knative" if found in ("Knative", "Serverless") else "Standard"


def _check_gateway_api(cluster: Cluster, settings: ServiceSettings) -> tuple[bool, str]:
    if settings.gateway_api != "auto":
        return settings.gateway_api == "yes", f"gateway_api is set to {settings.gateway_api}"
    with kserve_errors():
        if not cluster.has_api("gateway.networking.k8s.io", "v1"):
            return False, "the cluster has no Gateway API (gateway.networking.k8s.io/v1)"
    if _read_kserve_config(cluster, settings, "ingress").get("enableGatewayApi") is not True:
        return False, "KServe does not use the Gateway API (enableGatewayApi is not true in inferenceservice-config)"
    return True, "KServe routes through the Gateway API"


def _read_kserve_config(cluster: Cluster, settings: ServiceSettings, part: str) -> Json:
    """One part of KServe's own configuration."""
    path = kubernetes.resource_path("", "v1", settings.kserve_namespace, "configmaps", "inferenceservice-config")
    try:
        found: Json = json.loads(cluster.get(path).get("data", {}).get(part, "{}"))
    except ObjectNotFound:
        raise TargetFailed(f"{path}: KServe's configuration is not there; is kserve_namespace right?") from None
    except Forbidden as error:
        raise TargetFailed(f"{error}; or set mode and gateway_api in the service's settings") from None
    except ClusterFailed as error:
        raise TargetFailed(str(error)) from None
    except ValueError as error:
        raise TargetFailed(f"{path}: {part} is not JSON: {error}") from None
    return found
