"""Bodies and images of all requests together stay within their budgets, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from clincot.serving.api_errors import ApiError, RequestCancelled
from clincot.serving.budgets import FREE_BODY_BYTES, BodyBudget, PacedTurns, PixelBudget
from clincot.serving.request_context import RequestContext

FREE = FREE_BODY_BYTES


def test_small_bodies_hold_nothing() -> None:
    async def read() -> int:
        budget = BodyBudget(shared=0, largest=0)
        async with budget.open_lease() as lease:
            await lease.grow_to(FREE)
            return budget.used

    assert asyncio.run(read()) == 0


def test_a_body_waits_until_another_is_answered() -> None:
    """100 shared bytes and a largest body of 50: the oldest takes 120, the next one needs 40 and waits."""

    async def read() -> list[int]:
        budget, used = BodyBudget(shared=100, largest=50), []
        async with budget.open_lease() as oldest, budget.open_lease() as other:
            await other.grow_to(FREE + 20)  # of the 100 shared bytes
            await oldest.grow_to(FREE + 120)  # 140 of 150, which only the oldest may use
            waiting = asyncio.create_task(other.grow_to(FREE + 60))  # 40 more
            await asyncio.sleep(0)
            used += [budget.used, int(waiting.done()), int(other.waiting)]
            budget.complete(oldest)  # its body was read, but it still holds its bytes
            await asyncio.sleep(0)
            used.append(int(waiting.done()))
            waiting.cancel()
        return [*used, budget.used]

    assert asyncio.run(read()) == [140, 0, 1, 0, 0]


def test_two_half_read_bodies_do_not_wait_for_each_other() -> None:
    """Each has 60 of 100 shared bytes in sight and needs 80: the older one may use the last 80, and ends."""

    async def read() -> list[str]:
        budget, ended = BodyBudget(shared=100, largest=80), []

        async def one(name: str) -> None:
            async with budget.open_lease() as lease:
                for size in (50, 80):
                    await lease.grow_to(FREE + size)
                    await asyncio.sleep(0)
                budget.complete(lease)
            ended.append(name)

        await asyncio.wait_for(asyncio.gather(one("older"), one("younger")), timeout=10)
        return [*ended, str(budget.used)]

    assert asyncio.run(read()) == ["older", "younger", "0"]


def test_after_a_turn_the_loop_is_free_for_three_times_as_long() -> None:
    """The first turn takes 50 ms, so the second begins 150 ms after its end, or later; it may end before its block."""

    async def take_turns() -> tuple[float, bool]:
        turns, loop, began = PacedTurns(), asyncio.get_running_loop(), []

        async def second() -> None:
            async with turns.take():
                began.append(loop.time())

        async with turns.take() as end:
            waiting = asyncio.create_task(second())
            await asyncio.sleep(0)
            time.sleep(0.05)
            end()
            ended = loop.time()
            await waiting  # inside the first one's block
            end()  # again: nothing
        async with asyncio.timeout(10), turns.take():  # the block's end releases nothing twice
            alone = turns._free.locked()
        return began[0] - ended, alone

    pause_s, alone = asyncio.run(take_turns())
    assert pause_s >= 0.145  # the loop's clock is coarse
    assert alone


def test_a_turn_ends_with_an_error() -> None:
    async def fail() -> None:
        turns = PacedTurns()
        with pytest.raises(ApiError):
            async with turns.take():
                raise ApiError(400, "invalid_request", "no JSON")
        async with asyncio.timeout(10), turns.take():
            pass

    asyncio.run(fail())


def test_the_smallest_waiting_image_is_next() -> None:
    """100 pixels: while 90 are held, 80 wait and then 10 come, which fit."""
    budget, context, order = PixelBudget(100), RequestContext(60), []
    large_waits = threading.Event()

    def hold(pixels: int) -> None:
        large_waits.set()
        with budget.hold(pixels, context):
            order.append(pixels)

    with budget.hold(90, context):
        large = threading.Thread(target=hold, args=(80,))
        large.start()
        assert large_waits.wait(10)
        hold(10)
    large.join(timeout=10)
    assert order == [10, 80]


def test_an_image_above_the_budget_is_alone() -> None:
    budget, context = PixelBudget(100), RequestContext(60)
    with budget.hold(1000, context), pytest.raises(ApiError), budget.hold(1, RequestContext(0.05)):
        pass
    with budget.hold(1, RequestContext(0.05)):  # the whole budget was returned
        pass


def test_waiting_ends_at_the_deadline_and_when_the_client_leaves() -> None:
    budget = PixelBudget(10)
    with budget.hold(10, RequestContext(60)):
        with pytest.raises(ApiError) as late, budget.hold(1, RequestContext(0.05)):
            pass
        gone = RequestContext(60)
        threading.Timer(0.05, gone.cancel).start()
        with pytest.raises(RequestCancelled), budget.hold(1, gone):
            pass
    assert late.value.status == 504
