"""Generate the schema of pipeline.params in values.schema.json from the parameters' own types.

    python -m tests.chart.readme --write      # writes it, together with the chart's README

A name or type that the program would refuse is then refused by Helm, before anything is installed.
"""

from __future__ import annotations

import json
from typing import Any

from clincot.config import SECTION_NAMES, Params
from tests.chart.rendering import CHART

Json = dict[str, Any]
SCHEMA = CHART / "values.schema.json"
PREFIX = "params"  # of the names of the generated definitions
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


def render_schema() -> str:
    """Return values.schema.json with an up-to-date pipeline.params."""
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    params, definitions = build_params_schema()
    schema["properties"]["pipeline"]["properties"]["params"] = params
    kept = {name: one for name, one in schema["definitions"].items() if not name.startswith(PREFIX)}
    schema["definitions"] = {**kept, **definitions}
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
