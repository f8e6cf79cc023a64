"""Rollouts between two server processes on this machine.

The demo uses them, and they are a way to try a rollout without a cluster.

    state/front.json              the splitter process, whose address clients use (traffic_splitter.py)
    state/route.json              the traffic shares
    state/servers/<digest>.json   a server process: pid, start time, address, log file
    state/checkpoints/…           the checkpoints that the servers load

The servers serve the model under the name of its line, so clients need not change it after a rollout.

The processes keep running after the command ends. A process is signalled only if its start time matches the file, since
the operating system may have given its pid to another process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
from pydantic import BaseModel

from clincot.deployment.rollout import CountedRequests, NotReady, RequestCounts, TargetFailed
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.smoke import RequestFailed, build_smoke_headers, post_json
from clincot.deployment.targets.traffic_route import (
    COUNTS_PATH,
    ROUTE_FILE,
    TrafficBackend,
    TrafficRoute,
    read_route,
)
from clincot.fields import FrozenModel
from clincot.jsonl import atomic_write
from clincot.models.checkpoint import hash_checkpoint
from clincot.processes import find_free_port
from clincot.registry.manifest import CorruptCheckpoint, Manifest, download_checkpoint
from clincot.storage.store import Store

SERVE_COMMAND = (
    sys.executable,
    "-m",
    "clincot.cli.app",
    "serve",
    "--checkpoint",
    "{checkpoint}",
    "--host",
    "127.0.0.1",
    "--port",
    "{port}",
    "--model-name",
    "{name}",
)
STOP_TIMEOUT_S = 90.0  # servers finish the requests that they have accepted
_TAIL_CHARS = 600  # characters of a log that an error message quotes

M = TypeVar("M", bound=BaseModel)


class ServerProcess(FrozenModel):
    """A server or splitter process that a local rollout started."""

    pid: int
    started: float  # the start time that the operating system reports; a pid may be reused
    url: str
    log: str
    digest: str = ""

    @property
    def process(self) -> psutil.Process | None:
        """The running process; None if it has ended."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.started) < 0.05 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if same else None


class LocalTarget:
    """Server processes on 127.0.0.1 behind one address.

    An instance performs one rollout of one checkpoint.
    """

    how = "local processes behind one address"

    def __init__(
        self,
        state: Path,
        store: Store,
        manifest: Manifest,
        steps: tuple[int, ...],
        *,
        command: Sequence[str] = SERVE_COMMAND,
        port: int = 0,
    ) -> None:
        self.state, self.store, self.manifest = state.absolute(), store, manifest
        self.digest = manifest.sha256
        self.command, self.port = command, port
        self._steps = steps
        self._was_ready = False
        self._model = ""

    @property
    def steps(self) -> tuple[int, ...]:
        return self._steps if self._read_other_backends() else (100,)

    @property
    def model(self) -> str:
        """The model's name at the server (/openai/v1/models). Raises RequestFailed."""
        if not self._model:
            try:
                url = f"{self._read_server().url}/openai/v1/models"
                reply = httpx.get(url, headers=build_smoke_headers(), timeout=30).raise_for_status()
                self._model = str(reply.json()["data"][0]["id"])
            except (httpx.HTTPError, ValueError, LookupError) as error:
                raise RequestFailed(f"GET /openai/v1/models: expected a model, got {type(error).__name__}") from None
        return self._model

    def start_revision(self, rollout: str) -> str:
        self.state.mkdir(parents=True, exist_ok=True)
        running = self._find_server(self.digest)
        if running is None or running.process is None:
            try:
                folder = download_checkpoint(self.store, self.manifest, self.state / "checkpoints")
            except CorruptCheckpoint as error:
                raise TargetFailed(str(error)) from None
            if hash_checkpoint(folder) != self.digest:
                raise TargetFailed(
                    f"{folder}: expected the checkpoint {self.digest[:12]}, got other files; remove the folder, and it "
                    "is downloaded again"
                )
            port = find_free_port()
            command = [part.format(checkpoint=folder, port=port, name=self.manifest.line) for part in self.command]
            if self.command == SERVE_COMMAND:  # another server has arguments of its own
                command += ServiceSettings().with_measured(self.manifest.serve).list_serve_arguments()
            running = _spawn_process(command, self.state / "logs" / f"{self.digest[:12]}.log", port, self.digest)
            _write_state(self._build_server_path(self.digest), running)
        others = self._read_other_backends()
        return f"a server on {running.url}, " + (f"beside {others[0].digest[:12]}" if others else "alone")

    def check_ready(self) -> bool:
        running = self._read_server()
        if running.process is None:
            raise NotReady(f"the server has ended; the end of {running.log}: {_read_log_tail(Path(running.log))}")
        try:
            ready = httpx.get(f"{running.url}/v2/health/ready", timeout=10).status_code == 200
        except httpx.HTTPError:
            ready = False
        if self._was_ready and not ready:
            raise NotReady(
                f"the server was ready and is no longer ready; the end of {running.log}: "
                f"{_read_log_tail(Path(running.log))}"
            )
        self._was_ready = self._was_ready or ready
        return ready

    def post_request(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        return post_json(self._read_server().url, path, payload, timeout_s)

    @property
    def counts_smoke_requests(self) -> bool:
        """The splitter counts what users ask; the rollout's own questions go past it."""
        return False

    def read_request_counts(self) -> CountedRequests:
        front = _read_state(self.state / "front.json", ServerProcess)
        if front is None or front.process is None:
            return CountedRequests({}, "the splitter does not run")
        counts = httpx.get(front.url + COUNTS_PATH, timeout=10).json().get(self.digest, {"requests": 0, "failed": 0})
        return CountedRequests({self.digest[:12]: RequestCounts(counts["requests"], counts["failed"])})

    def explain_waiting(self) -> str:
        """Nothing: a server that ends is reported with its log by check_ready."""
        return ""

    def scale_revision(self, percent: int) -> None:
        """A local revision is one process."""

    def describe_traffic(self) -> str:
        backends = read_route(self.state).backends
        if not backends:
            return "nothing gets traffic"
        parts = []
        for backend in backends:
            ours = " (this rollout's revision)" if backend.digest == self.digest else ""
            parts.append(f"{backend.percent} % of the traffic goes to {backend.digest[:12]}{ours}")
        return ", ".join(parts)

    def post_to_endpoint(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        front = _read_state(self.state / "front.json", ServerProcess)
        if front is None:
            raise RequestFailed(f"POST {path}: the splitter was never started")
        return post_json(front.url, path, payload, timeout_s)

    def shift_traffic(self, percent: int) -> None:
        self.ensure_front()
        ours = TrafficBackend(digest=self.digest, url=self._read_server().url, percent=percent)
        others = [other.model_copy(update={"percent": 100 - percent}) for other in self._read_other_backends()]
        if not others and percent < 100:
            raise TargetFailed(f"no other server is running to take the remaining {100 - percent} % of the traffic")
        _write_state(self.state / ROUTE_FILE, TrafficRoute(backends=(*others, ours)))

    def finish_rollout(self) -> None:
        others = self._read_other_backends()
        ours = TrafficBackend(digest=self.digest, url=self._read_server().url, percent=100)
        _write_state(self.state / ROUTE_FILE, TrafficRoute(backends=(ours,)))
        for other in others:
            self._stop_server(other.digest)

    def remove_former_services(self) -> str:
        return ""

    def roll_back(self, rollout: str) -> None:
        others = self._read_other_backends()
        if others or read_route(self.state).backends:
            backends = tuple(other.model_copy(update={"percent": 100}) for other in others)
            _write_state(self.state / ROUTE_FILE, TrafficRoute(backends=backends))
        self._stop_server(self.digest)

    def ensure_front(self) -> ServerProcess:
        """Return the splitter process, after starting it if it does not run.

        It is started on its previous address. Raises TargetFailed.
        """
        path = self.state / "front.json"
        front = _read_state(path, ServerProcess)
        if front is not None and front.process is not None:
            return front
        port = self.port or (int(front.url.rpartition(":")[2]) if front is not None else find_free_port())
        command = [
            sys.executable,
            "-m",
            "clincot.deployment.targets.traffic_splitter",
            "--state",
            str(self.state),
            "--port",
            str(port),
        ]
        front = _spawn_process(command, self.state / "logs" / "front.log", port)
        _write_state(path, front)
        _wait_listening(front)
        return front

    def _read_other_backends(self) -> list[TrafficBackend]:
        """The running server that shares the traffic with ours: a list of at most one."""
        running = []
        for backend in read_route(self.state).backends:
            server = self._find_server(backend.digest)
            if backend.digest != self.digest and server is not None and server.process is not None:
                running.append(backend)
        return running[:1]

    def _read_server(self) -> ServerProcess:
        server = self._find_server(self.digest)
        if server is None:
            raise NotReady("the server was never started")
        return server

    def _find_server(self, digest: str) -> ServerProcess | None:
        return _read_state(self._build_server_path(digest), ServerProcess)

    def _build_server_path(self, digest: str) -> Path:
        return self.state / "servers" / f"{digest}.json"

    def _stop_server(self, digest: str) -> None:
        path = self._build_server_path(digest)
        server = _read_state(path, ServerProcess)
        if server is not None:
            _stop_process(server)
            path.unlink()


def stop_all_servers(state: Path) -> list[str]:
    """Stop the splitter and all servers of a local deployment.

    Returns a description of each stopped process.
    """
    paths = [state / "front.json", *sorted((state / "servers").glob("*.json"))]
    stopped = []
    for path in paths:
        server = _read_state(path, ServerProcess)
        if server is not None:
            name = "front" if path.name == "front.json" else server.digest[:12]
            stopped.append(f"{name} {server.url} (pid {server.pid})")
            _stop_process(server)
            path.unlink()
    return stopped


def _spawn_process(command: Sequence[str], log: Path, port: int, digest: str = "") -> ServerProcess:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ},
        )
    try:
        started = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        raise TargetFailed(f"{command[0]} ended at once; the end of {log}: {_read_log_tail(log)}") from None
    return ServerProcess(pid=process.pid, started=started, url=f"http://127.0.0.1:{port}", log=str(log), digest=digest)


def _stop_process(running: ServerProcess) -> None:
    process = running.process
    if process is None:
        return
    process.terminate()
    try:
        process.wait(timeout=STOP_TIMEOUT_S)
    except psutil.TimeoutExpired:
        process.kill()
        process.wait(timeout=10)


def _wait_listening(running: ServerProcess, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if running.process is None:
            raise TargetFailed(f"the splitter has ended; the end of {running.log}: {_read_log_tail(Path(running.log))}")
        try:
            httpx.get(running.url + COUNTS_PATH, timeout=5)
            return
        except httpx.HTTPError:
            time.sleep(0.05)
    raise TargetFailed(f"the splitter does not listen on {running.url} after {within_s:g} s")


def _read_state(path: Path, kind: type[M]) -> M | None:
    return kind.model_validate_json(path.read_bytes()) if path.is_file() else None


def _write_state(path: Path, content: BaseModel) -> None:
    with atomic_write(path) as file:
        json.dump(content.model_dump(mode="json"), file)


def _read_log_tail(path: Path) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return repr(text[-_TAIL_CHARS:])
