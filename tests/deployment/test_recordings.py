"""The stub of the Kubernetes API against what a real cluster answered (tests/support/recordings)."""

from __future__ import annotations

from typing import Any

import pytest

from clincot.clients.kubernetes import Cluster
from clincot.clients.pod_problems import find_pod_problems, list_creation_events, list_pods
from clincot.deployment.inference_service import build_predictor
from clincot.deployment.rollout import NotReady
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.targets.blue_green import BlueGreenTarget
from clincot.deployment.targets.kserve import list_inherited_fields
from tests.support.kube_api_server import RESTRICTED, ApiServer, Script, api_server
from tests.support.recordings import read_recording

DIGEST = "21b15888f2211d133b8d3a986e8ab4e239b8fc23cef2bc3d7418a9c025b97f52"
URI = f"s3://clincot/platform/models/clincot/{DIGEST}"
SETTINGS = ServiceSettings(
    namespace="clincot", engine="clincot", runtime="clincot-serve", service_account="clincot-server"
)
SELECTOR, OWNER = "app=isvc.clincot-r21b15888f2-predictor", "clincot-r21b15888f2-predictor"


def start(cluster: Cluster) -> BlueGreenTarget:
    target = BlueGreenTarget(cluster, SETTINGS, DIGEST, URI, (100,))
    target.start_revision("rollout-1")
    return target


def list_keys(value: Any, path: str = "") -> set[str]:
    """The paths of all fields."""
    keys: set[str] = set()
    if isinstance(value, dict):
        for key, item in value.items():
            keys |= {f"{path}/{key}"} | list_keys(item, f"{path}/{key}")
    return keys


def test_the_stubs_status_has_only_fields_that_were_seen() -> None:
    """KServe's other fields may be missing in the stub. canaryStatuses and Knative's are of other modes."""
    recorded = read_recording("inferenceservice-ready")
    with api_server(ApiServer(scripts={DIGEST: Script()})) as cluster:
        target = start(cluster)
        target.check_ready()
        assert target.check_ready()
        status = cluster.get(target.build_path(target.service_name))["status"]
    other_modes = {"canaryStatuses", "components"}
    seen = list_keys(recorded["status"])
    assert {key for key in list_keys(status) if key.split("/")[1] not in other_modes} <= seen
    kinds = {condition["type"] for condition in recorded["status"]["conditions"]}
    assert {condition["type"] for condition in status["conditions"]} <= kinds


def test_kserve_stores_no_fields_of_its_own() -> None:
    """So what a canary inherits (list_inherited_fields) is what somebody has set in the service before."""
    stored = read_recording("inferenceservice-ready")["spec"]["predictor"]
    settings = SETTINGS.model_copy(update={"resources": stored["model"]["resources"]})
    ours = build_predictor(settings, DIGEST, URI, mode="Standard")
    assert list_inherited_fields(stored, ours) == []
    assert list_inherited_fields(stored | {"tolerations": [{"key": "gpu"}]}, ours) == ["tolerations"]


def test_a_pod_has_the_arguments_once() -> None:
    """KServe appends the InferenceService's arguments to those of the ServingRuntime.

    The recorded runtime had them, too, so the container got them twice; now it has the subcommand only.
    """
    recorded = read_recording("inferenceservice-pod")["spec"]["containers"][0]["args"]
    own = recorded[: 1 + len(recorded) // 2]
    assert recorded == [own[0], *own[1:], *own[1:]]
    with api_server(ApiServer(scripts={DIGEST: Script()})) as cluster:
        start(cluster)
        (pod,) = list_pods(cluster, "clincot", SELECTOR)
    arguments = pod["spec"]["containers"][0]["args"]
    assert arguments[: len(own)] == own
    assert len(set(arguments)) == len(arguments)


def test_pod_security_is_told_as_kubernetes_says_it() -> None:
    """Both attempts of the recording are one reason, without the pods' names, and it ends the wait."""
    events = [
        {"reason": event["reason"], "message": event["message"]}
        | {"involvedObject": dict(zip(("kind", "name"), event["object"].split("/"), strict=True))}
        for event in read_recording("podsecurity-events")
    ]
    server = ApiServer(scripts={DIGEST: Script(create_error=RESTRICTED)})
    with api_server(server) as cluster:
        target = start(cluster)
        server._list_events = lambda namespace: events  # type: ignore[method-assign]
        (problem,) = find_pod_problems(cluster, "clincot", SELECTOR, OWNER)
        with pytest.raises(NotReady, match=r"cannot become ready: FailedCreate: .* is forbidden: violates PodSecurity"):
            target.check_ready()
    assert problem.permanent
    assert problem.text.startswith('FailedCreate: Error creating: pods is forbidden: violates PodSecurity "restricted')
    assert 'container "storage-initializer" must set securityContext.allowPrivilegeEscalation=false' in problem.text


def test_the_stubs_events_are_like_the_recorded_ones() -> None:
    recorded = read_recording("podsecurity-events")[0]
    with api_server(ApiServer(scripts={DIGEST: Script(create_error=RESTRICTED)})) as cluster:
        start(cluster)
        (event,) = cluster.get("/api/v1/namespaces/clincot/events")["items"]
    involved = event["involvedObject"]
    assert f"{involved['kind']}/{involved['name']}" == recorded["object"]
    assert event["reason"] == recorded["reason"]
    assert event["message"].partition("violates")[0] == recorded["message"].partition("violates")[0]


def test_events_of_an_earlier_attempt_do_not_end_the_wait() -> None:
    """They stay for an hour, so a rollout after the namespace was mended still sees them."""
    server = ApiServer(scripts={DIGEST: Script(create_error=RESTRICTED)})
    with api_server(server) as cluster:
        start(cluster)
        past = cluster.get("/api/v1/namespaces/clincot/events")["items"]
        server._list_events = lambda namespace: past  # type: ignore[method-assign]
        known = list_creation_events(cluster, "clincot", OWNER)
        assert find_pod_problems(cluster, "clincot", SELECTOR, OWNER, old_events=known) == []
        past[0]["count"] += 1  # it happened again
        assert find_pod_problems(cluster, "clincot", SELECTOR, OWNER, old_events=known)[0].permanent
