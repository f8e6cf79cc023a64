"""Generate the schema of pipeline.params in values.schema.json from the parameters' own types.

    python -m tests.chart.readme --write      # writes it, together with the chart's README

A name or type that the program would refuse is then refused by Helm, before anything is installed.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from clincot.config import SECTION_NAMES, Params
from tests.chart.rendering import CHART

Json = dict[str, Any]
SCHEMA = CHART / "values.schema.json"
PREFIX = "params"  # of the names of the generated definitions
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


def _simplify(part: Any, names: bool = False) -> Any:
    """Return the schema without texts and defaults. names: the keys of `part` are names of properties."""
    if isinstance(part, list):
        return [_simplify(one) for one in part]
    if not isinstance(part, dict):
        return part
    out = {}
    for key, value in part.items():
        if key == "$ref":
            out[key] = f"#/definitions/{PREFIX}{value.rpartition('/')[2]}"
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
    """Return values.schema.json with an up-to-date pipeline.params and all required keys."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    params, definitions = build_params_schema()
    schema["properties"]["pipeline"]["properties"]["params"] = params
    require_defaults(schema, yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")))
    kept = {name: one for name, one in schema["definitions"].items() if not name.startswith(PREFIX)}
    schema["definitions"] = {**kept, **definitions}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
