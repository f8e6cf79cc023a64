"""Model servers for tests: in this process on a free port, or `clincot serve` as its own process."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from clincot.config.server_settings import ServeSettings
from clincot.models.protocols import Generation, Policy
from clincot.prompts import Conversation, PromptFormat
from clincot.serving.auth import ApiKeys
from clincot.serving.backend import Backend, InProcessBackend
from clincot.serving.fetch import ImageFetcher
from clincot.serving.grpc_server import JointServer
from clincot.serving.metrics import observe_batch
from clincot.serving.middleware import RequestMiddleware
from clincot.serving.server import (
    QUIET_LOGGERS,
    build_application,
    build_data_plane,
    build_uvicorn_config,
    quiet_library_loggers,
)
from clincot.serving.service import AnswerService
from tests.support.http_server import free_port

ROOT = Path(__file__).resolve().parents[2]
PREDICT, INFER, CHAT = "/v1/models/policy:predict", "/v2/models/policy/infer", "/openai/v1/chat/completions"
# long limits, so that other load on the machine does not fail a test
PATIENT = [word for one in ("deadline_s=600", "body_s=120", "grace_s=300") for word in ("--set", one)]
LOOK_ONCE: dict[str, Any] = {"grounders": {"written": 1}, "temperature": 0.0}


@dataclass
class Parrot:
    """A policy that repeats the first turn, once `go` is set; it fails for a question that contains "bad"."""

    go: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list)
    digest: str = "parrot"
    views: PromptFormat = field(default_factory=PromptFormat)

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        self.asked.set()
        self.go.wait(timeout=300)
        self.batches.append(len(conversations))
        if any("bad" in turn.text for c in conversations for turn in c):
            raise ValueError("cannot encode")
        return [Generation(f"{len(c)} turns: {c[0].text}", (-0.5, -0.25)) for c in conversations]

    def p_yes(self, conversations: Sequence[Conversation]) -> list[float | None]:
        self.batches.append(len(conversations))
        return [len(c[0].text) / 1000 for c in conversations]


@contextlib.contextmanager
def serving_here(
    policy: Policy | Backend,
    settings: ServeSettings,
    *,
    keys: ApiKeys | None = None,
    fetcher: ImageFetcher | None = None,
    grpc_ports: list[int] | None = None,
) -> Iterator[str]:
    """Run a server in this process; yields its address, and stops it after the accepted requests.

    policy: the policy in this process, or a backend, such as one with a predictor. grpc_ports: a list to which the port
    of a gRPC server is added; None: without one.
    """
    levels = {name: logging.getLogger(name).level for name in QUIET_LOGGERS}  # other tests use these loggers
    quiet_library_loggers()
    is_backend = hasattr(policy, "check_health")
    backend = policy if is_backend else InProcessBackend(policy, settings, observe_batch)
    service = AnswerService(backend, settings, fetcher)
    plane = build_data_plane("policy", service)
    app = RequestMiddleware(build_application(plane, service), settings, keys)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = build_uvicorn_config(app, settings)
        server = JointServer(config, plane, app, "127.0.0.1:0") if grpc_ports is not None else uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            until(lambda: server.started)
            if grpc_ports is not None:
                grpc_ports.append(server.grpc_port)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            service.close()
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


@dataclass
class Served:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def wait_ready(self, timeout_s: float = 300) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.HTTPError):
                return httpx.get(f"{self.url}/v2/health/ready", timeout=5).status_code == 200
            return False

        until(ready, timeout_s)


@contextlib.contextmanager
def serving(log: Path, *options: str, port: int = 0) -> Iterator[Served]:
    """Run `clincot serve` with options; it is killed at the end if the test has not stopped it."""
    port = port or free_port()
    command = [
        sys.executable,
        "-m",
        "clincot.cli.app",
        "serve",
        "--port",
        str(port),
        "--model-name",
        "policy",
        *PATIENT,
    ]
    command += options
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield Served(f"http://127.0.0.1:{port}", process, log)
    finally:
        process.kill()
        process.wait(timeout=30)


def until(done: Any, timeout_s: float = 300) -> None:
    """Wait until another thread or process makes the condition true."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline, f"the condition did not become true within {timeout_s:g} s"
        time.sleep(0.01)


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def v1(question: str, image: str, **more: Any) -> dict[str, Any]:
    return {"instances": [{"question": question, "image": image, **more}]}


def v2(question: str, image: str, **parameters: Any) -> dict[str, Any]:
    tensors = {"question": question, "image": image}
    inputs = [{"name": n, "datatype": "BYTES", "shape": [1], "data": [text]} for n, text in tensors.items()]
    return {"inputs": inputs, "parameters": parameters}


def chat(question: str, image: str, **more: Any) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    return {"model": "policy", "messages": [{"role": "user", "content": content}], **more}
