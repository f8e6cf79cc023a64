"""OpenAI chat completions, each with one question about one image, under /openai/v1 and /v1.

What cannot be honoured is refused by its name (chat_schema, conversation, structured_output). An answer that abstains
has a `refusal`, as in OpenAI's protocol (openai-python 3.57.0, types/chat/chat_completion_message.py and
chat_completion_chunk.py), and the same text as content, because many clients show only that. The finish reason is
"length" if the answer was cut off. The chain is in the extension `clincot` of the completion, or of the last chunk of a
stream. The first chunk of a stream contains the hypotheses and regions; it is sent before the policy answers.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse

from clincot.config.server_settings import ServeSettings
from clincot.generation.visual_cot import AbstainReason, AnswerDecoding, RegionsProposed, VisualAnswer
from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, RequestCancelled, convert_error
from clincot.serving.chat_schema import (
    ChatRequest,
    Choice,
    Completion,
    JsonFormat,
    ModelList,
    ModelStatus,
    ReplyMessage,
    SchemaFormat,
    ServedModel,
    ServedModels,
    Usage,
)
from clincot.serving.conversation import read_conversation
from clincot.serving.middleware import CHAT_PATH
from clincot.serving.service import AnswerRequest, AnswerService, ServedAnswer, TokenCount
from clincot.serving.structured_output import ChainLayout, render_chain

_ABSTAIN_REASONS: dict[AbstainReason | Literal["schema"], str] = {
    "low_confidence": "its confidence in an answer is too low",
    "cut_off": "the answer reached the token limit before its end",
    "off_format": "it wrote nothing that can be read as an answer",
    "schema": "its answer does not satisfy the requested schema",
}


def build_models_router(service: AnswerService, name: str) -> APIRouter:
    """Build the routes that list the model `name`.

    GET /v1/models and /v1/models/NAME are routes of KServe's V1 protocol as well, so they reply with the fields of both
    protocols; this router has to be added before the SDK's.
    """
    router = APIRouter()
    model = ServedModel(id=name, created=int(time.time()))

    @router.get("/openai/v1/models", tags=["OpenAI"])
    async def list_models() -> ServedModels:
        return ServedModels(data=[model])

    @router.get("/openai/v1/models/{model_name}", tags=["OpenAI"])
    async def get_model(model_name: str) -> ServedModel:
        _check_model(model_name, name)
        return model

    @router.get("/v1/models", tags=["OpenAI", "V1"])
    async def list_models_v1() -> ModelList:
        return ModelList(data=[model], models=[name])

    @router.get("/v1/models/{model_name}", tags=["OpenAI", "V1"])
    async def get_model_v1(model_name: str) -> ModelStatus:
        _check_model(model_name, name)
        if not await asyncio.to_thread(service.backend.check_health):
            raise ApiError(503, "not_ready", "the model is not ready")
        return ModelStatus(**model.model_dump(), name=name, ready=True)

    return router


def build_chat_router(service: AnswerService, name: str) -> APIRouter:
    """Build the routes of chat completions for the model `name`."""
    router = APIRouter()

    async def complete_chat(request: ChatRequest) -> Response:
        _check_model(request.model, name)
        plan = _plan_completion(request, service.settings)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.stream:
            return await _stream_answer(service, plan, head)
        answers = await _answer_choices(service, plan)
        return JSONResponse(_build_completion(answers, plan, head).model_dump(mode="json", by_alias=True))

    for path in (CHAT_PATH, "/v1/chat/completions"):
        router.add_api_route(path, complete_chat, methods=["POST"], response_model=Completion, tags=["OpenAI"])
    return router


def _check_model(given: str, name: str) -> None:
    if given != name:
        raise ApiError(404, "model_not_found", f"this server serves only the model {name!r}", param="model")


@dataclass(frozen=True)
class _CompletionPlan:
    """A checked chat request."""

    request: AnswerRequest
    settings: ServeSettings
    choices: int
    as_json: bool
    layout: ChainLayout | None  # None with as_json: the whole chain
    stream_usage: bool

    def build_choice(self, answer: VisualAnswer, index: int = 0) -> Choice:
        """A choice with the answer, or with a refusal if the answer abstains or does not satisfy the schema."""
        finish: Literal["stop", "length"] = "length" if answer.cut_off else "stop"
        if answer.abstain_reason is not None:
            message = self._refuse(answer, _ABSTAIN_REASONS[answer.abstain_reason])
        elif not self.as_json:
            message = ReplyMessage(content=answer.answer)
        else:
            content = render_chain(answer) if self.layout is None else self.layout.render_answer(answer)
            message = self._refuse(answer, _ABSTAIN_REASONS["schema"])
            if content is not None:
                message = ReplyMessage(content=content)
        return Choice(index=index, message=message, finish_reason=finish)

    def _refuse(self, answer: VisualAnswer, reason: str) -> ReplyMessage:
        refusal = self.settings.abstain_refusal.replace("{reason}", reason)
        content = self.settings.abstain_content.replace("{refusal}", refusal).replace("{answer}", answer.answer)
        return ReplyMessage(content=content or None, refusal=refusal or None)


def _plan_completion(request: ChatRequest, settings: ServeSettings) -> _CompletionPlan:
    """Check what the schema of requests cannot. Raises ApiError (400)."""
    given = request.response_format
    choices = request.n or 1
    if choices > settings.max_choices:
        raise _refuse_option("n", f"expected at most {settings.max_choices} choices")
    if request.stream and choices > 1:
        raise _refuse_option("n", "expected one choice in a stream")
    if request.stream_options is not None and not request.stream:
        raise _refuse_option("stream_options", "expected stream options only with stream: true")
    return _CompletionPlan(
        request=replace(read_conversation(request, settings), decoding=_read_decoding(request, settings)),
        settings=settings,
        choices=choices,
        as_json=isinstance(given, JsonFormat | SchemaFormat),
        layout=ChainLayout(given.json_schema.definition) if isinstance(given, SchemaFormat) else None,
        stream_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _read_decoding(request: ChatRequest, settings: ServeSettings) -> AnswerDecoding:
    limits = {limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None}
    if len(limits) > 1:
        raise _refuse_option("max_tokens", "max_tokens and max_completion_tokens are the same limit; expected one")
    if request.temperature and not settings.sampling:
        raise _refuse_option("temperature", "this server decodes greedily; expected a temperature of 0 or null")
    if request.temperature and request.top_p not in (None, 1):
        raise _refuse_option("top_p", "top_p is not supported with a temperature above 0; expected 1 or null")
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if not all(stop):
        raise _refuse_option("stop", "expected stop sequences that are not empty")
    return AnswerDecoding(
        max_new_tokens=min(limits, default=None),
        temperature=request.temperature or 0.0,
        seed=(request.seed or 0) % 2**62,  # numpy's generators and vLLM take no negative ones
        stop=tuple(stop),
    )


def _refuse_option(name: str, message: str) -> ApiError:
    return ApiError(400, "unsupported_value", message, param=name)


async def _answer_choices(service: AnswerService, plan: _CompletionPlan) -> list[ServedAnswer]:
    """One answer for each choice. Greedy choices are all the same, so only one is computed."""
    decoding = plan.request.decoding
    if not decoding.temperature:
        return [await service.handle_request(plan.request)] * plan.choices
    # a choice takes the seeds after those of the choice before it, one for each region; no answer has 1,000 regions
    seeds = [decoding.seed + 1000 * choice for choice in range(plan.choices)]
    requests = [replace(plan.request, decoding=replace(decoding, seed=seed)) for seed in seeds]
    return list(await asyncio.gather(*map(service.handle_request, requests)))


def _build_completion(answers: list[ServedAnswer], plan: _CompletionPlan, head: dict[str, Any]) -> Completion:
    chains = [answered.answer for answered in answers]
    computed = answers if plan.request.decoding.temperature else answers[:1]
    return Completion(
        **head,
        choices=[plan.build_choice(chain, index) for index, chain in enumerate(chains)],
        usage=_build_usage([answered.tokens for answered in computed]),
        clincot=chains[0],
        clincot_choices=chains if len(chains) > 1 else None,
    )


def _build_usage(counts: list[TokenCount]) -> Usage | None:
    """The tokens of a completion; None if the predictor does not report those of the prompts."""
    prompts = [count.prompt for count in counts if count.prompt is not None]
    if len(prompts) < len(counts):
        return None
    prompt, written = sum(prompts), sum(count.written for count in counts)
    return Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)


async def _stream_answer(service: AnswerService, plan: _CompletionPlan, head: dict[str, Any]) -> Response:
    """Start a stream when the regions are known.

    Errors until then are returned with their HTTP status.
    """
    loop = asyncio.get_running_loop()
    regions: asyncio.Future[RegionsProposed] = loop.create_future()

    def on_regions(proposed: RegionsProposed) -> None:  # called in the chain's thread
        loop.call_soon_threadsafe(regions.set_result, proposed)

    work = asyncio.create_task(service.handle_request(plan.request, on_regions))
    either: set[asyncio.Future[Any]] = {work, regions}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        work.cancel()
        raise
    if not regions.done():
        work.result()  # raises the error that ended the work early
    return StreamingResponse(_iter_chunks(head, regions.result(), work, plan), media_type="text/event-stream")


async def _iter_chunks(
    head: dict[str, Any], proposed: RegionsProposed, work: asyncio.Task[ServedAnswer], plan: _CompletionPlan
) -> AsyncIterator[str]:
    """Yield the regions first and the answer, word by word, when it is known.

    The answer is known as a whole only after the policy has answered from all regions. An error after the first chunk
    is sent as an event with `error`, which OpenAI's clients understand.
    """
    head = {**head, "object": "chat.completion.chunk", **({"usage": None} if plan.stream_usage else {})}

    def event(delta: dict[str, str], finish: str | None = None, **extra: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return f"data: {json.dumps({**head, 'choices': [choice], **extra})}\n\n"

    try:
        yield event({"role": "assistant", "content": ""}, clincot=proposed.model_dump(mode="json", by_alias=True))
        try:
            answered = await work
        except RequestCancelled:
            return
        except Exception as error:  # the HTTP status has been sent already
            refused = convert_error(error)
            metrics.REFUSED.labels(refused.code).inc()
            yield f"data: {json.dumps(refused.build_body(CHAT_PATH))}\n\n"
            return
        choice = plan.build_choice(answered.answer)
        if choice.message.content is not None:
            for position, word in enumerate(choice.message.content.split(" ")):
                yield event({"content": word if position == 0 else f" {word}"})
        if choice.message.refusal is not None:
            yield event({"refusal": choice.message.refusal})
        yield event({}, choice.finish_reason, clincot=answered.answer.model_dump(mode="json", by_alias=True))
        if plan.stream_usage:
            usage = _build_usage([answered.tokens])
            counted = None if usage is None else usage.model_dump()
            yield f"data: {json.dumps({**head, 'choices': [], 'usage': counted})}\n\n"
        yield "data: [DONE]\n\n"
    finally:
        work.cancel()
