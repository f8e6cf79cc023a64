"""What a Helm release owns on KServe, and what a rollout does about it when the release's names change.

Helm knows nothing of served models, because rollouts make them. So a rollout lets them refer to the release's account,
runtime and storage container by their present names, and at its end removes the services that the release had under
former names. The new service is ready and asked before an old one goes.

Changed and removed is only what has the release's label (RELEASE_LABEL), which rollouts set from the settings that the
chart renders. What holds now is read from the release's ConfigMap: a run that began before a rename still rolls out
under the old names, and must not take the new ones for former ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import yaml

from clincot.clients.kubernetes import Cluster, ClusterFailed, ObjectNotFound, resource_path
from clincot.deployment.inference_service import GROUP, MODEL_FORMATS, PLURAL, RELEASE_LABEL, SERVICE_LABEL, VERSION
from clincot.deployment.service_settings import OwningRelease, ServiceSettings

Json = dict[str, Any]


def remove_former_services(cluster: Cluster, settings: ServiceSettings) -> str:
    """Remove the services of the settings' release that have another name than the settings.

    Call it when the service of the settings has all traffic. Returns a clause that says what was removed, or what was
    kept and why; "" if there is nothing to say. A failure is no error of the rollout, so it is only told.
    """
    release = settings.release
    if release is None:
        return ""
    try:
        owned = _list_owned_services(cluster, settings, release)
        former = [one for one in owned if _get_service_name(one) != settings.name]
        if not former:
            return ""
        names = ", ".join(sorted({_get_service_name(one) for one in former}))
        present = _read_present_settings(cluster, settings, release).get("name", "")
    except ClusterFailed as error:
        return f"former services of the release {release.name} were not looked for: {error}"
    if present != settings.name:
        now = f"is called {present} now" if present else f"has no ConfigMap {release.config_map} with a name"
        return f"kept {names}: the release {release.name} {now}, and this rollout has served {settings.name}"
    return "; ".join(_remove_service(cluster, one, release) for one in former)


def update_references(cluster: Cluster, settings: ServiceSettings) -> str:
    """Let what serves the settings' release refer to the release's objects by their present names.

    Without it, a model that is served already would refer to an account and a runtime that Helm has removed. Returns a
    clause that says what was changed; "" if nothing was. Raises ClusterFailed.
    """
    release = settings.release
    if release is None:
        return ""
    owned = _list_owned_services(cluster, settings, release)
    serving = [one for one in owned if _get_service_name(one) == settings.name]
    if not serving:
        return ""
    present = _read_present_settings(cluster, settings, release)
    changed = []
    for service in serving:
        if _set_references(service, present):
            name = service["metadata"]["name"]
            path = resource_path(GROUP, VERSION, settings.namespace, PLURAL, name)
            cluster.update_with_retry(path, lambda now: _set_references(now, present) or now)
            changed.append(name)
    return f"InferenceService {', '.join(changed)} refers to the present objects of {release.name}" if changed else ""


def _set_references(service: Json, settings: Json) -> Json | None:
    """Set the names that service.yaml gives to what a service refers to; None if it has them already."""
    spec = service["spec"]
    predictors = [spec["predictor"], *(one["predictor"] for one in spec.get("canary") or ())]
    wanted: list[tuple[Json, str, str]] = []
    for predictor in predictors:
        model, account = predictor.get("model", {}), settings.get("service_account", "")
        wanted += [(predictor, "serviceAccountName", account)]
        wanted += [(predictor, "storageContainerName", settings.get("storage_container", ""))]
        if model.get("modelFormat", {}).get("name") == MODEL_FORMATS.get(settings.get("engine", "vllm")):
            wanted += [(model, "runtime", settings.get("runtime", ""))]
    if "transformer" in spec:
        wanted += [(spec["transformer"], "serviceAccountName", settings.get("service_account", ""))]
    changes = [(part, key, name) for part, key, name in wanted if name and part.get(key, name) != name]
    for part, key, name in changes:
        part[key] = name
    return service if changes else None


def _list_owned_services(cluster: Cluster, settings: ServiceSettings, release: OwningRelease) -> list[Json]:
    path = resource_path(GROUP, VERSION, settings.namespace, PLURAL)
    selector = quote(f"{RELEASE_LABEL}={release.name}", safe="")
    try:
        found = cluster.get(f"{path}?labelSelector={selector}").get("items") or []
    except ObjectNotFound:
        return []
    return [one for one in found if _is_owned(one, release) and _get_service_name(one)]


def _is_owned(one: Mapping[str, Any], release: OwningRelease) -> bool:
    """Whether an object has the release's label and no owner, which would remove it itself."""
    metadata = one["metadata"]
    return metadata.get("labels", {}).get(RELEASE_LABEL) == release.name and not metadata.get("ownerReferences")


def _get_service_name(one: Mapping[str, Any]) -> str:
    return str(one["metadata"].get("labels", {}).get(SERVICE_LABEL, ""))


def _read_present_settings(cluster: Cluster, settings: ServiceSettings, release: OwningRelease) -> Json:
    """The service.yaml that is installed; {} if there is none. Raises ClusterFailed."""
    try:
        found = cluster.get(resource_path("", "v1", settings.namespace, "configmaps", release.config_map))
        content = yaml.safe_load(found.get("data", {}).get("service.yaml", ""))
    except (ObjectNotFound, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def _remove_service(cluster: Cluster, service: Json, release: OwningRelease) -> str:
    """Remove an InferenceService, and before it the Service in front of a blue-green pair."""
    namespace, name = service["metadata"]["namespace"], service["metadata"]["name"]
    predictor = service["spec"]["predictor"]
    if service["spec"].get("canary") or "canaryTrafficPercent" in predictor:
        return f"kept InferenceService {name}: a rollout to it is open"
    front_path = resource_path("", "v1", namespace, "services", _get_service_name(service))
    try:
        try:
            if _is_owned(cluster.get(front_path), release):
                cluster.delete(front_path)
        except ObjectNotFound:
            pass
        cluster.delete(resource_path(GROUP, VERSION, namespace, PLURAL, name))
    except ClusterFailed as error:
        return f"kept InferenceService {name}: {error}"
    return f"removed InferenceService {name}, a former name of the release {release.name}"
