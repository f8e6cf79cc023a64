"""Requests and replies of KServe's V2 protocol (Open Inference Protocol), as tensors.

Inputs: BYTES tensors `question` and `image` of shape [n] or [n, 1]. In JSON, an image is a data URI, base64 or a URL;
in a binary tensor or over gRPC, it may also be the file itself. Outputs: `answer` and `chain` (JSON of the whole
prediction) as BYTES, `confidence` as FP64, `abstained` as BOOL; a request may select some of them (`outputs`).

Binary tensors follow the Binary Tensor Data Extension (triton-inference-server/server, docs/protocol/
extension_binary_data.md): the header Inference-Header-Content-Length says how many bytes of the body are JSON, and the
tensors with a parameter `binary_data_size` follow in order. The SDK's own reader (kserve 0.21.0,
InferRequest.from_bytes) decodes every element as UTF-8, which an image file is not.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from kserve import InferRequest, InferResponse
from kserve.errors import InvalidInput
from kserve.protocol.infer_type import (
    InferInput,
    InferOutput,
    RequestedOutput,
    deserialize_bytes_tensor,
    to_http_parameters,
)
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError

from clincot.generation.visual_cot import VisualAnswer
from clincot.serving.api_errors import ApiError, describe_validation_error
from clincot.serving.service import AnswerRequest

INPUT_TYPES = {"question": "BYTES", "image": "BYTES"}
OUTPUT_TYPES = {"answer": "BYTES", "confidence": "FP64", "abstained": "BOOL", "chain": "BYTES"}
_REQUEST_PARAMETERS = ("return_overlay", "return_image", "binary_data_output")
_IMAGE_MAGIC = (b"\x89PNG", b"\xff\xd8\xff")

_Parameters = dict[str, StrictBool | StrictInt | StrictFloat | StrictStr]


class _TensorModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class BinaryInput(_TensorModel):
    """An input tensor in the JSON part of a binary request."""

    name: str
    datatype: str
    shape: list[int]
    parameters: _Parameters = Field(default_factory=dict)
    data: list[Any] | None = None  # None: its elements follow the JSON


class SelectedOutput(_TensorModel):
    """An output that a request selects."""

    name: str
    parameters: _Parameters = Field(default_factory=dict)


class BinaryRequest(_TensorModel):
    """The JSON part of a binary request."""

    id: str | None = None
    model_name: str | None = None  # KServe's client repeats the name of the path
    parameters: _Parameters = Field(default_factory=dict)
    inputs: Annotated[list[BinaryInput], Field(min_length=1, max_length=len(INPUT_TYPES))]
    outputs: list[SelectedOutput] | None = None


def read_binary_request(body: bytes, json_length: str, model_name: str) -> InferRequest:
    """Read a request whose tensors follow its JSON. Raises ApiError."""
    if not json_length.isdigit() or int(json_length[:18]) > len(body):
        raise _refuse_tensor("expected the length of the body's JSON in Inference-Header-Content-Length")
    position = int(json_length)
    try:
        request = BinaryRequest.model_validate_json(body[:position])
    except ValidationError as error:
        raise _refuse_tensor(describe_validation_error(error)) from None
    inputs = []
    for tensor in request.inputs:
        data = tensor.data
        if data is None:
            size = tensor.parameters.get("binary_data_size")
            room = len(body) - position
            if (
                isinstance(size, bool)
                or not isinstance(size, int)
                or not 0 <= size <= room
                or tensor.datatype != "BYTES"
            ):
                raise _refuse_tensor(f"input {tensor.name[:40]!r}: expected a BYTES tensor with its binary_data_size")
            data = _split_elements(body[position : position + size])
            position += size
        inputs.append(InferInput(tensor.name, tensor.shape, tensor.datatype, data, dict(tensor.parameters)))
    if position != len(body):
        raise _refuse_tensor(f"expected {position} bytes of JSON and tensors, got {len(body)}")
    selected = [RequestedOutput(output.name, dict(output.parameters)) for output in request.outputs or ()]
    return InferRequest(
        model_name,
        inputs,
        request_id=request.id,
        parameters=dict(request.parameters),
        request_outputs=selected or None,
    )


def read_questions(request: InferRequest) -> list[AnswerRequest]:
    """The questions of a request. Raises ApiError (422) for anything that is not supported."""
    parameters = _read_parameters(request)
    for output in request.request_outputs or ():
        if output.name not in OUTPUT_TYPES:
            expected = f"expected outputs among {', '.join(OUTPUT_TYPES)}"
            raise ApiError(422, "unknown_output", f"{expected}, got {output.name[:40]!r}", param="outputs")
        _check_names(output.parameters or {}, ("binary_data",), f"output {output.name!r}")
    tensors = {tensor.name: _read_values(tensor) for tensor in request.inputs}
    if set(tensors) != set(INPUT_TYPES) or len(request.inputs) != len(INPUT_TYPES):
        raise _refuse_tensor("expected exactly two inputs, 'question' and 'image'")
    if len(tensors["question"]) != len(tensors["image"]) or not tensors["question"]:
        raise _refuse_tensor("expected as many questions as images, and at least one")
    return [
        AnswerRequest(
            _decode_question(question),
            _decode_image(image),
            overlay=parameters.get("return_overlay", False),
            with_image=parameters.get("return_image", False),
        )
        for question, image in zip(tensors["question"], tensors["image"], strict=True)
    ]


def build_response(request: InferRequest, name: str, answers: Sequence[VisualAnswer]) -> InferResponse:
    """The selected outputs of the answers, in the order in which they were selected."""
    columns: dict[str, list[Any]] = {
        "answer": [answer.answer for answer in answers],
        "confidence": [answer.confidence for answer in answers],
        "abstained": [answer.abstained for answer in answers],
        "chain": [answer.model_dump_json(by_alias=True) for answer in answers],
    }
    default = bool(request.use_binary_outputs)
    selected = request.request_outputs or [RequestedOutput(column) for column in OUTPUT_TYPES]
    requested = []
    for output in selected:
        binary = (output.parameters or {}).get("binary_data", default)
        requested.append(RequestedOutput(output.name, {"binary_data": bool(binary)}))
    outputs = [
        InferOutput(output.name, [len(answers)], OUTPUT_TYPES[output.name], columns[output.name]) for output in selected
    ]
    return InferResponse(
        response_id=request.id or "",
        model_name=name,
        infer_outputs=outputs,
        use_binary_outputs=default,
        requested_outputs=requested,
    )


def _read_parameters(request: InferRequest) -> dict[str, bool]:
    parameters: dict[str, Any] = to_http_parameters(request.parameters or {})
    _check_names(parameters, _REQUEST_PARAMETERS, "request")
    for name, value in parameters.items():
        if not isinstance(value, bool):
            raise ApiError(422, "invalid_request", f"expected a boolean {name}", param=name)
    return parameters


def _check_names(parameters: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    if unknown := sorted(set(parameters) - set(known)):
        message = f"{where}: the parameter {unknown[0][:40]!r} is not supported; known: {', '.join(known)}"
        raise ApiError(422, "unknown_parameter", message, param=unknown[0][:40])


def _read_values(tensor: InferInput) -> list[str | bytes]:
    """The elements of a tensor: text from JSON, bytes from binary tensors and gRPC."""
    _check_names(tensor.parameters or {}, ("binary_data_size",), f"input {tensor.name[:40]!r}")
    shape, values = list(tensor.shape), tensor.data
    if tensor.datatype != "BYTES" or len(shape) not in (1, 2) or shape[1:] not in ([], [1]):
        raise _refuse_tensor("expected inputs of type BYTES and shape [n] with n elements")
    if not values:  # raw contents of gRPC
        try:
            values = tensor.as_numpy().ravel().tolist()
        except (struct.error, ValueError, InvalidInput):
            raise _refuse_tensor("expected inputs of type BYTES and shape [n] with n elements") from None
    if len(shape) == 2 and all(isinstance(value, list) and len(value) == 1 for value in values):
        values = [value for (value,) in values]
    if len(values) != shape[0] or not all(isinstance(value, str | bytes) for value in values):
        raise _refuse_tensor("expected inputs of type BYTES and shape [n] with n elements")
    return list(values)


def _split_elements(raw: bytes) -> list[bytes]:
    """The elements of a binary BYTES tensor, each of which follows its length (4 bytes, little endian)."""
    try:
        elements: list[bytes] = deserialize_bytes_tensor(raw).tolist()
    except struct.error:
        raise _refuse_tensor("expected binary elements that follow their lengths (4 bytes, little endian)") from None
    return elements


def _decode_question(question: str | bytes) -> str:
    try:
        return question.decode("utf-8") if isinstance(question, bytes) else question
    except UnicodeDecodeError:
        raise _refuse_tensor("expected questions in UTF-8") from None


def _decode_image(image: str | bytes) -> str | bytes:
    """An image file as it is; other bytes are text, as in JSON."""
    if isinstance(image, str) or image.startswith(_IMAGE_MAGIC) or image[128:132] == b"DICM":
        return image
    try:
        return image.decode("ascii")
    except UnicodeDecodeError:
        return image  # refused as a file of an unknown format


def _refuse_tensor(message: str) -> ApiError:
    return ApiError(422, "invalid_request", message)
