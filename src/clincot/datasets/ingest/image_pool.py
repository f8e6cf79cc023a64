"""The image files of a source: each decoded to its end once, in parallel where that pays."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self

from tqdm import tqdm

from clincot.datasets.ingest.index import ImageFacts, IngestIndex
from clincot.datasets.ingest.ingest_report import InvalidRow
from clincot.datasets.near_duplicates import hash_image
from clincot.errors import InvalidInput
from clincot.images import DEFAULT_LIMITS, ImageLimits, InvalidImage, open_image
from clincot.jsonl import hash_files

MIN_POOL_JOBS = 64  # files; below, starting processes (about a second) takes longer than decoding


class WorkerPool:
    """A process pool that starts with the first work that is worth it. One worker means none: all in this process."""

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

    def start_pool(self, jobs: int) -> ProcessPoolExecutor | None:
        """The pool for so many jobs, None where this process is as quick."""
        if self._pool is None and self._count > 1 and jobs >= MIN_POOL_JOBS:
            # spawn: a fork would copy this process's threads' locks without the threads
            self._pool = ProcessPoolExecutor(self._count, mp_context=multiprocessing.get_context("spawn"))
        return self._pool


class ImageInspector:
    """Facts about image files, from the ledger or found out now."""

    def __init__(self, ledger: IngestIndex, workers: WorkerPool, limits: ImageLimits = DEFAULT_LIMITS) -> None:
        self._ledger = ledger
        self._workers = workers
        self._limits = limits

    def inspect_all(self, paths: Iterable[Path], *, label: str = "") -> None:
        """Decode all that are not known yet; with a label a progress bar shows it."""
        fresh = [path for path in dict.fromkeys(paths) if self._ledger.find_file(path) is None]
        find = partial(inspect_image, limits=self._limits)
        pool = self._workers.start_pool(len(fresh))
        found = map(find, fresh) if pool is None else pool.map(find, fresh, chunksize=4)
        shown = tqdm(found, total=len(fresh), desc=label, unit="image", disable=None if label else True)
        for path, facts in zip(fresh, shown, strict=True):
            self._ledger.remember_file(path, facts)

    def read_facts(self, path: Path) -> ImageFacts:
        """Raises RowRefused where the file is no image that can be used."""
        found = self._ledger.find_file(path)
        if found is None:
            found = inspect_image(path, self._limits)
            self._ledger.remember_file(path, found)
        if isinstance(found, str):
            raise InvalidRow(f"image: {found}. Mend or replace the file, or remove the row")
        return found


def inspect_image(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> ImageFacts | str:
    """The facts, or why the file is refused."""
    try:
        image = open_image(path, limits=limits)
        with path.open("rb") as file:
            suffix = ".png" if file.read(1) == b"\x89" else ".jpg"  # open_image takes nothing else
        return ImageFacts(hash_files(path), *image.size, suffix, hash_image(image))
    except InvalidImage as error:
        return str(error)
