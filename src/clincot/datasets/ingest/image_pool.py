"""Inspection of a source's image files: each is decoded completely, once, and in parallel if there are many."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from tqdm import tqdm

from clincot.datasets.ingest.index import ImageFacts, IngestIndex
from clincot.datasets.ingest.ingest_report import InvalidRow
from clincot.datasets.near_duplicates import hash_image
from clincot.errors import InvalidInput
from clincot.images import DEFAULT_LIMITS, ImageLimits, InvalidImage, open_image
from clincot.jsonl import hash_files

J = TypeVar("J")
R = TypeVar("R")

MIN_POOL_JOBS = 64  # with fewer files, starting processes (about a second) takes longer than decoding


class WorkerPool:
    """A process pool that starts only when a batch is large enough to pay for it.

    `count`: worker processes, by default one per usable CPU. With 1, no pool is started and all work runs in this
    process. Use as a context manager. Raises InvalidInput if `count` is below 1.
    """

    def __init__(self, count: int | None = None) -> None:
        if count is not None and count < 1:
            raise InvalidInput(f"expected at least 1 worker, got {count}")
        self._count = count or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run_jobs(self, run: Callable[[J], R], jobs: Sequence[J], *, heavy: int | None = None) -> Iterator[R]:
        """Yield the result of each job, in order; in this process if starting others would take longer.

        heavy: how many of the jobs take about as long as decoding an image; None: all of them.
        """
        if self._pool is None and self._count > 1 and (len(jobs) if heavy is None else heavy) >= MIN_POOL_JOBS:
            # spawn: a fork would copy locks that other threads hold, but not the threads that release them
            self._pool = ProcessPoolExecutor(self._count, mp_context=multiprocessing.get_context("spawn"))
        return map(run, jobs) if self._pool is None else self._pool.map(run, jobs, chunksize=4)


class ImageInspector:
    """Looks up facts about image files in the index, and inspects files that are not in it yet."""

    def __init__(self, index: IngestIndex, workers: WorkerPool, limits: ImageLimits = DEFAULT_LIMITS) -> None:
        self._index = index
        self._workers = workers
        self._limits = limits

    def inspect_all(self, paths: Iterable[Path], *, label: str = "") -> None:
        """Decode all files that are not in the index yet; with a `label`, show a progress bar."""
        fresh = [path for path in dict.fromkeys(paths) if self._index.find_file(path) is None]
        inspect = partial(inspect_image, limits=self._limits)
        results = self._workers.run_jobs(inspect, fresh)
        progress = tqdm(results, total=len(fresh), desc=label, unit="image", disable=None if label else True)
        for path, facts in zip(fresh, progress, strict=True):
            self._index.remember_file(path, facts)

    def read_facts(self, path: Path) -> ImageFacts:
        """Return the facts about an image file; raises InvalidRow if it is not a usable image."""
        facts = self._index.find_file(path)
        if facts is None:
            facts = inspect_image(path, self._limits)
            self._index.remember_file(path, facts)
        if isinstance(facts, str):
            raise InvalidRow(f"image: {facts}. Repair or replace the file, or remove the row")
        return facts


def inspect_image(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> ImageFacts | str:
    """Return the facts about an image file, or the reason why the file is refused."""
    try:
        image = open_image(path, limits=limits)
        with path.open("rb") as file:
            suffix = ".png" if file.read(1) == b"\x89" else ".jpg"  # open_image accepts PNG and JPEG only
        return ImageFacts(hash_files(path), *image.size, suffix, hash_image(image))
    except InvalidImage as error:
        return str(error)
