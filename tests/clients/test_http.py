"""Parts of clients.http that tests/models/test_endpoint.py and tests/generation/test_http_grounder.py do not reach."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from clincot.clients import http
from clincot.clients.http import JsonClient, map_in_threads, read_api_key, validate_url
from clincot.errors import ModelFailed
from tests.support.http_server import serving


class Reply(BaseModel):
    text: str


def test_a_reply_that_is_too_large_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    """`{"text": "x…x"}` has 12 bytes around the text: 100 in all with 88 of it, 101 with 89."""
    monkeypatch.setattr(http, "MAX_REPLY_BYTES", 100)
    text = 88 * "x"

    with serving(lambda request: (200, {"text": text})) as server, JsonClient(timeout_s=5) as client:
        assert client.request_json("GET", f"{server.url}/a", Reply, expected="a text").text == text
        text += "x"
        with pytest.raises(ModelFailed, match=r"GET .*/a: expected a text, got .*the reply is larger than 100 bytes"):
            client.request_json("GET", f"{server.url}/a", Reply, expected="a text")


def test_threads_keep_the_order_of_results_and_of_failures() -> None:
    assert map_in_threads(lambda n: n * n, range(20), workers=3) == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda n: 1 / n if n < 5 else {}[n], [3, 0, 5, 0], workers=4)


def test_an_address_loses_its_trailing_slash_only() -> None:
    assert validate_url("https://judge.example:8443/v1/", what="judge") == "https://judge.example:8443/v1"


def test_no_key_is_read_if_none_is_named() -> None:
    assert read_api_key(what="judge") == ""
