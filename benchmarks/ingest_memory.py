"""Memory of an ingest as a function of the rows read, for each format.

    python -m benchmarks.ingest_memory [FORMAT …] [--rows N] [--images N]            (make bench-ingest)

Rows differ in everything that the ingest checks: text, answer, id and patient. Resident memory is printed at every
tenth of the rows. It must not grow by more than 8 MB from the second tenth to the last; the first tenth fills caches
and pools. Each format runs in a process of its own. The exit code is 0 if this holds and every row is kept.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from clincot.datasets.dicom import ingest_dicom
from clincot.datasets.finding_boxes import ingest_boxes
from clincot.datasets.hub_vqa import ingest_hf
from clincot.datasets.jsonl_vqa import ingest_jsonl

ALLOWED_GROWTH_MB = 8.0  # from the second tenth of the rows to the end
_ROW_GROUP = 1_000
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", metavar="FORMAT", help=f"Of {', '.join(FORMATS)} (default: all).")
    parser.add_argument("--rows", type=int, default=100_000, help="Number of rows (default: 100000).")
    parser.add_argument("--images", type=int, default=1_000, help="Number of images (default: 1000).")
    args = parser.parse_args()
    formats = args.formats or list(FORMATS)
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"unknown formats: {', '.join(sorted(unknown))}")
    if len(formats) == 1:
        return measure_format(formats[0], args.rows, args.images)
    codes = []
    for name in formats:
        counts = ("--rows", str(args.rows), "--images", str(args.images))
        codes.append(subprocess.run([sys.executable, "-m", "benchmarks.ingest_memory", name, *counts]).returncode)
    return max(codes)


def measure_format(name: str, rows: int, images: int) -> int:
    """Ingest a source of one format and print the memory; return 1 if it grew, or a row was not kept."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        source.mkdir()
        ingest = FORMATS[name](source, rows, images)
        size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
        print(f"{name}: {rows} rows, {images} images, {size / 1e6:.0f} MB", flush=True)
        started, cpu = time.perf_counter(), time.process_time()
        seen = watch_memory(lambda: ingest(out), out / "questions.jsonl", rows)
        took, cpu = time.perf_counter() - started, time.process_time() - cpu
        kept = sum(1 for _ in (out / "questions.jsonl").open("rb"))
    for done, megabytes in seen:
        print(f"{done:>9,} rows  {megabytes:7.1f} MB resident")
    growth = seen[-1][1] - seen[1][1]
    print(f"{kept} rows kept in {took:.0f} s, {cpu:.0f} s of processor time")
    print(f"growth over the last 80 %: {growth:+.1f} MB (allowed: {ALLOWED_GROWTH_MB})", flush=True)
    return int(growth > ALLOWED_GROWTH_MB or kept != rows)


# ------------------------------------------------------------------------------------------------ sources


def iter_rows(rows: int, images: int) -> Iterator[Row]:
    """Rows in the format of `clincot ingest jsonl`."""
    for number in range(rows):
        yield {
            "image": f"{number % images}.png",
            "question": f"Is finding number {number} to be seen in the left lung?",
            "answer": "yes" if number % 3 else "no",
            "boxes": [[0.1, 0.1, 0.5, 0.5]],
            "patient": f"p{number % images}",
            "id": f"row-{number}",
        }


def iter_pixels(images: int, side: int = 32) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for _ in range(images):
        yield rng.integers(0, 256, (side, side), dtype=np.uint8)


def write_images(folder: Path, images: int) -> None:
    for number, pixels in enumerate(iter_pixels(images)):
        Image.fromarray(pixels).save(folder / f"{number}.png")


def write_jsonl(folder: Path, rows: int, images: int) -> Callable[[Path], object]:
    write_images(folder, images)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in iter_rows(rows, images):
            file.write(json.dumps(row) + "\n")
    return partial(ingest_jsonl, folder / "rows.jsonl", workers=1)


def write_json_array(folder: Path, rows: int, images: int) -> Callable[[Path], object]:
    write_images(folder, images)
    with (folder / "rows.json").open("w", encoding="utf-8") as file:
        for number, row in enumerate(iter_rows(rows, images)):
            file.write(("," if number else "[") + json.dumps(row))
        file.write("]")
    return partial(ingest_hf, folder / "rows.json", split="given", workers=1)


def write_llava(folder: Path, rows: int, images: int) -> Callable[[Path], object]:
    write_images(folder, images)
    with (folder / "llava.json").open("w", encoding="utf-8") as file:
        for number, row in enumerate(iter_rows(rows, images)):
            turns = [
                {"from": "human", "value": f"<image>\n{row['question']}"},
                {"from": "gpt", "value": row["answer"]},
            ]
            entry = {"id": row["id"], "image": row["image"], "conversations": turns}
            file.write(("," if number else "[") + json.dumps(entry))
        file.write("]")
    return partial(ingest_hf, folder / "llava.json", split="given", workers=1)


def write_csv(folder: Path, rows: int, images: int) -> Callable[[Path], object]:
    write_images(folder, images)
    names = ("image", "question", "answer", "patient", "id")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(iter_rows(rows, images))
    return partial(ingest_hf, folder / "rows.csv", split="given", workers=1)


def _iter_tables(rows: int, images: int) -> Iterator[Any]:
    """Arrow tables with the images inside, of a thousand rows each."""
    import pyarrow as pa

    encoded = []
    for pixels in iter_pixels(images):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    source = iter_rows(rows, images)
    while batch := list(islice(source, _ROW_GROUP)):
        for row in batch:
            number = int(row["image"].removesuffix(".png"))
            row["image"] = {"bytes": encoded[number], "path": row["image"]}
        yield pa.Table.from_pylist(batch)


def write_parquet(folder: Path, rows: int, images: int) -> Callable[[Path], object]:
    from pyarrow import parquet

    tables = _iter_tables(rows, images)
    first = next(tables)
    with parquet.ParquetWriter(folder / "train-00000-of-00001.parquet", first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)
    return partial(ingest_hf, folder, split="given", workers=1)


def write_arrow(folder: Path, rows: int, images: int) -> Callable[[Path], object]:
    import pyarrow as pa

    tables = _iter_tables(rows, images)
    first = next(tables)
    with (
        pa.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as file,
        pa.ipc.new_stream(file, first.schema) as to,
    ):
        to.write_table(first)
        for table in tables:
            to.write_table(table)
    return partial(ingest_hf, folder / "data-00000-of-00001.arrow", split="given", workers=1)


def write_boxes(folder: Path, rows: int, images: int) -> Callable[[Path], object]:
    """VinDr-CXR's table: every row is another finding of its image."""
    write_images(folder, images)
    with (folder / "train.csv").open("w", encoding="utf-8") as file:
        file.write("image_id,rad_id,class_name,x_min,y_min,x_max,y_max\n")
        for number in range(rows):
            file.write(f"{number % images},R1,Finding {number // images},4,4,16,16\n")
    return partial(ingest_boxes, folder / "train.csv", absent=0, workers=1)


def write_dicom(folder: Path, rows: int, images: int) -> Callable[[Path], object]:
    """Questions about files of a folder; every tenth file has three frames, of which the second is asked about."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    (folder / "scans").mkdir()
    for number, pixels in enumerate(iter_pixels(images)):
        header = pydicom.Dataset()
        header.file_meta = pydicom.dataset.FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        header.StudyInstanceUID, header.PatientID, header.Modality = generate_uid(), f"p{number}", "CR"
        header.Rows, header.Columns, header.SamplesPerPixel, header.BitsAllocated = 32, 32, 1, 8
        header.BitsStored, header.HighBit, header.PixelRepresentation = 8, 7, 0
        header.PhotometricInterpretation, header.NumberOfFrames = "MONOCHROME2", 1 + 2 * (number % 10 == 0)
        header.PixelData = np.stack([pixels, 255 - pixels, pixels.T][: header.NumberOfFrames]).tobytes()
        header.save_as(folder / "scans" / f"{number}.dcm", enforce_file_format=True)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number, row in enumerate(iter_rows(rows, images)):
            del row["patient"]
            frame = "#2" if number % images % 10 == 0 else ""
            file.write(json.dumps(row | {"image": f"{number % images}.dcm{frame}"}) + "\n")
    settings: Row = {"salt_file": folder / "salt", "frames": "all", "burned_in": "off", "workers": 1}
    return partial(ingest_dicom, folder / "scans", questions=folder / "rows.jsonl", **settings)


FORMATS: dict[str, Callable[[Path, int, int], Callable[[Path], object]]] = {
    "jsonl": write_jsonl,
    "json": write_json_array,
    "llava": write_llava,
    "csv": write_csv,
    "parquet": write_parquet,
    "arrow": write_arrow,
    "boxes": write_boxes,
    "dicom": write_dicom,
}


# ------------------------------------------------------------------------------------------------ memory


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
