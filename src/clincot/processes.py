"""Child processes and their ports, retries, and a background worker for calls that need no result at once."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import FrameType
from typing import TypeVar

import tenacity

T = TypeVar("T")

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of cgroup v2: "QUOTA PERIOD" in microseconds; QUOTA may be "max"
_PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>
_PARENT_POLL_S = 0.2


def end_with_parent(how: signal.Signals = signal.SIGKILL, *, parent: int | None = None) -> None:
    """Send this process the signal `how` when its parent process ends, however the parent ends (even by SIGKILL).

    Call it in the child: at its start, or as the `preexec_fn` of subprocess.Popen. parent: the parent's process id, if
    the child knows it; if that process has ended already, the signal is sent at once. On Linux the kernel sends the
    signal, when the thread that started the child ends. Elsewhere a thread polls, which a `preexec_fn` does not keep.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(how))
        if parent is not None and os.getppid() != parent:  # it ended before prctl took effect
            os.kill(os.getpid(), how)
    else:
        expected = os.getppid() if parent is None else parent
        threading.Thread(target=_poll_parent, args=(expected, how), daemon=True).start()


def _poll_parent(parent: int, how: signal.Signals) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os.kill(os.getpid(), how)


@contextmanager
def heed_sigterm() -> Iterator[None]:
    """Let a process end on SIGTERM that would not: the first of a container, or one that was started to ignore it.

    The kernel drops a signal to process 1 of a container unless the process has a handler for it. Everywhere else the
    signal keeps its usual effect.
    """
    if os.getpid() != 1 and signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        yield
        return
    with exit_on_sigterm():
        yield


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM (the end of a pod), so that the block can clean up; only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def retry_call(
    call: Callable[[], T],
    *,
    is_transient: Callable[[BaseException], bool],
    wait_s: Callable[[int], float] = lambda failures: 0.0,
    attempts: int | None = None,
    timeout_s: float | None = None,
    on_retry: Callable[[BaseException, float], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """Call until it succeeds; return its result, or raise the error of the last attempt.

    is_transient: whether an error is worth another attempt; other errors are raised at once.
    wait_s: seconds to wait after the n-th failure (1, 2, ...).
    attempts: the number of calls at most. timeout_s: an error after this many seconds is the last. None: no limit.
    on_retry: called with the error and the seconds to wait, before the wait.
    """
    stop: list[tenacity.stop.stop_base] = []
    if attempts is not None:
        stop.append(tenacity.stop_after_attempt(attempts))
    if timeout_s is not None:
        stop.append(tenacity.stop_after_delay(timeout_s))

    def report(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        if on_retry is not None and error is not None:
            on_retry(error, state.upcoming_sleep)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        stop=tenacity.stop_any(*stop),
        wait=lambda state: wait_s(state.attempt_number),
        before_sleep=report,
        sleep=sleep,
        reraise=True,
    )
    return retrying(call)


def find_free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now, for a server that is started next."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class BackgroundWorker:
    """A queue of calls that one second process executes, one after the other."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._pending: list[Future[object]] = []

    def submit(self, call: Callable[..., object], *args: object) -> Future[object]:
        """Queue a call, and return its future. Raises the error of an earlier call that has failed."""
        self.raise_failures()
        self._pending.append(self._pool.submit(call, *args))
        return self._pending[-1]

    def raise_failures(self, *, wait: bool = False) -> None:
        """Raise the error of a finished call; with `wait`, wait for all calls first."""
        for future in [future for future in self._pending if wait or future.done()]:
            future.result()
            self._pending.remove(future)


def submit_call(worker: BackgroundWorker | None, call: Callable[..., object], *args: object) -> Future[object]:
    """Queue a call, or execute it at once without a worker; return its future."""
    if worker is not None:
        return worker.submit(call, *args)
    done: Future[object] = Future()
    done.set_result(call(*args))
    return done


@contextmanager
def background_worker(log: Path) -> Iterator[BackgroundWorker]:
    """Start a second process whose output goes to `log`; leaving the block waits for all calls.

    The process ends with this one, even if this one is killed: a restarted run would otherwise find it writing the
    same files. Each process computes with half of the cores: with models this small, two processes of one thread are
    faster than one process of two threads.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // 2)
    with (
        _limit_torch_threads(threads),
        ProcessPoolExecutor(1, get_context("spawn"), _init_worker, (log, os.getpid(), threads)) as pool,
    ):
        worker = BackgroundWorker(pool)
        try:
            yield worker
            worker.raise_failures(wait=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def share_cores(quota: Path = CPU_QUOTA) -> None:
    """Let the libraries that are loaded later compute with as many threads as this process has cores, without spinning.

    By default OpenMP starts a thread for each core of the machine, whatever the container's limit is, and threads that
    wait for each other spin. Where other threads need the cores, the waiting ones then use up the time of those that
    they wait for. What the environment says already is kept. Call it before torch is imported, which reads the
    environment once.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(count_cores(quota)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def count_cores(quota: Path = CPU_QUOTA) -> int:
    """The number of cores that this process may use: its affinity, or the quota of its container if that is less."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        allowed, period = quota.read_text(encoding="ascii").split()
    except (OSError, ValueError):  # no cgroup v2
        return available
    return available if allowed == "max" else max(1, min(available, math.ceil(int(allowed) / int(period))))


@contextmanager
def _limit_torch_threads(count: int) -> Iterator[None]:
    """Limit this process to `count` computing threads within the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _init_worker(log: Path, parent: int, threads: int) -> None:
    end_with_parent(parent=parent)
    import torch

    torch.set_num_threads(threads)
    sys.stdout = sys.stderr = log.open("a", encoding="utf-8", buffering=1)
