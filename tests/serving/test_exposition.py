"""Asking for the metrics costs a server little, however often it is done."""

from __future__ import annotations

import asyncio
import time

from clincot.serving.metrics import Exposition


def test_metrics_are_rendered_for_a_tenth_of_the_time_at_most() -> None:
    """200 requests at once for them, each of milliseconds, would hold up the answers."""
    read: list[float] = []

    def read_predictor() -> str:
        read.append(time.monotonic())
        time.sleep(0.05)
        return f"# reading {len(read)}\n"

    async def ask() -> tuple[list[bytes], bytes]:
        exposition = Exposition(read_predictor)
        together = await asyncio.gather(*(exposition.render() for _ in range(200)))
        await asyncio.sleep(1.1)  # the most that a text is kept
        return together, await exposition.render()

    together, later = asyncio.run(ask())
    assert len(set(together)) == 1
    assert together[0].endswith(b"# reading 1\n")
    assert later.endswith(b"# reading 2\n")
    assert b"clincot_queue_length" in later
