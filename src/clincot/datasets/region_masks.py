"""Masks of regions in a row of a source: COCO's run-length codes or polygons, and the boxes around them.

    {"size": [512, 512], "counts": "…"}              run-length code, compressed or a list of lengths
    {"size": [512, 512], "polygons": [[x, y, …], …]}  polygons in pixels, as in COCO's `segmentation`

`size` is the height and the width, in pixels, of the image that the mask was drawn on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clincot.fields import PositiveInt
from clincot.geometry import Box, RegionMask, encode_runs, has_proportions
from clincot.images import DEFAULT_LIMITS, draw_polygons, encode_mask, measure_mask
from clincot.jsonl import format_validation_error
from clincot.records import Study

MASKS_REMEDY = (
    'Write a list of {"size": [height, width], "counts": RLE} or {"size": [height, width], "polygons": [[x, y, …]]}, '
    "one for each box"
)


class _SourceMask(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    size: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)]
    counts: str | list[int] | None = None
    polygons: list[list[float]] | None = None


def parse_mask(value: Any) -> RegionMask:
    """A mask as a source writes it. Raises ValueError that says what was expected."""
    try:
        source = _SourceMask.model_validate(value)
    except ValidationError as error:
        raise ValueError(f"expected a mask: {format_validation_error(error)}") from None
    height, width = source.size
    if height * width > DEFAULT_LIMITS.max_pixels:
        raise ValueError(f"expected a mask of at most {DEFAULT_LIMITS.max_pixels} pixels, got {height} x {width}")
    if (source.counts is None) == (source.polygons is None):
        raise ValueError("expected a mask with either counts or polygons, not both and not neither")
    if source.polygons is not None:
        pixels_HW = draw_polygons(source.polygons, width=width, height=height)
        if not pixels_HW.any():
            raise ValueError(f"the polygons have no pixel in an image of {height} x {width}")
        return encode_mask(pixels_HW)
    counts = source.counts if isinstance(source.counts, str) else encode_runs(source.counts or [])
    try:
        return RegionMask(size=(height, width), counts=counts)
    except ValidationError as error:
        raise ValueError(format_validation_error(error)) from None


def derive_boxes(masks: Sequence[RegionMask], boxes: Sequence[Box]) -> tuple[Box, ...]:
    """The boxes of masks: those of the row, or the masks' own where the row has none.

    Raises ValueError if their numbers differ.
    """
    if not masks:
        return tuple(boxes)
    if not boxes:
        return tuple(measure_mask(mask) for mask in masks)
    if len(boxes) != len(masks):
        raise ValueError(f"masks belong to boxes, one each, got {len(masks)} masks and {len(boxes)} boxes")
    return tuple(boxes)


def find_mask_fault(masks: Sequence[RegionMask | None], study: Study) -> str:
    """Why masks cannot cover the study's image; "" if they can."""
    for mask in masks:
        if mask is not None and not has_proportions(mask.size, study.width, study.height):
            height, width = mask.size
            return (
                f"masks: expected the image's proportions ({study.width} x {study.height}), got {width} x {height}; "
                "state the size of the image on which the mask was drawn"
            )
    return ""
