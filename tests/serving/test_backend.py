"""Backends: a dead engine is not ready, and a predictor's refusal of a long prompt keeps its numbers."""

from __future__ import annotations

import time
from contextlib import ExitStack

import httpx
import pytest
import torch

from clincot.config.server_settings import ServeSettings
from clincot.errors import PromptTooLong
from clincot.prompts import PromptFormat, Turn
from clincot.serving.api_errors import ApiError
from clincot.serving.backend import PredictorAddress, RemoteBackend
from clincot.serving.request_context import RequestContext
from tests.support.chat_endpoint import MODELS
from tests.support.http_server import Reply, Request, serving
from tests.support.model_servers import CHAT, LOOK_ONCE, PREDICT, Parrot, chat, serving_here, v1

# vllm-project/vllm@017638d, vllm/renderers/params.py, TokenizeParams._token_len_check
TOO_LONG = (
    "You passed 2033 input tokens and requested 16 output tokens. However, the model's context length is only 2048 "
    "tokens, resulting in a maximum input length of 2032 tokens. Please reduce the length of the input prompt."
)


class FailingParrot(Parrot):
    """A policy whose calls raise `error`."""

    error: Exception

    def generate(self, conversations, **options):  # type: ignore[no-untyped-def]
        raise self.error


def open_predictor(url: str) -> RemoteBackend:
    return RemoteBackend(PredictorAddress(url), views=PromptFormat(), observe=lambda *_: None)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), 503),
        (torch.OutOfMemoryError("CUDA out of memory"), 200),
        (ValueError("cannot encode"), 200),
    ],
    ids=["device", "memory", "request"],
)
def test_a_server_whose_device_failed_is_not_ready(film: str, error: Exception, status: int) -> None:
    """After a device error every call fails; after other errors the next request may be answered."""
    parrot = FailingParrot()
    parrot.error = error
    with serving_here(parrot, ServeSettings.model_validate({"propose": LOOK_ONCE})) as url:
        assert httpx.get(f"{url}/v2/health/ready", timeout=60).status_code == 200
        assert httpx.post(url + PREDICT, json=v1("Is there a nodule?", film), timeout=60).status_code == 500
        assert httpx.get(f"{url}/v2/health/ready", timeout=60).status_code == status


@pytest.mark.parametrize(("health", "ready"), [(200, True), (404, True), (503, False)])
def test_a_predictor_whose_engine_died_is_not_ready(health: int, ready: bool) -> None:
    """vLLM lists its models to the end; /health is 503 (vllm/entrypoints/serve/instrumentator/health.py)."""

    def handler(request: Request) -> Reply:
        return (200, MODELS) if request.path == "/v1/models" else (health, {})

    with serving(handler) as server:
        assert open_predictor(server.url).check_health() is ready


def test_a_predictors_token_limit_is_reported_with_its_numbers() -> None:
    def handler(request: Request) -> Reply:
        if request.path == "/v1/models":
            return 200, MODELS
        return 400, {"error": {"message": TOO_LONG, "type": "BadRequestError", "param": "input_tokens", "code": 400}}

    with (
        serving(handler) as server,
        open_predictor(server.url).open_policy(RequestContext(60)) as policy,
        pytest.raises(PromptTooLong, match="limit is 2048 tokens, and the request needs 2049"),
    ):
        policy.generate([(Turn("user", "Is it?"),)], max_new_tokens=16, temperature=0.0, seeds=[0])


VLLM_METRICS = """# HELP python_info Python platform information
# TYPE python_info gauge
python_info{version="3.12"} 1.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="clincot"} 3.0
process_open_fds 20.0
"""


def test_metrics_contain_those_of_vllm_in_the_same_pod() -> None:
    """vLLM's own, without those of its Python process, which would be there twice."""
    with serving(lambda request: (200, VLLM_METRICS.encode())) as endpoint:
        address = PredictorAddress(endpoint.url)
        backend = RemoteBackend(address, views=PromptFormat(), observe=lambda *_: None)
        lines = backend.read_metrics().splitlines()
    assert lines == [line for line in VLLM_METRICS.splitlines() if "vllm:" in line]
    assert backend.read_metrics() == ""  # vLLM is away: the server's own metrics are still there
    elsewhere = RemoteBackend(PredictorAddress("clincot-predictor.ns"), views=PromptFormat(), observe=lambda *_: None)
    assert elsewhere.read_metrics() == ""  # it is scraped itself, each of its pods


def test_a_predictor_that_hangs_costs_the_deadline_and_not_more() -> None:
    """0.5 s for the request: 504 after about that time, although the predictor's own timeout is 60 s."""

    def reply(request: Request) -> Reply:
        if request.method == "POST":
            endpoint.hang()
        return 200, MODELS

    with serving(reply) as endpoint:
        backend = RemoteBackend(PredictorAddress(endpoint.url), views=PromptFormat(), observe=lambda *_: None)
        began = time.monotonic()
        with pytest.raises(ApiError) as late, backend.open_policy(RequestContext(0.5)) as policy:
            policy.generate([(Turn("user", "Is there a nodule?"),)], max_new_tokens=2, temperature=0.0, seeds=[0])
        assert late.value.status == 504
        assert time.monotonic() - began < 20


class Silent:
    """The reply of a predictor that takes longer than the request's deadline."""


@pytest.mark.parametrize(
    ("reply", "logged"),
    [
        ((500, {"error": {"message": "CUDA error"}}), ", got HTTP 500"),
        ((400, {"error": {"message": "Is there a nodule? has a bad token"}}), ", got HTTP 400"),
        ((429, {"error": {"message": "slow down"}}), ", got HTTP 429"),
        ((200, b"<html>Is there a nodule?</html>"), ", got HTTP 200 with a body that is not JSON"),
        ((200, {"choices": "Is there a nodule?"}), ", got JSON of another shape"),
        (Silent, ", got no complete reply within "),
        (None, ", got no reply: ConnectError"),
    ],
    ids=["500", "400", "429", "html", "shape", "timeout", "away"],
)
def test_the_log_says_how_a_predictor_failed(
    reply: object, logged: str, film: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each failure has its own line, without what the reply quotes.

    The predictor's time is shorter than the deadline here, so that a late reply is no 504.
    """

    def handler(request: Request) -> Reply:
        if request.method == "GET":
            return 200, MODELS
        if reply is Silent:
            endpoint.hang()
        return reply  # type: ignore[return-value]

    settings = ServeSettings.model_validate({"propose": LOOK_ONCE})
    with ExitStack() as stack:
        endpoint = stack.enter_context(serving(handler))
        backend = RemoteBackend(
            PredictorAddress(endpoint.url), views=PromptFormat(), timeout_s=0.5, observe=lambda *_: None
        )
        _ = backend.digest  # the model's name is known before the predictor goes away
        if reply is None:
            stack.close()
        with serving_here(backend, settings) as url:
            answer = httpx.post(url + CHAT, json=chat("Is there a nodule?", film), timeout=60)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "model_failed")
    (line,) = [record.getMessage() for record in caplog.records if "no usable answer" in record.getMessage()]
    assert logged in line
    assert "nodule" not in line
    assert "CUDA" not in line
