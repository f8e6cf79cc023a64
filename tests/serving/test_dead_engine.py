"""A model that has stopped or hangs: probes fail, and requests get an error instead of waiting."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as messages
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc as services

from clincot.config.server_settings import ServeSettings
from clincot.prompts import PromptFormat
from clincot.serving.backend import PredictorAddress, RemoteBackend
from tests.support import vllm_stand_in
from tests.support.chat_endpoint import MODELS, completion
from tests.support.http_server import Reply, Request, free_port, serving
from tests.support.model_servers import CHAT, LOOK_ONCE, PREDICT, Parrot, chat, serving_here, until, v1

SHORT_S = 20  # far below the deadline of a minute
NOT_READY = (503, "not_ready")  # the SDK's routes of V1 and V2 look at the model's readiness first


class EndingParrot(Parrot):
    """A policy that ends the thread that calls it, as `sys.exit` in a library does."""

    def generate(self, conversations, **options):  # type: ignore[no-untyped-def]
        raise SystemExit(1)


def settings(**changes: Any) -> ServeSettings:
    return ServeSettings.model_validate({"propose": LOOK_ONCE} | changes)


def read_probes(url: str) -> tuple[int, int]:
    """The statuses of readiness and liveness."""
    ready, live = (httpx.get(f"{url}/v2/health/{name}", timeout=60).status_code for name in ("ready", "live"))
    return ready, live


def ask(url: str, film: str) -> tuple[int, str]:
    """Status and error code of a question, which must come before a client would lose patience."""
    began = time.monotonic()
    reply = httpx.post(url + PREDICT, json=v1("Is there a nodule?", film), timeout=60)
    assert time.monotonic() - began < SHORT_S
    return reply.status_code, reply.json().get("code", "")


def test_a_model_that_stopped_fails_probes_and_requests(film: str) -> None:
    """Only a restart brings it back, so liveness fails as well; the same over gRPC."""
    ports: list[int] = []
    with serving_here(EndingParrot(), settings(), grpc_ports=ports) as url:
        assert read_probes(url) == (200, 200)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        assert ask(url, film) == (503, "model_stopped")  # the request that met the end
        assert read_probes(url) == (503, 503)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 503
        assert ask(url, film) == NOT_READY
        reply = httpx.post(url + CHAT, json=chat("Is there a nodule?", film), timeout=SHORT_S)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_stopped")
        with grpc.insecure_channel(f"127.0.0.1:{ports[0]}") as channel:
            stub = services.GRPCInferenceServiceStub(channel)
            assert not stub.ServerReady(messages.ServerReadyRequest(), timeout=60).ready
            assert not stub.ServerLive(messages.ServerLiveRequest(), timeout=60).live


def test_a_model_that_hangs_fails_probes_and_requests(film: str) -> None:
    """A batch still runs 0.5 s after it began: 504 for its request at the deadline of 6 s, and 503 for the next.

    When the batch ends after all, the server is ready again.
    """
    parrot = Parrot()
    with serving_here(parrot, settings(hang_s=0.5, deadline_s=6.0)) as url:
        assert ask(url, film) == (504, "deadline_exceeded")
        assert read_probes(url) == (503, 503)
        assert ask(url, film) == NOT_READY
        parrot.go.set()
        until(lambda: read_probes(url) == (200, 200))
        assert ask(url, film) == (200, "")


def test_a_slow_batch_is_no_hung_one(film: str) -> None:
    """A batch runs, and its request is past its deadline, but hang_s is not over."""
    parrot = Parrot()
    with serving_here(parrot, settings(hang_s=600.0, deadline_s=6.0)) as url:
        assert ask(url, film) == (504, "deadline_exceeded")
        assert read_probes(url) == (200, 200)
        parrot.go.set()


@contextlib.contextmanager
def stand_in(fault: str, log: Path) -> Iterator[str]:
    """vLLM's stand-in, a process of its own with an engine process; yields its address."""
    port = free_port()
    command = [sys.executable, vllm_stand_in.__file__, "serve", "policy", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "policy", "--limit-mm-per-prompt", '{"image": 8}']
    with log.open("w") as file:
        process = subprocess.Popen(command, env={**os.environ, "STAND_IN_FAULT": fault}, stdout=file, stderr=file)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: is_up(url), timeout_s=60)
        yield url
    finally:
        process.kill()
        process.wait()


def is_up(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    return False


def open_predictor(url: str) -> RemoteBackend:
    return RemoteBackend(PredictorAddress(url), views=PromptFormat(), observe=lambda *_: None)


def test_a_predictor_whose_engine_is_killed_fails_readiness_and_requests(film: str, tmp_path: Path) -> None:
    """vLLM ends with its engine, at the second question: 502 for it and for later ones, at once.

    The transformer stays alive: its restart would mend nothing, and vLLM's container has a probe of its own.
    """
    with (
        stand_in("dies:2", tmp_path / "log") as predictor,  # a question is two requests: its region and its answer
        serving_here(open_predictor(predictor), settings()) as url,
    ):
        assert read_probes(url) == (200, 200)
        assert ask(url, film)[0] == 200
        assert "vllm:prefix_cache_queries_total" in httpx.get(f"{url}/metrics", timeout=60).text
        assert ask(url, film) == (502, "model_failed")
        until(lambda: read_probes(url) == (503, 200), timeout_s=60)  # a health check is reused for 5 s
        assert ask(url, film) == NOT_READY
        reply = httpx.post(url + CHAT, json=chat("Is there a nodule?", film), timeout=SHORT_S)
        assert (reply.status_code, reply.json()["error"]["code"]) == (502, "model_failed")
        assert "vllm:" not in httpx.get(f"{url}/metrics", timeout=60).text


def test_a_predictor_that_hangs_is_not_ready_until_it_answers(film: str) -> None:
    """vLLM's /health is 200 as long as its engine has raised no error (vllm-project/vllm@00080ee,

    vllm/v1/engine/async_llm.py, check_health), so a hung engine shows only in what it does not answer.
    """
    hangs = threading.Event()

    def reply(request: Request) -> Reply:
        if request.method == "POST" and hangs.is_set():
            endpoint.hang()
        return 200, MODELS if request.method == "GET" else completion("yes", None, tokens=[-0.1])

    with serving(reply) as endpoint, serving_here(open_predictor(endpoint.url), settings(deadline_s=6.0)) as url:
        assert ask(url, film)[0] == 200
        assert read_probes(url) == (200, 200)
        assert [one.method for one in endpoint.requests].count("POST") == 2  # region and answer; none of the probes
        hangs.set()
        assert ask(url, film) == (504, "deadline_exceeded")
        assert read_probes(url) == (503, 200)
        hangs.clear()
        until(lambda: read_probes(url) == (200, 200), timeout_s=60)
        assert endpoint.requests[-1].body["max_tokens"] == 1  # the question that showed it
        assert ask(url, film)[0] == 200


def test_a_predictors_key_is_sent_with_health_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM with --api-key answers /v1/models with 401 without it (AuthenticationMiddleware), and /health with 200."""
    monkeypatch.setenv("PREDICTOR_KEY", "sk-predictor")

    def reply(request: Request) -> Reply:
        known = request.headers.get("authorization") == "Bearer sk-predictor"
        return (200 if known or request.path == "/health" else 401), MODELS

    with serving(reply) as endpoint:
        address = PredictorAddress(endpoint.url, api_key_env="PREDICTOR_KEY")
        assert RemoteBackend(address, views=PromptFormat(), observe=lambda *_: None).check_health()
        assert not open_predictor(endpoint.url).check_health()
