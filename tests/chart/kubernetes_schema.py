"""Generate the schemas of Kubernetes' own forms in values.schema.json: affinity, sources of volumes and of variables.

The forms are those of Kubernetes' OpenAPI document, which kubernetes-validate carries. They are stricter in two ways:
null is no value, and rules of pkg/apis/core/validation/validation.go (kubernetes/kubernetes v1.34.4) that a schema can
state are added, for what the API server would refuse only after the installation began.
"""

from __future__ import annotations

import copy
from typing import Any

from tests.chart.strict_objects import load_kubernetes_definitions

Json = dict[str, Any]
PREFIX = "kubernetes"  # of the names of the generated definitions
_VERSION = "1.34"
_CORE = "io.k8s.api.core.v1."
_META = "io.k8s.apimachinery.pkg.apis.meta.v1."
_QUANTITY = "io.k8s.apimachinery.pkg.api.resource.Quantity"
VOLUMES = {
    "configMap": "ConfigMapVolumeSource",
    "csi": "CSIVolumeSource",
    "downwardAPI": "DownwardAPIVolumeSource",
    "emptyDir": "EmptyDirVolumeSource",
    "ephemeral": "EphemeralVolumeSource",
    "image": "ImageVolumeSource",
    "nfs": "NFSVolumeSource",
    "persistentVolumeClaim": "PersistentVolumeClaimVolumeSource",
    "projected": "ProjectedVolumeSource",
    "secret": "SecretVolumeSource",
}
VARIABLES = {
    "secretKeyRef": "SecretKeySelector",
    "configMapKeyRef": "ConfigMapKeySelector",
    "fieldRef": "ObjectFieldSelector",
    "resourceFieldRef": "ResourceFieldSelector",
}
AFFINITY = {"nodeAffinity": "NodeAffinity", "podAffinity": "PodAffinity", "podAntiAffinity": "PodAntiAffinity"}
# Forms that the schema has already, with the same fields.
_OWN: dict[str, Json] = {
    f"{_META}LabelSelector": {"$ref": "#/definitions/labelSelector"},
    _QUANTITY: {"$ref": "#/definitions/quantities/additionalProperties"},
    f"{_META}ObjectMeta": {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "labels": {"$ref": "#/definitions/labels"},
            "annotations": {"$ref": "#/definitions/annotations"},
        },
    },
}
_NAME = {"$ref": "#/definitions/name"}
_MODE = {"type": "integer", "minimum": 0, "maximum": 0o777}
_WEIGHT = {"type": "integer", "minimum": 1, "maximum": 100}
_TOPOLOGY_KEY = {"$ref": "#/definitions/spread/items/properties/topologyKey"}
_KEY = {"type": "string", "pattern": "^[-._a-zA-Z0-9]+$", "maxLength": 253}
_RELATIVE = {"type": "string", "pattern": "^([^/.][^/]*|\\.[^/.][^/]*)(/([^/.][^/]*|\\.[^/.][^/]*))*$"}
_FIELDS = "^(metadata\\.(name|namespace|uid|labels|annotations)|metadata\\.(labels|annotations)\\['[^']+'\\])$"
_POD_FIELDS = "^(spec\\.(nodeName|serviceAccountName)|status\\.(hostIP|hostIPs|podIP|podIPs))$"
# Rules of the API server, by form and field.
_RULES: dict[str, Json] = {
    "NodeSelectorRequirement": {"operator": {"enum": ["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]}},
    "NodeSelector": {"nodeSelectorTerms": {"minItems": 1}},
    "PreferredSchedulingTerm": {"weight": _WEIGHT},
    "WeightedPodAffinityTerm": {"weight": _WEIGHT},
    "PodAffinityTerm": {"topologyKey": _TOPOLOGY_KEY},
    "EmptyDirVolumeSource": {"medium": {"pattern": "^(Memory|HugePages(-[0-9]+[kMGTPE]i?)?)?$"}},
    "ImageVolumeSource": {
        "reference": {"minLength": 1},
        "pullPolicy": {"enum": ["Always", "IfNotPresent", "Never"]},
    },
    "PersistentVolumeClaimVolumeSource": {"claimName": _NAME},
    "PersistentVolumeClaimSpec": {
        "volumeMode": {"enum": ["Filesystem", "Block"]},
        "accessModes": {
            "minItems": 1,
            "items": {"enum": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]},
        },
    },
    "VolumeResourceRequirements": {"requests": {"required": ["storage"]}},
    "NFSVolumeSource": {"path": {"pattern": "^/"}, "server": {"minLength": 1}},
    "ConfigMapVolumeSource": {"name": _NAME, "defaultMode": _MODE},
    "SecretVolumeSource": {"secretName": _NAME, "defaultMode": _MODE},
    "DownwardAPIVolumeSource": {"defaultMode": _MODE},
    "ProjectedVolumeSource": {"defaultMode": _MODE, "sources": {"minItems": 1}},
    "ConfigMapProjection": {"name": _NAME},
    "SecretProjection": {"name": _NAME},
    "KeyToPath": {"key": _KEY, "path": _RELATIVE, "mode": _MODE},
    "DownwardAPIVolumeFile": {"path": _RELATIVE, "mode": _MODE},
    "ServiceAccountTokenProjection": {
        "path": _RELATIVE,
        "expirationSeconds": {"minimum": 600, "maximum": 1 << 32},
    },
    "SecretKeySelector": {"name": _NAME, "key": _KEY},
    "ConfigMapKeySelector": {"name": _NAME, "key": _KEY},
    "ObjectFieldSelector": {
        "apiVersion": {"const": "v1"},
        "fieldPath": {"pattern": f"{_FIELDS}|{_POD_FIELDS}"},
    },
    "ResourceFieldSelector": {
        "resource": {"pattern": "^(requests|limits)\\.(cpu|memory|ephemeral-storage|hugepages-[0-9]+[kMGTPE]i?)$"}
    },
}
# Fields that OpenAPI calls optional, without which the API server refuses the object.
_REQUIRED = {
    "ConfigMapVolumeSource": ["name"],
    "SecretVolumeSource": ["secretName"],
    "ConfigMapProjection": ["name"],
    "SecretProjection": ["name"],
    "SecretKeySelector": ["name"],
    "ConfigMapKeySelector": ["name"],
    "ImageVolumeSource": ["reference"],
    "EphemeralVolumeSource": ["volumeClaimTemplate"],
    "PersistentVolumeClaimSpec": ["accessModes", "resources"],
    "VolumeResourceRequirements": ["requests"],
    "ProjectedVolumeSource": ["sources"],
}
_LEFT_OUT = ("description", "format", "x-kubernetes-map-type", "x-kubernetes-list-type", "x-kubernetes-list-map-keys")


def build_kubernetes_definitions() -> Json:
    """Return the definitions of the forms of VOLUMES, VARIABLES and AFFINITY, and of the forms inside them."""
    theirs = load_kubernetes_definitions(_VERSION)
    found: Json = {}
    waiting = [f"{_CORE}{name}" for name in (*VOLUMES.values(), *VARIABLES.values(), *AFFINITY.values())]
    while waiting:
        name = waiting.pop()
        if name in found or name in _OWN:
            continue
        found[name] = _add_rules(_simplify(theirs[name], waiting), name.removeprefix(_CORE))
    return {_rename(name): found[name] for name in sorted(found)}


def insert_forms(schema: Json) -> None:
    """Refer to the forms where the values have them."""
    definitions = schema["definitions"]
    volume = definitions["pod"]["properties"]["volumes"]["items"]["properties"]
    sources = definitions["variable"]["properties"]["valueFrom"]["properties"]
    affinity = definitions["affinity"]["properties"]
    for place, forms in ((volume, VOLUMES), (sources, VARIABLES), (affinity, AFFINITY)):
        for key, form in forms.items():
            place[key] = {"$ref": f"#/definitions/{_rename(_CORE + form)}"}


def _rename(name: str) -> str:
    return PREFIX + name.rpartition(".")[2]


def _simplify(part: Any, waiting: list[str], names: bool = False) -> Any:
    """Return a form without texts and nulls; adds the forms inside it to `waiting`. names: the keys are fields."""
    if isinstance(part, list):
        return [_simplify(one, waiting) for one in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part and not names:
        name = part["$ref"].rpartition("/")[2]
        waiting.append(name)
        return copy.deepcopy(_OWN.get(name, {"$ref": f"#/definitions/{_rename(name)}"}))
    out: Json = {}
    for key, value in part.items():
        if names:
            out[key] = _simplify(value, waiting)
        elif key == "type" and isinstance(value, list):
            (out[key],) = [one for one in value if one != "null"]
        elif key not in _LEFT_OUT:
            out[key] = _simplify(value, waiting, names=key == "properties")
    return out


def _add_rules(form: Json, name: str) -> Json:
    for field, rule in _RULES.get(name, {}).items():
        old = form["properties"][field]
        form["properties"][field] = dict(rule) if "$ref" in rule else {**old, **rule}
    required = [*form.get("required", []), *_REQUIRED.get(name, [])]
    return {**form, "required": sorted(set(required))} if required else form
