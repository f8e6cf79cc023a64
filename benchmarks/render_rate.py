"""How fast radiographs are rendered on this machine: `python benchmarks/render_rate.py [images]`, one core."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from clincot.synthetic.anatomy import fetch_anatomy, prepare_warp
from clincot.synthetic.build import build_synthetic_dataset
from clincot.synthetic.rendering import prepare_patients, render_radiograph


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    anatomy = fetch_anatomy()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        started = time.perf_counter()
        for seed in range(4):
            prepare_warp(anatomy, seed, folder)
        print(f"warp preparation: {(time.perf_counter() - started) / 4:.2f} s a patient")
        size = sum(path.stat().st_size for path in folder.glob("warp-*.npz")) / 4
        print(f"a cached warp: {size / 1e6:.2f} MB")
        group = prepare_patients(range(4), folder)
        for patient in group:
            render_radiograph(patient, 0, ["pneumothorax", "nodule"])  # fill the patient's maps
        started = time.perf_counter()
        for index in range(images):
            render_radiograph(group[index % 4], (1, index))
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
        print(f"whole data set, PNG and records included: {rate:.0f} images/s, {counts['questions']} questions")


if __name__ == "__main__":
    main()
