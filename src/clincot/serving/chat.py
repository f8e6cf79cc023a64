"""OpenAI chat completions over the chain: one question, one image, one answer.

What would change an answer and is not done here (sampling, tools, several choices) is refused, not ignored. The chain
comes in the extension `clincot` of the completion, or of the last chunk of a stream; the first chunk of a stream has
the hypotheses and regions in it, and is sent before they are looked at.
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
        str, Field(description="data:image/png;base64,… (or an address, where the operator allows its host)")
    ]
    detail: Literal["auto", "low", "high"] = "auto"  # the checkpoint decides how it is shown


class ImagePart(_StrictModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class UserMessage(_StrictModel):
    role: Literal["user"]
    content: Annotated[list[TextPart | ImagePart], Field(min_length=1, max_length=16)]
    name: str = ""


class StreamOptions(_StrictModel):
    include_usage: bool = False


class Extension(_StrictModel):
    """What a client may ask for beyond OpenAI's protocol (`extra_body={"clincot": …}`)."""

    return_overlay: bool = False


class ChatRequest(_StrictModel):
    """A chat completion's request. Answers are greedy."""

    model: str
    messages: Annotated[list[UserMessage], Field(min_length=1, max_length=1, description="one question, no history")]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=0, description="greedy: 0")] = 0.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0  # greedy answers do not depend on it
    n: Annotated[int, Field(ge=1, le=1)] = 1
    max_tokens: Annotated[int | None, Field(ge=1, description="the server's own limit may be lower")] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    seed: int | None = None  # nothing is drawn
    user: str = ""
    clincot: Extension = Extension()

    @property
    def answer_request(self) -> AnswerRequest:
        """Raises Refused unless there is one image and a text."""
        parts = self.messages[0].content
        images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if len(images) != 1:
            raise ApiError(400, "one_image", f"expected one image, got {len(images)}", param="messages")
        question = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        return AnswerRequest(question, images[0], self.clincot.return_overlay)


class Message(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: int = 0
    message: Message
    finish_reason: Literal["stop"] = "stop"
    logprobs: None = None


class Completion(BaseModel):
    """A chat completion with the chain behind it."""

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


def build_chat_router(answering: AnswerService, name: str) -> APIRouter:
    """The routes under /openai/v1 for the model `name`."""
    router = APIRouter(prefix="/openai/v1", tags=["OpenAI"])
    started = int(time.time())

    @router.get("/models")
    async def models() -> ServedModels:
        return ServedModels(data=[ServedModel(id=name, created=started)])

    @router.post("/chat/completions", response_model=Completion)
    async def chat(request: ChatRequest) -> Response:
        if request.model != name:
            raise ApiError(404, "model_not_found", f"the model served here is {name!r}", param="model")
        about: dict[str, Any] = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.stream:
            usage = bool(request.stream_options and request.stream_options.include_usage)
            return await _stream_answer(answering, request.answer_request, about, usage=usage)
        answer = await answering.handle_request(request.answer_request)
        completion = Completion(**about, choices=[Choice(message=Message(content=answer.answer))], clincot=answer)
        return JSONResponse(completion.model_dump(mode="json"))

    return router


async def _stream_answer(
    answering: AnswerService, order: AnswerRequest, about: dict[str, Any], *, usage: bool
) -> Response:
    """A stream that begins when the regions are known. What is wrong before then is refused by its status."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[RegionsProposed] = loop.create_future()

    def tell(looking: RegionsProposed) -> None:  # in the chain's thread
        loop.call_soon_threadsafe(found.set_result, looking)

    work = asyncio.create_task(answering.handle_request(order, tell))
    either: set[asyncio.Future[Any]] = {work, found}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        work.cancel()
        raise
    if not found.done():
        work.result()  # raises why
    return StreamingResponse(_iter_chunks(about, found.result(), work, usage), media_type="text/event-stream")


async def _iter_chunks(
    about: dict[str, Any], looking: RegionsProposed, work: asyncio.Task[VisualAnswer], usage: bool
) -> AsyncIterator[str]:
    """The regions at once, then the answer word by word: it is known as a whole when all regions have been looked at.

    A failure after the first chunk is an event `error` in its place, as OpenAI's clients understand it.
    """
    head = {**about, "object": "chat.completion.chunk"}

    def event(delta: dict[str, str], finish: str | None = None, **extra: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice], **extra})}\n\n"

    try:
        yield event({"role": "assistant", "content": ""}, clincot=looking.model_dump(mode="json"))
        try:
            answer = await work
        except RequestCancelled:
            return
        except Exception as error:  # the status is sent already
            refused = _convert_error(error)
            metrics.REFUSED.labels(refused.code).inc()
            yield f"data: {json.dumps(refused.build_body(CHAT_PATH))}\n\n"
            return
        for position, word in enumerate(answer.answer.split(" ")):
            yield event({"content": word if position == 0 else f" {word}"})
        yield event({}, "stop", clincot=answer.model_dump(mode="json"))
        if usage:  # tokens are the predictor's to count; the protocol wants the chunk
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': None})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        work.cancel()


def _convert_error(error: Exception) -> ApiError:
    """As it would have been told by its status."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ModelFailed):
        return ApiError(502, "model_failed", "the model behind this server gave no usable answer")
    log_unexpected_error(error)
    return ApiError(500, "internal_error", "the server failed; its log says where")
