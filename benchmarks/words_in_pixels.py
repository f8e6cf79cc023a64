"""How often the search for text finds words in rendered radiographs: without text, and with a name drawn over them.

    python -m benchmarks.words_in_pixels [--pictures N]

Needs the extra `ocr`. Prints the pictures in which words are found, of those without text (each is a false alarm) and
of those with a name of 11 to 24 pixels' height at a random place. On two idle cores, 200 pictures take a few minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clincot.datasets.burned_in_text import count_words
from clincot.synthetic.build import build_synthetic_dataset

NAMES = ("QUINCE OPHELIA", "Marmalade, Otto 1942-03-01", "MRN 4711-0815", "DOE^JANE", "Müller Jürgen")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200, help="Number of radiographs (default: 200).")
    args = parser.parse_args()
    rng, false_alarms, found = np.random.default_rng(0), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "films"
        build_synthetic_dataset(
            folder, warp_seeds=range(8), images=args.pictures, questions_per_image=1, seed=0, split="films"
        )
        paths = sorted((folder / "images").iterdir())
        for path in paths:
            film = Image.open(path).convert("L")
            false_alarms += count_words(film) > 0
            found += count_words(draw_name(film, rng)) > 0
    print(f"pictures without text in which words are found: {false_alarms} of {len(paths)}")
    print(f"pictures with a name in which words are found: {found} of {len(paths)}")
    return 0


def draw_name(film: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The film with one of the names over it, bright or dark, wholly inside the picture."""
    picture, font = film.copy(), ImageFont.load_default(size=int(rng.integers(11, 25)))
    draw, name = ImageDraw.Draw(picture), NAMES[rng.integers(len(NAMES))]
    _, _, width, height = draw.textbbox((0, 0), name, font=font)
    at = [int(rng.integers(0, max(1, side - size))) for side, size in zip(film.size, (width, height), strict=True)]
    spot = np.asarray(film.crop((at[0], at[1], int(at[0] + width), int(at[1] + height))))
    draw.text((at[0], at[1]), name, fill=20 if spot.mean() > 128 else 235, font=font)
    return picture


if __name__ == "__main__":
    raise SystemExit(main())
