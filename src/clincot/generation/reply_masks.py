"""Masks in the replies of segmentation models: decoded, checked against the image, and split into regions."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clincot.generation.masks import split_mask
from clincot.geometry import RegionMask, encode_runs, has_proportions
from clincot.images import DEFAULT_LIMITS, decode_mask, encode_mask
from clincot.jsonl import format_validation_error
from clincot.models.protocols import GroundedRegion

_MASK_THRESHOLD = 128  # the lowest grey that is at least half of 255
# What Pillow's PNG reader raises on damaged files, and base64 on characters outside ASCII.
_PNG_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class UnusableRegion(Exception):
    """A region of a reply that cannot be used; the message says why."""


class RleReply(BaseModel):
    """A run-length encoded mask as COCO has it: `counts` compressed to text, or as a list of lengths."""

    model_config = ConfigDict(strict=True)

    size: Annotated[list[int], Field(min_length=2, max_length=2)]  # height, width
    counts: str | list[int]


def decode_png_mask(encoded: str, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Decode a mask to grey values (H, W); `width` and `height` are those of the image that it has to cover."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=("PNG",)) as image:
            _check_pixels(image.width, image.height)
            if image.mode not in ("1", "L"):
                raise UnusableRegion(f"expected a mask in 8-bit grey or 1 bit, got a PNG of mode {image.mode!r}")
            grey_HW = np.asarray(image.convert("L"))
    except binascii.Error as error:
        raise UnusableRegion(f"expected a mask in base64, got something else ({error})") from None
    except UnidentifiedImageError:
        raise UnusableRegion("expected a mask that is a PNG, got another format") from None
    except _PNG_ERRORS as error:
        raise UnusableRegion(f"expected a mask that is a whole PNG, but it is damaged ({error})") from None
    check_proportions(grey_HW.shape, width, height)
    if grey_HW.max() == 1:
        raise UnusableRegion("a mask whose highest grey is 1; expected 255 for what belongs to it (multiply by 255)")
    return grey_HW


def decode_rle_mask(reply: RleReply, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Decode a run-length encoded mask to 0 and 255 (H, W); `width` and `height` as in decode_png_mask."""
    rows, columns = reply.size
    if rows > 0 and columns > 0:
        _check_pixels(columns, rows)
        check_proportions((rows, columns), width, height)
        if _is_empty(reply):
            return np.zeros((rows, columns), dtype=np.uint8)
    counts = reply.counts if isinstance(reply.counts, str) else encode_runs(reply.counts)
    try:
        mask = RegionMask(size=(rows, columns), counts=counts)
    except ValidationError as error:
        raise UnusableRegion(f"expected a run-length encoded mask of COCO: {format_validation_error(error)}") from None
    return decode_mask(mask).astype(np.uint8) * 255


def _is_empty(reply: RleReply) -> bool:
    """Whether the mask has one run of background only: the model has found nothing."""
    area = reply.size[0] * reply.size[1]
    return reply.counts in ([area], encode_runs([area]))


def iter_mask_regions(
    hypothesis: str, grey_HW: npt.NDArray[np.uint8], confidence: float | None, *, min_area: float
) -> Iterator[GroundedRegion]:
    """Yield a region, with its own mask, for each connected component of at least half of 255.

    Its confidence is `confidence`, or its mean grey if that is None.
    """
    for box, mean, component_HW in split_mask(grey_HW >= _MASK_THRESHOLD, grey_HW / 255, min_area=min_area):
        yield GroundedRegion(hypothesis, box, mean if confidence is None else confidence, encode_mask(component_HW))


def check_confidence(confidence: float | None) -> float | None:
    """The confidence to six decimals; raises UnusableRegion for one outside [0, 1]."""
    if confidence is None:
        return None
    if not 0 <= confidence <= 1:  # false for NaN too
        raise UnusableRegion(f"expected a confidence in [0, 1], got {confidence}")
    return round(confidence, 6)


def check_proportions(shape: tuple[int, ...], width: int, height: int) -> None:
    """Raise UnusableRegion unless a mask of `shape` (rows, columns) has the image's proportions, to the pixel."""
    rows, columns = shape
    if not has_proportions((rows, columns), width, height):
        raise UnusableRegion(
            f"expected a mask of the image's proportions ({width} x {height}), got {columns} x {rows}; a padded or "
            "stretched mask cannot be placed"
        )


def _check_pixels(width: int, height: int) -> None:
    if width * height > DEFAULT_LIMITS.max_pixels:
        raise UnusableRegion(f"expected a mask of at most {DEFAULT_LIMITS.max_pixels} pixels, got {(width, height)}")
