"""The stub of the API server is as strict as KServe's webhook, and its controller reports what KServe's does.

Every case names the function of kserve/kserve@aaac4e2 that it follows; the messages are KServe's own. Those of the
webhook are in pkg/apis/serving/v1beta1/inference_service_validation.go.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from clincot.clients.kubernetes import Cluster, ClusterFailed, resource_path
from clincot.deployment.inference_service import build_canary, build_inference_service
from clincot.deployment.service_settings import ServiceSettings
from tests.support.kube_api_server import ApiServer, Script, api_server

Json = dict[str, Any]
STABLE, OTHER = "4f" * 32, "5e" * 32
SETTINGS = ServiceSettings(name="chest", namespace="serving", replicas=2)
PATH = resource_path("serving.kserve.io", "v1beta1", "serving", "inferenceservices", "chest")


def build_service(mode: str = "Standard") -> Json:
    return build_inference_service(SETTINGS, STABLE, f"s3://models/{STABLE}", mode=mode)


def with_canary(changes: Json, *, percent: int = 10, mode: str = "Standard") -> Json:
    """The service with a canary whose predictor is changed."""
    service = build_service(mode)
    canary = build_canary(SETTINGS, OTHER, f"s3://models/{OTHER}", percent)
    canary["predictor"] |= changes
    service["spec"]["canary"] = [canary]
    return service


def refuse(cluster: Cluster, service: Json) -> str:
    """What the webhook says to a new object."""
    with pytest.raises(ClusterFailed) as refused:
        cluster.create(PATH, service)
    assert refused.value.status == 403
    assert 'admission webhook "inferenceservice.kserve-webhook-server.validator" denied the request' in str(
        refused.value
    )
    return str(refused.value)


@pytest.mark.parametrize(
    ("service", "message"),
    [
        # validateCanarySpecs
        (with_canary({}, mode="Knative"), "canary is only supported in Standard deployment mode"),
        (with_canary({"name": ""}), "canary[0] predictor.name is required"),
        (with_canary({"name": f"r{STABLE[:10]}"}), "conflicts with stable predictor name"),
        (with_canary({"minReplicas": 3}), "minReplicas (3) must not exceed stable predictor minReplicas (2)"),
        (with_canary({"maxReplicas": 3}), "must not set maxReplicas (canary uses fixed replicas)"),
        (with_canary({"scaleTarget": 3}), "must not set scaleTarget (canary uses fixed replicas)"),
        (with_canary({"autoScaling": {"metrics": []}}), "must not set autoScaling (canary uses fixed replicas)"),
        (with_canary({"workerSpec": {}}), "must not set workerSpec (multi-node is not yet supported for canary)"),
        (with_canary({}, percent=101), "trafficPercent must be between 0 and 100, got 101"),
    ],
)
def test_the_webhook_refuses_a_canary(service: Json, message: str) -> None:
    with api_server(ApiServer()) as cluster:
        assert message in refuse(cluster, service)
        cluster.create(PATH, with_canary({}))  # as this project builds it


def test_the_shares_of_canaries_have_a_sum() -> None:
    """validateCanarySpecs: two canaries with 60 %, and two of one name."""
    service = with_canary({}, percent=60)
    second = copy.deepcopy(service["spec"]["canary"][0])
    service["spec"]["canary"].append(second)
    with api_server(ApiServer()) as cluster:
        assert "is duplicated" in refuse(cluster, service)
        second["predictor"]["name"] = "third"
        assert "sum of canary trafficPercent values (120) must be <= 100" in refuse(cluster, service)


def test_the_stable_predictor_has_no_name_of_its_model() -> None:
    """validatePredictor; the schema asks for one in a canary, so it is empty there (build_canary)."""
    service = build_service()
    service["spec"]["predictor"]["model"]["name"] = "kserve-container"
    with api_server(ApiServer()) as cluster:
        assert "the 'name' field is not allowed in standard predictor" in refuse(cluster, service)


def test_a_collocated_transformer_has_no_storage() -> None:
    """validateCollocationStorageURI."""
    service = build_service()
    service["spec"]["predictor"]["containers"][0]["env"] = [{"name": "STORAGE_URI", "value": "s3://models/x"}]
    with api_server(ApiServer()) as cluster:
        assert "storage uri should not be specified in transformer container" in refuse(cluster, service)


def test_updates_that_the_webhook_refuses() -> None:
    """validatePredictorNameChange, and validateDeploymentMode after the controller's first reconciliation."""

    def rename(now: Json) -> Json:
        now["spec"]["predictor"]["name"] = "other"
        return now

    def change_mode(now: Json) -> Json:
        now["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] = "Knative"
        return now

    with api_server(ApiServer(scripts={STABLE: Script()})) as cluster:
        cluster.create(PATH, build_service())
        for _ in range(2):  # the status follows one read later
            cluster.get(PATH)
        for change, message in (
            (rename, "predictor.name change requires a model change (e.g. storageUri)"),
            (change_mode, "update rejected: deploymentMode cannot be changed from 'Standard' to 'Knative'"),
        ):
            with pytest.raises(ClusterFailed) as refused:
                cluster.update_with_retry(PATH, change)
            assert message in str(refused.value)


def test_the_controller_reports_canaries() -> None:
    """reconcileCanaryDeployments and adjustStableMinReplicasForCanaries (components/predictor.go): of two replicas,

    one is taken off the stable predictor as soon as the canary is ready, and never a status of its model is reported.
    """
    server = ApiServer(scripts={STABLE: Script(), OTHER: Script(ready_after=2)})
    with api_server(server) as cluster:
        cluster.create(PATH, with_canary({}))
        seen = [cluster.get(PATH)["status"] for _ in range(4)][1:]
    name = f"r{OTHER[:10]}"
    assert [status["canaryStatuses"] for status in seen] == [
        [{"name": name, "ready": ready, "trafficPercent": 10}] for ready in (False, True, True)
    ]
    conditions = [{one["type"]: one for one in status["conditions"]}["CanaryPredictorReady"] for status in seen]
    assert [one["reason"] for one in conditions] == ["CanariesNotReady", "AllCanariesReady", "AllCanariesReady"]
    assert {scale[f"chest-r{STABLE[:10]}-predictor"] for scale in server.scales} == {2, 1}


def test_a_canary_inherits_from_the_stable_predictor() -> None:
    """buildCanaryPredictor (components/predictor.go): a toleration that it no longer has is in its pods."""
    service = with_canary({})
    service["spec"]["predictor"]["tolerations"] = [{"key": "gpu", "operator": "Exists"}]
    service["spec"]["predictor"]["model"]["runtime"] = "vllm-old"
    server = ApiServer(scripts={STABLE: Script(), OTHER: Script()})
    with api_server(server) as cluster:
        cluster.create(PATH, service)
        for _ in range(2):
            cluster.get(PATH)
        deployments = server._list_deployments(server.objects[PATH])
    predictors = {name: predictor for name, _, predictor in deployments}
    canary = predictors[f"chest-r{OTHER[:10]}-predictor"]
    assert canary["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert canary["model"]["runtime"] == "vllm-old"
    assert canary["model"]["storageUri"].endswith(OTHER)
    assert (canary["name"], canary["minReplicas"]) == (f"r{OTHER[:10]}", 1)
