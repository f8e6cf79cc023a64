"""The choice of a traffic mode, with the real kubernetes client against a stub of the API server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clincot.deployment.inference_service import build_inference_service
from clincot.deployment.rollout import TargetFailed
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.targets.select import choose_traffic_mode
from tests.support.kube_api_server import ApiServer, api_server, find_knative_refusal

SERVICE = ServiceSettings(name="chest", namespace="serving")
SMALL = {"engine": "clincot", "runtime": "clincot-serve"}  # one container
CONFIG = "/api/v1/namespaces/kserve/configmaps/inferenceservice-config"


@pytest.mark.parametrize(
    ("groups", "config", "settings", "mode", "why"),
    [
        ({"gateway.networking.k8s.io/v1"}, {"enableGatewayApi": True}, {}, "canary", "routes through the Gateway API"),
        (
            {"gateway.networking.k8s.io/v1"},
            {"enableGatewayApi": False},
            {},
            "blue-green",
            "enableGatewayApi is not true",
        ),
        (set(), {}, {}, "blue-green", "the cluster has no Gateway API"),
        ({"serving.knative.dev/v1"}, {}, SMALL, "knative", "Knative mode"),
        # Knative would refuse vLLM's pod, so the service runs in Standard mode beside it
        ({"serving.knative.dev/v1"}, {}, {}, "blue-green", "the cluster has no Gateway API"),
        (set(), {}, {"gateway_api": "yes"}, "canary", "gateway_api is set to yes"),
        (set(), {}, {"gateway_api": "yes", "transformer": "separate"}, "blue-green", "past a transformer of its own"),
    ],
)
def test_the_mode_is_chosen_by_what_the_cluster_has(
    groups: set[str], config: dict[str, Any], settings: dict[str, Any], mode: str, why: str
) -> None:
    default = "Knative" if "serving.knative.dev/v1" in groups else "Standard"
    data = {"ingress": json.dumps(config), "deploy": json.dumps({"defaultDeploymentMode": default})}
    server = ApiServer(groups=groups, objects={CONFIG: {"kind": "ConfigMap", "metadata": {}, "data": data}})
    with api_server(server) as cluster:
        chosen, reason = choose_traffic_mode(cluster, SERVICE.model_copy(update=settings))
    assert chosen == mode
    assert why in reason


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("standard", r"spec\.canary\[\] would have no effect here: the cluster has no Gateway API"),
        ("knative", r"does not serve serving\.knative\.dev/v1"),
    ],
)
def test_an_unsupported_mode_is_refused(mode: str, why: str) -> None:
    with api_server(ApiServer()) as cluster, pytest.raises(TargetFailed, match=why):
        choose_traffic_mode(cluster, SERVICE.model_copy(update={"mode": mode}))


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, r"Knative allows one port in a pod.*set mode: standard or blue-green, or engine: clincot"),
        ({**SMALL, "grpc": True}, "its services have HTTP or gRPC, not both; set grpc: false"),
        ({"transformer": "separate"}, "may reach another revision of the predictor; set mode: standard or blue-green"),
    ],
)
def test_pods_that_knative_refuses_are_refused_before(settings: dict[str, Any], why: str) -> None:
    """The stub, like Knative, refuses such a pod, which KServe only tells while the rollout waits."""
    service = SERVICE.model_copy(update={"mode": "knative"} | settings)
    predictor = build_inference_service(SERVICE, "4f" * 32, "s3://b/m", mode="Knative")["spec"]["predictor"]
    assert find_knative_refusal(predictor).startswith("more than one container port is set")
    small = build_inference_service(SERVICE.model_copy(update=SMALL), "4f" * 32, "s3://b/m", mode="Knative")
    assert find_knative_refusal(small["spec"]["predictor"]) == ""
    with (
        api_server(ApiServer(groups={"serving.knative.dev/v1"})) as cluster,
        pytest.raises(TargetFailed, match=why),
    ):
        choose_traffic_mode(cluster, service)


def test_settings_replace_a_config_map_that_cannot_be_read() -> None:
    """KServe's ConfigMap is often not readable; the error names the settings that replace it."""
    server = ApiServer(groups={"gateway.networking.k8s.io/v1"}, forbidden={("GET", "configmaps")})
    with api_server(server) as cluster:
        with pytest.raises(TargetFailed, match=r"HTTP 403.*or set mode and gateway_api"):
            choose_traffic_mode(cluster, SERVICE)
        said = SERVICE.model_copy(update={"gateway_api": "yes"})
        assert choose_traffic_mode(cluster, said)[0] == "canary"
