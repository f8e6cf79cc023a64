"""Waiting for services that are away: one budget and one rule for the store, endpoints, clusters and repositories.

A node that restarts takes its pods away for some minutes: the store refuses connections, a judge answers 503. Kubeflow
Pipelines 2.17 gives only lost pods another attempt, so a task waits itself. `ServiceWaiting.call` repeats a call while
its service is away, at growing intervals, until the budget is spent. What will not pass (a wrong key, a missing bucket,
an unknown host) is raised at once; each client decides which of its errors pass (see `is_passing_status`).

The budget is measured by the clock, from the first failure after the last success, and all calls to one service in this
process share it. So attempts that take long are part of it, and retries inside a library do not add to it. When it is
spent, the calls that follow are tried once each until one succeeds.

CLINCOT_WAIT_S           the budget in seconds (default 600; 0: never wait)
CLINCOT_TASK_TIMEOUT_S   time limit of the task; waiting ends before it, so that the task can say why it fails
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from random import random
from typing import TypeVar

import psutil
import tenacity

from clincot.errors import InvalidInput

T = TypeVar("T")

WAIT_ENV, TASK_TIMEOUT_ENV = "CLINCOT_WAIT_S", "CLINCOT_TASK_TIMEOUT_S"
DEFAULT_BUDGET_S = 600.0  # a node drains, restarts and starts its pods again in less
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 30.0
SHORTEST_DELAY_S = 0.1  # for a server that asks to come back after 0 s
RESERVED_S = 60.0  # of a task's time limit, for the error message and the end of the process
_RESERVED_SHARE = 0.1  # of a time limit so short that RESERVED_S would be most of it

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outage:
    """Why a call failed in a way that passes. retry_after_s: the wait that the server asked for."""

    reason: str
    retry_after_s: float | None = None


@dataclass
class _ServiceState:
    """What the calls to one service have found, on the clock of the process."""

    since: float | None = None  # first failure after the last success
    told_until: float = 0.0  # when the wait ends that the log has announced


class _Alarm:
    """A sleep that another thread can end."""

    def __init__(self) -> None:
        self._rung = threading.Condition()
        self.count = 0

    def sleep(self, seconds: float) -> None:
        with self._rung:
            before = self.count
            self._rung.wait_for(lambda: self.count != before, seconds)

    def ring(self) -> None:
        with self._rung:
            self.count += 1
            self._rung.notify_all()


_alarm = _Alarm()


@dataclass
class ServiceWaiting:
    """How long, and at which intervals, this process waits for services. Threads may share it.

    budget_s: for each outage of each service. ends_at: on `clock`; no wait goes beyond it. The n-th wait of a call
    takes 2^(n-1) seconds, at most LONGEST_DELAY_S, times a random factor from [1, 1.5), so that clients that failed
    together do not come back together. A server's Retry-After replaces it.
    """

    budget_s: float = DEFAULT_BUDGET_S
    ends_at: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = _alarm.sleep
    draw: Callable[[], float] = random  # uniform on [0, 1)
    _states: dict[str, _ServiceState] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def call(self, service: str, call: Callable[[], T], find_outage: Callable[[BaseException], Outage | None]) -> T:
        """Call until it succeeds, and return its result.

        service: address of the service, without credentials; it identifies the service and is logged.
        find_outage: what passes about an error; None if another attempt would fail in the same way.
        Raises the error of the last attempt, whose message then says how long was waited.
        """
        waited = _Wait(self, service, find_outage, _alarm.count)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(waited.passes),
            wait=waited.choose_delay,
            stop=waited.is_over,
            before_sleep=waited.announce,
            sleep=self.sleep,
            reraise=True,
        )
        try:
            result: T = retrying(call)
        except BaseException as error:
            waited.explain(error)
            raise
        self._record_success(service)
        return result

    def is_away(self, service: str) -> bool:
        """Return whether the latest call to the service failed in a way that passes."""
        with self._lock:
            return self._get_state(service).since is not None

    def finds_outage(self) -> bool:
        """Return whether any service is away."""
        with self._lock:
            return any(state.since is not None for state in self._states.values())

    def _get_state(self, service: str) -> _ServiceState:
        return self._states.setdefault(service, _ServiceState())

    def _record_success(self, service: str) -> None:
        with self._lock:
            self._get_state(service).since = None

    def _find_start(self, service: str, now: float) -> float:
        """Return when the current outage began; it begins now if there is none."""
        with self._lock:
            state = self._get_state(service)
            state.since = now if state.since is None else state.since
            return state.since

    def _may_tell(self, service: str, now: float, delay_s: float) -> bool:
        """Return whether to log a wait: one line for all threads that wait for a service at the same time."""
        with self._lock:
            state = self._get_state(service)
            if now < state.told_until:
                return False
            state.told_until = now + delay_s
            return True


@dataclass
class _Wait:
    """One call that may have to wait, as tenacity's callbacks see it."""

    waiting: ServiceWaiting
    service: str
    find_outage: Callable[[BaseException], Outage | None]
    alarms: int  # rung before the call
    first_failure: float | None = None
    outage: Outage | None = None  # of the latest attempt
    refused_s: float | None = None  # a Retry-After beyond what is left

    def passes(self, error: BaseException) -> bool:
        self.outage = self.find_outage(error) if isinstance(error, Exception) else None
        if self.outage is None and isinstance(error, Exception):
            self.waiting._record_success(self.service)  # it has answered, if only with a refusal
        return self.outage is not None

    @property
    def spent_s(self) -> float:
        """Seconds from the first failure of the outage, or of this call if others have succeeded since."""
        now = self.waiting.clock()
        self.first_failure = now if self.first_failure is None else self.first_failure
        return now - min(self.waiting._find_start(self.service, now), self.first_failure)

    @property
    def left_s(self) -> float:
        """Seconds until the budget or the time limit of the task is spent."""
        return min(self.waiting.budget_s - self.spent_s, self.waiting.ends_at - self.waiting.clock())

    def choose_delay(self, state: tenacity.RetryCallState) -> float:
        assert self.outage is not None
        left_s, asked_s = self.left_s, self.outage.retry_after_s
        self.refused_s = asked_s if asked_s is not None and asked_s > left_s else None
        late = self.waiting.draw() / 2
        if asked_s is not None:
            delay_s = max(asked_s, SHORTEST_DELAY_S) + late * FIRST_DELAY_S
        else:
            delay_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(state.attempt_number - 1, 16)) * (1 + late)
        return max(0.0, min(delay_s, left_s))  # the last attempt comes when the budget ends

    def is_over(self, _: tenacity.RetryCallState) -> bool:
        return self.left_s <= 0 or self.refused_s is not None or _alarm.count != self.alarms

    def announce(self, state: tenacity.RetryCallState) -> None:
        assert self.outage is not None
        if self.waiting._may_tell(self.service, self.waiting.clock(), state.upcoming_sleep):
            _log.warning(
                "%s is away (%s); waiting %.3g s, %s of %s left",
                self.service,
                self.outage.reason,
                state.upcoming_sleep,
                format_seconds(self.left_s),
                format_seconds(self.waiting.budget_s),
            )

    def explain(self, error: BaseException) -> None:
        """Add to the message of an error that passes how long was waited, and how to wait longer."""
        if self.outage is None or not self.waiting.budget_s:
            return
        if self.refused_s is not None:
            added = f"it asks to wait {format_seconds(self.refused_s)}, longer than {WAIT_ENV} allows"
        else:
            added = f"still away after {format_seconds(self.spent_s)} ({WAIT_ENV}={self.waiting.budget_s:g})"
        error.args = (f"{error}; {added}", *error.args[1:])


def is_passing_status(status: int) -> bool:
    """Return whether an HTTP status says that the service is away: too many requests, or an error of the server.

    400, 401, 403, 404 and other refusals do not pass: the same request would be refused again.
    """
    return status == 429 or status >= 500


def parse_retry_after(value: str, *, now: float | None = None) -> float | None:
    """The seconds of a Retry-After header (RFC 9110, section 10.2.3): a number or an HTTP date; None if it is neither.

    now: seconds since the epoch, for a date.
    """
    text = value.strip()
    if text.replace(".", "", 1).isascii() and text.replace(".", "", 1).isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except (TypeError, ValueError):
        return None
    date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - (time.time() if now is None else now))


def is_unknown_host(error: BaseException) -> bool:
    """Return whether a name does not exist (NXDOMAIN), which does not pass: the address is wrong.

    A name server that does not answer (EAI_AGAIN) passes. In Kubernetes the name of a Service exists while none of its
    pods does, so an outage is no reason for NXDOMAIN.
    """
    missing = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
    return any(isinstance(one, socket.gaierror) and one.errno in missing for one in iter_causes(error))


def is_wrong_certificate(error: BaseException) -> bool:
    """Return whether a server's certificate was refused: another name, an unknown authority, expired."""
    import ssl

    return any(isinstance(one, ssl.SSLCertVerificationError) for one in iter_causes(error))


def iter_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and the errors that it wraps: its causes, contexts, and errors among its arguments."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        inner = (one.__cause__, one.__context__, getattr(one, "reason", None), *one.args)
        pending += [other for other in inner if isinstance(other, BaseException)]


def format_seconds(seconds: float) -> str:
    """Return a time in minutes and seconds."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes} min {rest} s" if minutes and rest else f"{minutes} min" if minutes else f"{rest} s"


def interrupt_waiting() -> None:
    """End the waits of all threads: each call raises the error of its last attempt. For Ctrl-C."""
    _alarm.ring()


@contextmanager
def end_waits_on_interrupt() -> Iterator[None]:
    """End the waits of all threads if the block is left by Ctrl-C, because a pool of threads waits for its threads."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            interrupt_waiting()
        raise


_current: list[ServiceWaiting] = []


def get_waiting() -> ServiceWaiting:
    """Return how this process waits, as the environment says. Raises InvalidInput for a malformed variable."""
    if not _current:
        _current.append(_read_environment())
    return _current[-1]


@contextmanager
def use_waiting(waiting: ServiceWaiting) -> Iterator[ServiceWaiting]:
    """Wait in another way within the block."""
    _current.append(waiting)
    try:
        yield waiting
    finally:
        _current.remove(waiting)


def _read_environment() -> ServiceWaiting:
    timeout_s, ends_at = _read_seconds(TASK_TIMEOUT_ENV), float("inf")
    if timeout_s:
        age_s = time.time() - psutil.Process().create_time()
        ends_at = time.monotonic() - age_s + timeout_s - min(RESERVED_S, _RESERVED_SHARE * timeout_s)
    budget_s = _read_seconds(WAIT_ENV)
    return ServiceWaiting(DEFAULT_BUDGET_S if budget_s is None else budget_s, ends_at)


def _read_seconds(name: str) -> float | None:
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InvalidInput(f"{name}: expected a number of seconds from 0 on, got {text!r}")
    return seconds
