"""Speed of the renderer on this machine, on one core.

    python -m benchmarks.render_rate [images]            (make bench)

Prints the time to prepare a patient, the size of a cached warp, and the images per second with and without writing a
data set. It checks nothing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from clincot.synthetic.anatomy import fetch_anatomy, prepare_warp
from clincot.synthetic.build import build_synthetic_dataset
from clincot.synthetic.rendering import prepare_patients, render_radiograph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=int, nargs="?", default=500, help="Number of images (default: 500).")
    images = parser.parse_args().images
    anatomy = fetch_anatomy()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = time.perf_counter()
        for seed in range(4):
            prepare_warp(anatomy, seed, folder)
        print(f"warp preparation: {(time.perf_counter() - started) / 4:.2f} s per patient")
        size = sum(path.stat().st_size for path in folder.glob("warp-*.npz")) / 4
        print(f"size of a cached warp: {size / 1e6:.2f} MB")
        patients = prepare_patients(range(4), folder)
        for patient in patients:
            render_radiograph(patient, 0, ["pneumothorax", "nodule"])  # computes and caches the patient's maps
        started = time.perf_counter()
        for index in range(images):
            render_radiograph(patients[index % 4], (1, index))
        print(f"rendering: {images / (time.perf_counter() - started):.0f} images/s")
        started = time.perf_counter()
        counts = build_synthetic_dataset(
            folder / "set",
            warp_seeds=range(4),
            images=images,
            questions_per_image=2,
            seed=1,
            split="bench",
            cache_dir=folder,
        )
        rate = counts["studies"] / (time.perf_counter() - started)
        print(f"data set with PNG files and records: {rate:.0f} images/s, {counts['questions']} questions")


if __name__ == "__main__":
    main()
