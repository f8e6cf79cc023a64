"""A grounder that calls a text-prompted segmentation model behind KServe's V2 protocol (Open Inference Protocol).

KServe, Triton Inference Server and MLServer speak it. Each image is one POST to /v2/models/MODEL/infer:

    {"inputs": [{"name": "image", "shape": [1], "datatype": "BYTES", "data": ["<base64 PNG>"]},
                {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["nodule", "pleural effusion"]}]}

The reply has one mask for each text, in order, in the output `masks`; one without pixels says that nothing was found:

    datatype BYTES, shape [2]                  each a base64 PNG, or COCO's run-length code as JSON
                                               {"size": [height, width], "counts": "…"}
    datatype FP32, UINT8 or BOOL, shape [2, H, W]  probabilities, 0 and 255 (or 1), or true and false

An optional output `scores` (FP32, shape [2]) has a confidence for each text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from clincot.clients.http import NO_RETRIES, JsonClient, encode_png_base64, read_api_key, validate_url
from clincot.generation.masks import MIN_AREA, select_regions
from clincot.generation.reply_masks import (
    RleReply,
    UnusableRegion,
    check_confidence,
    check_proportions,
    decode_png_mask,
    decode_rle_mask,
    iter_mask_regions,
)
from clincot.images import load_cached_view
from clincot.jsonl import format_validation_error
from clincot.models.protocols import GroundedRegion, GroundingQuery, collect_findings, group_by_study
from clincot.prompts import fill_segmenter_prompt
from clincot.records import Study

_EXPECTED_REPLY = "the outputs of an inference"
_NUMBERS = ("FP32", "UINT8", "BOOL")


class _Tensor(BaseModel):
    """An output tensor; other fields of the protocol, such as parameters, are not read."""

    model_config = ConfigDict(strict=True)

    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class _InferenceReply(BaseModel):
    outputs: list[_Tensor]


class KserveSegmenter:
    """See protocols.Grounder. Raises ModelFailed for any reply that does not follow the format above.

    url: address of the server, without /v2. model: name of the model. prompt: what stands for a hypothesis
    (prompts.fill_segmenter_prompt). The other arguments are those of HttpGrounder.
    """

    name = "http"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        prompt: str = "{finding}",
        api_key_env: str = "",
        timeout_s: float = 60.0,
        side_px: int | None = None,
        min_area: float = MIN_AREA,
    ) -> None:
        base = validate_url(url, what="grounder 'http' (propose.http_url)").rstrip("/")
        self.url = f"{base}/v2/models/{model}/infer"
        self._prompt = prompt
        self._key = read_api_key(env=api_key_env, file=None, what="grounder 'http'")
        self._timeout_s, self._side_px, self._min_area = timeout_s, side_px, min_area

    def ground(self, queries: Sequence[GroundingQuery], folder: Path) -> list[list[GroundedRegion]]:
        """Send one request per image for all of its questions; "normal" has no place, so it is not sent."""
        regions: list[list[GroundedRegion]] = []
        for study, group in group_by_study(queries):
            findings = collect_findings(group)
            found = self._segment(study, findings, folder) if findings else {}
            regions += [select_regions(query.hypotheses, found) for query in group]
        return regions

    def _segment(self, study: Study, findings: Sequence[str], folder: Path) -> dict[str, list[GroundedRegion]]:
        image = load_cached_view(folder / study.image, None, self._side_px)
        texts = [fill_segmenter_prompt(self._prompt, finding, study) for finding in findings]
        payload = {
            "inputs": [
                {"name": "image", "shape": [1], "datatype": "BYTES", "data": [encode_png_base64(image)]},
                {"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts},
            ]
        }
        with JsonClient(timeout_s=self._timeout_s, key=self._key) as client:
            reply = NO_RETRIES.call(
                self.url,
                lambda: client.request_json(
                    "POST", self.url, _InferenceReply, expected=_EXPECTED_REPLY, payload=payload
                ),
            )
            try:
                return self._read_outputs(reply, findings, study)
            except UnusableRegion as error:
                where = f"POST {self.url} ({study.image})"
                raise client.build_error(where, _EXPECTED_REPLY, str(error)) from None

    def _read_outputs(
        self, reply: _InferenceReply, findings: Sequence[str], study: Study
    ) -> dict[str, list[GroundedRegion]]:
        outputs = {tensor.name: tensor for tensor in reply.outputs}
        if "masks" not in outputs:
            raise UnusableRegion(f"expected an output 'masks', got {', '.join(outputs) or 'none'}")
        masks = list(_read_masks(outputs["masks"], len(findings), study))
        scores = _read_scores(outputs["scores"], len(findings)) if "scores" in outputs else [None] * len(findings)
        return {
            finding: list(iter_mask_regions(finding, grey_HW, score, min_area=self._min_area))
            for finding, grey_HW, score in zip(findings, masks, scores, strict=True)
        }


def _read_masks(tensor: _Tensor, count: int, study: Study) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the masks of the output as grey values (H, W), one for each text."""
    if tensor.datatype == "BYTES":
        if tensor.shape != [count] or len(tensor.data) != count:
            raise UnusableRegion(f"masks: expected one for each of {count} texts, got the shape {tensor.shape}")
        for position, value in enumerate(tensor.data):
            try:
                yield _decode_text_mask(value, study)
            except UnusableRegion as error:
                raise UnusableRegion(f"masks.{position}: {error}") from None
        return
    if tensor.datatype not in _NUMBERS:
        raise UnusableRegion(f"masks: expected the datatype BYTES, {', '.join(_NUMBERS)}, got {tensor.datatype}")
    if len(tensor.shape) != 3 or tensor.shape[0] != count or min(tensor.shape) < 1:
        raise UnusableRegion(f"masks: expected the shape [{count}, height, width], got {tensor.shape}")
    check_proportions(tuple(tensor.shape[1:]), study.width, study.height)
    try:
        values_NHW = np.asarray(tensor.data, dtype=np.float64).reshape(tensor.shape)
    except (ValueError, TypeError) as error:
        raise UnusableRegion(f"masks: expected {tensor.shape} numbers, got others ({error})") from None
    top = 255 if tensor.datatype == "UINT8" and values_NHW.max() > 1 else 1
    if not (np.isfinite(values_NHW).all() and values_NHW.min() >= 0 and values_NHW.max() <= top):
        raise UnusableRegion(
            f"masks: expected {tensor.datatype} numbers from 0 to {top}, got {values_NHW.min():g} to "
            f"{values_NHW.max():g}; logits are not converted here, take their sigmoid at the endpoint"
        )
    yield from np.rint(values_NHW * (255 / top)).astype(np.uint8)


def _decode_text_mask(value: Any, study: Study) -> npt.NDArray[np.uint8]:
    """A mask that is text: run-length code as JSON, or a PNG."""
    if not isinstance(value, str):
        raise UnusableRegion(f"expected a base64 PNG or a run-length code as text, got {type(value).__name__}")
    if not value.lstrip().startswith("{"):
        return decode_png_mask(value, study.width, study.height)
    try:
        rle = RleReply.model_validate_json(value)
    except ValidationError as error:
        raise UnusableRegion(f"expected {{size, counts}}: {format_validation_error(error)}") from None
    return decode_rle_mask(rle, study.width, study.height)


def _read_scores(tensor: _Tensor, count: int) -> list[float | None]:
    numbers = [value for value in tensor.data if type(value) in (int, float)]
    if tensor.datatype != "FP32" or len(numbers) != len(tensor.data) or len(numbers) != count:
        raise UnusableRegion(
            f"scores: expected {count} FP32 numbers, got {tensor.datatype} of the shape {tensor.shape}"
        )
    return [check_confidence(float(number)) for number in numbers]
