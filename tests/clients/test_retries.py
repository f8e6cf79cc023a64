"""When a request is sent again: an endpoint that is away is waited for, a request that fails alone is repeated."""

from __future__ import annotations

from typing import Any

import pytest

from clincot.clients.http import HttpFailure, RequestRetries
from clincot.waiting import parse_retry_after
from tests.support.fast_clock import FastClock, failing

URL = "http://judge/v1"


def policy(slept: list[float], **options: Any) -> RequestRetries:
    settings: dict[str, Any] = {"retries": 3, "delay_s": 1.0, "sleep": slept.append, "draw": lambda: 0.0} | options
    return RequestRetries(**settings)


def broken(message: str = "HTTP 500") -> HttpFailure:
    return HttpFailure(message, status=500, transient=True)


def away(**facts: Any) -> HttpFailure:
    return HttpFailure("HTTP 503", status=503, away=True, **facts)


def test_waits_double_up_to_the_longest() -> None:
    slept: list[float] = []
    assert policy(slept, retries=5, max_delay_s=6.0).call(URL, failing(*[broken()] * 5)) == "done"
    assert slept == [1.0, 2.0, 4.0, 6.0, 6.0]


def test_jitter_lengthens_a_wait_by_up_to_a_half() -> None:
    slept: list[float] = []
    policy(slept, draw=lambda: 0.5).call(URL, failing(broken(), broken()))
    assert slept == [1.25, 2.5]


def test_the_last_failure_is_raised_after_all_retries() -> None:
    slept: list[float] = []
    with pytest.raises(HttpFailure, match="fourth"):
        policy(slept).call(URL, failing(broken(), broken(), broken(), broken("fourth")))
    assert slept == [1.0, 2.0, 4.0]


def test_a_permanent_failure_is_not_retried(fast_clock: FastClock) -> None:
    slept: list[float] = []
    with pytest.raises(HttpFailure, match="bad request"):
        policy(slept).call(URL, failing(HttpFailure("bad request", status=400)))
    assert slept == fast_clock.slept == []


def test_an_endpoint_that_is_away_costs_no_retry(fast_clock: FastClock) -> None:
    """Six 503s with `retries` 0: the endpoint is waited for."""
    slept: list[float] = []
    assert policy(slept, retries=0).call(URL, failing(*[away()] * 6)) == "done"
    assert fast_clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert slept == []


def test_retry_after_replaces_the_wait(fast_clock: FastClock) -> None:
    assert policy([]).call(URL, failing(*[away(retry_after_s=15.0)] * 6)) == "done"
    assert fast_clock.slept == [15.0] * 6


def test_when_the_wait_is_over_the_failure_is_final(fast_clock: FastClock) -> None:
    """Ten minutes once, not once more for each of the three retries; and the endpoint is given up."""
    slept: list[float] = []
    with pytest.raises(HttpFailure, match="still away after 10 min") as failed:
        policy(slept).call(URL, failing(*[away() for _ in range(500)]))
    assert (failed.value.transient, failed.value.away, failed.value.fatal) == (False, False, True)
    assert sum(fast_clock.slept) == pytest.approx(600.0, abs=2.0)
    assert slept == []


def test_without_retries_nothing_is_retried() -> None:
    slept: list[float] = []
    with pytest.raises(HttpFailure):
        policy(slept, retries=0).call(URL, failing(broken()))
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
