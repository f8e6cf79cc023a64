"""An API server that is away: which requests are repeated, and what a lost reply costs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from kubernetes import client

from clincot.clients.kubernetes import Cluster, ClusterFailed, Conflict, Forbidden, ObjectNotFound, resource_path
from tests.support.fast_clock import FastClock
from tests.support.fault_servers import FaultPlan, Gate, gate_before
from tests.support.kube_api_server import ApiServer, Json, api_server

PATH = resource_path("", "v1", "team", "configmaps", "settings")


def config_map(value: str) -> Json:
    return {"kind": "ConfigMap", "metadata": {"name": "settings"}, "data": {"value": value}, "spec": {}}


@dataclass(frozen=True)
class Remote:
    """A cluster behind a gate; a wait moves the clock of both."""

    server: ApiServer
    cluster: Cluster
    gate: Gate
    clock: FastClock


@pytest.fixture
def remote(fault_plan: FaultPlan, fast_clock: FastClock) -> Iterator[Remote]:
    server = ApiServer()
    with api_server(server), gate_before("cluster", server.url, fault_plan) as gate:
        configuration = client.Configuration(host=gate.url)
        configuration.retries = False
        yield Remote(server, Cluster(client.ApiClient(configuration)), gate, fast_clock)


@pytest.mark.parametrize("method", ["get", "create", "update", "delete"])
def test_every_request_outlasts_a_minute(remote: Remote, method: str) -> None:
    if method != "create":
        remote.server.objects[PATH] = config_map("one") | {"metadata": {"name": "settings", "resourceVersion": "1"}}
        remote.server.objects[PATH]["metadata"]["generation"] = 1
    remote.gate.plan.begin({"cluster": 60.0})
    if method == "get":
        assert remote.cluster.get(PATH)["data"] == {"value": "one"}
    elif method == "create":
        remote.cluster.create(PATH, config_map("one"))
    elif method == "update":
        remote.cluster.update_with_retry(PATH, lambda found: found | {"data": {"value": "two"}})
    else:
        remote.cluster.delete(PATH)
    assert remote.clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]


def test_an_object_whose_creation_was_not_confirmed_is_ours(remote: Remote) -> None:
    """The server adds fields of its own, such as status and resourceVersion; ours are all there."""
    remote.gate.cut_after = [0]
    created = remote.cluster.create(PATH, config_map("mine"))
    assert created["data"] == {"value": "mine"}
    assert [method for method, _ in remote.server.requests] == ["POST", "POST", "GET"]


def test_an_object_of_somebody_else_is_a_conflict_also_after_a_lost_reply(remote: Remote) -> None:
    remote.cluster.create(PATH, config_map("theirs"))
    remote.gate.cut_after = [0]
    remote.cluster.close()  # the next request opens a connection, which is cut
    with pytest.raises(Conflict):
        remote.cluster.create(PATH, config_map("mine"))


def test_refusals_are_raised_at_once(remote: Remote) -> None:
    remote.server.forbidden.add(("GET", "settings"))
    with pytest.raises(Forbidden):
        remote.cluster.get(PATH)
    with pytest.raises(ObjectNotFound):
        remote.cluster.get(resource_path("", "v1", "team", "configmaps", "other"))
    assert remote.clock.slept == []


def test_a_service_that_its_proxy_cannot_reach_is_not_the_api_server(remote: Remote) -> None:
    """503 "no endpoints" is the answer about the Service; a rollout has its own time limit for it."""
    with pytest.raises(ClusterFailed, match="503"):
        remote.cluster.get("/api/v1/namespaces/team/services/http:nobody:80/proxy/metrics")
    assert remote.clock.slept == []


def test_after_ten_minutes_the_error_says_how_long_was_waited(remote: Remote) -> None:
    remote.server.broken = 10**9
    with pytest.raises(ClusterFailed, match=r"HTTP 503: .*; still away after 10 min \(CLINCOT_WAIT_S=600\)$"):
        remote.cluster.get(PATH)


def test_an_unknown_host_is_not_waited_for(fast_clock: FastClock, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    configuration = client.Configuration(host="http://no-such-cluster.example")
    with pytest.raises(ClusterFailed, match="no reply from the API server: NameResolutionError"):
        Cluster(client.ApiClient(configuration)).get(PATH)
    assert fast_clock.slept == []
