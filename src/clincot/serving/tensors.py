"""Requests and replies of KServe's V2 protocol (Open Inference Protocol), as tensors.

Inputs: BYTES tensors `question` and `image` of shape [n] or [n, 1]. In JSON, an image is a data URI, base64 or a URL;
in a binary tensor or over gRPC, it may also be the file itself. `other_images` of shape [n, k] has up to k further
images of each question, if the server's setting `max_images` allows them, and `other_roles` of the same shape has their
roles; an empty element is no image. Outputs: `answer` and `chain` (JSON of the whole prediction) as BYTES, `confidence`
as FP64, `abstained` as BOOL; a request may select some of them (`outputs`).

Binary tensors follow the Binary Tensor Data Extension (triton-inference-server/server, docs/protocol/
extension_binary_data.md): the header Inference-Header-Content-Length says how many bytes of the body are JSON, and the
tensors with a parameter `binary_data_size` follow in order. The SDK's own reader (kserve 0.21.0,
InferRequest.from_bytes) decodes every element as UTF-8, which an image file is not.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from itertools import chain
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
from clincot.serving.service import AnswerRequest, FurtherImage

INPUT_TYPES = {"question": "BYTES", "image": "BYTES"}
CONTEXT_TYPES = {"other_images": "BYTES", "other_roles": "BYTES"}  # may be left out
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
    inputs: Annotated[list[BinaryInput], Field(min_length=1, max_length=len(INPUT_TYPES | CONTEXT_TYPES))]
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
    _check_input_names([tensor.name for tensor in request.inputs])
    tensors = {tensor.name: _read_rows(tensor) for tensor in request.inputs}
    for name in INPUT_TYPES:
        if any(len(row) != 1 for row in tensors[name]):
            further = "; further images belong in the input 'other_images'" if name == "image" else ""
            raise _refuse_tensor(f"expected the input {name!r} of shape [n]{further}")
    if len({len(rows) for rows in tensors.values()}) != 1 or not tensors["question"]:
        raise _refuse_tensor("expected as many questions as images, and at least one")
    others = _join_others(tensors.get("other_images"), tensors.get("other_roles"), len(tensors["question"]))
    return [
        AnswerRequest(
            _decode_text(question, "questions"),
            _decode_image(image),
            others=further,
            overlay=parameters.get("return_overlay", False),
            with_image=parameters.get("return_image", False),
        )
        for (question,), (image,), further in zip(tensors["question"], tensors["image"], others, strict=True)
    ]


def _check_input_names(names: Sequence[str]) -> None:
    known = [*INPUT_TYPES, *CONTEXT_TYPES]
    if unknown := [name for name in names if name not in known]:
        raise _refuse_tensor(f"the input {unknown[0][:40]!r} is not supported; known: {', '.join(known)}")
    if len(set(names)) != len(names) or not set(INPUT_TYPES) <= set(names):
        raise _refuse_tensor("expected the inputs 'question' and 'image', and no input twice")


def _join_others(
    images: list[list[str | bytes]] | None, roles: list[list[str | bytes]] | None, count: int
) -> list[tuple[FurtherImage, ...]]:
    """The further images of each of `count` questions, with their roles; empty elements are left out."""
    if images is None and roles is not None:
        raise _refuse_tensor("expected the input 'other_images' beside 'other_roles'")
    if images is None:
        return [()] * count
    roles = [[""] * len(row) for row in images] if roles is None else roles
    if [len(row) for row in images] != [len(row) for row in roles]:
        raise _refuse_tensor("expected 'other_images' and 'other_roles' of the same shape")
    joined = []
    for row, named in zip(images, roles, strict=True):
        pairs = [(image, role) for image, role in zip(row, named, strict=True) if image or role]
        if not all(image for image, _ in pairs):
            raise _refuse_tensor("expected no role of an empty image in 'other_roles'")
        joined.append(tuple(FurtherImage(_decode_image(image), _decode_text(role, "roles")) for image, role in pairs))
    return joined


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


def _read_rows(tensor: InferInput) -> list[list[str | bytes]]:
    """The elements of a tensor of shape [n] or [n, k], of each question: text from JSON, bytes otherwise."""
    _check_names(tensor.parameters or {}, ("binary_data_size",), f"input {tensor.name[:40]!r}")
    shape, values = list(tensor.shape), tensor.data
    expected = f"expected the input {tensor.name!r} of type BYTES and shape [n] or [n, k] with as many elements"
    if tensor.datatype != "BYTES" or len(shape) not in (1, 2) or any(size < 0 for size in shape):
        raise _refuse_tensor(expected)
    if not values:  # raw contents of gRPC
        try:
            values = tensor.as_numpy().ravel().tolist()
        except (struct.error, ValueError, InvalidInput):
            raise _refuse_tensor(expected) from None
    count, width = shape[0], shape[1] if len(shape) == 2 else 1
    if len(shape) == 2 and len(values) == count and all(isinstance(value, list) for value in values):
        values = list(chain.from_iterable(values))  # JSON may nest the rows
    if len(values) != count * width or not all(isinstance(value, str | bytes) for value in values):
        raise _refuse_tensor(expected)
    return [list(values[start : start + width]) for start in range(0, count * width, width or 1)]


def _split_elements(raw: bytes) -> list[bytes]:
    """The elements of a binary BYTES tensor, each of which follows its length (4 bytes, little endian)."""
    try:
        elements: list[bytes] = deserialize_bytes_tensor(raw).tolist()
    except struct.error:
        raise _refuse_tensor("expected binary elements that follow their lengths (4 bytes, little endian)") from None
    return elements


def _decode_text(text: str | bytes, what: str) -> str:
    try:
        return text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError:
        raise _refuse_tensor(f"expected {what} in UTF-8") from None


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
