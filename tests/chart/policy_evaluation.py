"""Evaluate rendered network policies as a network plugin does, and list who reaches whom in each profile."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import yaml

from tests.chart.rendering import SHIPPED, Json, of_kind, rendered, settings_of

Workload = tuple[str, dict[str, str]]
Target = Workload | str | None  # a pod, an address outside the cluster, or one that is in every ipBlock


def label_pods(component: str, release: str = "clincot") -> dict[str, str]:
    """Return the labels of a component's pods by which policies select them."""
    return {
        "app.kubernetes.io/part-of": "clincot",
        "app.kubernetes.io/instance": release,
        "app.kubernetes.io/component": component,
    }


def selects(selector: Json, labels: dict[str, str]) -> bool:
    """Return whether a LabelSelector matches; all of its requirements have to hold, an empty one matches everything.

    LabelSelector in staging/src/k8s.io/apimachinery/pkg/apis/meta/v1/types.go of kubernetes/kubernetes v1.34.4; NotIn
    also matches without the key (labels/selector.go).
    """
    assert set(selector) <= {"matchLabels", "matchExpressions"}, selector
    same = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    return same and all(_holds(one, labels) for one in selector.get("matchExpressions", ()))


def _holds(requirement: Json, labels: dict[str, str]) -> bool:
    key, values = requirement["key"], requirement.get("values", ())
    results = {
        "In": key in labels and labels[key] in values,
        "NotIn": key not in labels or labels[key] not in values,
        "Exists": key in labels,
        "DoesNotExist": key not in labels,
    }
    return results[requirement["operator"]]


def allowed(policies: list[Json], source: Workload, target: Target, port: int) -> bool:
    """Return whether both ends allow TCP traffic; a pod without a policy allows all.

    target: a pod, the address of something outside the cluster, or None for one that is in every ipBlock.
    """
    out = _allows(policies, "egress", source, target, port)
    return out and (not isinstance(target, tuple) or _allows(policies, "ingress", target, source, port))


def _allows(policies: list[Json], direction: str, pod: Workload, other: Target, port: int) -> bool:
    mine = [
        one["spec"]
        for one in policies
        if one["metadata"]["namespace"] == pod[0]
        and selects(one["spec"]["podSelector"], pod[1])
        and direction.capitalize() in one["spec"]["policyTypes"]
    ]
    if not mine:
        return True
    rules = [rule for spec in mine for rule in spec.get(direction) or ()]
    return any(_rule_allows(rule, direction, pod, other, port) for rule in rules)


def _rule_allows(rule: Json, direction: str, pod: Workload, other: Target, port: int) -> bool:
    """Return whether one rule allows the traffic; an empty or missing list of ports or peers means all of them.

    "If this field is empty or missing, this rule matches all sources": NetworkPolicyIngressRule and
    NetworkPolicyEgressRule in staging/src/k8s.io/api/networking/v1/types.go of kubernetes/kubernetes v1.34.4.
    """
    ports = rule.get("ports")
    if ports and not any(_is_port(one, port) for one in ports):
        return False
    peers = rule.get("to" if direction == "egress" else "from")
    return not peers or any(is_peer(peer, pod, other) for peer in peers)


def _is_port(one: Json, port: int) -> bool:
    """Return whether a NetworkPolicyPort contains a TCP port; the default protocol is TCP, no port means all."""
    assert set(one) <= {"port", "protocol", "endPort"}, one
    first: int = one.get("port", 0)
    last: int = one.get("endPort", first or 65535)
    return bool(one.get("protocol", "TCP") == "TCP") and first <= port <= last


def is_peer(peer: Json, pod: Workload, other: Target) -> bool:
    """Return whether a peer selects a pod or an address; None is an address that every ipBlock contains.

    A podSelector alone selects pods of the policy's own namespace, an empty selector everything of its kind.
    """
    assert peer, "a peer without selector and ipBlock is invalid"
    assert set(peer) <= {"ipBlock", "namespaceSelector", "podSelector"}, peer
    if "ipBlock" in peer or not isinstance(other, tuple):
        return "ipBlock" in peer and not isinstance(other, tuple) and _is_in_block(peer["ipBlock"], other)
    names = {"kubernetes.io/metadata.name": other[0]}
    near = selects(peer["namespaceSelector"], names) if "namespaceSelector" in peer else other[0] == pod[0]
    return near and selects(peer.get("podSelector", {}), other[1])


def _is_in_block(block: Json, address: str | None) -> bool:
    if address is None:
        return True
    own = ip_address(address)
    left_out = any(own in ip_network(one, strict=False) for one in block.get("except", ()))
    return own in ip_network(block["cidr"], strict=False) and not left_out


COMPONENTS = {  # component: what its pods are called in the table
    "run": "tasks of a run",
    "trainer": "nodes of a TrainJob",
    "deployer": "rollout",
    "hook": "pipeline hooks",
    "bucket": "bucket hook",
    "monitor": "monitor",
    "server": "endpoint",
    "judge": "judges",
    "seaweedfs": "the trial's store",
}
OTHERS: dict[str, Workload | None] = {
    "Kubeflow Pipelines": ("kubeflow", {"app": "ml-pipeline"}),
    "gateways": ("istio-system", {"app": "gateway"}),
    "ingress controller": ("ingress-nginx", {"app": "controller"}),
    "Prometheus": ("monitoring", {"app": "prometheus"}),
    "any other pod": ("elsewhere", {"app": "other"}),
    "addresses outside the cluster": None,
}


def list_traffic(profile: str, *flags: str) -> Iterator[tuple[str, str, list[int]]]:
    """Yield (from, to, TCP ports) of the traffic that a profile's policies allow, except DNS.

    Ports that a component reaches everywhere, inside the cluster and outside, are listed once, as `any address`.
    """
    objects = rendered(profile, *flags)
    policies = of_kind(objects, "NetworkPolicy")
    ports = _list_ports(policies)
    located = {name: _locate(objects, component) for component, name in COMPONENTS.items()}
    ours = {name: one for name, one in located.items() if _has_pods(objects, one)}

    def find_ports(source: Workload, target: Workload | None) -> set[int]:
        return {port for port in ports if allowed(policies, source, target, port)}

    for source, here in ours.items():
        everywhere = find_ports(here, OTHERS["any other pod"]) & find_ports(here, None)
        for target, there in {**ours, **OTHERS}.items():
            yield source, target, sorted(find_ports(here, there) - everywhere)
        yield source, "any address", sorted(everywhere)
    for source, here in OTHERS.items():
        for target, there in ours.items():
            if here is not None:
                yield source, target, sorted(find_ports(here, there))


def _locate(objects: tuple[Json, ...], component: str) -> Workload:
    """Return namespace and labels of a component's pods."""
    run = str(yaml.safe_load(settings_of(objects)["cluster.yaml"])["namespace"])
    return (run if component in ("run", "trainer") else "clincot", label_pods(component))


def _has_pods(objects: tuple[Json, ...], workload: Workload) -> bool:
    """Return whether the profile has pods of the component, or makes them later (runs, the endpoint)."""
    component = workload[1]["app.kubernetes.io/component"]
    if component in ("run", "server"):
        return True
    if component == "trainer":
        return "how: train-job" in settings_of(objects)["launch.yaml"]
    label = f"app.kubernetes.io/component: {component}"
    kinds = ("Job", "Pod", "Deployment", "StatefulSet", "InferenceService")
    return any(label in yaml.safe_dump(one) for one in objects if one["kind"] in kinds)


def _list_ports(policies: list[Json]) -> set[int]:
    rules = [rule for one in policies for kind in ("ingress", "egress") for rule in one["spec"].get(kind) or ()]
    return {
        8085,
        *(int(port["port"]) for rule in rules for port in rule.get("ports", ()) if port.get("protocol") != "UDP"),
    } - {53}


# An Ingress, whose controller is in the namespace ingress-nginx, as a profile's operator would add it.
WITH_INGRESS = (
    *("--set", "server.mode=blue-green,server.route.kind=Ingress,server.route.hosts={clincot.hospital.example}"),
    "--set-json",
    'networkPolicy.ingressController=[{"namespaceSelector":{"matchLabels":{"kubernetes.io/metadata.name":'
    '"ingress-nginx"}}}]',
)


def render_traffic_tables() -> str:
    """Return one table for each profile, and what an Ingress adds to one of them, in Markdown."""
    out = []
    for profile in SHIPPED:
        out += [f"## `values-{profile}.yaml`", "", *_render_table(_list_rows(profile)), ""]
    before = _list_rows("production", "--set", "server.mode=blue-green")
    more = [row for row in _list_rows("production", *WITH_INGRESS) if row not in before]
    out += ["## What an Ingress adds to `values-production.yaml`", "", *_render_table(more), ""]
    return "\n".join(out)


def _list_rows(profile: str, *flags: str) -> list[str]:
    return [
        f"| {source} | {target} | {', '.join(map(str, ports))} |"
        for source, target, ports in list_traffic(profile, *flags)
        if ports
    ]


def _render_table(rows: list[str]) -> list[str]:
    return ["| from | to | TCP ports |", "|---|---|---|", *rows]
