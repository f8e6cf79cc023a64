"""Images that are the same picture with other bytes: re-compressed, resized, brightened, windowed a little otherwise.

The perceptual hash is the DCT hash (pHash; Zauner 2010, "Implementation and benchmarking of perceptual image hash
functions"): the signs of the 64 lowest frequencies of a 32 x 32 thumbnail about their median. Its parameters were
chosen on the 314 images of VQA-RAD. Re-compressed at JPEG quality 50, halved, squeezed to a square, brightened by
a fifth or with a fifth less contrast, an image moves by 0-2 bits in the median and by at most 6; of the 49,455
pairs of different images none is closer than 8. The difference hash (dHash), which is as cheap, has 158 pairs of
*different* films within 6 bits: films look alike at 9 x 8 pixels. Neither sees through a crop of more than a few
per cent, a rotation or a mirror. A pair that is found is a pair to look at, not a proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.fft import dctn

from clincot.images import open_image

MAX_DISTANCE_BITS = 6  # bits of 64
_THUMBNAIL, _FREQUENCIES = 32, 8
_BLOCK_SIZE = 1 << 22  # hashes compared at a time: 32 MB of differences


class NearPair(NamedTuple):
    """Places in the two sequences that were searched, and how many of the 64 bits differ."""

    first: int
    second: int
    distance: int


def hash_image(image: Image.Image) -> int:
    """The perceptual hash of an image, in [0, 2^64); an image of one colour has hash 0."""
    thumbnail_HW = np.asarray(
        image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX), dtype=np.float64
    )
    # Rounded: what is 0 by symmetry must not get a sign from the last bit of the sum.
    low = np.round(dctn(thumbnail_HW, norm="ortho")[:_FREQUENCIES, :_FREQUENCIES], 6).ravel()
    low[0] = 0.0  # the mean brightness says nothing about the picture
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes())


def hash_image_file(path: Path) -> int:
    """The perceptual hash of a PNG or JPEG file, as models see it (upright, 8 bits); raises BadImage."""
    return hash_image(open_image(path))


def find_near_pairs(
    first: Sequence[int], second: Sequence[int] | None = None, *, within: int = MAX_DISTANCE_BITS
) -> Iterator[NearPair]:
    """Pairs of hashes at most `within` bits apart, in the order of `first`, then of `second`.

    One of `first` and one of `second`; or without `second`, two of `first`, each pair once. Every pair is
    compared (50,000 with 50,000 in about 13 s), so none is missed; memory does not grow with the pairs.
    """
    if not 0 <= within <= 64:
        raise ValueError(f"within is a number of bits in [0, 64], got {within}")
    rows = np.array(first, dtype=np.uint64)
    columns = rows if second is None else np.array(second, dtype=np.uint64)
    step = max(1, _BLOCK_SIZE // max(1, len(columns)))
    for start in range(0, len(rows), step):
        skipped = start if second is None else 0  # columns before that were compared as rows
        apart = np.bitwise_count(rows[start : start + step, None] ^ columns[None, skipped:])
        for row, column in np.argwhere(apart <= within):
            a, b = int(row) + start, int(column) + skipped
            if second is not None or a < b:
                yield NearPair(a, b, int(apart[row, column]))
