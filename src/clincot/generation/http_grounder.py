"""A grounder that calls a segmentation or grounding model over HTTP.

Each image is one POST of JSON:

    {"image": "<base64 PNG>", "hypotheses": ["nodule", "pleural effusion"]}

The reply lists any number of regions; each names its hypothesis and has either a box or a mask:

    {"regions": [{"hypothesis": "nodule", "box": [0.12, 0.30, 0.37, 0.55], "confidence": 0.8},
                 {"hypothesis": "pleural effusion", "mask": "<base64 PNG>"}]}

A box is x0, y0, x1, y1 in [0, 1], normalised to the image as sent. Numbers outside that range are an error; they are
never interpreted as pixels or percent. A mask is an 8-bit grey (255: certain) or 1-bit PNG of any size with the image's
proportions. Pixels of at least half of 255 are grouped into connected components; a component's confidence is its mean
grey unless the reply states one.
"""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clincot.clients.http import NO_RETRIES, JsonClient, encode_png_base64, read_api_key, validate_url
from clincot.generation.masks import MIN_AREA, extract_mask_regions, sort_by_confidence
from clincot.geometry import Box, box_from_xyxy
from clincot.images import DEFAULT_LIMITS, load_cached_view
from clincot.models.protocols import GroundedRegion, GroundingQuery, collect_findings, group_by_study
from clincot.records import Study

_EXPECTED_REPLY = "regions for the hypotheses"
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


class _RegionReply(BaseModel):
    model_config = ConfigDict(strict=True)

    hypothesis: str
    box: Annotated[list[float], Field(min_length=4, max_length=4)] | None = None
    mask: str | None = None
    confidence: float | None = None


class _GroundingReply(BaseModel):
    regions: list[_RegionReply]


class HttpGrounder:
    """See protocols.Grounder. Raises ModelFailed for any reply that does not follow the format above.

    url: address of the POST. side_px: longest side of the image as sent; None keeps its size. timeout_s: limit of a
    whole request. min_area: smallest component of a mask that counts, as a share of the image.
    """

    name = "http"

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str = "",
        api_key_file: Path | None = None,
        timeout_s: float = 60.0,
        side_px: int | None = None,
        min_area: float = MIN_AREA,
    ) -> None:
        self.url = validate_url(url, what="grounder 'http' (propose.http_url)")
        self._key = read_api_key(env=api_key_env, file=api_key_file, what="grounder 'http'")
        self._timeout_s = timeout_s
        self._side_px = side_px
        self._min_area = min_area

    def ground(self, queries: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        """Send one request per image for all of its questions; "normal" has no place, so it is not sent."""
        regions: list[list[GroundedRegion]] = []
        for study, group in group_by_study(queries):
            hypotheses = [query.hypotheses for query in group]
            regions += self._ground_image(study, collect_findings(group), hypotheses, folder)
        return regions

    def _ground_image(
        self, study: Study, findings: list[str], hypotheses: Sequence[Sequence[str]], folder: Path
    ) -> list[list[GroundedRegion]]:
        if not findings:
            return [[] for _ in hypotheses]
        image = load_cached_view(folder / study.image, None, self._side_px)
        payload = {"image": encode_png_base64(image), "hypotheses": findings}
        regions: dict[str, list[GroundedRegion]] = {finding: [] for finding in findings}
        with JsonClient(timeout_s=self._timeout_s, key=self._key) as client:
            reply = NO_RETRIES.call(
                self.url,
                lambda: client.request_json(
                    "POST", self.url, _GroundingReply, expected=_EXPECTED_REPLY, payload=payload
                ),
            )
            for position, region in enumerate(reply.regions):
                try:
                    if region.hypothesis not in regions:
                        raise _UnusableRegion(
                            f"a region for {region.hypothesis!r}, which was not asked; asked were {findings}"
                        )
                    regions[region.hypothesis] += self._parse_region(region, study)
                except _UnusableRegion as error:
                    where = f"POST {self.url} ({study.image})"
                    raise client.build_error(where, _EXPECTED_REPLY, f"at regions.{position}: {error}") from None
        return [_select_regions(names, regions) for names in hypotheses]

    def _parse_region(self, region: _RegionReply, study: Study) -> Iterator[GroundedRegion]:
        if (region.box is None) == (region.mask is None):
            raise _UnusableRegion("expected a box or a mask, not both and not neither")
        confidence = None if region.confidence is None else round(region.confidence, 6)
        if confidence is not None and not 0 <= confidence <= 1:
            raise _UnusableRegion(f"expected a confidence in [0, 1], got {region.confidence}")
        if region.box is not None:
            if confidence is None:
                raise _UnusableRegion("a box needs a confidence in [0, 1]")
            yield GroundedRegion(region.hypothesis, _parse_box(region.box), confidence)
        elif region.mask is not None:
            grey_HW = _decode_mask(region.mask, study.width, study.height)
            for box, mean in extract_mask_regions(grey_HW >= _MASK_THRESHOLD, grey_HW / 255, min_area=self._min_area):
                yield GroundedRegion(region.hypothesis, box, mean if confidence is None else confidence)


class _UnusableRegion(Exception):
    """A region of a reply that cannot be used; the message says why."""


def _select_regions(hypotheses: Sequence[str], regions: Mapping[str, Sequence[GroundedRegion]]) -> list[GroundedRegion]:
    """The regions of one question's hypotheses, best first."""
    selected: list[GroundedRegion] = []
    for hypothesis in dict.fromkeys(hypotheses):
        selected += regions.get(hypothesis, ())
    return sort_by_confidence(selected)


def _parse_box(numbers: Sequence[float]) -> Box:
    if not all(0 <= round(v, 4) <= 1 for v in numbers):  # false for NaN too; boxes are rounded to four decimals
        raise _UnusableRegion(
            f"expected a box as x0, y0, x1, y1 normalised to [0, 1] of the image, got {list(numbers)}; pixels or "
            "percent are not converted here, divide them by the image's width and height at the endpoint"
        )
    x0, y0, x1, y1 = numbers
    try:
        return box_from_xyxy((x0, y0, x1, y1))
    except ValidationError:
        raise _UnusableRegion(
            f"expected a box with x0 < x1 and y0 < y1 (to four decimals), got {list(numbers)}"
        ) from None


def _decode_mask(encoded: str, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Decode a mask to grey values (H, W); `width` and `height` are those of the image that it has to cover."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)), formats=("PNG",)) as image:
            if image.width * image.height > DEFAULT_LIMITS.max_pixels:
                raise _UnusableRegion(
                    f"expected a mask of at most {DEFAULT_LIMITS.max_pixels} pixels, got {image.size}"
                )
            if image.mode not in ("1", "L"):
                raise _UnusableRegion(f"expected a mask in 8-bit grey or 1 bit, got a PNG of mode {image.mode!r}")
            grey_HW = np.asarray(image.convert("L"))
    except binascii.Error as error:
        raise _UnusableRegion(f"expected a mask in base64, got something else ({error})") from None
    except UnidentifiedImageError:
        raise _UnusableRegion("expected a mask that is a PNG, got another format") from None
    except _PNG_ERRORS as error:
        raise _UnusableRegion(f"expected a mask that is a whole PNG, but it is damaged ({error})") from None
    rows, columns = grey_HW.shape
    if abs(columns - rows * width / height) > 1 and abs(rows - columns * height / width) > 1:
        raise _UnusableRegion(
            f"expected a mask of the image's proportions ({width} x {height}), got {columns} x {rows}; a padded or "
            "stretched mask cannot be placed"
        )
    if grey_HW.max() == 1:
        raise _UnusableRegion("a mask whose highest grey is 1; expected 255 for what belongs to it (multiply by 255)")
    return grey_HW
