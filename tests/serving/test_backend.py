"""Backends: a dead engine is not ready, and a predictor's refusal of a long prompt keeps its numbers."""

from __future__ import annotations

import httpx
import pytest
import torch

from clincot.config.server_settings import ServeSettings
from clincot.errors import PromptTooLong
from clincot.prompts import PromptFormat, Turn
from clincot.serving.backend import PredictorAddress, RemoteBackend
from clincot.serving.request_context import RequestContext
from tests.support.chat_endpoint import MODELS
from tests.support.http_server import Reply, Request, serving
from tests.support.model_servers import LOOK_ONCE, PREDICT, Parrot, serving_here, v1

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
