"""Memory of an ingest while rows go by: `python benchmarks/ingest_memory.py [rows] [images]` (100,000 rows, 1,000 images).

Rows differ in everything that is looked at: text, answer, id, patient. The resident memory is printed every tenth of
the way; flat means that the last tenth needs no more than the second (the first fills caches and pools).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from clincot.datasets.jsonl_vqa import ingest_jsonl

ALLOWED_GROWTH_MB = 8.0


def main() -> int:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    images = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000
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
    print(f"{kept} rows kept in {took:.0f} s, {cpu:.0f} s of them on the processor")
    print(f"growth over the last 80 %: {growth:+.1f} MB (allowed: {ALLOWED_GROWTH_MB})")
    return int(growth > ALLOWED_GROWTH_MB or kept != rows)


def write_source(path: Path, rows: int, images: int) -> None:
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


def watch_memory(work, written: Path, rows: int) -> list[tuple[int, float]]:  # type: ignore[no-untyped-def]
    """(rows written, MB resident) at every tenth, read from the file that grows while `work` runs."""
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
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    raise SystemExit(main())
