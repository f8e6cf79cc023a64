"""The chain as a KServe model, for the V1 and V2 protocols of its SDK.

V1, POST /v1/models/NAME:predict

    {"instances": [{"question": "Is there a nodule?", "image": "data:image/png;base64,…", "return_overlay": false}]}
    {"predictions": [{"answer": "yes", "confidence": 0.91, "abstained": false, "regions": […], …}]}

V2, POST /v2/models/NAME/infer and gRPC: see tensors.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from kserve import InferRequest, InferResponse, Model
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clincot.generation.visual_cot import VisualAnswer
from clincot.serving.api_errors import ApiError, describe_validation_error
from clincot.serving.service import AnswerRequest, AnswerService
from clincot.serving.tensors import INPUT_TYPES, OUTPUT_TYPES, build_response, read_questions


class Image64(BaseModel):
    """An image in the format of TensorFlow Serving's clients."""

    model_config = ConfigDict(extra="forbid", strict=True)

    b64: str


class Instance(BaseModel):
    """One question of a V1 request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str
    image: str | Image64
    return_overlay: bool | None = False
    return_image: bool | None = False

    @property
    def answer_request(self) -> AnswerRequest:
        image = self.image if isinstance(self.image, str) else self.image.b64
        return AnswerRequest(
            self.question, image, overlay=bool(self.return_overlay), with_image=bool(self.return_image)
        )


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

    def check_alive(self) -> bool:
        """False if the model cannot answer until the server is restarted."""
        return self.service.backend.check_alive()

    def get_input_types(self) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in INPUT_TYPES.items()]

    def get_output_types(self) -> list[dict[str, Any]]:
        return [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in OUTPUT_TYPES.items()]

    async def predict(
        self, payload: dict[str, Any] | InferRequest, headers: dict[str, str] | None = None
    ) -> dict[str, Any] | InferResponse:
        """Answer a V1 or V2 request.

        Raises ApiError (422) if it is not a request of this model.
        """
        if isinstance(payload, InferRequest):
            answers = await self._answer_all(read_questions(payload))
            return build_response(payload, self.name, answers)
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
        numbered = enumerate(requests) if len(requests) > 1 else [(None, requests[0])]
        return list(await asyncio.gather(*(self._answer_one(request, number) for number, request in numbered)))

    async def _answer_one(self, request: AnswerRequest, number: int | None) -> VisualAnswer:
        """Answer one question; an error names its number, unless it is the only one."""
        try:
            return (await self.service.handle_request(request)).answer
        except ApiError as error:
            if number is None:
                raise
            raise error.with_message(f"instance {number}: {error.message}") from None
