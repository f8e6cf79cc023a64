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

from clincot.datasets.ingest.index import ImageFacts, Ledger
from clincot.datasets.ingest.ingest_report import RowRefused
from clincot.datasets.near_duplicates import image_hash
from clincot.errors import BadInput
from clincot.images import DEFAULT_LIMITS, BadImage, ImageLimits, open_image
from clincot.jsonl import file_digest

POOL_PAYS = 64  # files; below, starting processes (about a second) takes longer than decoding


class Workers:
    """A process pool that starts with the first work that is worth it. One worker means none: all in this process."""

    def __init__(self, count: int | None = None) -> None:
        if count is not None and count < 1:
            raise BadInput(f"expected at least 1 worker, got {count}")
        self._count = count or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def pool(self, jobs: int) -> ProcessPoolExecutor | None:
        """The pool for so many jobs, None where this process is as quick."""
        if self._pool is None and self._count > 1 and jobs >= POOL_PAYS:
            # spawn: a fork would copy this process's threads' locks without the threads
            self._pool = ProcessPoolExecutor(self._count, mp_context=multiprocessing.get_context("spawn"))
        return self._pool


class SourceImages:
    """Facts about image files, from the ledger or found out now."""

    def __init__(self, ledger: Ledger, workers: Workers, limits: ImageLimits = DEFAULT_LIMITS) -> None:
        self._ledger = ledger
        self._workers = workers
        self._limits = limits

    def check(self, paths: Iterable[Path], *, label: str = "") -> None:
        """Decode all that are not known yet; with a label a progress bar shows it."""
        fresh = [path for path in dict.fromkeys(paths) if self._ledger.file(path) is None]
        find = partial(image_facts, limits=self._limits)
        pool = self._workers.pool(len(fresh))
        found = map(find, fresh) if pool is None else pool.map(find, fresh, chunksize=4)
        shown = tqdm(found, total=len(fresh), desc=label, unit="image", disable=None if label else True)
        for path, facts in zip(fresh, shown, strict=True):
            self._ledger.remember_file(path, facts)

    def facts(self, path: Path) -> ImageFacts:
        """Raises RowRefused where the file is no image that can be used."""
        found = self._ledger.file(path)
        if found is None:
            found = image_facts(path, self._limits)
            self._ledger.remember_file(path, found)
        if isinstance(found, str):
            raise RowRefused(f"image: {found}. Mend or replace the file, or remove the row")
        return found


def image_facts(path: Path, limits: ImageLimits = DEFAULT_LIMITS) -> ImageFacts | str:
    """The facts, or why the file is refused."""
    try:
        image = open_image(path, limits=limits)
        with path.open("rb") as file:
            suffix = ".png" if file.read(1) == b"\x89" else ".jpg"  # open_image takes nothing else
        return ImageFacts(file_digest(path), *image.size, suffix, image_hash(image))
    except BadImage as error:
        return str(error)
