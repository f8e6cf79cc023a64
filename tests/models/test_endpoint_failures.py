"""Endpoints that fail, and keys that must not be told, against a real HTTP server."""

from __future__ import annotations

import logging
import math
import socketserver
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

from clincot.clients.http import FAIL_AT_ONCE
from clincot.errors import ModelFailed
from clincot.models.endpoint import EndpointModel
from tests.support.chat_endpoint import KEY, MODELS, asked, chat, completion, p_yes_of
from tests.support.fast_clock import FastClock
from tests.support.http_server import Reply, Request, free_port, serving


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_http_errors_name_address_expectation_and_reply(status: int) -> None:
    def failing(request: Request) -> Reply:
        return (200, MODELS) if request.path == "/v1/models" else (status, b'{"error": "out of memory"}')

    with serving(failing) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert str(failed.value) == (
        f"POST {server.url}/v1/chat/completions: expected a chat completion with log-probabilities, "
        f"""got HTTP {status}: '{{"error": "out of memory"}}'"""
    )


def test_nothing_is_retried_here() -> None:
    """Retries are the panel's: two layers of them would multiply."""
    with serving(lambda request: (500, b"no")) as server:
        with pytest.raises(ModelFailed):
            p_yes_of(server)
        assert len(server.requests) == 1


class Starting:
    """A server that answers 503 to its first three requests, in the words of a gateway before a pod that starts."""

    def __init__(self) -> None:
        self.left = 3

    def __call__(self, request: Request) -> Reply:
        self.left -= 1
        if self.left >= 0:
            return 503, b"no healthy upstream"
        return (200, MODELS) if request.path == "/v1/models" else (200, completion("?", {"yes": -0.1, "no": -2.4}))


def test_an_endpoint_that_is_away_is_waited_for(fast_clock: FastClock) -> None:
    with serving(Starting()) as server:
        assert p_yes_of(server) == [pytest.approx(0.909, abs=1e-3)]  # e^-0.1 / (e^-0.1 + e^-2.4)
    assert fast_clock.slept == [1.0, 2.0, 4.0]


def test_a_server_passes_the_failure_of_its_model_on(fast_clock: FastClock) -> None:
    """`clincot serve` before vLLM: a request that waited for ten minutes would be of no use."""
    with serving(Starting()) as server, pytest.raises(ModelFailed, match="HTTP 503"):
        p_yes_of(server, retry=FAIL_AT_ONCE)
    assert fast_clock.slept == []
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_not_waited_for(status: int, fast_clock: FastClock) -> None:
    with serving(lambda request: (status, b"no")) as server, pytest.raises(ModelFailed, match=f"HTTP {status}"):
        p_yes_of(server)
    assert fast_clock.slept == []


@pytest.mark.parametrize(
    ("body", "came"),
    [
        (b"<html>It works!</html>", "a body that is not JSON: '<html>It works!</html>'"),
        (b"", "a body that is not JSON: ''"),
        (b"\xff\xfe\x00", "a body that is not JSON"),
        (b'{"choices": [', "a body that is not JSON"),
        (b"[" * 100_000, "a body that is not JSON"),
        (b"[]", "JSON of another shape (body: Input should be a valid dictionary"),
        (b'{"result": "yes"}', "JSON of another shape (choices: Field required)"),
        (b'{"choices": []}', "JSON of another shape (choices: List should have at least 1 item"),
        (b'{"choices": [{"text": "yes"}]}', "(choices.0.message: Field required)"),
    ],
)
def test_garbage_is_named(body: bytes, came: str) -> None:
    with serving(chat(body)) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert came in str(failed.value)
    assert f"POST {server.url}/v1/chat/completions: expected a chat completion" in str(failed.value)


def test_a_long_reply_is_cut_in_the_message() -> None:
    with serving(chat(b"x" * 5000)) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert "x" * 300 + "'…" in str(failed.value)
    assert "x" * 301 not in str(failed.value)


def test_a_probability_in_place_of_a_log_probability_is_refused() -> None:
    with serving(chat(completion("?", {"yes": 0.93, "no": 0.07}))) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert "got 0.93 as a log-probability; natural logarithms are never above 0" in str(failed.value)


def test_not_a_number_is_refused() -> None:
    with (
        serving(chat(completion("?", {"yes": math.nan, "no": -1.0}))) as server,
        pytest.raises(ModelFailed, match="got nan as a log-probability"),
    ):
        p_yes_of(server)


@pytest.mark.parametrize(
    "reply",
    [
        completion("yes", None),
        completion("yes", {}),
        {"choices": [{"message": {"content": "yes"}}]},
        {"choices": [{"message": {"content": "yes"}, "logprobs": {"content": []}}]},
        {"choices": [{"message": {"content": "yes"}, "logprobs": {"content": None}}]},
    ],
)
def test_no_log_probabilities_says_how_to_mend_it(reply: dict[str, Any]) -> None:
    """The text says yes, and is not read: a parsed text is not a probability."""
    with serving(chat(reply)) as server, pytest.raises(ModelFailed) as failed:
        p_yes_of(server)
    assert str(failed.value) == (
        f"POST {server.url}/v1/chat/completions (model 'med-vlm'): expected a chat completion with log-probabilities, "
        "got none; serve the model with something that returns them (vLLM does, `transformers serve` does not), or set "
        "`rating: true` for this judge to let it write n/10 instead"
    )


def test_a_hanging_endpoint_fails_after_its_time() -> None:
    def hanging(request: Request) -> Reply:
        if request.path != "/v1/models":
            server.hang()
        return 200, MODELS

    with serving(hanging) as server:
        started = time.monotonic()
        with pytest.raises(ModelFailed, match=r"completions: expected .*, got no complete reply within 0\.3 s"):
            p_yes_of(server, timeout_s=0.3)
        assert 0.3 <= time.monotonic() - started < 5


def test_an_endpoint_that_drips_fails_after_its_time() -> None:
    """Every byte comes within the HTTP client's own limit, which is for one read, so it alone would wait for 20 s."""

    class Dripping(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n")
            for _ in range(200):
                try:
                    self.request.sendall(b" ")
                except OSError:
                    return
                time.sleep(0.1)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Dripping) as dripping:
        dripping.daemon_threads = True
        thread = threading.Thread(target=dripping.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started = time.monotonic()
        try:
            with pytest.raises(ModelFailed, match=r"no complete reply within 0\.4 s"):
                EndpointModel(f"http://127.0.0.1:{dripping.server_address[1]}/v1", timeout_s=0.4).p_yes([asked("?")])
        finally:
            dripping.shutdown()
            thread.join()
        assert time.monotonic() - started < 5


def test_a_refused_connection() -> None:
    port = free_port()
    with pytest.raises(ModelFailed) as failed:
        EndpointModel(f"http://127.0.0.1:{port}/v1").p_yes([asked("Right?")])
    assert (
        f"GET http://127.0.0.1:{port}/v1/models: expected the list of served models, got no reply: ConnectError"
        in str(failed.value)
    )


def test_a_connection_that_is_cut() -> None:
    def cutting(request: Request) -> Reply:
        return (200, MODELS) if request.path == "/v1/models" else (-1, b"")  # "HTTP/1.1 -1" is no status line

    with serving(cutting) as server, pytest.raises(ModelFailed, match="got no reply: RemoteProtocolError"):
        p_yes_of(server)


# Keys


@pytest.mark.parametrize("place", ["environment", "file"])
def test_the_key_is_sent_as_a_bearer_token(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    (tmp_path / "key").write_text(KEY + "\n")
    named: dict[str, Any] = (
        {"api_key_env": "JUDGE_KEY"} if place == "environment" else {"api_key_file": tmp_path / "key"}
    )
    with serving(chat(completion("?", {"yes": -0.5}))) as server:
        p_yes_of(server, **named)
        assert [request.headers["authorization"] for request in server.requests] == [f"Bearer {KEY}"] * 2


def test_without_a_key_no_header_is_sent() -> None:
    with serving(chat(completion("?", {"yes": -0.5}))) as server:
        p_yes_of(server)
        assert all("authorization" not in request.headers for request in server.requests)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 500])
@pytest.mark.parametrize("shape", ["text", "json", "escaped", "value"])
def test_an_echoed_key_is_in_no_message_and_no_log(
    status: int, shape: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Endpoints quote keys in their errors, as text or in JSON, whose slashes may be written \\/."""
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def echoing(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, MODELS
        sent = request.headers["authorization"]
        return status, {
            "text": f"you sent {sent}".encode(),
            "json": {"error": f"you sent {sent}"},
            "escaped": f'{{"error": "{sent}"}}'.replace("/", "\\/").encode(),
            "value": {"choices": [{"message": {"content": 5, "key": sent}}]},
        }[shape]

    with caplog.at_level(logging.DEBUG), serving(echoing) as server:
        model = EndpointModel(f"{server.url}/v1", api_key_env="JUDGE_KEY")
        assert KEY not in repr(model)
        with pytest.raises(ModelFailed) as failed:
            model.p_yes([asked("Right?")])
    told = "".join(traceback.format_exception(failed.value)) + caplog.text
    assert caplog.text  # the HTTP client does log
    assert str(server.url) in told
    for part in (KEY, KEY.replace("/", "\\/"), "secret"):
        assert part not in told


@pytest.mark.parametrize("kept", ["JUDGE_KEY", ""])
def test_401_says_whether_a_key_was_sent(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving(lambda request: (401, b'{"error": "Incorrect API key provided: sk-Zq3****"}')) as server,
        pytest.raises(ModelFailed) as failed,
    ):
        p_yes_of(server, api_key_env=kept)
    said = "the key sent was not accepted" if kept else "no key was sent; one is needed"
    assert str(failed.value).endswith(f"got HTTP 401: {said}")


def test_a_redirect_is_not_followed_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with (
        serving(lambda request: (307, b"elsewhere")) as server,
        pytest.raises(ModelFailed, match="got HTTP 307: 'elsewhere'"),
    ):
        p_yes_of(server, api_key_env="JUDGE_KEY")


@pytest.mark.parametrize("value", [f"{KEY} {KEY}", f"{KEY}\nX-Other: 1", f"{KEY}é"])
def test_a_key_that_is_no_key_is_refused_without_being_quoted(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP client quotes a header that it cannot send."""
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ValueError, match="the environment variable JUDGE_KEY holds more than one word") as refused:
        EndpointModel("http://127.0.0.1:1/v1", api_key_env="JUDGE_KEY")
    assert "secret" not in str(refused.value)


def test_a_missing_key_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    monkeypatch.setenv("EMPTY_KEY", "  ")
    with pytest.raises(ValueError, match="the environment variable JUDGE_KEY should hold the key, but is unset"):
        EndpointModel("http://127.0.0.1:1/v1", api_key_env="JUDGE_KEY")
    with pytest.raises(ValueError, match="the environment variable EMPTY_KEY should hold the key, but is empty"):
        EndpointModel("http://127.0.0.1:1/v1", api_key_env="EMPTY_KEY")
    with pytest.raises(ValueError, match=r"the file .*nowhere should hold the key, but cannot be read \(No such file"):
        EndpointModel("http://127.0.0.1:1/v1", api_key_file=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not both"):
        EndpointModel("http://127.0.0.1:1/v1", api_key_env="EMPTY_KEY", api_key_file=tmp_path / "nowhere")


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@127.0.0.1:1/v1",
        f"http://{KEY}@127.0.0.1:1/v1",
        f"http://127.0.0.1:1/v1?api_key={KEY}",
        f"http://127.0.0.1:1/v1#{KEY}",
        f"user:{KEY}@127.0.0.1:1/v1",
        "127.0.0.1:8000/v1",
        "ftp://127.0.0.1/v1",
        "http://",
        "",
        "http://127.0.0.1:port/v1",
    ],
)
def test_unusable_addresses_are_refused_without_quoting_them(url: str) -> None:
    """Addresses with credentials, and malformed ones, are refused without being quoted."""
    with pytest.raises(ValueError, match="endpoint 'judge': ") as refused:
        EndpointModel(url, name="judge")
    assert "secret" not in str(refused.value)
