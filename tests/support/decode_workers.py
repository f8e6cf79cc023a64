"""The decode workers of servers in this process, which a test has to end with its server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from clincot.serving import decode_worker


def list_decode_workers() -> list[psutil.Process]:
    """The decode workers that are children of this process; those of `clincot serve` are its own children."""
    workers = []
    for process in psutil.Process().children():
        try:
            if decode_worker.__name__ in process.cmdline():
                workers.append(process)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return workers


@contextmanager
def expect_no_new_workers() -> Iterator[None]:
    """Check that every decode worker that was started in the block has ended."""
    before = {worker.pid for worker in list_decode_workers()}
    yield
    left = [worker.pid for worker in list_decode_workers() if worker.pid not in before]
    assert left == [], f"decode workers {left} are still running: close the server's AnswerService or ImageDecoder"
