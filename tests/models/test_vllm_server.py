"""vLLM in the pod of a stage: its arguments, its start, its end, and what is said about either.

The processes are real; a stand-in takes vLLM's place (tests/support/vllm_stand_in.py). tests/serving_vllm has vLLM.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from clincot.config import VllmConfig
from clincot.errors import EngineFailed, InvalidInput
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.vllm_server import (
    CacheUse,
    ServedWeights,
    VllmServer,
    build_arguments,
    find_served_weights,
    find_vllm,
    start_vllm,
)
from tests.support.vllm_command import install_stand_in, is_gone, read_pids

SETTINGS = VllmConfig(start_s=60.0)


@pytest.fixture
def pids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stand-in is the `vllm` of this test; the file names its processes."""
    install_stand_in(tmp_path, monkeypatch)
    monkeypatch.setenv("STAND_IN_PIDS", str(tmp_path / "pids"))
    return tmp_path / "pids"


def start(settings: VllmConfig = SETTINGS) -> VllmServer:
    return start_vllm(ServedWeights("model"), "p", dtype="float32", device="cpu", share=1.0, settings=settings)


def wait_until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.05)


def test_the_command_is_the_variables_then_the_neighbour_then_the_paths(tmp_path: Path) -> None:
    command = tmp_path / "vllm"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    assert find_vllm({"PATH": str(tmp_path)}) == [str(command), "serve"]
    assert find_vllm({"PATH": "", "CLINCOT_VLLM": str(command)}) == [str(command), "serve"]
    python = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    assert find_vllm({"PATH": str(tmp_path), "CLINCOT_VLLM": sys.executable}) == python
    with pytest.raises(
        InvalidInput, match="run the stage in the image clincot-cuda, install vllm, or set CLINCOT_VLLM"
    ):
        find_vllm({"PATH": str(tmp_path / "empty")})
    with pytest.raises(InvalidInput, match="/nowhere/vllm is not there"):
        find_vllm({"PATH": str(tmp_path), "CLINCOT_VLLM": "/nowhere/vllm"})


def test_two_judges_divide_the_memory_of_a_gpu() -> None:
    """0.85 for one server, 0.425 for each of two."""
    arguments = [
        build_arguments(ServedWeights("m"), "n", 1, dtype="bfloat16", device="cuda", share=share, settings=VllmConfig())
        for share in (1.0, 0.5)
    ]
    shares = [one[one.index("--gpu-memory-utilization") + 1] for one in arguments]
    assert shares == ["0.850", "0.425"]


def test_an_adapter_is_served_on_its_base(tmp_path: Path) -> None:
    """Rank 12 needs room for 16, the next size that vLLM has."""
    content = {"base_model_name_or_path": "/models/base", "r": 12}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content))
    weights = find_served_weights(tmp_path)
    assert weights == ServedWeights("/models/base", tmp_path, 12)
    arguments = build_arguments(
        weights, "tuned", 1, dtype="float32", device="cpu", share=1.0, settings=VllmConfig(max_model_len=900)
    )
    assert arguments[0] == "/models/base"
    assert arguments[-3:] == ["16", "--lora-modules", f"tuned={tmp_path}"]
    assert arguments[arguments.index("--max-model-len") + 1] == "900"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedCheckpoint, match="expected the base model"):
        find_served_weights(tmp_path)


def test_a_stopped_server_leaves_no_process(pids: Path) -> None:
    server = start()
    assert server.is_running
    assert server.find_failure() == ""
    server.stop()
    assert [pid for pid in read_pids(pids) if not is_gone(pid)] == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_one_that_started_it(pids: Path, number: signal.Signals) -> None:
    """The starter is killed, without a chance to clean up: vLLM and its engine end as well."""
    code = (
        "from tests.models.test_vllm_server import start\n"
        "import time\n"
        "server = start()\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    assert starter.stdout.readline() == "ready\n"
    running = read_pids(pids)
    assert [pid for pid in running if is_gone(pid)] == []
    starter.send_signal(number)
    starter.wait(timeout=30)
    starter.stdout.close()
    wait_until(lambda: all(is_gone(pid) for pid in running))


def test_a_server_that_starts_too_slowly_is_stopped(pids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", "slow")
    with pytest.raises(
        EngineFailed, match=r"not become ready within 2 s \(models\.vllm\.start_s\).* 'INFO loading model'"
    ):
        start(VllmConfig(start_s=2.0))
    assert [pid for pid in read_pids(pids) if not is_gone(pid)] == []


def test_too_little_memory_at_the_start_is_named(pids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAULT", "memory")
    with pytest.raises(
        EngineFailed, match="out of memory: ValueError: No available memory for the cache blocks"
    ) as found:
        start()
    assert "models.vllm.gpu_memory_utilization (GPU) or models.vllm.cpu_kv_gb (CPU)" in str(found.value)


def test_options_that_vllm_refuses_are_quoted(pids: Path) -> None:
    server = VllmServer(find_vllm(), ["model", "--no-such-option"], name="p", port=1, settings=SETTINGS)
    with pytest.raises(
        EngineFailed, match=r"ended \(status 2\): vllm: error: unrecognized arguments: --no-such-option"
    ):
        server.wait_ready()
    server.stop()


def test_a_killed_engine_is_told_from_a_busy_one(pids: Path) -> None:
    """SIGKILL is what a pod's memory limit sends. Whether vLLM itself is hit or its engine, the server ends."""
    server = start()
    os.kill(read_pids(pids)[0], signal.SIGKILL)
    assert "out of memory: it was killed (SIGKILL), as by the memory limit of a pod" in server.find_failure()
    server.stop()
    server = start()
    os.kill(read_pids(pids)[1], signal.SIGKILL)
    assert "EngineDeadError: EngineCore encountered an issue" in server.find_failure()
    server.stop()


def test_the_caches_use_is_counted_since_the_last_reading(pids: Path) -> None:
    """The stand-in counts 100 tokens a request, 75 of them from the cache; those of other caches do not count."""
    import httpx

    server = start()
    body = {"model": "p", "messages": [{"role": "user", "content": "Right?"}]}
    assert server.take_cache_use() == CacheUse(0, 0)
    for requests in (1, 2):
        for _ in range(requests):
            assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200
        assert server.take_cache_use() == CacheUse(100 * requests, 75 * requests)
    server.stop()
    assert str(CacheUse(200, 150)) == "150 of 200 prompt tokens (75%) from the prefix cache"
