"""A probe of one outside dependency, and how probes are run together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from clincot.errors import UserError
from clincot.preflight.preflight_report import PreflightCheck, fail_check


@dataclass(frozen=True)
class Probe:
    """A few checks that build on one another, in `limit_s` seconds. An error for the user is a failed check as well."""

    name: str
    tried: str
    mend: str
    limit_s: float
    run: Callable[[], Iterable[PreflightCheck]]


def run_probes(asked: Sequence[Probe]) -> list[PreflightCheck]:
    """All probes at once, each in a thread of its own; checks in the probes' order.

    What has not ended by its limit has failed. Its thread is left behind (nothing in Python ends it) and keeps no
    process from ending.
    """
    began = time.monotonic()
    answers = [_ProbeRun(probe) for probe in asked]
    for answer in answers:
        threading.Thread(target=answer.run_probe, name=f"preflight {answer.probe.name}", daemon=True).start()
    found: list[PreflightCheck] = []
    for answer in answers:
        probe = answer.probe
        ended = answer.ended.wait(timeout=max(0.0, began + probe.limit_s - time.monotonic()))
        found += answer.checks[:]  # what was found before it hung or broke off, too
        if not ended:
            found.append(fail_check(probe.name, probe.tried, f"no answer within {probe.limit_s:g} s", probe.mend))
        elif isinstance(answer.error, (UserError, OSError)):
            found.append(fail_check(probe.name, probe.tried, str(answer.error), probe.mend))
        elif answer.error is not None:
            raise answer.error  # a fault of the program
    return found


class _ProbeRun:
    """What a probe has found so far."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self.checks: list[PreflightCheck] = []
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def run_probe(self) -> None:
        try:
            self.checks.extend(self.probe.run())
        except BaseException as error:  # for the thread that waits, which tells or raises it
            self.error = error
        finally:
            self.ended.set()
