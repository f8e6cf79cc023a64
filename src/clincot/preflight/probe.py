"""Probes of outside dependencies, which all run at once and each within a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from clincot.errors import UserError
from clincot.preflight.preflight_report import PreflightCheck, fail_check
from clincot.waiting import get_waiting

_POLL_S = 1.0  # how often to look whether a service is away


@dataclass(frozen=True)
class Probe:
    """Checks of one dependency that build on one another and share a time limit.

    If the time limit passes or `run` raises a UserError or OSError, that is one more failed check with this
    description and remedy.
    """

    name: str
    description: str
    remedy: str
    limit_s: float
    run: Callable[[], Iterable[PreflightCheck]]


def run_probes(probes: Sequence[Probe]) -> list[PreflightCheck]:
    """Run all probes at once, each in its own thread, and return their checks in the order of the probes.

    A probe that has not ended by its limit has failed. While a service is away for which probes wait (waiting.py), the
    limit does not run. The daemon thread of a failed probe keeps running; Python cannot stop it, but it does not block
    exit. An error of a probe that is not a UserError or OSError is a bug and is raised.
    """
    began = time.monotonic()
    runs = [_ProbeRun(probe) for probe in probes]
    for run in runs:
        threading.Thread(target=run.run_probe, name=f"preflight {run.probe.name}", daemon=True).start()
    checks: list[PreflightCheck] = []
    for run in runs:
        probe = run.probe
        ended = run.wait_until(began + probe.limit_s)
        checks += run.checks[:]  # also those from before a timeout or an error
        if not ended:
            result = f"no answer within {probe.limit_s:g} s"
            checks.append(fail_check(probe.name, probe.description, result, probe.remedy))
        elif isinstance(run.error, (UserError, OSError)):
            checks.append(fail_check(probe.name, probe.description, str(run.error), probe.remedy))
        elif run.error is not None:
            raise run.error
    return checks


class _ProbeRun:
    """A running probe and its checks so far."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.checks: list[PreflightCheck] = []
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def wait_until(self, deadline: float) -> bool:
        """Wait for the end of the probe until `deadline` (monotonic), which an outage moves; return whether it came."""
        waiting = get_waiting()
        latest = deadline + waiting.budget_s
        while not self.ended.wait(timeout=max(0.0, min(deadline - time.monotonic(), _POLL_S))):
            now = time.monotonic()
            if waiting.finds_outage():
                deadline = min(latest, max(deadline, now + self.probe.limit_s))
            if now >= deadline:
                return False
        return True

    def run_probe(self) -> None:
        """Collect the probe's checks; keep an error for the thread that waits."""
        try:
            self.checks.extend(self.probe.run())
        except BaseException as error:  # run_probes reports or raises it
            self.error = error
        finally:
            self.ended.set()
