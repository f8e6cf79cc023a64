"""A killed server loses only its current requests; a stopped one finishes the accepted requests."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import psutil
import pytest

from tests.serving.conftest import POLICY
from tests.support.model_servers import PREDICT, Served, serving, until, v1

QUESTION = "Is there a nodule, an effusion, a consolidation or a pneumothorax?"  # four findings make the chain longer


FRAGMENTS = """
import sys, time, psutil
from clincot.serving.server import tune_allocator, return_free_memory
tune_allocator()
process = psutil.Process()
before, large, small = process.memory_info().rss, [], []
for _ in range(200):  # 200 MiB that a batch needs, each followed by something that is kept
    large.append(bytearray(b"x") * (1 << 20))
    small.append(bytearray(b"x") * 4096)
del large
left = process.memory_info().rss - before
with return_free_memory(every_s=0.05):
    deadline = time.monotonic() + 30
    while process.memory_info().rss - before > left / 4 and time.monotonic() < deadline:
        time.sleep(0.05)
print(left >> 20, process.memory_info().rss - before >> 20, len(small))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the allocator is not glibc's")
def test_memory_that_a_rare_batch_needed_is_returned() -> None:
    """Freed below what is kept, it would stay with the process: about 200 MiB, of which 0.8 MiB are in use."""
    done = subprocess.run([sys.executable, "-c", FRAGMENTS], capture_output=True, text=True, check=True, timeout=300)
    left, after, _ = map(int, done.stdout.split())
    assert left > 150
    assert after < 20


BUFFERS = """
import resource
from clincot.serving.server import tune_allocator
tune_allocator()
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    buffers = [bytearray(b"x") * (12 << 20) for _ in range(4)]  # larger than what is kept by default
    del buffers
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the allocator is not glibc's")
def test_the_buffers_of_a_forward_pass_are_kept_for_the_next() -> None:
    """48 MiB are 12,288 pages, which the kernel maps one by one the first time that they are written."""
    done = subprocess.run([sys.executable, "-c", BUFFERS], capture_output=True, text=True, check=True, timeout=300)
    first, *others = map(int, done.stdout.split())
    assert first > 12_000
    assert max(others) < 100


def running(server: Served) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("clincot_running "))


def in_the_background(server: Served, film: str, kept: list[object]) -> threading.Thread:
    def ask() -> None:
        try:
            kept.append(httpx.post(server.url + PREDICT, json=v1(QUESTION, film), timeout=600).status_code)
        except httpx.HTTPError as error:
            kept.append(type(error).__name__)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def test_a_killed_server_serves_again_after_a_restart(film: str, tmp_path: Path) -> None:
    answers: list[object] = []
    slow = ("--checkpoint", str(POLICY), "--set", "max_batch=1")
    with serving(tmp_path / "log", *slow) as server:
        server.wait_ready()
        threads = [in_the_background(server, film, answers) for _ in range(4)]
        until(lambda: running(server) >= 1)
        server.process.kill()
        for thread in threads:
            thread.join()
        port = int(server.url.rpartition(":")[2])
    assert len(answers) == 4
    assert answers[0] not in (200, 500)  # lost: the client sees a connection error
    with serving(tmp_path / "log", "--checkpoint", str(POLICY), port=port) as again:
        again.wait_ready()
        assert httpx.post(again.url + PREDICT, json=v1(QUESTION, film), timeout=600).status_code == 200


def test_sigterm_finishes_accepted_requests_and_accepts_no_more(film: str, tmp_path: Path) -> None:
    answers: list[object] = []
    with serving(tmp_path / "log", "--checkpoint", str(POLICY), "--set", "max_batch=1", "--set", "running=1") as server:
        server.wait_ready()
        threads = [in_the_background(server, film, answers) for _ in range(3)]  # one runs, two wait
        until(lambda: running(server) >= 1)
        until(lambda: metric(server, "clincot_queue_length") >= 2)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert server.process.wait(timeout=300) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url, timeout=10)
    assert answers == [200, 200, 200]
    assert "all accepted requests are answered" in (tmp_path / "log").read_text()


def metric(server: Served, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=60).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


LIBRARIES = f"""
import time
import kserve, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
AutoProcessor.from_pretrained({str(POLICY)!r})
AutoModelForImageTextToText.from_pretrained({str(POLICY)!r})
print(time.process_time())
"""


def test_a_server_starts_nearly_as_fast_as_its_libraries(tmp_path: Path) -> None:
    """Measured in processor time against a process that imports the libraries and loads the same model."""
    done = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True, check=True, timeout=300)
    libraries_s = float(done.stdout.split()[-1])
    with serving(tmp_path / "log", "--checkpoint", str(POLICY)) as server:
        server.wait_ready()
        times = psutil.Process(server.process.pid).cpu_times()
    print(f"ready after {times.user + times.system:.1f} s of computing, libraries {libraries_s:.1f} s")
    assert times.user + times.system < 1.5 * libraries_s
