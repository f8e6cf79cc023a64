"""A second process for work that can be done beside, in the order it is given.

Two processes of one thread each get more out of two cores than one process of two threads, on models this small.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def set_parent_death_signal(how: signal.Signals = signal.SIGTERM) -> None:
    """Ask Linux to send this process a signal when the thread that started it ends, even by SIGKILL."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(how))


class BackgroundWorker:
    """Calls that a second process works through, one after the other."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._waiting: list[Future[object]] = []

    def submit(self, call: Callable[..., object], *args: object) -> None:
        """Queue a call; an earlier one that failed raises its error here."""
        self.raise_failures()
        self._waiting.append(self._pool.submit(call, *args))

    def raise_failures(self, *, wait: bool = False) -> None:
        """Raise what a finished call raised; with `wait`, once all are finished."""
        for future in [f for f in self._waiting if wait or f.done()]:
            future.result()
            self._waiting.remove(future)


@contextmanager
def background_worker(log: Path) -> Iterator[BackgroundWorker]:
    """The second process, whose output goes to `log`; leaving the block waits for all calls.

    It never outlives this process, even one that was killed: a run that is started again would meet it at its files.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // 2)
    with (
        _limit_torch_threads(threads),
        ProcessPoolExecutor(1, get_context("spawn"), _init_worker, (log, os.getpid(), threads)) as pool,
    ):
        beside = BackgroundWorker(pool)
        try:
            yield beside
            beside.raise_failures(wait=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _limit_torch_threads(count: int) -> Iterator[None]:
    """This process computes with so many threads meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _init_worker(log: Path, parent: int, threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8", buffering=1)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)
