"""Generate the parts of values.schema.json that others define: the program's own types, and Kubernetes' forms.

    python -m tests.chart.readme --write      # writes it, together with the chart's README

A name, type or address that the program would refuse is then refused by Helm, before anything is installed.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from clincot.config import SECTION_NAMES, Params
from clincot.config.server_settings import ServeSettings
from clincot.deployment.service_settings import MEASURED_SETTINGS
from tests.chart.kubernetes_schema import PREFIX as KUBERNETES_PREFIX
from tests.chart.kubernetes_schema import build_kubernetes_definitions, insert_forms
from tests.chart.rendering import CHART

Json = dict[str, Any]
SCHEMA = CHART / "values.schema.json"
PREFIX = "params"  # of the names of the generated definitions
# Texts that are addresses, and the schema that they have elsewhere in the values: the templates parse them, and a
# malformed one would be an error of a template.
ADDRESSES = {
    **dict.fromkeys(("url", "http_url", "model_registry", "traces_endpoint"), "#/definitions/url"),
    "repository": "#/properties/git/properties/url",
}
NOT_OF_A_DEPLOYMENT = (*MEASURED_SETTINGS, "grace_s")  # ServiceSettings refuses them
POD_KEYS = (
    "annotations",
    "labels",
    "nodeSelector",
    "tolerations",
    "affinity",
    "topologySpreadConstraints",
    "priorityClassName",
    "runtimeClassName",
    "imagePullSecrets",
    "env",
    "volumes",
    "volumeMounts",
    "securityContext",
    "containerSecurityContext",
)
_POD_RESOURCES = (
    ("pipeline", "hook"),
    ("judgeDefaults",),
    ("server",),
    ("server", "storageInitializer"),
    ("monitoring",),
    ("seaweedfs",),
    ("tests",),
)
# Lists that may be missing, which means that nothing is allowed, and settings of pods that are not set then. A limit of
# CPU is optional.
MAY_BE_MISSING = {
    *(("podDefaults", name) for name in POD_KEYS),
    *((*path, "resources", "limits", "cpu") for path in _POD_RESOURCES),
    ("server", "frontResources", "limits", "cpu"),
    *((workload, "pod", "tolerations") for workload in ("judgeDefaults", "server")),
    ("kfp", "ports"),
    *(("networkPolicy", name) for name in ("gateway", "ingressController", "prometheus", "store", "git")),
    *(("networkPolicy", name) for name in ("apiServer", "apiServerPorts")),
}
_LEFT_OUT = ("title", "description", "default", "examples")


def build_params_schema() -> tuple[Json, Json]:
    """Return (schema of pipeline.params, definitions that it refers to)."""
    whole = Params.model_json_schema()
    definitions = {f"{PREFIX}{name}": _simplify(one) for name, one in whole["$defs"].items()}
    sections = {name: _simplify(whole["properties"][name]) for name in SECTION_NAMES}
    return {"type": "object", "additionalProperties": False, "properties": sections}, definitions


def build_settings_schema() -> Json:
    """Return the schema of server.settings, whose fields have simple types."""
    whole = ServeSettings.model_json_schema()
    names = [name for name in whole["properties"] if name not in NOT_OF_A_DEPLOYMENT]
    fields = {name: _simplify(whole["properties"][name]) for name in names}
    fields["traces_endpoint"] = {"$ref": ADDRESSES["traces_endpoint"]}
    fields["url_hosts"]["items"] = {"$ref": "#/definitions/host"}
    return {"type": "object", "additionalProperties": False, "properties": fields}


def _simplify(part: Any, names: bool = False) -> Any:
    """Return the schema without texts and defaults. names: the keys of `part` are names of properties."""
    if isinstance(part, list):
        return [_simplify(one) for one in part]
    if not isinstance(part, dict):
        return part
    out: Json = {}
    for key, value in part.items():
        if key == "$ref":
            out[key] = f"#/definitions/{PREFIX}{value.rpartition('/')[2]}"
        elif names and key in ADDRESSES:
            out[key] = {"$ref": ADDRESSES[key]}
        elif names or key not in _LEFT_OUT:
            out[key] = _simplify(value, names=key == "properties" and not names)
    return out


def require_defaults(schema: Json, values: Json, path: tuple[str, ...] = ()) -> None:
    """Require every key of values.yaml, so that null, with which Helm removes a key, is refused by name."""
    free = path in (("pipeline", "params"), ("pipeline", "stages"), ("pipeline", "launch"))
    if "properties" not in schema or free:
        return
    schema["required"] = [name for name in values if (*path, name) not in MAY_BE_MISSING]
    for name, value in values.items():
        if isinstance(value, dict):
            require_defaults(schema["properties"][name], value, (*path, name))


def render_schema() -> str:
    """Return values.schema.json with up-to-date parameters, settings and forms of Kubernetes, and all required keys."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    params, definitions = build_params_schema()
    schema["properties"]["pipeline"]["properties"]["params"] = params
    schema["properties"]["server"]["properties"]["settings"] = build_settings_schema()
    require_defaults(schema, yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")))
    generated = (PREFIX, KUBERNETES_PREFIX)
    kept = {name: one for name, one in schema["definitions"].items() if not name.startswith(generated)}
    schema["definitions"] = {**kept, **definitions, **build_kubernetes_definitions()}
    insert_forms(schema)
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
