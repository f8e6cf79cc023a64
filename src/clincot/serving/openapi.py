"""The OpenAPI document: FastAPI's, with what the SDK leaves out (bodies, refusals), without what is closed."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from clincot.serving.kserve_model import V1Request, V1Response
from clincot.serving.middleware import CLOSED_PATHS

_SCHEMA_REF = "#/components/schemas/{model}"
_ERROR_RESPONSES = {
    "400": "malformed, or not a request that this server answers",
    "401": "no valid API key",
    "403": "not allowed",
    "404": "no such model or route",
    "408": "the body came too slowly",
    "413": "too large",
    "415": "unsupported type",
    "422": "not as the protocol has it",
    "429": "the queue is full; see Retry-After",
    "502": "the predictor failed",
    "503": "not ready",
    "504": "not answered in time",
}
_V1_PATH = "/v1/models/{model_name}:predict"


def build_openapi_document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the application."""
    content = get_openapi(title=app.title, version=app.version, routes=app.routes)
    content["paths"] = {
        path: item
        for path, item in content["paths"].items()
        if not CLOSED_PATHS.fullmatch(path.replace("{model_name}", "m"))
    }
    schemas = content.setdefault("components", {}).setdefault("schemas", {})
    for model in (V1Request, V1Response):
        schema = model.model_json_schema(ref_template=_SCHEMA_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    schemas["Refusal"] = _build_error_schema()
    refusal = {"application/json": {"schema": {"$ref": _SCHEMA_REF.format(model="Refusal")}}}
    for item in content["paths"].values():
        for operation in item.values():
            responses = operation.setdefault("responses", {})
            for status, about in _ERROR_RESPONSES.items():
                responses[status] = {"description": about, "content": refusal}
    predict = content["paths"][_V1_PATH]["post"]
    predict["requestBody"] = {"required": True, "content": _build_json_content("V1Request")}
    predict["responses"]["200"] = {
        "description": "answers in the questions' order",
        "content": _build_json_content("V1Response"),
    }
    content["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    content["security"] = [{}, {"key": []}]
    content["paths"]["/metrics"]["get"]["responses"]["200"] = {
        "description": "Prometheus metrics",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
    return content


def _build_json_content(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _SCHEMA_REF.format(model=model)}}}


def _build_error_schema() -> dict[str, Any]:
    """KServe's protocols have the message as text, OpenAI's as an object."""
    text = {"type": "string"}
    inner = {
        "type": "object",
        "required": ["message", "type", "code"],
        "properties": {"message": text, "type": text, "code": text, "param": {"type": ["string", "null"]}},
    }
    return {"type": "object", "properties": {"error": {"anyOf": [text, inner]}, "code": text}}
