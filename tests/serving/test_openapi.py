"""The OpenAPI document, tested with requests generated from it, valid and invalid."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from clincot.config.server_settings import ServeSettings
from tests.support.model_servers import CHAT, INFER, LOOK_ONCE, PREDICT, Parrot, serving_here

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    parrot = Parrot()
    parrot.go.set()
    with serving_here(parrot, ServeSettings.model_validate({"propose": LOOK_ONCE})) as address:
        yield address


def test_the_document_has_the_protocols_and_no_closed_routes(url: str) -> None:
    document = httpx.get(f"{url}/openapi.json").json()
    paths = document["paths"]
    assert {CHAT, PREDICT.replace("policy", "{model_name}"), INFER.replace("policy", "{model_name}")} <= set(paths)
    assert [path for path in paths if "repository" in path or "explain" in path] == []
    assert "regions" in document["components"]["schemas"]["VisualAnswer"]["properties"]


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
