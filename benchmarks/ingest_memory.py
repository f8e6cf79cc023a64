"""Memory of an ingest as a function of the rows read.

    python -m benchmarks.ingest_memory [rows] [images]            (make bench-ingest)

Rows differ in everything that the ingest checks: text, answer, id and patient. Resident memory is printed at every
tenth of the rows. It must not grow by more than 8 MB from the second tenth to the last; the first tenth fills caches
and pools. The exit code is 0 if this holds and every row is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from clincot.datasets.jsonl_vqa import ingest_jsonl

ALLOWED_GROWTH_MB = 8.0  # from the second tenth of the rows to the end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="?", default=100_000, help="Number of rows (default: 100000).")
    parser.add_argument("images", type=int, nargs="?", default=1_000, help="Number of images (default: 1000).")
    args = parser.parse_args()
    rows, images = args.rows, args.images
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "rows.jsonl", Path(scratch) / "out"
        write_source(source, rows, images)
        print(f"{rows} rows, {source.stat().st_size / 1e6:.0f} MB of JSONL, {images} images")
        started, cpu = time.perf_counter(), time.process_time()
        seen = watch_memory(lambda: ingest_jsonl(source, out, workers=1), out / "questions.jsonl", rows)
        took, cpu = time.perf_counter() - started, time.process_time() - cpu
        kept = sum(1 for _ in (out / "questions.jsonl").open("rb"))
    for done, megabytes in seen:
        print(f"{done:>9,} rows  {megabytes:7.1f} MB resident")
    growth = seen[-1][1] - seen[1][1]
    print(f"{kept} rows kept in {took:.0f} s, {cpu:.0f} s of processor time")
    print(f"growth over the last 80 %: {growth:+.1f} MB (allowed: {ALLOWED_GROWTH_MB})")
    return int(growth > ALLOWED_GROWTH_MB or kept != rows)


def write_source(path: Path, rows: int, images: int) -> None:
    """Write a JSONL file of `rows` questions, and the images next to it."""
    rng = np.random.default_rng(0)
    for number in range(images):
        Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8)).save(path.parent / f"{number}.png")
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {
                "image": f"{number % images}.png",
                "question": f"Is finding number {number} to be seen in the left lung?",
                "answer": "yes" if number % 3 else "no",
                "boxes": [[0.1, 0.1, 0.5, 0.5]],
                "patient": f"p{number % images}",
                "id": f"row-{number}",
            }
            file.write(json.dumps(row) + "\n")


def watch_memory(work: Callable[[], object], written: Path, rows: int) -> list[tuple[int, float]]:
    """Run `work` and return (rows written, MB resident) at every tenth of the rows.

    The rows are estimated from the size of the file that `work` writes and the length of its first line.
    """
    seen: list[tuple[int, float]] = []
    done = threading.Event()

    def watch() -> None:
        line = 0.0
        while not done.wait(0.02):
            (partial,) = [*written.parent.glob(f"{written.name}.*.partial")][:1] or [written]
            size = partial.stat().st_size if partial.is_file() else 0
            if size and not line:
                line = len(partial.open("rb").readline())
            count = int(size / line) if line else 0
            if count >= rows * (len(seen) + 1) / 10 and len(seen) < 10:
                seen.append((count, read_resident_mb()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    seen.append((rows, read_resident_mb()))
    return seen


def read_resident_mb() -> float:
    """Return the resident memory of this process in MB (Linux only)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
