"""When a request is sent again, and how long the client waits; the clock and the jitter are the test's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from clincot.clients.http import HttpFailure, RequestRetries, parse_retry_after


def failing(*failures: HttpFailure) -> Callable[[], str]:
    """A call that raises the failures in turn and then returns "done"."""
    left = list(failures)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


def policy(slept: list[float], **options: Any) -> RequestRetries:
    settings: dict[str, Any] = {"retries": 3, "delay_s": 1.0, "sleep": slept.append, "draw": lambda: 0.0} | options
    return RequestRetries(**settings)


def busy(**facts: Any) -> HttpFailure:
    return HttpFailure("busy", status=503, transient=True, **facts)


def test_waits_double_up_to_the_longest() -> None:
    slept: list[float] = []
    assert policy(slept, retries=5, max_delay_s=6.0).call(failing(*[busy()] * 5)) == "done"
    assert slept == [1.0, 2.0, 4.0, 6.0, 6.0]


def test_jitter_lengthens_a_wait_by_up_to_a_half() -> None:
    slept: list[float] = []
    policy(slept, draw=lambda: 0.5).call(failing(busy(), busy()))
    assert slept == [1.25, 2.5]


def test_the_last_failure_is_raised_after_all_retries() -> None:
    slept: list[float] = []
    with pytest.raises(HttpFailure, match="fourth"):
        policy(slept).call(failing(busy(), busy(), busy(), HttpFailure("fourth", transient=True)))
    assert slept == [1.0, 2.0, 4.0]


def test_a_permanent_failure_is_not_retried() -> None:
    slept: list[float] = []
    with pytest.raises(HttpFailure, match="bad request"):
        policy(slept).call(failing(HttpFailure("bad request", status=400)))
    assert slept == []


def test_retry_after_replaces_the_wait_and_costs_no_retry() -> None:
    """15 s as in the finding; six of them with three retries."""
    slept: list[float] = []
    assert policy(slept).call(failing(*[busy(retry_after_s=15.0)] * 6)) == "done"
    assert slept == [15.0] * 6


def test_a_wait_beyond_the_budget_is_not_started() -> None:
    slept: list[float] = []
    with pytest.raises(HttpFailure):
        policy(slept, budget_s=40.0).call(failing(*[busy(retry_after_s=15.0)] * 6))
    assert slept == [15.0, 15.0]
    with pytest.raises(HttpFailure):
        policy(slept, budget_s=40.0).call(failing(busy(retry_after_s=3600.0)))
    assert slept == [15.0, 15.0]


def test_without_retries_nothing_is_retried() -> None:
    slept: list[float] = []
    with pytest.raises(HttpFailure):
        policy(slept, retries=0).call(failing(busy(retry_after_s=1.0)))
    assert slept == []


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("15", 15.0),
        (" 0 ", 0.0),
        ("1.5", 1.5),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 37.0),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 37.0),
        ("Sun, 06 Nov 1994 08:48:00 GMT", 0.0),
        ("soon", None),
        ("-5", None),
        ("", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str, seconds: float | None) -> None:
    """RFC 9110, sections 10.2.3 and 5.6.7, which has these dates; now is 08:49:00 of that day."""
    assert parse_retry_after(header, now=784111740.0) == seconds
