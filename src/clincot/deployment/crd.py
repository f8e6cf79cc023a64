"""A manifest against the schema of its custom resource, refusing what the schema does not know.

An API server prunes unknown fields in silence: a misspelt `minReplicass` would be lost, and KServe's SDK models let
`min_replicas="abc"` pass.
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
    """A manifest that its CRD does not allow; names every field."""


def build_validator(crd: Json, version: str) -> Draft202012Validator:
    """What `check` needs of one version of a CustomResourceDefinition."""
    for served in crd.get("spec", {}).get("versions", ()):
        if served["name"] == version:
            return Draft202012Validator(forbid_unknown_fields(served["schema"]["openAPIV3Schema"]))
    raise InvalidRecord(f"the CustomResourceDefinition has no version {version}")


def read_crd(path: Path) -> Json:
    """A CustomResourceDefinition from a YAML file."""
    # KServe's is 5 MB of YAML: seconds with libyaml, minutes without
    content = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(content, dict) or content.get("kind") != "CustomResourceDefinition":
        raise InvalidRecord(f"{path}: expected one CustomResourceDefinition")
    return content


def validate_manifest(manifest: Json, validator: Draft202012Validator) -> None:
    """Raise InvalidManifest, naming every field that is unknown, missing or of another type."""
    errors = validator.iter_errors(manifest)
    found = sorted(f"{error.json_path.removeprefix('$.')}: {error.message[:200]}" for error in errors)
    if found:
        metadata = manifest.get("metadata", {})
        raise InvalidResource(f"{manifest.get('kind')} {metadata.get('name')}: " + "; ".join(found[:10]))


def forbid_unknown_fields(schema: Any) -> Any:
    """An OpenAPI v3 schema as JSON schema that allows no unknown field.

    `metadata` of the resource itself is an ObjectMeta, which a CRD leaves open.
    """
    if isinstance(schema, list):
        return [forbid_unknown_fields(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    out: Json = {}
    for key, value in schema.items():
        if key == "properties":
            out[key] = {name: forbid_unknown_fields(one) for name, one in value.items()}
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
