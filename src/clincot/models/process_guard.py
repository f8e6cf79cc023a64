"""Runs a command in a process group of its own, and ends the whole group when its starter ends.

    python -m clincot.models.process_guard STARTER_PID GRACE_SECONDS COMMAND …

vLLM consists of several processes. If the one that a task has started is killed, the others can stay behind and keep
the memory of the GPU. This process stands between: on SIGTERM, and when the starter ends however it ends, it sends
SIGTERM to the group, and SIGKILL after the grace period. It also ends what is left of the group when the command has
ended by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

from clincot.processes import end_with_parent

_POLL_S = 0.1


def run_guarded(command: list[str], *, starter: int, grace_s: float) -> int:
    """Run the command until it ends or has to; return its exit status, 128 + n for the signal n."""
    stopping = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the starter, which stops this process
    end_with_parent(signal.SIGTERM, parent=starter)
    child = subprocess.Popen(command, start_new_session=True)
    while child.poll() is None and not stopping.is_set():
        time.sleep(_POLL_S)
    if child.poll() is None:
        _signal_group(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=grace_s)
    _signal_group(child.pid, signal.SIGKILL)
    status = child.wait()
    return 128 - status if status < 0 else status


def _signal_group(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    sys.exit(run_guarded(sys.argv[3:], starter=int(sys.argv[1]), grace_s=float(sys.argv[2])))
