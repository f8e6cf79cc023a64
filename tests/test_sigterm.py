"""A command in a container ends on SIGTERM, which the kernel drops for process 1 unless it has a handler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.http_server import free_port

# As process 1, a program that has no handler survives the signal; so it does if it was started with the signal ignored.
IGNORING = partial(signal.signal, signal.SIGTERM, signal.SIG_IGN)
HANDLED = 14  # bit of SIGTERM in SigCgt: signal 15 is bit 14


@pytest.mark.parametrize(
    "command",
    [
        ("store", "create", "s3://bucket/prefix", "--wait=300"),
        ("pipeline", "schedule", "--remove", "--endpoint=http://127.0.0.1:{port}"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_hook_ends_on_sigterm(command: tuple[str, ...], tmp_path: Path) -> None:
    """Both commands wait for a server that never answers."""
    port = free_port()
    environment = os.environ | {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "k",
        "AWS_SECRET_ACCESS_KEY": "s",
        "CLINCOT_WAIT_S": "300",
    }
    words = [word.format(port=port) for word in command]
    hook = subprocess.Popen(
        [sys.executable, "-m", "clincot", *words],
        env=environment,
        cwd=tmp_path,
        preexec_fn=IGNORING,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for_handler(hook.pid)
        hook.send_signal(signal.SIGTERM)
        assert hook.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        hook.kill()


def _wait_for_handler(pid: int) -> None:
    for _ in range(600):
        status = Path(f"/proc/{pid}/status").read_text()
        (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
        if int(caught, 16) >> HANDLED & 1:
            return
        time.sleep(0.1)
    pytest.fail("the command has no handler of SIGTERM")
