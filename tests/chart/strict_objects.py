"""What a Kubernetes API server refuses although the object has the right fields and types.

The rules are those of pkg/apis/core/validation/validation.go, pkg/apis/networking/validation/validation.go and
staging/src/k8s.io/apimachinery/pkg/util/validation/validation.go of kubernetes/kubernetes v1.34.4, and the expressions
(x-kubernetes-validations) of the Gateway API's CRD that the chart's routes could violate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from ipaddress import ip_network
from typing import Any

import kubernetes_validate
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource

from clincot.deployment.crd import InvalidResource, validate_manifest
from tests.chart.demand import parse_quantity
from tests.support.crds import KINDS, load_validator

Json = dict[str, Any]
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
NAME_PART = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
ENV_NAME = re.compile(r"[ -<>-~]+")
QUANTITY = re.compile(r"\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?")
# names of these become a DNS label or a label's value
SHORT_NAMES = ("Service", "Job", "StatefulSet", "InferenceService", "Namespace")


def list_refusals(document: str) -> list[str]:
    """Return why the API server would refuse an object, given as JSON."""
    return list(_list_refusals(document))


@cache
def _list_refusals(document: str) -> tuple[str, ...]:
    one: Json = json.loads(document)
    return (*_check_schema(one), *_check_metadata(one), *_check_ingress(one), *_check_parts(one, ""))


def _check_schema(one: Json) -> Iterator[str]:
    try:
        if one["kind"] in KINDS:
            validate_manifest(one, load_validator(one["kind"]))
        else:
            validate_strictly(one, "1.33")
    except (InvalidResource, ValidationError) as error:
        yield str(error)[:500]


def validate_strictly(one: Json, version: str) -> None:
    """Check an object of Kubernetes against the schemas of kubernetes-validate. Raises ValidationError.

    As kubernetes_validate.validate(strict=True), which reads all definitions for every object.
    """
    _load_schema(version, f"{one['kind'].lower()}-{_shorten_group(one['apiVersion'])}").validate(one)


def _shorten_group(version: str) -> str:
    """rbac.authorization.k8s.io/v1 -> rbac-v1"""
    group, slash, number = version.rpartition("/")
    return f"{group.partition('.')[0]}-{number}" if slash else number


@cache
def _load_schema(version: str, name: str) -> Draft202012Validator:
    release = _find_release(version)
    schema, definitions = (_read_schema(release, file) for file in (name, "_definitions"))
    registry: Registry[Any] = Registry()
    registry = Resource.from_contents(schema) @ (Resource.from_contents(definitions) @ registry)
    return Draft202012Validator(schema, registry=registry)


def load_kubernetes_definitions(version: str) -> Json:
    """Return the forms of Kubernetes by their full names, as io.k8s.api.core.v1.NodeAffinity."""
    found: Json = _read_schema(_find_release(version), "_definitions")["$defs"]
    return found


def _find_release(version: str) -> str:
    return [one for one in kubernetes_validate.utils.all_versions() if one.startswith(f"{version}.")][-1]


@cache
def _read_schema(release: str, name: str) -> Json:
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{release}-local-strict"
    found: Json = json.loads((folder / f"{name}.json").read_text())
    return found


def _check_metadata(one: Json) -> Iterator[str]:
    about = one["metadata"]
    pattern, most = (LABEL, 63) if one["kind"] in SHORT_NAMES else (SUBDOMAIN, 253)
    if len(about["name"]) > most or not pattern.fullmatch(about["name"]):
        yield f"metadata.name {about['name']!r}"
    if not LABEL.fullmatch(about.get("namespace", "clincot")):
        yield f"metadata.namespace {about['namespace']!r}"


def _check_ingress(one: Json) -> Iterator[str]:
    """Check an Ingress as ValidateIngressCreate does."""
    if one["kind"] != "Ingress":
        return
    spec = one["spec"]
    if "ingressClassName" in spec and "kubernetes.io/ingress.class" in one["metadata"].get("annotations", {}):
        yield "the annotation kubernetes.io/ingress.class and ingressClassName are both set"
    for rule in spec["rules"]:
        yield from _check_hosts([rule.get("host", "")])
        for entry in rule["http"]["paths"]:
            path = entry["path"]
            if not path.startswith("/") or any(text in path for text in ("//", "/./", "/../", "%2f", "%2F")):
                yield f"path {path!r}"
            if len(entry["backend"]["service"]["name"]) > 63:
                yield f"backend {entry['backend']['service']['name']}"


def _check_parts(part: Any, where: str) -> Iterator[str]:
    """Check every map in the object by the names of its fields."""
    if isinstance(part, list):
        for index, one in enumerate(part):
            yield from _check_parts(one, f"{where}[{index}]")
    if not isinstance(part, dict):
        return
    for key, check in CHECKS.items():
        if key in part:
            for reason in check(part[key]):
                yield f"{where}.{key}: {reason}"
    for key, value in part.items():
        if key not in ("data", "stringData", "annotations"):
            yield from _check_parts(value, f"{where}.{key}")


def _check_labels(labels: Any) -> Iterator[str]:
    for key, value in (labels or {}).items():
        yield from _check_key(key)
        if not isinstance(value, str) or (value and not NAME_PART.fullmatch(value)):
            yield f"value {value!r}"


def _check_annotations(annotations: Any) -> Iterator[str]:
    for key in annotations or {}:
        yield from _check_key(key)


def _check_key(key: str) -> Iterator[str]:
    prefix, slash, name = key.rpartition("/")
    if not NAME_PART.fullmatch(name) or (slash and not (SUBDOMAIN.fullmatch(prefix) and len(prefix) <= 253)):
        yield f"key {key!r}"


def _check_resources(resources: Any) -> Iterator[str]:
    if not isinstance(resources, dict) or not {"requests", "limits"} & set(resources):
        return
    wanted, limits = resources.get("requests") or {}, resources.get("limits") or {}
    for name, value in (*wanted.items(), *limits.items()):
        if not QUANTITY.fullmatch(str(value)):
            yield f"{name} {value!r} is no quantity"
            return
    for name in set(wanted) & set(limits):
        if parse_quantity(wanted[name]) > parse_quantity(limits[name]):
            yield f"{name}: request {wanted[name]} above limit {limits[name]}"


def _check_tolerations(tolerations: Any) -> Iterator[str]:
    for one in tolerations or ():
        key, operator, effect = one.get("key", ""), one.get("operator") or "Equal", one.get("effect", "")
        if key:
            yield from _check_key(key)
        elif operator != "Exists":
            yield "operator must be Exists if there is no key"
        if operator == "Exists" and one.get("value"):
            yield "value must be empty with Exists"
        if operator == "Equal" and one.get("value") and not NAME_PART.fullmatch(one["value"]):
            yield f"value {one['value']!r}"
        if "tolerationSeconds" in one and effect != "NoExecute":
            yield "tolerationSeconds needs the effect NoExecute"


def _check_env(variables: Any) -> Iterator[str]:
    for one in variables if isinstance(variables, list) else ():
        if not ENV_NAME.fullmatch(one["name"]):
            yield f"name {one['name']!r}"
        secret = one.get("valueFrom", {}).get("secretKeyRef")
        if secret is not None and not SUBDOMAIN.fullmatch(secret["name"]):
            yield f"secret {secret['name']!r}"


def _check_peers(peers: Any) -> Iterator[str]:
    for peer in peers if isinstance(peers, list) else ():
        if not peer or ("ipBlock" in peer and len(peer) > 1):
            yield f"peer {peer}"
        if "ipBlock" in peer:
            yield from _check_block(peer["ipBlock"])


def _check_block(block: Json) -> Iterator[str]:
    try:
        outer = ip_network(block["cidr"], strict=False)
        for one in block.get("except", ()):
            inner = ip_network(one, strict=False)
            if inner.version != outer.version or not inner.subnet_of(outer) or inner == outer:  # type: ignore[arg-type]
                yield f"except {one} is not inside {block['cidr']}"
    except ValueError as error:
        yield str(error)


def _check_ports(ports: Any) -> Iterator[str]:
    for one in ports if isinstance(ports, list) else ():
        if "endPort" in one and one["endPort"] < one.get("port", 65536):
            yield f"endPort {one['endPort']} below port {one.get('port')}"


def _check_hosts(hosts: Any) -> Iterator[str]:
    for host in hosts if isinstance(hosts, list) else ():
        name = host.removeprefix("*.")
        if len(host) > 253 or not SUBDOMAIN.fullmatch(name) or re.fullmatch(r"[\d.]+", name):
            yield f"host {host!r}"
        if any(len(part) > 63 for part in name.split(".")):
            yield f"host {host!r} has a label of more than 63 characters"


def _check_parents(parents: Any) -> Iterator[str]:
    """Two references to one parent need two names of sections (HTTPRoute, spec.parentRefs)."""
    sections: dict[tuple[str, str], list[str]] = {}
    for one in parents:
        sections.setdefault((one.get("namespace", ""), one["name"]), []).append(one.get("sectionName", ""))
    for parent, names in sections.items():
        if len(names) > 1 and ("" in names or len(set(names)) < len(names)):
            yield f"{parent} is named twice with the sections {names}"


def _check_backends(backends: Any) -> Iterator[str]:
    """A reference to a Service needs a port (HTTPRoute, spec.rules[].backendRefs[])."""
    for one in backends:
        if one.get("kind", "Service") == "Service" and "port" not in one:
            yield f"Service {one['name']} without a port"


def _check_secrets(names: Any) -> Iterator[str]:
    for one in names if isinstance(names, list) else ():
        if isinstance(one, dict) and set(one) == {"name"} and not SUBDOMAIN.fullmatch(one["name"]):
            yield f"name {one['name']!r}"


CHECKS = {
    "labels": _check_labels,
    "matchLabels": _check_labels,
    "nodeSelector": _check_labels,
    "annotations": _check_annotations,
    "resources": _check_resources,
    "tolerations": _check_tolerations,
    "env": _check_env,
    "from": _check_peers,
    "to": _check_peers,
    "ports": _check_ports,
    "imagePullSecrets": _check_secrets,
    "hosts": _check_hosts,
    "hostnames": _check_hosts,
    "parentRefs": _check_parents,
    "backendRefs": _check_backends,
}
