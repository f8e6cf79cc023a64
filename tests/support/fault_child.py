"""Runs one task of a recorded round under a fault: `python -m tests.support.fault_child SPEC.json`.

The process is a fork of a server that has imported everything (clincot.pipelines.fork_server). Waits for services move
the clock of the plan and take no time. Faults of the process itself happen when it first writes one of its outputs.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from clincot.waiting import ServiceWaiting, use_waiting
from tests.support.fault_servers import FaultPlan


class PlanClock:
    """Real time plus the waits, which move the clock of the plan."""

    def __init__(self, plan: FaultPlan) -> None:
        self._plan, self._began, self._lock = plan, time.monotonic() - plan.elapsed, threading.Lock()
        self._ahead = 0.0

    def read(self) -> float:
        return time.monotonic() + self._ahead

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._ahead += seconds
            self._plan.move(self.read() - self._began)


def main() -> None:
    spec: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    clock = PlanClock(FaultPlan(Path(spec["plan"])))
    _arm(spec["fault"], spec["outputs"])
    module, *sys.argv[1:] = spec["argv"]
    with use_waiting(ServiceWaiting(600.0, clock=clock.read, sleep=clock.sleep, draw=lambda: 0.0)):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _arm(fault: str, outputs: str) -> None:
    """Make a fault happen when the process first writes below `outputs`, or at once where it is a limit."""
    if fault == "disk":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    elif fault in ("SIGKILL", "SIGTERM", "error"):

        def strike(event: str, arguments: tuple[object, ...]) -> None:
            if event != "open" or not isinstance(arguments[0], str | os.PathLike):
                return
            mode = arguments[1]
            if os.fspath(arguments[0]).startswith(outputs) and isinstance(mode, str) and mode[:1] in ("w", "x"):
                if fault == "error":
                    raise OSError("Transport endpoint is not connected")
                os.kill(os.getpid(), signal.Signals[fault])
                time.sleep(10)  # SIGTERM arrives a moment later

        sys.addaudithook(strike)


if __name__ == "__main__":
    main()
