"""The chain as a KServe model, for the V1 and V2 protocols of its SDK.

V1, POST /v1/models/NAME:predict

    {"instances": [{"question": "Is there a nodule?", "image": "data:image/png;base64,…", "return_overlay": false}]}
    {"predictions": [{"answer": "yes", "confidence": 0.91, "abstained": false, "regions": […], …}]}

V2, POST /v2/models/NAME/infer: BYTES tensors `question` and `image` of shape [n]; BOOL parameter `return_overlay`.
The reply has the outputs `answer` and `chain` (JSON of the whole prediction) as BYTES, `confidence` as FP64 and
`abstained` as BOOL.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi.exceptions import RequestValidationError
from kserve import InferRequest, InferResponse, Model
from kserve.protocol.infer_type import InferInput, InferOutput
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clincot.generation.visual_cot import VisualAnswer
from clincot.jsonl import strip_prefix
from clincot.serving.api_errors import ApiError
from clincot.serving.service import AnswerRequest, AnswerService


class Image64(BaseModel):
    """An image in the format of TensorFlow Serving's clients."""

    model_config = ConfigDict(extra="forbid", strict=True)

    b64: str


class Instance(BaseModel):
    """One question of a V1 request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str
    image: str | Image64
    return_overlay: bool = False

    @property
    def answer_request(self) -> AnswerRequest:
        image = self.image if isinstance(self.image, str) else self.image.b64
        return AnswerRequest(self.question, image, self.return_overlay)


class V1Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    instances: Annotated[list[Instance], Field(min_length=1)]


class V1Response(BaseModel):
    predictions: list[VisualAnswer]


class VisualCotModel(Model):  # type: ignore[misc]
    """The model that the SDK's routes call."""

    def __init__(self, name: str, service: AnswerService) -> None:
        super().__init__(name)
        self.service = service
        self.ready = True

    async def healthy(self) -> bool:
        return bool(self.ready) and await asyncio.to_thread(self.service.backend.check_health)

    def get_input_types(self) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": "BYTES", "shape": [-1]} for name in ("question", "image")]

    def get_output_types(self) -> list[dict[str, Any]]:
        kinds = {"answer": "BYTES", "confidence": "FP64", "abstained": "BOOL", "chain": "BYTES"}
        return [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in kinds.items()]

    async def predict(
        self, payload: dict[str, Any] | InferRequest, headers: dict[str, str] | None = None
    ) -> dict[str, Any] | InferResponse:
        """Answer a V1 or V2 request.

        Raises ApiError (422) if it is not a request of this model.
        """
        if isinstance(payload, InferRequest):
            answers = await self._answer_all(_parse_infer_request(payload))
            return _build_infer_response(payload, self.name, answers)
        try:
            request = V1Request.model_validate(payload)
        except ValidationError as error:
            raise ApiError(422, "invalid_request", describe_validation_error(error)) from None
        answers = await self._answer_all([instance.answer_request for instance in request.instances])
        return {"predictions": [answer.model_dump(mode="json", by_alias=True) for answer in answers]}

    async def _answer_all(self, requests: Sequence[AnswerRequest]) -> list[VisualAnswer]:
        limit = self.service.settings.max_instances
        if len(requests) > limit:
            message = f"expected at most {limit} questions in one request, got {len(requests)}"
            raise ApiError(413, "too_many_instances", message)
        # the first error fails the whole request; RequestMiddleware then cancels the other questions
        return list(await asyncio.gather(*(self.service.handle_request(request) for request in requests)))


def describe_validation_error(error: ValidationError | RequestValidationError) -> str:
    """Name the wrong fields (at most five), without quoting their values."""
    problems = []
    for problem in error.errors()[:5]:
        field = ".".join(map(str, problem["loc"])) or "body"
        problems.append(f"{field}: {strip_prefix(problem['msg'])}")
    return "; ".join(problems)


def _parse_infer_request(request: InferRequest) -> list[AnswerRequest]:
    tensors = {tensor.name: _read_strings(tensor) for tensor in request.inputs}
    if set(tensors) != {"question", "image"} or len(request.inputs) != 2:
        raise ApiError(422, "invalid_request", "expected exactly two inputs, 'question' and 'image'")
    overlay = (request.parameters or {}).get("return_overlay", False)
    if not isinstance(overlay, bool):
        raise ApiError(422, "invalid_request", "expected a boolean return_overlay", param="return_overlay")
    if len(tensors["question"]) != len(tensors["image"]) or not tensors["question"]:
        raise ApiError(422, "invalid_request", "expected as many questions as images, and at least one")
    pairs = zip(tensors["question"], tensors["image"], strict=True)
    return [AnswerRequest(question, image, overlay) for question, image in pairs]


def _read_strings(tensor: InferInput) -> list[str]:
    values = tensor.data
    if tensor.datatype != "BYTES" or not isinstance(values, list) or list(tensor.shape) != [len(values)]:
        raise ApiError(422, "invalid_request", "expected inputs of type BYTES and shape [n] with n strings")
    if not all(isinstance(value, str) for value in values):
        raise ApiError(422, "invalid_request", "expected inputs of strings (images as data URI or base64)")
    return list(values)


def _build_infer_response(request: InferRequest, name: str, answers: Sequence[VisualAnswer]) -> InferResponse:
    columns: dict[str, tuple[str, list[Any]]] = {
        "answer": ("BYTES", [answer.answer for answer in answers]),
        "confidence": ("FP64", [answer.confidence for answer in answers]),
        "abstained": ("BOOL", [answer.abstained for answer in answers]),
        "chain": ("BYTES", [answer.model_dump_json(by_alias=True) for answer in answers]),
    }
    outputs = [InferOutput(column, [len(answers)], kind, data) for column, (kind, data) in columns.items()]
    return InferResponse(response_id=request.id or "", model_name=name, infer_outputs=outputs)
