"""A stand-in of Kubeflow's Model Registry, as strict as its API v1alpha3 about what it is sent.

Source of its rules: kubeflow/model-registry at c6ac741e, api/openapi/src/model-registry.yaml (paths, statuses, required
fields) and api/openapi/src/lib/common.yaml at 00a8ece4 (MetadataValue: no further keys, int_value is a string; ids are
strings of digits). Creation answers 201, a name that is taken 409, a search without a hit 404.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.http_server import Reply, Request

_API = "/api/model_registry/v1alpha3/"
_VALUES = {
    "MetadataStringValue": "string_value",
    "MetadataIntValue": "int_value",
    "MetadataDoubleValue": "double_value",
}
_TYPES: dict[str, type | tuple[type, ...]] = {"string_value": str, "int_value": str, "double_value": (int, float)}
_BASE = {"name", "description", "externalId", "customProperties"}
_MODEL = _BASE | {"owner", "state", "readme", "maturity", "tasks", "provider", "license", "libraryName"}
_VERSION = _BASE | {"registeredModelId", "state", "author"}
_ARTIFACT = _BASE | {
    "artifactType",
    "uri",
    "modelFormatName",
    "modelFormatVersion",
    "storageKey",
    "storagePath",
    "state",
}


@dataclass
class RegistryStandIn:
    """Resources by kind: "registered_model", "model_version", "artifact"."""

    resources: dict[str, list[dict[str, Any]]] = field(
        default_factory=lambda: {"registered_model": [], "model_version": [], "artifact": []}
    )
    token: str = ""  # "": requests need none
    created: int = 0

    def reply(self, request: Request) -> Reply:
        if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
            return _refuse(401, "unauthorized")
        parts = urlsplit(request.path)
        if not parts.path.startswith(_API):
            return _refuse(404, "no such path")
        path = parts.path.removeprefix(_API)
        if request.method == "GET":
            return self._find(path, {name: values[0] for name, values in parse_qs(parts.query).items()})
        problem = _find_problem(request.body)
        if problem:
            return _refuse(400, problem)
        if request.method == "PATCH" and (match := re.fullmatch(r"registered_models/(\d+)", path)):
            return self._patch(match[1], request.body)
        return self._create(path, request.body)

    def _find(self, kind: str, query: dict[str, str]) -> Reply:
        if kind not in self.resources:
            return _refuse(404, "no such path")
        for resource in self.resources[kind]:
            parent = query.get("parentResourceId", resource["parent"])
            if (resource["name"], resource["parent"]) == (query["name"], parent):
                return 200, _show(resource)
        return _refuse(404, f"no {kind} named {query.get('name')}")

    def _create(self, path: str, body: dict[str, Any]) -> Reply:
        nested = re.fullmatch(r"(registered_models|model_versions)/(\d+)/(versions|artifacts)", path)
        if path == "registered_models":
            return self._add("registered_model", body, _MODEL, {"name"}, parent="")
        if nested and (nested[1], nested[3]) == ("registered_models", "versions"):
            if body.get("registeredModelId") != nested[2]:
                return _refuse(400, "registeredModelId does not match the path")
            return self._add("model_version", body, _VERSION, {"name", "registeredModelId"}, parent=nested[2])
        if nested and (nested[1], nested[3]) == ("model_versions", "artifacts"):
            return self._add("artifact", body, _ARTIFACT, {"artifactType"}, parent=nested[2])
        return _refuse(404, "no such path")

    def _add(self, kind: str, body: dict[str, Any], known: set[str], required: set[str], *, parent: str) -> Reply:
        if not required <= set(body) <= known:
            return _refuse(400, f"{kind}: fields {sorted(body)}, required {sorted(required)}")
        parents = {"model_version": "registered_model", "artifact": "model_version"}
        if parent and parent not in {resource["id"] for resource in self.resources[parents[kind]]}:
            return _refuse(404, f"{kind}: no parent {parent}")
        if any((r["name"], r["parent"]) == (body.get("name"), parent) for r in self.resources[kind]):
            return _refuse(409, f"{kind} {body.get('name')} exists")
        self.created += 1
        resource = {**body, "id": str(self.created), "parent": parent}
        self.resources[kind].append(resource)
        return 201, _show(resource)

    def _patch(self, identity: str, body: dict[str, Any]) -> Reply:
        for resource in self.resources["registered_model"]:
            if resource["id"] == identity:
                resource.update(body)
                return 200, _show(resource)
        return _refuse(404, f"no registered model {identity}")


def _show(resource: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in resource.items() if name != "parent"}


def _refuse(status: int, message: str) -> Reply:
    return status, {"code": str(status), "message": message}


def _find_problem(body: Any) -> str:
    if not isinstance(body, dict):
        return "the body is no object"
    for name, value in body.get("customProperties", {}).items():
        key = _VALUES.get(value.get("metadataType", ""), "")
        if set(value) != {"metadataType", key} or not isinstance(value[key], _TYPES[key]):
            return f"customProperties.{name}: not a MetadataValue"
    return ""
