"""The OpenAPI document, tested with requests generated from it, valid and invalid."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from kserve import model_server
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from clincot.config.server_settings import ServeSettings
from clincot.serving.middleware import CLOSED_PATHS
from tests.support.model_servers import CHAT, INFER, LOOK_ONCE, PREDICT, Parrot, serving_here, v2

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    parrot = Parrot()
    parrot.go.set()
    settings = ServeSettings.model_validate({"propose": LOOK_ONCE, "max_images": 2})
    with serving_here(parrot, settings) as address:
        yield address


def test_the_document_has_the_protocols_and_no_closed_routes(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    paths = document["paths"]
    assert {CHAT, PREDICT.replace("policy", "{model_name}"), INFER.replace("policy", "{model_name}")} <= set(paths)
    assert [path for path in paths if "repository" in path or "explain" in path] == []
    schemas = document["components"]["schemas"]
    assert {"regions", "others"} <= set(schemas["VisualAnswer"]["properties"])
    assert {"image", "others"} <= set(schemas["Instance"]["properties"])
    assert set(schemas["OtherUpload"]["properties"]) == {"image", "role"}
    assert "roles" in schemas["Extension"]["properties"]


def iter_routes(routes: Sequence[Any]) -> Iterator[Any]:
    """The routes of an application, those of its routers included; no router here has a prefix."""
    for route in routes:
        router = getattr(route, "original_router", None)
        if router is None:
            yield route
        else:
            yield from iter_routes(router.routes)


def test_every_route_is_in_the_document_or_closed(url: str) -> None:
    """Of the routes that the server has, only those for browsers and the HEAD of others are not described."""
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    described = {(method.upper(), path) for path, operations in paths.items() for method in operations}
    served = set()
    for route in iter_routes(model_server.app.routes):
        path = route.path.replace("{model_name:path}", "{model_name}")
        if not CLOSED_PATHS.fullmatch(path.replace("{model_name}", "m")):
            served |= {(method, path) for method in route.methods or ()}
    hidden = {(method, path) for method, path in served - described if method != "HEAD"}
    assert described <= served
    versions = {path for _, path in hidden if "/versions/" in path}
    for path in versions:  # of the SDK; models have no versions here
        address = url + path.format(model_name="policy", model_version="1")
        body = v2("Is there a nodule?", "AAAA") if path.endswith("/infer") else None
        reply = httpx.request("POST" if body else "GET", address, json=body, timeout=60)
        assert (reply.status_code, reply.json()["code"]) == (404, "model_not_found")
    assert {path for _, path in hidden} - versions == {"/openapi.json", "/page/{name}"}


def test_generated_requests_conform_to_the_document(url: str) -> None:
    """No operation returns a 5xx, an undocumented status, or another schema or content type."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    checked = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy())
        def send(case: schemathesis.Case) -> None:
            reply = case.call(base_url=url, timeout=60)
            case.validate_response(reply, checks=CHECKS)

        send()
        checked += 1
    operations = [item for methods in schema.raw_schema["paths"].values() for item in methods]
    assert checked == len(operations) >= 15
