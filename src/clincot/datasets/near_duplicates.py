"""Near-duplicate search: the same picture with other bytes (re-compressed, resized, brightened, windowed slightly).

The perceptual hash is the DCT hash (pHash; Zauner 2010, "Implementation and benchmarking of perceptual image hash
functions"). It takes the 64 lowest frequencies of a 32 x 32 thumbnail; a bit is 1 if its frequency is above their
median. The parameters were chosen on the 314 images of VQA-RAD. An image that is re-compressed at JPEG quality 50,
halved in size, squeezed to a square, brightened by 20 % or shown with 20 % less contrast moves by 0-2 bits in the
median and by at most 6 bits; none of the 49,455 pairs of different images is closer than 8 bits. The difference hash
(dHash) is as cheap, but puts 158 pairs of *different* films within 6 bits, because films look alike at 9 x 8 pixels.
Neither hash detects a crop of more than a few per cent, a rotation or a mirrored copy. A pair that is found deserves a
look; it is not a proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field
from scipy.fft import dctn

from clincot.fields import FrozenModel, Sha256
from clincot.images import open_image
from clincot.jsonl import read_models

IMAGE_HASHES = "image_hashes.jsonl"  # of a data set's folder; hashing 100,000 films again takes over an hour
MAX_DISTANCE_BITS = 6  # out of 64
_THUMBNAIL, _FREQUENCIES = 32, 8
_BLOCK_SIZE = 1 << 22  # hashes compared at a time: 32 MB of differences


class ImageHash(FrozenModel):
    """A line of IMAGE_HASHES: an image file's sha256 and its perceptual hash in hexadecimal digits."""

    sha256: Sha256
    hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


def format_hash_line(sha256: str, value: int) -> str:
    """A line of IMAGE_HASHES."""
    return ImageHash(sha256=sha256, hash=f"{value:016x}").model_dump_json() + "\n"


def read_image_hashes(folder: Path) -> dict[str, int]:
    """{sha256 of an image file: perceptual hash} of a data set; {} if an older version wrote it without them.

    Raises InvalidRecord naming the first bad line.
    """
    path = folder / IMAGE_HASHES
    if not path.is_file():
        return {}
    return {line.sha256: int(line.hash, 16) for line in read_models(path, ImageHash)}


class NearPair(NamedTuple):
    """Indices into the two sequences that were searched, and the number of bits (of 64) that differ."""

    first: int
    second: int
    distance: int


def hash_image(image: Image.Image) -> int:
    """Return the perceptual hash of an image, in [0, 2^64); an image of one colour has hash 0."""
    thumbnail_HW = np.asarray(
        image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX), dtype=np.float64
    )
    # Rounded, because a coefficient that is 0 by symmetry would otherwise get its sign from floating-point error.
    low = np.round(dctn(thumbnail_HW, norm="ortho")[:_FREQUENCIES, :_FREQUENCIES], 6).ravel()
    low[0] = 0.0  # ignore mean brightness, which changes between copies of a picture
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes())


def hash_image_file(path: Path) -> int:
    """Return the perceptual hash of a PNG or JPEG file as models see it (upright, 8 bits); raises InvalidImage."""
    return hash_image(open_image(path))


def find_near_pairs(
    first: Sequence[int], second: Sequence[int] | None = None, *, within: int = MAX_DISTANCE_BITS
) -> Iterator[NearPair]:
    """Find pairs of hashes that differ in at most `within` bits, ordered by index in `first`, then in `second`.

    Each pair has one hash from `first` and one from `second`. Without `second`, both are from `first`, and each pair
    occurs once. The search is exhaustive (50,000 against 50,000 hashes in about 13 s) and works in blocks, so memory
    does not grow with the number of pairs. Raises ValueError if `within` is not in [0, 64].
    """
    if not 0 <= within <= 64:
        raise ValueError(f"within: expected a number of bits in [0, 64], got {within}")
    rows = np.array(first, dtype=np.uint64)
    columns = rows if second is None else np.array(second, dtype=np.uint64)
    step = max(1, _BLOCK_SIZE // max(1, len(columns)))
    for start in range(0, len(rows), step):
        skipped = start if second is None else 0  # earlier columns have been compared as rows
        apart = np.bitwise_count(rows[start : start + step, None] ^ columns[None, skipped:])
        for row, column in np.argwhere(apart <= within):
            a, b = int(row) + start, int(column) + skipped
            if second is not None or a < b:
                yield NearPair(a, b, int(apart[row, column]))
