"""Processes that work beside each other, one for each GPU of this pod, and how much of their work is done.

A process sees its own GPU only, so the models and servers that it keeps are those of that GPU. The processes stay for
the following stages of this process, until their models must go (rollout_engines.free_models).
"""

from __future__ import annotations

import atexit
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm import tqdm

from clincot.errors import EngineFailed, InvalidInput
from clincot.processes import count_cores, end_with_parent

T = TypeVar("T")

DEVICES_ENV = "CLINCOT_DEVICES"
VISIBLE_ENV = "CUDA_VISIBLE_DEVICES"
_POLL_S = 2.0  # how often the progress of the workers is read

_counter: Any = None  # of the items that this worker has done; None in a process that is no worker


def count_devices() -> int:
    """The number of processes among which a stage divides its work: one for each GPU, or 1.

    The environment variable CLINCOT_DEVICES overrides it, up to the number of GPUs; without a GPU the processes divide
    the cores. Raises InvalidInput for a value that is no such number.
    """
    text = os.environ.get(DEVICES_ENV, "")
    if text and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise InvalidInput(f"{DEVICES_ENV}={text}: expected a number of devices of at least 1")
    if is_device_worker() or text == "1":
        return 1
    import torch  # 3 s, which only a stage with models of its own spends

    gpus = torch.cuda.device_count()
    if text and gpus and int(text) > gpus:
        raise InvalidInput(f"{DEVICES_ENV}={text}: this machine has {gpus} GPU(s) that this process may use")
    return int(text) if text else max(1, gpus)


@dataclass(frozen=True)
class _Workers:
    """One pool of one process for each device, and the counter that they share."""

    pools: tuple[ProcessPoolExecutor, ...]
    counter: Any


_workers: _Workers | None = None


def run_on_devices(call: Callable[..., T], arguments: Sequence[tuple[Any, ...]], *, what: str, unit: str) -> list[T]:
    """Call a function with each of the arguments, on as many devices; return the results in order.

    what, unit: of the progress bar, which counts what the workers report (count_progress). Raises the error of the
    first call that fails, after all workers are stopped; EngineFailed if a worker was killed.
    """
    workers = _ensure_workers(len(arguments))
    before = int(workers.counter.value)
    futures = [pool.submit(_call_portably, call, given) for pool, given in zip(workers.pools, arguments, strict=False)]
    try:
        _wait_for(futures, workers.counter, before, what, unit)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        stop_device_workers()
        raise EngineFailed(
            "the process of one of several devices has ended without an error of its own, as when memory runs out: "
            f"what the others had finished is kept for the next run, and {DEVICES_ENV}=1 uses one device ({error})"
        ) from error
    except BaseException:
        stop_device_workers()
        raise


def stop_device_workers() -> None:
    """End the processes of all devices, with their models and servers."""
    global _workers
    if _workers is None:
        return
    stopped, _workers = _workers, None
    for pool in stopped.pools:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)


def is_device_worker() -> bool:
    """Whether this process works for one of several devices."""
    return _counter is not None


def count_progress(items: Iterable[T]) -> Iterable[T]:
    """The items; a worker adds each that it has passed on to what its parent shows."""
    return items if _counter is None else _count_items(items)


def _count_items(items: Iterable[T]) -> Iterator[T]:
    for item in items:
        yield item
        with _counter.get_lock():
            _counter.value += 1


def _ensure_workers(count: int) -> _Workers:
    """The workers of the first `count` devices; those of another number are stopped."""
    global _workers
    if _workers is not None and len(_workers.pools) < count:
        stop_device_workers()
    if _workers is None:
        context = get_context("spawn")
        counter = context.Value("q", 0)
        threads = max(1, count_cores() // count)
        _workers = _Workers(
            tuple(
                ProcessPoolExecutor(1, context, _init_worker, (name, threads, os.getpid(), counter))
                for name in _list_device_names(count)
            ),
            counter,
        )
    return _workers


def _list_device_names(count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is in each worker: the names in this process's own, or numbers."""
    visible = [name.strip() for name in os.environ.get(VISIBLE_ENV, "").split(",") if name.strip()]
    return visible[:count] if len(visible) >= count else [str(number) for number in range(count)]


def _init_worker(device: str, threads: int, parent: int, counter: Any) -> None:
    global _counter
    end_with_parent(parent=parent)
    os.environ[VISIBLE_ENV] = device
    os.environ["OMP_NUM_THREADS"] = str(threads)
    _counter = counter


def _call_portably(call: Callable[..., T], given: tuple[Any, ...]) -> T:
    """Call; an error that could not be sent to the parent is replaced by one of its text."""
    try:
        return call(*given)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


def _wait_for(futures: Sequence[Future[Any]], counter: Any, before: int, what: str, unit: str) -> None:
    """Wait for all calls, or for the first error, and show how many items are done."""
    pending: set[Future[Any]] = set(futures)
    with tqdm(desc=what, unit=f" {unit}", mininterval=_POLL_S, disable=None) as bar:
        while pending:
            done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            bar.update(int(counter.value) - before - bar.n)
            for future in done:
                future.result()


atexit.register(stop_device_workers)
