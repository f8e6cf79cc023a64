"""Write a small data set in ClinCoT's JSON Lines format, and ingest it with a patient-disjoint split.

    python examples/02_own_data.py --out data/example

The images are grey noise with one bright square each; replace `write_images` by your own images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, SQUARE = 128, 24  # pixels


def write_images(folder: Path, patients: int) -> list[dict[str, object]]:
    """Write two images for each patient; return one row for each image, in the format that `ingest jsonl` reads."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for number in range(2 * patients):
        pixels = rng.integers(10, 80, (SIDE, SIDE)).astype(np.uint8)
        x, y = (int(value) for value in rng.integers(0, SIDE - SQUARE, 2))
        pixels[y : y + SQUARE, x : x + SQUARE] = 240
        name = f"images/{number}.png"
        Image.fromarray(pixels).save(folder / name)
        box = [x / SIDE, y / SIDE, (x + SQUARE) / SIDE, (y + SQUARE) / SIDE]  # normalised: x0, y0, x1, y1
        rows.append(
            {
                "image": name,  # relative to the file
                "question": "In which half is the bright square?",
                "answer": "upper" if y + SQUARE / 2 < SIDE / 2 else "lower",
                "boxes": [box],  # where the answer can be seen; leave it out if you do not know
                "patient": f"p{number // 2}",  # a key that groups images, never a name
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/example"), help="folder of the data set")
    parser.add_argument("--patients", type=int, default=20)
    args = parser.parse_args()
    source = args.out.with_name(f"{args.out.name}-source")
    rows = write_images(source, args.patients)
    file = source / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    command = ["ingest", "jsonl", str(file), "--out", str(args.out), "--split", "patient-disjoint"]
    subprocess.run([sys.executable, "-m", "clincot", *command], check=True)
    # How far do answers get without the image? A policy has to beat this.
    subprocess.run([sys.executable, "-m", "clincot", "blind", "--data", str(args.out)], check=True)


if __name__ == "__main__":
    main()
