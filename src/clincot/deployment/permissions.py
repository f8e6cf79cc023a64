"""What a rollout asks of the API server, one permission each: for preflight, and for the Role of its account."""

from __future__ import annotations

from clincot.clients.kubernetes import Permission
from clincot.deployment.inference_service import CRD_NAME, GROUP, PLURAL
from clincot.deployment.service_settings import ServiceSettings


def list_rollout_permissions(settings: ServiceSettings) -> list[Permission]:
    """Everything that deployment/targets/kserve.py, blue_green.py and modes.py may have to do in the service's namespace."""
    here = settings.namespace
    needed = [Permission(verb, GROUP, PLURAL, here) for verb in ("get", "list", "create", "update", "delete")]
    needed += [Permission(verb, "", "services", here) for verb in ("get", "create", "update", "delete")]
    if not settings.service_url:  # smoke requests and counters go through the API server
        needed += [Permission(verb, "", "services/proxy", here) for verb in ("get", "create")]
    needed.append(
        Permission("get", "apiextensions.k8s.io", "customresourcedefinitions", "", CRD_NAME)
    )  # to validate by
    if settings.mode == "auto" or settings.gateway_api == "auto":
        needed.append(Permission("get", "", "configmaps", settings.kserve_namespace, "inferenceservice-config"))
    return needed
