"""A grounder that calls a segmentation or grounding model over HTTP.

Each image is one POST of JSON:

    {"image": "<base64 PNG>", "hypotheses": ["nodule", "pleural effusion"]}

With a prompt of its own (propose.http_prompt), `prompts` has the text of each hypothesis, in the same order. The reply
lists any number of regions; each names its hypothesis and has a box, a mask or COCO's run-length code of a mask:

    {"regions": [{"hypothesis": "nodule", "box": [0.12, 0.30, 0.37, 0.55], "confidence": 0.8},
                 {"hypothesis": "pleural effusion", "mask": "<base64 PNG>"},
                 {"hypothesis": "pleural effusion", "rle": {"size": [512, 512], "counts": "…"}}]}

A box is x0, y0, x1, y1 in [0, 1], normalised to the image as sent. Numbers outside that range are an error; they are
never interpreted as pixels or percent. A mask is an 8-bit grey (255: certain) or 1-bit PNG of any size with the image's
proportions. Pixels of at least half of 255 are grouped into connected components; a component's confidence is its mean
grey unless the reply states one. `rle` has the same proportions; its `counts` are COCO's compressed text or a list.
Regions with a mask keep it (records.Region.mask).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clincot.clients.http import NO_RETRIES, JsonClient, encode_png_base64, read_api_key, validate_url
from clincot.generation.masks import MIN_AREA, select_regions
from clincot.generation.reply_masks import (
    RleReply,
    UnusableRegion,
    check_confidence,
    decode_png_mask,
    decode_rle_mask,
    iter_mask_regions,
)
from clincot.geometry import Box, box_from_xyxy
from clincot.images import load_cached_view
from clincot.models.protocols import GroundedRegion, GroundingQuery, collect_findings, group_by_study
from clincot.prompts import fill_segmenter_prompt
from clincot.records import Study

_EXPECTED_REPLY = "regions for the hypotheses"


class _RegionReply(BaseModel):
    model_config = ConfigDict(strict=True)

    hypothesis: str
    box: Annotated[list[float], Field(min_length=4, max_length=4)] | None = None
    mask: str | None = None
    rle: RleReply | None = None
    confidence: float | None = None


class _GroundingReply(BaseModel):
    regions: list[_RegionReply]


class HttpGrounder:
    """See protocols.Grounder. Raises ModelFailed for any reply that does not follow the format above.

    url: address of the POST. side_px: longest side of the image as sent; None keeps its size. timeout_s: limit of a
    whole request. min_area: smallest component of a mask that counts, as a share of the image. prompt: what a
    hypothesis is prompted with (prompts.fill_segmenter_prompt).
    """

    name = "http"

    def __init__(
        self,
        url: str,
        *,
        prompt: str = "{finding}",
        api_key_env: str = "",
        api_key_file: Path | None = None,
        timeout_s: float = 60.0,
        side_px: int | None = None,
        min_area: float = MIN_AREA,
    ) -> None:
        self.url = validate_url(url, what="grounder 'http' (propose.http_url)")
        self._key = read_api_key(env=api_key_env, file=api_key_file, what="grounder 'http'")
        self._prompt = prompt
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
        payload: dict[str, str | list[str]] = {"image": encode_png_base64(image), "hypotheses": findings}
        if self._prompt != "{finding}":
            payload["prompts"] = [fill_segmenter_prompt(self._prompt, finding, study) for finding in findings]
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
                        raise UnusableRegion(
                            f"a region for {region.hypothesis!r}, which was not asked; asked were {findings}"
                        )
                    regions[region.hypothesis] += self._parse_region(region, study)
                except UnusableRegion as error:
                    where = f"POST {self.url} ({study.image})"
                    raise client.build_error(where, _EXPECTED_REPLY, f"at regions.{position}: {error}") from None
        return [select_regions(names, regions) for names in hypotheses]

    def _parse_region(self, region: _RegionReply, study: Study) -> Iterator[GroundedRegion]:
        given = [name for name in ("box", "mask", "rle") if getattr(region, name) is not None]
        if len(given) != 1:
            raise UnusableRegion(f"expected one of box, mask and rle, got {' and '.join(given) or 'none'}")
        confidence = check_confidence(region.confidence)
        if region.box is not None:
            if confidence is None:
                raise UnusableRegion("a box needs a confidence in [0, 1]")
            yield GroundedRegion(region.hypothesis, _parse_box(region.box), confidence)
            return
        if region.mask is not None:
            grey_HW = decode_png_mask(region.mask, study.width, study.height)
        elif region.rle is not None:
            grey_HW = decode_rle_mask(region.rle, study.width, study.height)
        yield from iter_mask_regions(region.hypothesis, grey_HW, confidence, min_area=self._min_area)


def _parse_box(numbers: Sequence[float]) -> Box:
    if not all(0 <= round(v, 4) <= 1 for v in numbers):  # false for NaN too; boxes are rounded to four decimals
        raise UnusableRegion(
            f"expected a box as x0, y0, x1, y1 normalised to [0, 1] of the image, got {list(numbers)}; pixels or "
            "percent are not converted here, divide them by the image's width and height at the endpoint"
        )
    x0, y0, x1, y1 = numbers
    try:
        return box_from_xyxy((x0, y0, x1, y1))
    except ValidationError:
        raise UnusableRegion(
            f"expected a box with x0 < x1 and y0 < y1 (to four decimals), got {list(numbers)}"
        ) from None
