"""The OpenAPI document: FastAPI's document, corrected.

It adds request bodies and error responses that KServe's SDK does not declare, and drops routes that are closed.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from kserve.protocol.rest.v2_datamodels import InferenceRequest, InferenceResponse

from clincot.serving.kserve_model import V1Request, V1Response
from clincot.serving.middleware import CLOSED_PATHS

_SCHEMA_REF = "#/components/schemas/{model}"
_ERROR_RESPONSES = {
    "400": "The request is malformed, or this server does not support it.",
    "401": "The request has no valid API key.",
    "403": "The image's URL is not allowed, or the page of another site sent the request.",
    "404": "The model or route does not exist.",
    "408": "The request body arrived too slowly.",
    "413": "The request, its image or its number of questions is too large.",
    "415": "The content type or the image format is not supported.",
    "422": "The request does not follow the protocol.",
    "429": "The queue is full; Retry-After says when to try again.",
    "502": "The model gave no usable answer.",
    "503": "The model is not ready.",
    "504": "The answer was not ready before the deadline.",
}
_V2_PATH = "/v2/models/{model_name}/infer"
_V1_PATH = "/v1/models/{model_name}:predict"


def build_openapi_document(app: FastAPI) -> dict[str, Any]:
    """Build the OpenAPI 3.1 document of the application."""
    # of two routes with one path, the first answers requests, but the last would be described
    content = get_openapi(title=app.title, version=app.version, routes=app.routes[::-1])
    content["paths"] = {
        path: item
        for path, item in content["paths"].items()
        if not CLOSED_PATHS.fullmatch(path.replace("{model_name}", "m"))
    }
    schemas = content.setdefault("components", {}).setdefault("schemas", {})
    for model in (V1Request, V1Response, InferenceRequest, InferenceResponse):
        schema = model.model_json_schema(ref_template=_SCHEMA_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    schemas["Refusal"] = _build_error_schema()
    error = {"application/json": {"schema": {"$ref": _SCHEMA_REF.format(model="Refusal")}}}
    for item in content["paths"].values():
        for operation in item.values():
            responses = operation.setdefault("responses", {})
            for status, description in _ERROR_RESPONSES.items():
                responses[status] = {"description": description, "content": error}
    infer = content["paths"][_V2_PATH]["post"]
    binary = {"schema": {"type": "string", "format": "binary"}}
    for part, model in ((infer["requestBody"], "InferenceRequest"), (infer["responses"]["200"], "InferenceResponse")):
        part["content"] = {**_build_json_content(model), "application/octet-stream": binary}
    predict = content["paths"][_V1_PATH]["post"]
    predict["requestBody"] = {"required": True, "content": _build_json_content("V1Request")}
    predict["responses"]["200"] = {
        "description": "Returns one prediction for each instance, in their order.",
        "content": _build_json_content("V1Response"),
    }
    content["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    content["security"] = [{}, {"key": []}]
    content["paths"]["/metrics"]["get"]["responses"]["200"] = {
        "description": "Returns Prometheus metrics.",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
    return content


def _build_json_content(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _SCHEMA_REF.format(model=model)}}}


def _build_error_schema() -> dict[str, Any]:
    """The schema of error bodies.

    The member `error` is a string in KServe's protocols, and an object in OpenAI's.
    """
    text = {"type": "string"}
    inner = {
        "type": "object",
        "required": ["message", "type", "code"],
        "properties": {"message": text, "type": text, "code": text, "param": {"type": ["string", "null"]}},
    }
    return {"type": "object", "properties": {"error": {"anyOf": [text, inner]}, "code": text}}
