"""The Kubernetes permissions that a rollout needs.

Preflight checks them, and the Role of the rollout's account grants them.
"""

from __future__ import annotations

from clincot.clients.kubernetes import Permission
from clincot.deployment.inference_service import CRD_NAME, GROUP, PLURAL
from clincot.deployment.service_settings import ServiceSettings


def list_rollout_permissions(settings: ServiceSettings) -> list[Permission]:
    """List the permissions that targets on a cluster use."""
    namespace = settings.namespace
    needed = [Permission(verb, GROUP, PLURAL, namespace) for verb in ("get", "list", "create", "update", "delete")]
    needed += [Permission(verb, "", "services", namespace) for verb in ("get", "create", "update", "delete")]
    if not settings.service_url:  # smoke requests and counters go through the API server
        needed += [Permission(verb, "", "services/proxy", namespace) for verb in ("get", "create")]
    needed.append(Permission("get", "", "namespaces", namespace, namespace))  # Pod Security
    if settings.release is not None:  # what the release calls its service now, before a former one is removed
        needed.append(Permission("get", "", "configmaps", namespace, settings.release.config_map))
    # why a revision waits: events of its ReplicaSet, state and logs of its pods
    needed += [Permission("list", "", resource, namespace) for resource in ("pods", "events")]
    needed.append(Permission("get", "", "pods/log", namespace))
    if not settings.service_url and not settings.pod_metrics_url:  # the watch reads the pods' metrics
        needed.append(Permission("get", "", "pods/proxy", namespace))
    # manifests are validated against the cluster's CRD
    needed.append(Permission("get", "apiextensions.k8s.io", "customresourcedefinitions", "", CRD_NAME))
    if settings.mode == "auto" or settings.gateway_api == "auto":
        needed.append(Permission("get", "", "configmaps", settings.kserve_namespace, "inferenceservice-config"))
    return needed
