"""How many requests are in flight, and how long a reply is waited for."""

from __future__ import annotations

import threading

from clincot.clients.adaptive_limit import AdaptiveLimit, ReplyPatience


def record(limit: AdaptiveLimit, *, replies: int, refusals: int) -> int:
    """Record evenly spread refusals; return the limit afterwards."""
    for number in range(replies):
        limit.record_reply(refused=(number + 1) * refusals // replies > number * refusals // replies)
    return limit.limit


def test_many_refusals_lower_the_limit_and_their_end_raises_it() -> None:
    """A window of 2 x 32 = 64 replies may hold 12.8 refusals: at the 13th, the 20th reply, 32 x 0.7 = 22.4 remain."""
    limit = AdaptiveLimit(32)
    assert record(limit, replies=19, refusals=12) == 32
    assert record(limit, replies=1, refusals=1) == 22
    assert record(limit, replies=44, refusals=0) == 23  # a window of 2 x 22 replies
    assert record(limit, replies=10_000, refusals=0) == 32  # never more than the setting


def test_a_few_refusals_do_not_change_the_limit() -> None:
    """5 % of 429, as of a shared rate limit, cost their own waits only."""
    assert record(AdaptiveLimit(8), replies=2000, refusals=100) == 8


def test_an_endpoint_that_refuses_everything_is_asked_one_by_one() -> None:
    limit = AdaptiveLimit(8)
    assert record(limit, replies=1000, refusals=1000) == 1
    with limit.hold():
        pass


def test_no_more_than_the_limit_are_in_flight_and_the_earliest_goes_first() -> None:
    limit, order = AdaptiveLimit(1), []
    queued = [threading.Thread(target=lambda n=n: hold(n)) for n in (3, 1, 2)]

    def hold(number: int) -> None:
        with limit.hold((0, number)):
            order.append(number)

    with limit.hold():
        for thread in queued:
            thread.start()
        while len(limit._waiting) < 3:
            pass
        assert order == []
    for thread in queued:
        thread.join()
    assert order == [1, 2, 3]


def test_a_lowered_limit_holds_for_requests_in_flight() -> None:
    """Two in flight, the limit falls to 1: the next one starts when both have ended, not when one has."""
    limit, started = AdaptiveLimit(2), threading.Event()

    def hold() -> None:
        with limit.hold():
            started.set()

    third = threading.Thread(target=hold)
    with limit.hold():
        with limit.hold():
            record(limit, replies=40, refusals=40)
            assert limit.limit == 1
            third.start()
        assert not started.wait(0.05)
    assert started.wait(10)
    third.join()


def test_patience_follows_the_slowest_recent_reply() -> None:
    """Slowest 3 s: 12 s, then 24 s, then the timeout of 30 s. A fast endpoint still gets 2 s."""
    patience = ReplyPatience(30.0)
    assert patience.choose_timeout(0, last=False) == 30.0
    for _ in range(19):
        patience.add(3.0)
    assert patience.choose_timeout(0, last=False) == 30.0  # 19 replies say nothing yet
    patience.add(1.0)
    assert [patience.choose_timeout(n, last=False) for n in (0, 1, 2)] == [12.0, 24.0, 30.0]
    assert patience.choose_timeout(0, last=True) == 30.0
    for _ in range(100):
        patience.add(0.01)
    assert [patience.choose_timeout(n, last=False) for n in (0, 1)] == [2.0, 4.0]
