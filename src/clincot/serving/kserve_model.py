"""The chain as a KServe model, for the V1 and V2 protocols of its SDK.

V1, POST /v1/models/NAME:predict

    {"instances": [{"question": "Is there a nodule?", "image": "data:image/png;base64,…", "return_overlay": false,
                    "others": [{"image": "data:image/png;base64,…", "role": "prior"}]}]}
    {"predictions": [{"answer": "yes", "confidence": 0.91, "abstained": false, "regions": […], …}]}

V2, POST /v2/models/NAME/infer and gRPC: see tensors.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any

from kserve import InferRequest, InferResponse, Model
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from clincot.generation.visual_cot import VisualAnswer
from clincot.serving.api_errors import ApiError, describe_validation_error, number_errors
from clincot.serving.service import AnswerRequest, AnswerService, FurtherImage
from clincot.serving.tensors import CONTEXT_TYPES, INPUT_TYPES, OUTPUT_TYPES, build_response, read_questions


class Image64(BaseModel):
    """An image in the format of TensorFlow Serving's clients."""

    model_config = ConfigDict(extra="forbid", strict=True)

    b64: str


def _refuse_list(value: Any) -> Any:
    if isinstance(value, list):
        raise ValueError("expected one image; further ones belong in `others`, each with an `image` and a `role`")
    return value


OneImage = Annotated[str | Image64, BeforeValidator(_refuse_list)]


class OtherUpload(BaseModel):
    """A further image of a question, such as a prior, if the server's setting `max_images` allows it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: OneImage
    role: str = ""  # "": "image 2" and so on

    @property
    def further_image(self) -> FurtherImage:
        return FurtherImage(_get_text(self.image), self.role)


class Instance(BaseModel):
    """One question of a V1 request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    question: str
    image: OneImage
    others: list[OtherUpload] = []
    return_overlay: bool | None = False
    return_image: bool | None = False

    @property
    def answer_request(self) -> AnswerRequest:
        return AnswerRequest(
            self.question,
            _get_text(self.image),
            others=tuple(other.further_image for other in self.others),
            overlay=bool(self.return_overlay),
            with_image=bool(self.return_image),
        )


def _get_text(image: str | Image64) -> str:
    return image if isinstance(image, str) else image.b64


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
        inputs = [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in INPUT_TYPES.items()]
        if self.service.settings.max_images > 1:
            inputs += [{"name": name, "datatype": kind, "shape": [-1, -1]} for name, kind in CONTEXT_TYPES.items()]
        return inputs

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
        count = len(requests)
        answers = (self._answer_one(request, number, count) for number, request in enumerate(requests))
        return list(await asyncio.gather(*answers))

    async def _answer_one(self, request: AnswerRequest, number: int, count: int) -> VisualAnswer:
        with number_errors("instance", number, count):
            return (await self.service.handle_request(request)).answer
