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
_QUARTERS, _QUARTER_BITS = 4, 16
_BLOCK_SIZE = 1 << 18  # candidates compared at a time, of about 50 bytes each


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
    occurs once. The search is exhaustive, and works in blocks, so memory does not grow with the number of pairs.

    Of four quarters of 16 bits, two such hashes differ in at most within // 4 bits in at least one. Only hashes that
    share a quarter up to so many bits are compared (multi-index hashing; Norouzi et al., CVPR 2012). Raises ValueError
    if `within` is not in [0, 64].
    """
    if not 0 <= within <= 64:
        raise ValueError(f"within: expected a number of bits in [0, 64], got {within}")
    rows = np.array(first, dtype=np.uint64)
    columns = rows if second is None else np.array(second, dtype=np.uint64)
    values = np.arange(1 << _QUARTER_BITS, dtype=np.uint64)
    flips = values[np.bitwise_count(values) <= within // _QUARTERS]
    groups = [_QuarterGroups(columns, quarter, flips) for quarter in range(_QUARTERS)]
    step = max(1, _BLOCK_SIZE // (_QUARTERS * len(flips)))
    for start in range(0, len(rows), step):
        counts = sum(group.count_candidates(rows[start : start + step]) for group in groups)
        for part in _split_evenly(np.asarray(counts)):
            block = slice(start + part.start, start + part.stop)
            for row, column, distance in _compare_candidates(rows[block], columns, groups, within):
                if second is not None or block.start + row < column:
                    yield NearPair(block.start + row, column, distance)


class _QuarterGroups:
    """Hashes grouped by the value of one quarter of their bits.

    flips: the differences that two hashes' quarters may have.
    """

    def __init__(self, hashes: np.ndarray, quarter: int, flips: np.ndarray) -> None:
        self._shift = np.uint64(quarter * _QUARTER_BITS)
        self._flips = flips
        values = self._get_quarter(hashes).astype(np.int64)
        self._order = np.argsort(values, kind="stable")
        sizes = np.bincount(values, minlength=1 << _QUARTER_BITS)
        self._starts = np.concatenate([[0], np.cumsum(sizes)])

    def _get_quarter(self, hashes: np.ndarray) -> np.ndarray:
        return hashes >> self._shift & np.uint64((1 << _QUARTER_BITS) - 1)

    def _find_groups(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and size of the groups within reach of every hash, each (hashes, flips)."""
        values = (self._get_quarter(hashes)[:, None] ^ self._flips).astype(np.int64)
        return self._starts[values], self._starts[values + 1] - self._starts[values]

    def count_candidates(self, hashes: np.ndarray) -> np.ndarray:
        """Number of grouped hashes within reach of every hash, (hashes,)."""
        sizes = self._find_groups(hashes)[1]
        return np.asarray(sizes.sum(axis=1))

    def list_candidates(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of a hash and a grouped hash within its reach: two arrays of indices."""
        starts, sizes = self._find_groups(hashes)
        ends = np.cumsum(sizes)
        within_group = np.arange(sizes.sum()) - np.repeat(ends - sizes.ravel(), sizes.ravel())
        columns = self._order[np.repeat(starts.ravel(), sizes.ravel()) + within_group]
        return np.repeat(np.arange(len(hashes)), sizes.sum(axis=1)), columns


def _split_evenly(counts: np.ndarray) -> Iterator[slice]:
    """Split rows into slices of at most about _BLOCK_SIZE candidates, or of one row."""
    total = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, done + _BLOCK_SIZE, side="right")))
        yield slice(start, stop)
        start = stop


def _compare_candidates(
    rows: np.ndarray, columns: np.ndarray, groups: Sequence[_QuarterGroups], within: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (row, column, distance) of every candidate within the distance, in order, once."""
    found: dict[tuple[int, int], int] = {}
    for group in groups:
        row, column = group.list_candidates(rows)
        distance = np.bitwise_count(rows[row] ^ columns[column])
        near = distance <= within
        found.update(
            zip(zip(row[near].tolist(), column[near].tolist(), strict=True), distance[near].tolist(), strict=True)
        )
    for (first, second), apart in sorted(found.items()):
        yield first, second, apart
