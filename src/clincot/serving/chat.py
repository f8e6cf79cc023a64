"""OpenAI chat completions, each with one question, one image and one answer.

Unsupported options that would change an answer (sampling, tools, several choices) are refused rather than ignored; the
same options with their neutral values are accepted, because clients send them. An answer that abstains has a `refusal`,
as in OpenAI's protocol (openai-python 3.57.0, types/chat/chat_completion_message.py and chat_completion_chunk.py), and
the finish reason is "length" if the answers from all regions were cut off. The
chain is in the extension `clincot` of the completion, or of the last chunk of a stream. The first chunk of a stream
contains the hypotheses and regions; it is sent before the policy answers.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from clincot.config.server_settings import ServeSettings
from clincot.errors import ModelFailed
from clincot.generation.visual_cot import RegionsProposed, VisualAnswer
from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, RequestCancelled
from clincot.serving.middleware import CHAT_PATH, log_unexpected_error
from clincot.serving.service import AnswerRequest, AnswerService


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_StrictModel):
    type: Literal["text"]
    text: str


class ImageUrl(_StrictModel):
    url: Annotated[
        str, Field(description="A data URI (data:image/png;base64,…), or an https URL if the operator allows its host.")
    ]
    detail: Literal["auto", "low", "high"] = "auto"  # ignored: the checkpoint determines the image's resolution


class ImagePart(_StrictModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class UserMessage(_StrictModel):
    role: Literal["user"]
    content: str | Annotated[list[TextPart | ImagePart], Field(min_length=1, max_length=16)]
    name: str | None = None


class StreamOptions(_StrictModel):
    include_usage: bool = False


class TextFormat(_StrictModel):
    type: Literal["text"]


class Extension(_StrictModel):
    """Options beyond OpenAI's protocol (`extra_body={"clincot": …}`)."""

    return_overlay: bool = False


class ChatRequest(_StrictModel):
    """A request for a chat completion. Decoding is greedy."""

    model: str
    messages: Annotated[
        list[UserMessage],
        Field(min_length=1, max_length=1, description="One user message: a question without history."),
    ]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[
        float | None, Field(ge=0, le=0, description="Only 0 or null, which mean greedy decoding, are supported.")
    ] = 0.0
    top_p: Annotated[float | None, Field(ge=0, le=1)] = 1.0  # has no effect on greedy decoding
    n: Annotated[int | None, Field(ge=1, le=1)] = 1
    max_tokens: Annotated[
        int | None, Field(ge=1, description="Accepted and not applied: the server's own limit holds.")
    ] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: int | None = None  # has no effect on greedy decoding
    user: str | None = None
    # Neutral values of unsupported options (openai-python 3.57.0, types/chat/completion_create_params.py)
    tools: Annotated[list[Any] | None, Field(max_length=0, description="Only an empty list or null.")] = None
    logprobs: Literal[False] | None = None
    presence_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    frequency_penalty: Annotated[float | None, Field(ge=0, le=0)] = None
    response_format: TextFormat | None = None
    clincot: Extension = Extension()

    @property
    def answer_request(self) -> AnswerRequest:
        """The question and the image.

        Raises ApiError (400) unless the message has exactly one image.
        """
        content = self.messages[0].content
        parts = [TextPart(type="text", text=content)] if isinstance(content, str) else content
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if len(images) != 1:
            raise ApiError(400, "one_image", f"expected exactly one image, got {len(images)}", param="messages")
        question = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        return AnswerRequest(question, images[0], self.clincot.return_overlay)


class Message(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: Annotated[str | None, Field(exclude_if=lambda refusal: refusal is None)] = None


class Choice(BaseModel):
    index: int = 0
    message: Message
    finish_reason: Literal["stop", "length"] = "stop"
    logprobs: None = None


class Completion(BaseModel):
    """A chat completion, with its chain in the extension `clincot`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    clincot: VisualAnswer


class ServedModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "clincot"


class ServedModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[ServedModel]


def build_chat_router(service: AnswerService, name: str) -> APIRouter:
    """Build the routes under /openai/v1 for the model `name`."""
    router = APIRouter(prefix="/openai/v1", tags=["OpenAI"])
    started = int(time.time())

    @router.get("/models")
    async def models() -> ServedModels:
        return ServedModels(data=[ServedModel(id=name, created=started)])

    @router.post("/chat/completions", response_model=Completion)
    async def chat(request: ChatRequest) -> Response:
        if request.model != name:
            raise ApiError(404, "model_not_found", f"this server serves only the model {name!r}", param="model")
        head: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.stream:
            usage = bool(request.stream_options and request.stream_options.include_usage)
            return await _stream_answer(service, request.answer_request, head, usage=usage)
        answer = await service.handle_request(request.answer_request)
        choice = Choice(message=_build_message(answer, service.settings), finish_reason=_find_finish_reason(answer))
        completion = Completion(**head, choices=[choice], clincot=answer)
        return JSONResponse(completion.model_dump(mode="json", by_alias=True))

    return router


def _build_message(answer: VisualAnswer, settings: ServeSettings) -> Message:
    """The assistant's message; one that abstains refuses, with the content that the operator has set."""
    if not answer.abstained:
        return Message(content=answer.answer)
    content = settings.abstain_content.replace("{answer}", answer.answer)
    return Message(content=content or None, refusal=settings.abstain_refusal or None)


def _find_finish_reason(answer: VisualAnswer) -> Literal["stop", "length"]:
    return "length" if answer.cut_off else "stop"


async def _stream_answer(
    service: AnswerService, request: AnswerRequest, head: dict[str, Any], *, usage: bool
) -> Response:
    """Start a stream when the regions are known.

    Errors until then are returned with their HTTP status.
    """
    loop = asyncio.get_running_loop()
    regions: asyncio.Future[RegionsProposed] = loop.create_future()

    def on_regions(proposed: RegionsProposed) -> None:  # called in the chain's thread
        loop.call_soon_threadsafe(regions.set_result, proposed)

    work = asyncio.create_task(service.handle_request(request, on_regions))
    either: set[asyncio.Future[Any]] = {work, regions}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        work.cancel()
        raise
    if not regions.done():
        work.result()  # raises the error that ended the work early
    chunks = _iter_chunks(head, regions.result(), work, service.settings, usage=usage)
    return StreamingResponse(chunks, media_type="text/event-stream")


async def _iter_chunks(
    head: dict[str, Any],
    proposed: RegionsProposed,
    work: asyncio.Task[VisualAnswer],
    settings: ServeSettings,
    *,
    usage: bool,
) -> AsyncIterator[str]:
    """Yield the regions first and the answer, word by word, when it is known.

    The answer is known as a whole only after the policy has answered from all regions. An error after the first chunk
    is sent as an event with `error`, which OpenAI's clients understand.
    """
    head = {**head, "object": "chat.completion.chunk"}

    def event(delta: dict[str, str], finish: str | None = None, **extra: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice], **extra})}\n\n"

    try:
        yield event({"role": "assistant", "content": ""}, clincot=proposed.model_dump(mode="json", by_alias=True))
        try:
            answer = await work
        except RequestCancelled:
            return
        except Exception as error:  # the HTTP status has been sent already
            refused = _convert_error(error)
            metrics.REFUSED.labels(refused.code).inc()
            yield f"data: {json.dumps(refused.build_body(CHAT_PATH))}\n\n"
            return
        message = _build_message(answer, settings)
        if message.content is not None:
            for position, word in enumerate(message.content.split(" ")):
                yield event({"content": word if position == 0 else f" {word}"})
        if message.refusal is not None:
            yield event({"refusal": message.refusal})
        yield event({}, _find_finish_reason(answer), clincot=answer.model_dump(mode="json", by_alias=True))
        if usage:  # the protocol requires the chunk; only the predictor can count tokens
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': None})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        work.cancel()


def _convert_error(error: Exception) -> ApiError:
    """Convert an error to the one that would have been returned with its HTTP status."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelFailed):
        return ApiError(502, "model_failed", "the model behind this server gave no usable answer")
    log_unexpected_error(error)
    return ApiError(500, "internal_error", "the server failed; its log says where")
