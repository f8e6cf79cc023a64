"""Validation of a manifest against its CustomResourceDefinition.

Unknown fields are errors. An API server drops unknown fields silently, so a misspelt `minReplicass` would have no
effect. The models of KServe's SDK do not help: they accept `min_replicas="abc"`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from clincot.errors import InvalidInput
from clincot.jsonl import InvalidRecord

Json = dict[str, Any]


class InvalidResource(InvalidInput):
    """A manifest that its CRD does not allow; the message names the wrong fields."""


def build_validator(crd: Json, version: str) -> Draft202012Validator:
    """Build the validator of one version of a CustomResourceDefinition.

    Raises InvalidRecord.
    """
    for served in crd.get("spec", {}).get("versions", ()):
        if served["name"] == version:
            return Draft202012Validator(forbid_unknown_fields(served["schema"]["openAPIV3Schema"]))
    known = ", ".join(served["name"] for served in crd.get("spec", {}).get("versions", ())) or "none"
    raise InvalidRecord(f"expected a CustomResourceDefinition with version {version}; it has {known}")


def read_crd(path: Path) -> Json:
    """Read a CustomResourceDefinition from a YAML file. Raises InvalidRecord."""
    # KServe's CRD has 5 MB of YAML: libyaml takes seconds, the pure Python loader minutes
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(content, dict) or content.get("kind") != "CustomResourceDefinition":
        raise InvalidRecord(f"{path}: expected one CustomResourceDefinition")
    return content


def validate_manifest(manifest: Json, validator: Draft202012Validator) -> None:
    """Validate a manifest.

    Raises InvalidResource, naming each field that is unknown, missing or of the wrong type (at most ten).
    """
    problems = sorted(
        f"{error.json_path.removeprefix('$.')}: {error.message[:200]}" for error in validator.iter_errors(manifest)
    )
    if problems:
        metadata = manifest.get("metadata", {})
        raise InvalidResource(f"{manifest.get('kind')} {metadata.get('name')}: " + "; ".join(problems[:10]))


def forbid_unknown_fields(schema: Any) -> Any:
    """Convert an OpenAPI v3 schema to a JSON schema that allows no unknown fields.

    A resource's own `metadata` stays open, because CRDs do not list the fields of ObjectMeta.
    """
    if isinstance(schema, list):
        return [forbid_unknown_fields(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: Json = {}
    for key, value in schema.items():
        if key == "properties":
            out[key] = {name: forbid_unknown_fields(field) for name, field in value.items()}
        elif key in ("items", "additionalProperties", "anyOf", "allOf", "oneOf", "not"):
            out[key] = forbid_unknown_fields(value)
        elif key in (
            "type",
            "required",
            "enum",
            "pattern",
            "minimum",
            "maximum",
            "minLength",
            "maxLength",
            "minItems",
            "maxItems",
        ):
            out[key] = value
    closed = "properties" in schema and "additionalProperties" not in schema
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    if schema.get("nullable"):
        return {"anyOf": [out, {"type": "null"}]}
    return out
