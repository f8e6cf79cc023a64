"""Waiting for services: how long, how often, what for, and what is said about it. The clock is the test's."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from clincot.errors import InvalidInput
from clincot.waiting import (
    TASK_TIMEOUT_ENV,
    WAIT_ENV,
    Outage,
    ServiceWaiting,
    end_waits_on_interrupt,
    format_seconds,
    get_waiting,
    is_passing_status,
    is_unknown_host,
    use_waiting,
)
from tests.support.fast_clock import FastClock, failing


class Away(Exception):
    """A failure that passes."""


def find_outage(error: BaseException) -> Outage | None:
    asked = error.args[1] if len(error.args) > 1 else None
    return Outage(str(error.args[0]), asked) if isinstance(error, Away) else None


def waiting_on(clock: FastClock, **options: float) -> ServiceWaiting:
    return ServiceWaiting(**{"budget_s": 600.0, **options}, clock=clock.read, sleep=clock.sleep, draw=lambda: 0.0)


def test_waits_double_up_to_half_a_minute() -> None:
    clock = FastClock()
    assert waiting_on(clock).call("store", failing(*[Away("503")] * 7), find_outage) == "done"
    assert clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_jitter_lengthens_a_wait_by_up_to_a_half() -> None:
    clock = FastClock()
    waiting = ServiceWaiting(600.0, clock=clock.read, sleep=clock.sleep, draw=lambda: 0.5)
    waiting.call("store", failing(Away("503"), Away("503")), find_outage)
    assert clock.slept == [1.25, 2.5]


def test_the_budget_ends_with_a_last_attempt() -> None:
    """1 + 2 + 4 + 8 + 16 = 31 s, 18 waits of 30 s make 571 s, and 29 s are left of 600 s: 25 attempts."""
    clock, calls = FastClock(), 0

    def call() -> None:
        nonlocal calls
        calls += 1
        raise Away("503")

    with pytest.raises(Away, match=r"^503; still away after 10 min \(CLINCOT_WAIT_S=600\)$"):
        waiting_on(clock).call("store", call, find_outage)
    assert clock.slept == pytest.approx([1.0, 2.0, 4.0, 8.0, 16.0, *[30.0] * 18, 29.0], abs=0.5)
    assert calls == 25


def test_what_does_not_pass_is_raised_at_once_and_unchanged() -> None:
    clock = FastClock()
    with pytest.raises(ValueError, match=r"^HTTP 403$"):
        waiting_on(clock).call("store", failing(ValueError("HTTP 403")), find_outage)
    assert clock.slept == []


def test_retry_after_replaces_the_wait() -> None:
    clock = FastClock()
    waiting_on(clock).call("judge", failing(Away("429", 15.0), Away("429", 0.0), Away("503")), find_outage)
    assert clock.slept == [15.0, 0.1, 4.0]


def test_a_retry_after_beyond_the_budget_is_not_waited_for() -> None:
    clock = FastClock()
    with pytest.raises(Away, match=r"it asks to wait 60 min, longer than CLINCOT_WAIT_S allows"):
        waiting_on(clock).call("judge", failing(Away("429", 3600.0)), find_outage)
    assert clock.slept == []


def test_an_outage_is_waited_out_once_however_many_calls_meet_it() -> None:
    """A stage that cleans up after its failure, and its next request, do not wait for ten more minutes each."""
    clock = FastClock()
    waiting = waiting_on(clock)
    for expected in (25, 1, 1):
        attempts = [Away("503")] * 100
        call = failing(*attempts)
        before = len(clock.slept)
        with pytest.raises(Away):
            waiting.call("store", call, find_outage)
        assert len(clock.slept) - before == expected - 1
    assert waiting.is_away("store")
    assert waiting.call("store", failing(), find_outage) == "done"
    assert not waiting.is_away("store")
    assert waiting.call("store", failing(Away("503")), find_outage) == "done"
    assert clock.slept[-1] == 1.0


def test_each_service_has_a_budget_of_its_own() -> None:
    clock = FastClock()
    waiting = waiting_on(clock)
    with pytest.raises(Away):
        waiting.call("store", failing(*[Away("503")] * 100), find_outage)
    assert waiting.call("judge", failing(Away("503")), find_outage) == "done"


def test_a_call_that_fails_alone_ends_although_others_succeed() -> None:
    clock = FastClock()
    waiting = waiting_on(clock)

    def call() -> str:
        waiting.call("judge", failing(), find_outage)
        raise Away("503")

    with pytest.raises(Away, match="still away after 10 min"):
        waiting.call("judge", call, find_outage)


def test_a_wait_ends_before_the_time_limit_of_the_task() -> None:
    clock = FastClock()
    waiting = waiting_on(clock, ends_at=clock.read() + 20.0)
    with pytest.raises(Away):
        waiting.call("store", failing(*[Away("503")] * 100), find_outage)
    assert clock.slept == pytest.approx([1.0, 2.0, 4.0, 8.0, 5.0], abs=0.1)


def test_without_a_budget_nothing_is_waited_for_or_added() -> None:
    clock = FastClock()
    with pytest.raises(Away, match=r"^503$"):
        waiting_on(clock, budget_s=0.0).call("store", failing(Away("503")), find_outage)
    assert clock.slept == []


def test_one_line_says_what_why_how_long_and_what_is_left(caplog: pytest.LogCaptureFixture) -> None:
    clock = FastClock()
    with caplog.at_level(logging.WARNING):
        waiting_on(clock).call("store http://s3:8333", failing(Away("HTTP 503"), Away("HTTP 503")), find_outage)
    assert caplog.messages == [
        "store http://s3:8333 is away (HTTP 503); waiting 1 s, 10 min of 10 min left",
        "store http://s3:8333 is away (HTTP 503); waiting 2 s, 9 min 59 s of 10 min left",
    ]


def test_threads_that_wait_for_the_same_service_share_a_line(caplog: pytest.LogCaptureFixture) -> None:
    """Eight requests of a judge fail together: one line."""
    waiting = ServiceWaiting(600.0, clock=lambda: 0.0, sleep=lambda _: None, draw=lambda: 0.0)
    together = threading.Barrier(8)

    def ask() -> None:
        errors = [Away("HTTP 503")]

        def call() -> None:
            if errors:
                together.wait()
                raise errors.pop()

        waiting.call("judge", call, find_outage)

    with caplog.at_level(logging.WARNING):
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(caplog.messages) == 1


def test_an_interrupt_ends_the_waits_of_other_threads() -> None:
    """A pool of threads joins its threads: without this, Ctrl-C would take up to ten minutes."""
    failed = threading.Event()

    def ask() -> None:
        with pytest.raises(Away):
            ServiceWaiting(600.0).call("judge", failing(*[Away("503")] * 100), find_outage)
        failed.set()

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.2)
    with pytest.raises(KeyboardInterrupt), end_waits_on_interrupt():
        raise KeyboardInterrupt
    assert failed.wait(timeout=5)
    thread.join()


def test_ctrl_c_ends_a_command_that_waits() -> None:
    """The first wait is announced at once; then SIGINT ends the process within a second or two."""
    code = "from clincot.cli import main; raise SystemExit(main(ARGS))"
    arguments = ["pipeline", "status", "run", "--endpoint", "http://127.0.0.1:9"]
    environment = {**os.environ, WAIT_ENV: "600"}
    command = [sys.executable, "-c", f"ARGS = {arguments!r}; {code}"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # a shell starts background jobs with SIGINT ignored, which children inherit
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "http://127.0.0.1:9 is away" in line
        assert "of 10 min left" in line
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_too_many_requests_and_server_errors_pass(status: int) -> None:
    assert is_passing_status(status)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 422])
def test_refusals_do_not_pass(status: int) -> None:
    assert not is_passing_status(status)


def test_an_unknown_host_is_not_a_name_server_that_is_away() -> None:
    assert is_unknown_host(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    assert not is_unknown_host(socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"))
    wrapped = RuntimeError("no reply")
    wrapped.__cause__ = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert is_unknown_host(wrapped)


def test_the_environment_sets_budget_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of 1000 s keeps 60 s to say why it fails; of one of 100 s, a tenth."""
    monkeypatch.setattr("clincot.waiting._current", [])
    monkeypatch.setattr("psutil.Process", lambda: _Born(time.time()))
    monkeypatch.setenv(WAIT_ENV, "90")
    for limit_s, ends_s in ((1000, 940), (100, 90)):
        monkeypatch.setattr("clincot.waiting._current", [])
        monkeypatch.setenv(TASK_TIMEOUT_ENV, str(limit_s))
        waiting = get_waiting()
        assert waiting.budget_s == 90.0
        assert waiting.ends_at - time.monotonic() == pytest.approx(ends_s, abs=2.0)


class _Born:
    def __init__(self, at: float) -> None:
        self.create_time = lambda: at


@pytest.mark.parametrize("value", ["ten minutes", "-1", "inf"])
def test_a_malformed_budget_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clincot.waiting._current", [])
    monkeypatch.setenv(WAIT_ENV, value)
    with pytest.raises(InvalidInput, match=rf"CLINCOT_WAIT_S: expected a number of seconds from 0 on, got '{value}'"):
        get_waiting()


def test_a_block_can_wait_in_its_own_way() -> None:
    mine = ServiceWaiting(1.0)
    with use_waiting(mine):
        assert get_waiting() is mine
    assert get_waiting() is not mine


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (583.2, "9 min 43 s")])
def test_times_are_written_in_minutes(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
