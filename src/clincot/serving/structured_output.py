"""Chains as JSON in the content of a chat completion (`response_format`).

A client's schema selects and restricts fields of the chain; the model itself writes plain text. So a schema is refused
if it asks for other fields, and an answer that does not satisfy the schema, such as one outside its `enum`, is not
given. References are replaced by their targets first, within a limit, so that a schema cannot make the server load
another document or check an answer for ever.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema

from clincot.generation.visual_cot import RegionAnswer, VisualAnswer
from clincot.serving.api_errors import ApiError

_MAX_NODES = 1000  # of a schema without references; the chain's own has about 60
_MAX_DEPTH = 32
_KEYWORDS = {
    *("type", "enum", "const", "required", "additionalProperties", "items", "anyOf", "$ref"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems", "minLength", "maxLength"),
    *("title", "description", "default", "examples", "$schema", "$id", "properties", "$defs", "definitions"),
}


class ChainLayout:
    """The part of the chain that a client's schema asks for. The constructor raises ApiError (400)."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = _SchemaExpander(schema).expand(schema)
        fields = self._schema.get("properties", {})
        if self._schema.get("type", "object") != "object" or "anyOf" in self._schema:
            raise _refuse_schema("expected a schema of type object")
        if unknown := sorted(set(fields) - set(VisualAnswer.model_fields)):
            known = ", ".join(VisualAnswer.model_fields)
            raise _refuse_schema(f"the chain has no field {unknown[0][:40]!r}; it has {known}")
        try:
            jsonschema.Draft202012Validator.check_schema(self._schema)
        except jsonschema.SchemaError as error:
            raise _refuse_schema(f"not a JSON schema: {'.'.join(map(str, error.path)) or 'schema'}") from None

    def render_answer(self, answer: VisualAnswer) -> str | None:
        """The content of a completion; None if the answer does not satisfy the schema."""
        content = _select_fields(_list_chain_fields(answer), self._schema)
        return json.dumps(content, ensure_ascii=False) if _is_valid(content, self._schema) else None


def render_chain(answer: VisualAnswer) -> str:
    """The whole chain as JSON, with every optional field."""
    return json.dumps(_list_chain_fields(answer), ensure_ascii=False)


def _list_chain_fields(answer: VisualAnswer) -> dict[str, Any]:
    """The chain with the optional fields that a reply leaves out at their defaults."""
    chain = answer.model_dump(mode="json", by_alias=True)
    regions = [{"cut_off": RegionAnswer.model_fields["cut_off"].default, **region} for region in chain["regions"]]
    return {"abstain_reason": None, "image": None, "others": [], **chain, "regions": regions}


def _select_fields(value: Any, schema: Mapping[str, Any]) -> Any:
    """The part of a value that a schema names."""
    for option in schema.get("anyOf", ()):
        selected = _select_fields(value, option)
        if _is_valid(selected, option):
            return selected
    if isinstance(value, dict) and "properties" in schema:
        return {name: _select_fields(value[name], of) for name, of in schema["properties"].items() if name in value}
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_select_fields(item, schema["items"]) for item in value]
    return value


def _is_valid(value: Any, schema: Mapping[str, Any]) -> bool:
    return bool(jsonschema.Draft202012Validator(schema).is_valid(value))


class _SchemaExpander:
    """Replaces the references of a schema by copies of their targets, up to a number of parts."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root, self._left = root, _MAX_NODES

    def expand(self, schema: Any, depth: int = 0) -> dict[str, Any]:
        """The schema without references. Raises ApiError (400)."""
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH:
            raise _refuse_schema(
                f"expected at most {_MAX_NODES} parts and {_MAX_DEPTH} levels after references are replaced"
            )
        if isinstance(schema, bool):
            return {} if schema else {"enum": []}
        if not isinstance(schema, dict):
            raise _refuse_schema("expected objects as schemas")
        if unknown := sorted(set(schema) - _KEYWORDS):
            raise _refuse_schema(f"the keyword {unknown[0][:40]!r} is not supported")
        if "$ref" in schema:
            siblings = {key: value for key, value in schema.items() if key != "$ref"}
            return self.expand({**self._find_target(schema["$ref"]), **siblings}, depth + 1)
        return {key: self._expand_keyword(key, value, depth + 1) for key, value in schema.items() if key[0] != "$"}

    def _expand_keyword(self, keyword: str, value: Any, depth: int) -> Any:
        if keyword == "properties" and isinstance(value, dict):
            return {name: self.expand(child, depth) for name, child in value.items()}
        if keyword == "definitions":  # only references need them
            return {}
        if keyword == "items" or (keyword == "additionalProperties" and not isinstance(value, bool)):
            return self.expand(value, depth)
        if keyword == "anyOf" and isinstance(value, list):
            return [self.expand(option, depth) for option in value]
        return value

    def _find_target(self, reference: Any) -> dict[str, Any]:
        """The target of a reference like #/$defs/Box."""
        target: Any = self._root
        if not isinstance(reference, str) or not reference.startswith("#"):
            raise _refuse_schema("expected references into the schema itself (#/$defs/…)")
        for name in filter(None, reference[1:].split("/")):
            target = target.get(name) if isinstance(target, dict) else None
        if not isinstance(target, dict):
            raise _refuse_schema("a reference has no target")
        return target


def _refuse_schema(reason: str) -> ApiError:
    return ApiError(400, "unsupported_schema", f"response_format: {reason}", param="response_format")
