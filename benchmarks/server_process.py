"""`clincot serve` as a process whose memory is measured, and limited as the chart limits it."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import yaml
from kubernetes.utils.quantity import parse_quantity

from tests.support.http_server import free_port

ROOT = Path(__file__).resolve().parents[1]
CHART_VALUES = ROOT / "charts" / "clincot" / "values-cpu.yaml"
_SAMPLE_S = 0.05
READY_S = 600  # on a busy machine


def read_chart_limit() -> int:
    """The memory limit in bytes of the chart's server container that runs the model in its own process."""
    values = yaml.safe_load(CHART_VALUES.read_text(encoding="utf-8"))
    return int(parse_quantity(values["server"]["resources"]["limits"]["memory"]))


@dataclass
class ServerProcess:
    """A running server and what was measured of it."""

    url: str
    port: int
    process: subprocess.Popen[bytes]
    limit: int  # bytes; 0: none
    peak: int = 0  # bytes: the sum over the server and its decode workers
    kills: int = 0

    def measure_memory(self) -> int:
        """Resident bytes of the server and its child processes together."""
        total = 0
        for process in self.list_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total

    def list_processes(self) -> list[psutil.Process]:
        """The server's process and its decode workers; none after its end."""
        try:
            server = psutil.Process(self.process.pid)
            return [server, *server.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []


@contextlib.contextmanager
def start_server(
    checkpoint: Path,
    *,
    overrides: Sequence[str] = (),
    limit: int = 0,
    log: Path | None = None,
    threads: int = 0,
    module: str = "clincot.cli.app",
) -> Iterator[ServerProcess]:
    """Start a server and yield it when it is ready.

    overrides: settings, FIELD=VALUE. limit: bytes of memory. The kernel limits the private memory of the server's
    process (RLIMIT_DATA). The sum over all its processes is measured 20 times a second; above the limit the server is
    killed, as a container would be. threads: of torch; 0: as the environment says, or else one for each core. module:
    what Python runs.
    """
    port = free_port()
    command = [sys.executable, "-m", module, "serve", "--checkpoint", str(checkpoint)]
    command += ["--port", str(port), "--model-name", "policy"]
    command += [word for override in overrides for word in ("--set", override)]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    variables |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    with (log or Path(os.devnull)).open("ab") as file:
        process = subprocess.Popen(
            command,
            env=variables,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: _limit_process(limit),
        )
    server = ServerProcess(f"http://127.0.0.1:{port}", port, process, limit)
    stop = threading.Event()
    watch = threading.Thread(target=_watch_memory, args=(server, stop), daemon=True)
    try:
        _wait_until_ready(server)
        watch.start()
        yield server
    finally:
        stop.set()
        process.terminate()
        try:
            process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _limit_process(limit: int) -> None:
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _wait_until_ready(server: ServerProcess) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server exited with code {server.process.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/v2/health/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the server was not ready within {READY_S} s")


def _watch_memory(server: ServerProcess, stop: threading.Event) -> None:
    while not stop.wait(_SAMPLE_S):
        server.peak = max(server.peak, server.measure_memory())
        if 0 < server.limit < server.peak and server.process.poll() is None:
            server.kills += 1
            server.process.kill()
            return
