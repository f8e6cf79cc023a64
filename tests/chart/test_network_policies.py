"""The rendered network policies allow the needed traffic and nothing else.

The tests evaluate them as a network plugin does.
"""

from __future__ import annotations

import json
import re
from ipaddress import ip_network

import pytest
import yaml

from tests.chart.policy_evaluation import Target, Workload, allowed, label_pods, list_traffic
from tests.chart.rendering import HELMS, Json, of_kind, rendered, settings_of, template

RUN = ("kubeflow", label_pods("run"))
DEPLOYER = ("clincot", label_pods("deployer"))
BUCKET = ("clincot", label_pods("bucket"))
HOOK = ("clincot", label_pods("hook"))
SERVER = ("clincot", label_pods("server"))
JUDGE = ("clincot", label_pods("judge"))
STORE = ("clincot", label_pods("seaweedfs"))
MONITOR = ("clincot", label_pods("monitor"))
GATEWAY, PROMETHEUS = ("istio-system", {"app": "gateway"}), ("monitoring", {"app": "prometheus"})
KFP, STRANGER = ("kubeflow", {"app": "ml-pipeline"}), ("elsewhere", {"app": "x"})


@pytest.fixture(scope="module")
def trial() -> list[Json]:
    flags = ("--set", "monitoring.serviceMonitor=true", "--set-json", 'judges=[{"name":"med","modelUri":"s3://m/med"}]')
    return of_kind(rendered("trial", *flags), "NetworkPolicy")


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (RUN, STORE, 8333),
        (RUN, JUDGE, 8080),
        (RUN, SERVER, 8080),
        (RUN, KFP, 8888),
        (RUN, KFP, 8887),
        (RUN, None, 443),
        (RUN, None, 6443),
        (DEPLOYER, SERVER, 8080),
        (DEPLOYER, None, 6443),
        (DEPLOYER, STORE, 8333),
        (HOOK, KFP, 8888),
        (BUCKET, STORE, 8333),
        (BUCKET, None, 6443),
        (SERVER, STORE, 8333),
        (SERVER, SERVER, 8080),
        (JUDGE, STORE, 8333),
        (MONITOR, STORE, 8333),
        (GATEWAY, SERVER, 8080),
        (PROMETHEUS, SERVER, 8080),
        (PROMETHEUS, JUDGE, 8080),
        (PROMETHEUS, MONITOR, 8080),
    ],
)
def test_needed_traffic_is_allowed(trial: list[Json], source: Workload, target: Target, port: int) -> None:
    assert allowed(trial, source, target, port)


@pytest.mark.parametrize(
    ("source", "target", "port"),
    [
        (STRANGER, SERVER, 8080),
        (STRANGER, JUDGE, 8080),
        (STRANGER, STORE, 8333),
        (KFP, STORE, 8333),
        (GATEWAY, JUDGE, 8080),
        (GATEWAY, STORE, 8333),
        (PROMETHEUS, STORE, 8333),
        (JUDGE, SERVER, 8080),
        (SERVER, KFP, 8888),
        (SERVER, None, 443),
        (JUDGE, None, 443),
        (HOOK, SERVER, 8080),
        (HOOK, STORE, 8333),
        (HOOK, None, 443),
        (BUCKET, KFP, 8888),
        (SERVER, JUDGE, 8080),
        (DEPLOYER, JUDGE, 8080),
        (GATEWAY, SERVER, 8085),
        (RUN, SERVER, 8085),
        (PROMETHEUS, SERVER, 8085),
        (SERVER, SERVER, 8085),
        (RUN, STRANGER, 9000),
        (DEPLOYER, KFP, 8888),
        (STORE, None, 443),
        (STORE, SERVER, 8080),
        (RUN, None, 25),
    ],
)
def test_other_traffic_is_denied(trial: list[Json], source: Workload, target: Target, port: int) -> None:
    assert not allowed(trial, source, target, port)


def test_policies_do_not_select_pods_of_others(trial: list[Json]) -> None:
    """Kubeflow Pipelines' own pods run in the same namespace."""
    assert allowed(trial, STRANGER, KFP, 8888)
    assert allowed(trial, KFP, STRANGER, 25)


@pytest.mark.parametrize("rule", [{"from": []}, {"from": None, "ports": []}, {}])
def test_an_empty_list_in_a_rule_means_everyone(rule: Json) -> None:
    spec = {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [rule]}
    policy = {"metadata": {"namespace": "clincot"}, "spec": spec}
    assert allowed([policy], STRANGER, SERVER, 8085)


NOT_X = {"key": "app", "operator": "NotIn", "values": ["x"]}


@pytest.mark.parametrize(
    ("peer", "source", "selected"),
    [
        ({"podSelector": {}}, JUDGE, True),
        ({"podSelector": {}}, STRANGER, False),
        ({"namespaceSelector": {}}, STRANGER, True),
        ({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "x"}}}, STRANGER, True),
        ({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "y"}}}, STRANGER, False),
        ({"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "elsewhere"}}}, JUDGE, False),
        ({"ipBlock": {"cidr": "0.0.0.0/0"}}, STRANGER, False),
        ({"podSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]}}, ("clincot", {}), False),
        ({"namespaceSelector": {}, "podSelector": {"matchExpressions": [NOT_X]}}, STRANGER, False),
        ({"namespaceSelector": {}, "podSelector": {"matchExpressions": [NOT_X]}}, ("elsewhere", {}), True),
    ],
)
def test_peers_are_selected_as_in_kubernetes(peer: Json, source: Workload, selected: bool) -> None:
    """NetworkPolicyPeer in staging/src/k8s.io/api/networking/v1/types.go of kubernetes/kubernetes v1.34.4."""
    spec = {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"from": [peer]}]}
    policy = {"metadata": {"namespace": "clincot"}, "spec": spec}
    assert allowed([policy], source, SERVER, 8080) is selected


@pytest.mark.parametrize(
    ("rule", "reached"),
    [
        (
            {"to": [{"ipBlock": {"cidr": "10.1.0.0/16", "except": ["10.1.2.0/24"]}}]},
            {"10.1.0.1": True, "10.1.2.3": False},
        ),
        ({"to": [{"ipBlock": {"cidr": "fd00::/8"}}]}, {"fd00::1": True, "10.1.0.1": False}),
        ({"to": [{"namespaceSelector": {}}]}, {"10.1.0.1": False}),
        ({"ports": [{"port": 8000, "endPort": 8999}]}, {"10.1.0.1": True}),
        ({"ports": [{"port": 443}]}, {"10.1.0.1": False}),
        ({"ports": [{"port": 8085, "protocol": "UDP"}]}, {"10.1.0.1": False}),
        ({"ports": [{"protocol": "TCP"}]}, {"10.1.0.1": True}),
    ],
)
def test_addresses_and_ports_are_matched_as_in_kubernetes(rule: Json, reached: dict[str, bool]) -> None:
    spec = {"podSelector": {}, "policyTypes": ["Egress"], "egress": [rule]}
    policy = {"metadata": {"namespace": "clincot"}, "spec": spec}
    assert {address: allowed([policy], SERVER, address, 8085) for address in reached} == reached


@pytest.mark.parametrize("empty", ["[]", "null"])
@pytest.mark.parametrize(
    ("value", "source", "target", "port"),
    [
        ("networkPolicy.gateway", GATEWAY, SERVER, 8080),
        ("networkPolicy.gateway", STRANGER, SERVER, 8085),
        ("networkPolicy.prometheus", PROMETHEUS, JUDGE, 8080),
        ("networkPolicy.prometheus", STRANGER, MONITOR, 8080),
        ("networkPolicy.apiServerPorts", RUN, None, 6443),
        ("networkPolicy.apiServerPorts", DEPLOYER, None, 25),
        ("networkPolicy.apiServer", RUN, None, 6443),
        ("networkPolicy.apiServer", DEPLOYER, None, 443),
        ("kfp.ports", RUN, KFP, 8888),
        ("kfp.ports", HOOK, KFP, 25),
    ],
)
def test_an_empty_list_allows_nothing(value: str, source: Workload, target: Target, port: int, empty: str) -> None:
    """A rule with an empty list would allow everything, so the chart renders no rule."""
    judges = 'judges=[{"name":"med","modelUri":"s3://m/med"}]'
    flags = ("--set", "monitoring.serviceMonitor=true", "--set-json", judges, "--set-json", f"{value}={empty}")
    policies = of_kind(rendered("trial", *flags), "NetworkPolicy")
    assert not allowed(policies, source, target, port)


@pytest.mark.parametrize("empty", ["[]", "null"])
@pytest.mark.parametrize(("value", "port"), [("networkPolicy.store", 9443), ("networkPolicy.git", 8443)])
def test_an_empty_list_of_peers_closes_the_port(value: str, port: int, empty: str) -> None:
    addresses = "store.endpoint=https://s3.example:9443,git.url=https://git.example:8443/d.git,git.existingSecret=g"
    opened = of_kind(rendered("default", "--set", addresses), "NetworkPolicy")
    closed = of_kind(rendered("default", "--set", addresses, "--set-json", f"{value}={empty}"), "NetworkPolicy")
    assert (allowed(opened, RUN, None, port), allowed(closed, RUN, None, port)) == (True, False)


def test_git_has_a_rule_only_if_there_is_a_repository() -> None:
    """Without a repository, run pods must not reach any address on port 443."""
    closed = ("--set-json", 'networkPolicy.apiServer=["10.0.0.1/32"]', "--set", "networkPolicy.apiServerPorts={6443}")
    assert not allowed(of_kind(rendered("trial", *closed), "NetworkPolicy"), RUN, None, 443)
    url = "https://git.hospital.example/data.git"
    for value in ("git.url", "pipeline.params.version.repository"):
        policies = of_kind(rendered("trial", *closed, "--set", f"{value}={url}"), "NetworkPolicy")
        assert allowed(policies, RUN, None, 443)


def test_the_nodes_of_a_train_job_reach_only_each_other() -> None:
    flags = ("--set", "pipeline.trainJobs=true,pipeline.cache.accessMode=ReadWriteMany")
    objects = rendered("trial", *flags)
    job = yaml.safe_load(settings_of(objects)["launch.yaml"])["job"]
    policies, node = of_kind(objects, "NetworkPolicy"), (job["namespace"], job["pod_labels"])
    assert allowed(policies, node, node, 29500)
    for other in (STORE, STRANGER, RUN, None):
        assert not allowed(policies, node, other, 443)
    assert not allowed(policies, STRANGER, node, 29500)
    (account,) = of_kind(objects, "ServiceAccount", job["service_account"], job["namespace"])
    assert account["automountServiceAccountToken"] is False  # a TrainJob's patch cannot set it
    assert job["pod_labels"]["app.kubernetes.io/instance"] == "clincot"
    assert not of_kind(rendered("trial"), "ServiceAccount", job["service_account"])


MINIO, OUTSIDE = ("minio", {"app": "minio"}), "203.0.113.7"
JUDGES = "pipeline.params.judge.judges[0].name=far,pipeline.params.judge.judges[0].url"


@pytest.mark.parametrize(
    ("values", "source", "target", "port"),
    [
        ("store.endpoint=http://minio.minio.svc:9000", SERVER, MINIO, 9000),
        ("store.endpoint=http://minio.minio.svc:9000", RUN, MINIO, 9000),
        ("store.endpoint=http://minio.minio.svc.cluster.local", RUN, MINIO, 80),
        ("store.endpoint=https://s3.example:9443", RUN, OUTSIDE, 9443),
        ("store.endpoint=http://10.1.2.3:9000", RUN, "10.1.2.3", 9000),
        ("store.endpoint=https://[fd00::1]:9443", RUN, "fd00::1", 9443),
        ("store.endpoint=https://[fd00::1]", JUDGE, "fd00::1", 443),
        ("git.url=https://git.hospital.example:8443/data.git", RUN, OUTSIDE, 8443),
        ("git.url=git@git.hospital.example:data.git", RUN, OUTSIDE, 22),
        ("pipeline.params.version.repository=ssh://git.hospital.example/data.git", RUN, OUTSIDE, 22),
        ("proxy.https=http://proxy:3129,proxy.http=http://proxy:3128", RUN, OUTSIDE, 3129),
        ("proxy.https=http://proxy:3129,proxy.http=http://proxy:3128", HOOK, OUTSIDE, 3128),
        ("proxy.https=http://squid.egress.svc:3128", JUDGE, ("egress", {}), 3128),
        ("kfp.endpoint=https://kubeflow.hospital.example:8443", HOOK, OUTSIDE, 8443),
        ("judges[0].name=far,judges[0].url=http://judge.example:8000/v1", RUN, OUTSIDE, 8000),
        ("judges[0].name=far,judges[0].url=http://tgi.models.svc:8000/v1", RUN, ("models", {}), 8000),
        (f"{JUDGES}=http://judge.example:8001/v1", RUN, OUTSIDE, 8001),
        ("pipeline.params.propose.http_url=http://grounder.tools.svc:8002", RUN, ("tools", {}), 8002),
        ("pipeline.params.evaluate.serve.propose.http_url=http://grounder:8002", SERVER, OUTSIDE, 8002),
        ("pipeline.params.evaluate.serve.propose.http_url=http://grounder:8002", DEPLOYER, OUTSIDE, 8002),
        ("pipeline.env.MLFLOW_TRACKING_URI=http://mlflow.tools.svc:5000", RUN, ("tools", {}), 5000),
        ("server.endpointUrl=https://clincot.hospital.example", DEPLOYER, OUTSIDE, 443),
        ("server.endpointUrl=https://clincot.hospital.example:444", RUN, OUTSIDE, 444),
        ("server.settings.traces_endpoint=http://otel.tools.svc:4318", SERVER, ("tools", {}), 4318),
        ("server.settings.url_hosts[0]=images.hospital.example", SERVER, OUTSIDE, 443),
    ],
)
def test_ports_follow_from_the_addresses(values: str, source: Workload, target: Target, port: int) -> None:
    """Without the address, the port is closed; networkPolicy needs no value for it.

    An address in the cluster or an IP opens the way to itself only, which a host outside cannot.
    """
    closed = ("--set-json", 'networkPolicy.apiServer=["10.0.0.1/32"]', "--set", "networkPolicy.apiServerPorts={6443}")
    flags = ("--set", "store.endpoint=http://s3.example:81", *closed, "--set", "git.existingSecret=g")
    assert not allowed(of_kind(rendered("default", *flags), "NetworkPolicy"), source, target, port)
    policies = of_kind(rendered("default", *flags, "--set", values), "NetworkPolicy")
    assert allowed(policies, source, target, port)
    for other in (STRANGER, "198.51.100.9"):
        assert allowed(policies, source, other, port) is (target == OUTSIDE), other
    assert not allowed(policies, STRANGER, SERVER, 8080)


def test_further_egress_is_for_runs_only() -> None:
    rule = '[{"to":[{"ipBlock":{"cidr":"10.9.0.0/16"}}],"ports":[{"protocol":"TCP","port":8444}]}]'
    policies = of_kind(rendered("trial", "--set-json", f"networkPolicy.extraEgress={rule}"), "NetworkPolicy")
    reached = {pod[1]["app.kubernetes.io/component"] for pod in PODS if allowed(policies, pod, "10.9.0.1", 8444)}
    assert reached == {"run"}
    assert not allowed(policies, RUN, "10.8.0.1", 8444)


PODS = (RUN, DEPLOYER, BUCKET, HOOK, SERVER, JUDGE, STORE)


def test_two_releases_in_a_namespace_open_nothing_for_each_other() -> None:
    """The first closes its endpoint to gateways and has a store of its own; the second has neither closed."""
    policies = of_kind(rendered("trial", "--set-json", "networkPolicy.gateway=[]"), "NetworkPolicy")
    policies += of_kind(rendered("trial", release="second"), "NetworkPolicy")
    first, second = (("clincot", label_pods("server", release)) for release in ("clincot", "second"))
    store = ("clincot", label_pods("seaweedfs", "second"))
    assert (allowed(policies, GATEWAY, first, 8080), allowed(policies, GATEWAY, second, 8080)) == (False, True)
    assert (allowed(policies, first, store, 8333), allowed(policies, second, store, 8333)) == (False, True)
    assert not allowed(policies, second, first, 8080)


def test_knatives_proxy_is_reached_in_its_modes() -> None:
    """The gateway's requests enter a Knative pod through the queue-proxy.

    Ports of pkg/networking/constants.go in knative/serving: 8012 (HTTP), 8013 (HTTP/2), 8112 (HTTPS).
    """
    for mode, reached in (("auto", True), ("knative", True), ("standard", False), ("blue-green", False)):
        policies = of_kind(rendered("trial", "--set", f"server.mode={mode}"), "NetworkPolicy")
        assert [allowed(policies, GATEWAY, SERVER, port) for port in (8012, 8013, 8112)] == [reached] * 3
        assert not allowed(policies, GATEWAY, SERVER, 8085)


def test_gateways_reach_grpc_only_where_it_is_served() -> None:
    for served in (True, False):
        policies = of_kind(rendered("trial", "--set", f"server.grpc={str(served).lower()}"), "NetworkPolicy")
        assert allowed(policies, GATEWAY, SERVER, 8081) == served
        assert not allowed(policies, STRANGER, SERVER, 8081)


def test_an_external_store_is_reached_at_its_address() -> None:
    block = 'networkPolicy.store=[{"ipBlock":{"cidr":"10.1.0.0/16"}}]'
    flags = ("--set", "networkPolicy.storePort=9000", "--set-json", block)
    policies = of_kind(rendered("production", *flags), "NetworkPolicy")
    assert allowed(policies, SERVER, None, 9000)
    assert not allowed(policies, SERVER, None, 443)


def test_the_table_lists_what_is_allowed() -> None:
    """A row for each pair with open ports; ports that are open everywhere are in the row of any address only."""
    rows = {(source, target): ports for source, target, ports in list_traffic("trial") if ports}
    assert rows["endpoint", "the trial's store"] == [8333]
    assert rows["tasks of a run", "any address"] == [443, 6443]
    assert rows["tasks of a run", "Kubeflow Pipelines"] == [3000, 8080, 8333, 8887, 8888, 9000]
    assert ("any other pod", "endpoint") not in rows
    assert ("endpoint", "any address") not in rows
    opened = list_traffic("trial", "--set", "networkPolicy.enabled=false")
    assert ("any other pod", "endpoint") in {(source, target) for source, target, ports in opened if 8085 in ports}


def test_every_pod_has_a_policy_for_its_component() -> None:
    """With the default denial only, it could not reach anything."""
    objects = rendered("trial", "--set", "monitoring.rules.enabled=true,server.first.enabled=true")
    named = {one["metadata"]["name"].removeprefix("clincot-") for one in of_kind(objects, "NetworkPolicy")}
    for one in objects:
        labels = one["metadata"].get("labels", {})
        if one["kind"] in ("Job", "StatefulSet", "Deployment"):
            labels = one["spec"]["template"]["metadata"]["labels"]
        elif one["kind"] != "Pod":
            continue
        assert labels["app.kubernetes.io/part-of"] == "clincot"
        assert labels["app.kubernetes.io/component"] in named


@pytest.mark.parametrize("helm", HELMS)
def test_an_exception_has_to_be_inside_its_block(helm: str) -> None:
    """Kubernetes wants a strict subset (ValidateIPBlock in pkg/apis/networking/validation/validation.go, v1.34.4).

    Each pair is compared with Python's ipaddress.
    """
    blocks = (
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.1.0.0/16",
        "10.1.2.3/32",
        "172.16.0.0/12",
        "172.32.0.0/12",
        "192.168.128.0/17",
    )
    blocks += (
        "::/0",
        "fd00::/8",
        "FD00:1::/32",
        "fd00:1:0:a::/64",
        "2001:db8::/33",
        "2001:db8:8000::/33",
        "fd00:1:2:3:4:5:6:7/128",
    )
    peers = [{"ipBlock": {"cidr": outer, "except": [*blocks]}} for outer in blocks]
    done = template(
        "--set", "store.existingSecret=s3", "--set-json", f"networkPolicy.prometheus={json.dumps(peers)}", version=helm
    )
    refused = set(
        re.findall(
            r"networkPolicy\.prometheus\[\d+\]\.ipBlock: the exception (\S+) is not inside the block (\S+)", done.stderr
        )
    )
    assert refused == {(inner, outer) for outer in blocks for inner in blocks if not _is_inside(inner, outer)}


def _is_inside(inner: str, outer: str) -> bool:
    small, large = ip_network(inner), ip_network(outer)
    return small.version == large.version and small != large and small.subnet_of(large)  # type: ignore[arg-type]
