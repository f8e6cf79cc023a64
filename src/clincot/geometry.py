"""Boxes and masks on images; boxes are normalised xyxy in [0, 1] of the unpadded image.

All code uses this one unit. Only this module converts boxes to pixels, and to and from the text that a policy writes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import Field, model_validator

from clincot.fields import FrozenModel, PositiveInt, UnitFloat

# The forms in which model families write a region; prompts.REGION_FORMS maps families to forms and names the sources.
#
#   percent       [12, 30, 37, 55]                                    percent of width and height
#   pixels        [86, 108, 266, 198]                                 pixels of the image as the processor resized it
#   thousand      [120, 300, 370, 550]                                0 to 1000 across width and height
#   qwen2_box     <|box_start|>(120,300),(370,550)<|box_end|>         0 to 1000
#   internvl_box  <box>[[120, 300, 370, 550]]</box>                   0 to 1000
#   loc           <loc0307><loc0123><loc0563><loc0379>                0 to 1023, y before x
RegionForm = Literal["percent", "pixels", "thousand", "qwen2_box", "internvl_box", "loc"]

# A region in a policy's own words: percent of width and height, for instance "[12, 30, 37, 55]".
_BOX_PATTERN = re.compile(r"\[\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\]")

# Other forms. Markers and JSON around the numbers are optional, because decoders drop special tokens.
_LIST_PATTERN = re.compile(r"\[\s*(\d{1,5})\s*,\s*(\d{1,5})\s*,\s*(\d{1,5})\s*,\s*(\d{1,5})\s*\]")
_CORNERS_PATTERN = re.compile(r"\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)\s*,\s*\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)")
_LOC_PATTERN = re.compile(r"<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>\s*<loc(\d{4})>")

# A whole region with its markers, as region_to_text writes it (a regular expression). Markers are special tokens, which
# conversations otherwise spell out as text; inside such a region they stay tokens, as in the family's own training.
REGION_MARKUP = (
    r"<\|box_start\|>\(\d{1,4},\d{1,4}\),\(\d{1,4},\d{1,4}\)<\|box_end\|>|<box>\[\[\d{1,4}(?:, \d{1,4}){3}\]\]</box>"
)


class Box(FrozenModel):
    """A rectangle: 0 <= x0 < x1 <= 1 from the left edge, 0 <= y0 < y1 <= 1 from the top edge."""

    x0: UnitFloat
    y0: UnitFloat
    x1: UnitFloat
    y1: UnitFloat

    @model_validator(mode="after")
    def _check_area(self) -> Box:
        if self.x1 <= self.x0 or self.y1 <= self.y0:
            raise ValueError(f"a box needs x0 < x1 and y0 < y1, got {self.xyxy}")
        return self

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        return (self.x0, self.y0, self.x1, self.y1)

    @property
    def area(self) -> float:
        """The box's share of the image area, in (0, 1]."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)

    @property
    def center(self) -> tuple[float, float]:
        return ((self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2)


WHOLE_IMAGE = Box(x0=0.0, y0=0.0, x1=1.0, y1=1.0)

# How the surroundings of a mask are shown in the crop of its region: as they are, darkened, or black.
Surroundings = Literal["shown", "dimmed", "blank"]


class RegionMask(FrozenModel):
    """The pixels of a region, run-length encoded as in COCO's annotations.

    The runs go column by column and alternate, background first. The mask covers the whole image; it may have another
    number of pixels. `counts` is COCO's compressed text, as pycocotools writes it (`encode_runs`).
    """

    size: tuple[PositiveInt, PositiveInt]  # height, width
    counts: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _check_runs(self) -> RegionMask:
        height, width = self.size
        runs = self.runs
        if min(runs) < 0 or sum(runs) != height * width:
            raise ValueError(f"the runs of a mask of {height} x {width} pixels add up to {sum(runs)}")
        if not any(runs[1::2]):
            raise ValueError("a mask needs at least one pixel of its region, got an empty one")
        return self

    @property
    def runs(self) -> list[int]:
        """Lengths of the runs, background first."""
        return decode_runs(self.counts)


class Cutout(FrozenModel):
    """A mask and what a crop shows outside it."""

    mask: RegionMask
    outside: Literal["dimmed", "blank"]


def cut_out_region(mask: RegionMask | None, outside: Surroundings) -> Cutout | None:
    """How the crop of a region is cut out; None for a region without a mask or with its surroundings shown."""
    return None if mask is None or outside == "shown" else Cutout(mask=mask, outside=outside)


def has_proportions(size: tuple[int, int], width: int, height: int) -> bool:
    """Whether rows and columns of a mask (`size`) have the proportions of an image, to the pixel."""
    rows, columns = size
    return abs(columns - rows * width / height) <= 1 or abs(rows - columns * height / width) <= 1


def encode_runs(runs: Iterable[int]) -> str:
    """Compress run lengths to text, as COCO does.

    From the fourth run on, the difference to the run two places before is written, in groups of 5 bits with the lowest
    first; a sixth bit says whether another group follows, and 48 is added to make it a printable character.
    """
    lengths = list(runs)
    characters = []
    for position, length in enumerate(lengths):
        rest = length - lengths[position - 2] if position > 2 else length
        more = True
        while more:
            group = rest & 31
            rest >>= 5
            more = rest != (-1 if group & 16 else 0)  # the highest bit of the last group is the sign
            characters.append(chr(48 + (group | 32 * more)))
    return "".join(characters)


def decode_runs(text: str) -> list[int]:
    """Invert encode_runs. Raises ValueError for text that is none."""
    runs: list[int] = []
    value = shift = 0
    more = False
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64:
            raise ValueError(f"not a run-length code of COCO: the character {character!r}")
        value |= (group & 31) << shift
        shift += 5
        more = bool(group & 32)
        if not more:
            if group & 16:
                value -= 1 << shift
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    if more or not runs:
        raise ValueError("not a run-length code of COCO: it ends within a number")
    return runs


def box_from_xyxy(xyxy: tuple[float, float, float, float]) -> Box:
    """Build a Box from four numbers, rounded to 4 decimals so that its id does not depend on the platform."""
    x0, y0, x1, y1 = (round(float(v), 4) for v in xyxy)
    return Box(x0=x0, y0=y0, x1=x1, y1=y1)


def box_from_pixels(x0: float, y0: float, x1: float, y1: float, *, width: int, height: int) -> Box:
    """Convert pixel edges (x1, y1 exclusive) to a normalised box."""
    return box_from_xyxy((x0 / width, y0 / height, x1 / width, y1 / height))


def clip_pixel_box(x0: float, y0: float, x1: float, y1: float, *, width: int, height: int) -> Box | None:
    """Convert pixel edges to a normalised box, cut at the image's edges; None if nothing of it is inside."""
    x0, x1 = (min(max(x, 0.0), float(width)) for x in (x0, x1))
    y0, y1 = (min(max(y, 0.0), float(height)) for y in (y0, y1))
    if round(x1 / width, 4) <= round(x0 / width, 4) or round(y1 / height, 4) <= round(y0 / height, 4):
        return None
    return box_from_pixels(x0, y0, x1, y1, width=width, height=height)


def box_to_pixels(box: Box, *, width: int, height: int) -> tuple[int, int, int, int]:
    """Convert a box to the nearest whole-pixel edges (x1, y1 exclusive) inside the image, at least one pixel apart.

    Inverts box_from_pixels for images of up to 5000 px a side. Beyond that, 4 decimals are coarser than a pixel.
    """
    x0 = min(round(box.x0 * width), width - 1)
    y0 = min(round(box.y0 * height), height - 1)
    x1 = max(x0 + 1, min(width, round(box.x1 * width)))
    y1 = max(y0 + 1, min(height, round(box.y1 * height)))
    return x0, y0, x1, y1


def compute_iou(a: Box, b: Box) -> float:
    """Compute intersection over union, in [0, 1]."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (a.area + b.area - shared)


def compute_coverage(target: Box, by: Box) -> float:
    """Compute the share of the target's area that `by` covers, in [0, 1]."""
    width = min(target.x1, by.x1) - max(target.x0, by.x0)
    height = min(target.y1, by.y1) - max(target.y0, by.y0)
    return max(width, 0.0) * max(height, 0.0) / target.area


@lru_cache(maxsize=4096)  # the windows of an image are those of every other of its shape
def crop_square(box: Box, *, min_side: float, aspect: float = 1.0) -> Box:
    """Compute the square crop that shows a region: half side = max(half width, half height, M), inside the image.

    The rule is UV-CoT's (kesenzhao/UV-CoT), where M is 168 px (generation) or 112 px (evaluation) of a 336 px input.
    Here `min_side` sets the smallest side as a fraction of the image's shorter side. `aspect` is the image's width /
    height in pixels, since the crop is square in pixels. A crop that crosses a border is shifted inward; one that is
    larger than the image is cut to it. Raises ValueError unless 0 < min_side <= 1.
    """
    if not 0 < min_side <= 1:
        raise ValueError(f"min_side is a fraction of the image in (0, 1], got {min_side}")
    shorter = min(aspect, 1.0)  # lengths are in units of the image's height
    side = max((box.x1 - box.x0) * aspect, box.y1 - box.y0, min_side * shorter)
    return _place_around(box.center, min(side / aspect, 1.0), min(side, 1.0))


def _place_around(center: tuple[float, float], width: float, height: float) -> Box:
    """The box of this size around a point, shifted to be inside the image."""
    x, y = center
    x0, y0 = min(max(x - width / 2, 0.0), 1.0 - width), min(max(y - height / 2, 0.0), 1.0 - height)
    return box_from_xyxy((x0, y0, x0 + width, y0 + height))


def measure_square(side: float, *, aspect: float) -> tuple[float, float]:
    """Width and height, as shares of the image's, of a square (in pixels) whose side is a share of its shorter side."""
    return side * min(aspect, 1.0) / aspect, side * min(aspect, 1.0)


def choose_view_side(box: Box) -> float:
    """Choose the side of the square view of a box: a quarter of the image, or a half for a larger box."""
    return 0.25 if max(box.x1 - box.x0, box.y1 - box.y0) < 0.35 else 0.5


def fit_view_side(box: Box, *, aspect: float = 1.0) -> float:
    """Compute the side of the view that shows a box, as a share of the image's shorter side.

    That of choose_view_side, and for a box that does not fit into half of the image, such as an organ, the box's own
    longer side, at most 1. `aspect`: the image's width / height in pixels.
    """
    longest = max((box.x1 - box.x0) * aspect, box.y1 - box.y0) / min(aspect, 1.0)
    if longest > 0.5:
        return min(longest, 1.0)
    return 0.25 if longest < 0.35 else 0.5


def fit_view_square(box: Box, *, aspect: float = 1.0) -> Box:
    """Compute the square view of a box around its centre, shifted to be inside the image: the ideal crop of a finding.

    It is square in pixels; a box that is longer than the image's shorter side is shown to its ends (crop_square).
    `aspect`: see fit_view_side.
    """
    side = fit_view_side(box, aspect=aspect)
    if side > 0.5:
        return crop_square(box, min_side=side, aspect=aspect)
    return _place_around(box.center, *measure_square(side, aspect=aspect))


def box_to_text(box: Box) -> str:
    """Format a box as a policy reads and writes it: integer percent, for instance "[12, 30, 37, 55]"."""
    x0, y0 = (min(round(v * 100), 99) for v in (box.x0, box.y0))
    x1, y1 = max(round(box.x1 * 100), x0 + 1), max(round(box.y1 * 100), y0 + 1)  # at least 1 % wide and high
    return f"[{x0}, {y0}, {x1}, {y1}]"


def box_from_text(text: str) -> Box | None:
    """Parse the first box in a policy's text; None unless it is well formed. Other units are not guessed."""
    match = _BOX_PATTERN.search(text)
    if match is None:
        return None
    x0, y0, x1, y1 = (int(v) for v in match.groups())
    if not (0 <= x0 < x1 <= 100 and 0 <= y0 < y1 <= 100):
        return None
    return box_from_xyxy((x0 / 100, y0 / 100, x1 / 100, y1 / 100))


class SmartResize(FrozenModel):
    """How Qwen's image processor resizes an image: both sides to multiples of `factor`, the area between two limits."""

    factor: PositiveInt
    min_pixels: PositiveInt
    max_pixels: PositiveInt

    def compute_size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) after resizing, in pixels.

        smart_resize of transformers 5.19.0, models/qwen2_vl/image_processing_qwen2_vl.py. That function also refuses
        proportions above 200, and the processor does so when it is shown the image.
        """
        factor = self.factor
        new_width, new_height = round(width / factor) * factor, round(height / factor) * factor
        if new_width * new_height > self.max_pixels:
            shrink = math.sqrt(width * height / self.max_pixels)
            new_width = max(factor, math.floor(width / shrink / factor) * factor)
            new_height = max(factor, math.floor(height / shrink / factor) * factor)
        elif new_width * new_height < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (width * height))
            new_width, new_height = (
                math.ceil(width * grow / factor) * factor,
                math.ceil(height * grow / factor) * factor,
            )
        return new_width, new_height


def region_to_text(box: Box, form: RegionForm, size: tuple[int, int]) -> str:
    """Format a box as the policy writes it, at least one unit wide and high.

    size: (width, height) in pixels of the image as the model receives it; only the form "pixels" reads it.
    """
    if form == "percent":
        return box_to_text(box)
    scales, largest = _find_units(form, size)
    x0, x1 = _round_edges(box.x0, box.x1, scale=scales[0], largest=largest[0])
    y0, y1 = _round_edges(box.y0, box.y1, scale=scales[1], largest=largest[1])
    if form == "qwen2_box":
        return f"<|box_start|>({x0},{y0}),({x1},{y1})<|box_end|>"
    if form == "internvl_box":
        return f"<box>[[{x0}, {y0}, {x1}, {y1}]]</box>"
    if form == "loc":
        return f"<loc{y0:04d}><loc{x0:04d}><loc{y1:04d}><loc{x1:04d}>"
    return f"[{x0}, {y0}, {x1}, {y1}]"


def parse_region(text: str, form: RegionForm, size: tuple[int, int]) -> Box | None:
    """Parse the first region in a policy's text; None unless it is well formed. Other forms are not guessed.

    size: see region_to_text.
    """
    if form == "percent":
        return box_from_text(text)
    pattern = {"qwen2_box": _CORNERS_PATTERN, "loc": _LOC_PATTERN}.get(form, _LIST_PATTERN)
    match = pattern.search(text)
    if match is None:
        return None
    numbers = [int(number) for number in match.groups()]
    if form == "loc":
        numbers = [numbers[1], numbers[0], numbers[3], numbers[2]]
    (width, height), _ = _find_units(form, size)
    limits = (width, height, width, height)
    if any(number > limit for number, limit in zip(numbers, limits, strict=True)):
        return None
    x0, y0, x1, y1 = (round(number / limit, 4) for number, limit in zip(numbers, limits, strict=True))
    if not (x0 < x1 and y0 < y1):  # after rounding: on images of over 10,000 px, a pixel may vanish
        return None
    return Box(x0=x0, y0=y0, x1=x1, y1=y1)


def _find_units(form: RegionForm, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(numbers at the right and the bottom edge, largest numbers that are written) of a form."""
    if form == "pixels":
        # the last pixel, as in Qwen's own data; a policy may also write the edge itself
        return size, (size[0] - 1, size[1] - 1)
    units = 1023 if form == "loc" else 1000
    return (units, units), (units, units)


def _round_edges(low: float, high: float, *, scale: int, largest: int) -> tuple[int, int]:
    first = min(round(low * scale), largest - 1)
    return first, max(min(round(high * scale), largest), first + 1)
