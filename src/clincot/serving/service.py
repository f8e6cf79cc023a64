"""The service that answers requests of all protocols.

A request waits for a free slot, its chain runs in a thread, and the overlay is drawn if the client wants one.
"""

from __future__ import annotations

import asyncio
import base64
import contextvars
import io
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from PIL import Image

from clincot.config.server_settings import ServeSettings
from clincot.drawing import BLUE, BoxAnnotation, ImagePanel, render_panels
from clincot.errors import PromptTooLong
from clincot.generation.visual_cot import (
    GREEDY,
    AnswerDecoding,
    ImageQuestion,
    RegionsProposed,
    VisualAnswer,
    answer_question,
)
from clincot.images import open_image
from clincot.models.protocols import Generation, Policy, PolicyWrapper
from clincot.prompts import Conversation
from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, build_deadline_error
from clincot.serving.backend import Backend
from clincot.serving.blank_image import check_contrast
from clincot.serving.fetch import ImageFetcher
from clincot.serving.image_decoder import ImageDecoder
from clincot.serving.image_input import check_question, is_url, read_image
from clincot.serving.request_context import RequestContext, current_request
from clincot.serving.spool import Spool, open_spool
from clincot.serving.tracing import StageSequence, measure_stage

DOWNLOADS = 2  # images from URLs that are in memory at the same time, besides those in request bodies
_SHOWN_PX = 1600  # longest side of an image in a reply
RegionsCallback = Callable[[RegionsProposed], None]


@dataclass(frozen=True)
class AnswerRequest:
    """A client's request as received; nothing is checked yet."""

    question: str
    image: str | bytes  # data URI, base64 or URL; bytes: the image file itself
    overlay: bool = False
    with_image: bool = False  # return the image to which the boxes refer
    instructions: str = ""
    history: tuple[tuple[str, str], ...] = ()
    decoding: AnswerDecoding = GREEDY


@dataclass
class TokenCount:
    """Tokens of a request's conversations in which the policy wrote something."""

    prompt: int | None = 0  # None: the predictor does not report it
    written: int = 0

    def add_replies(self, replies: Sequence[Generation]) -> None:
        """Count the prompts and the written tokens of a call."""
        for reply in replies:
            known = self.prompt is not None and reply.prompt_tokens is not None
            self.prompt = (self.prompt or 0) + (reply.prompt_tokens or 0) if known else None
            self.written += len(reply.token_logprobs)


@dataclass(frozen=True)
class ServedAnswer:
    """An answer and what it cost."""

    answer: VisualAnswer
    tokens: TokenCount


class AnswerService:
    """Answers requests with one backend.

    RequestMiddleware has limited the number of waiting requests before. spool: the server's temporary folder; by
    default the service makes one.
    """

    def __init__(
        self,
        backend: Backend,
        settings: ServeSettings,
        fetcher: ImageFetcher | None = None,
        *,
        spool: Spool | None = None,
    ) -> None:
        self.backend, self.settings = backend, settings
        self._stack = ExitStack()
        self._spool = spool or self._stack.enter_context(open_spool())
        self.decoder = ImageDecoder(settings, self._spool)
        self._stack.callback(self.decoder.close)
        self._fetcher = fetcher or ImageFetcher(
            settings.url_hosts, max_bytes=settings.max_image_bytes, timeout_s=settings.url_s
        )
        self._downloads = threading.BoundedSemaphore(DOWNLOADS)
        self._turns = asyncio.Semaphore(settings.running)
        self._threads = ThreadPoolExecutor(max_workers=settings.running, thread_name_prefix="chain")

    async def handle_request(
        self, request: AnswerRequest, on_regions: RegionsCallback = lambda _: None
    ) -> ServedAnswer:
        """Answer one request.

        on_regions: called in another thread when the regions are known. Raises ApiError, RequestCancelled, ModelFailed.
        """
        checked = _check_texts(request, self.settings)
        context = current_request.get()
        async with self._wait_for_turn(context):
            loop = asyncio.get_running_loop()
            try:
                chain = partial(self._run_chain, checked, context, on_regions)
                # in a copy of this coroutine's context, so that the thread's spans belong to the request's
                served = await loop.run_in_executor(self._threads, contextvars.copy_context().run, chain)
            except asyncio.CancelledError:
                context.cancel()
                raise
        answer = served.answer
        metrics.REGIONS.observe(len(answer.regions))
        metrics.CONFIDENCE.observe(answer.confidence)
        metrics.ABSTENTIONS.inc(answer.abstained)
        return served

    def close(self) -> None:
        """Wait for running chains to end and close the backend."""
        self._threads.shutdown()
        self.backend.close()
        self._stack.close()

    @asynccontextmanager
    async def _wait_for_turn(self, context: RequestContext) -> AsyncIterator[None]:
        metrics.WAITING.inc()
        try:
            with measure_stage("queue"):
                async with asyncio.timeout(max(0.0, context.remaining_s)):
                    await self._turns.acquire()
        except TimeoutError:
            raise build_deadline_error() from None
        finally:
            metrics.WAITING.dec()
        metrics.RUNNING.inc()
        try:
            yield
        finally:
            metrics.RUNNING.dec()
            self._turns.release()

    def _run_chain(self, request: AnswerRequest, context: RequestContext, on_regions: RegionsCallback) -> ServedAnswer:
        context.check_alive()
        with ExitStack() as stack:
            folder = stack.enter_context(self._spool.open_folder())
            if isinstance(request.image, str) and is_url(request.image):
                stack.enter_context(self._downloads)
            encoded = read_image(request.image, self.settings, self._fetcher)
            study = stack.enter_context(self.decoder.open_picture(encoded, folder, context))
            del encoded
            picture = folder / study.image
            check_contrast(picture, self.settings.min_contrast)
            tokens = TokenCount()
            asked = ImageQuestion(study, folder, request.question, request.instructions, request.history)
            answer = self._answer_question(asked, request.decoding, tokens, context, on_regions)
            pictures = {}
            if request.overlay:
                with measure_stage("overlay"):
                    pictures["overlay"] = _draw_overlay(picture, answer)
            if request.with_image:
                pictures["image"] = _encode_image(open_image(picture))
            return ServedAnswer(answer.model_copy(update=pictures), tokens)

    def _answer_question(
        self,
        asked: ImageQuestion,
        decoding: AnswerDecoding,
        tokens: TokenCount,
        context: RequestContext,
        on_regions: RegionsCallback,
    ) -> VisualAnswer:
        with StageSequence() as stages:

            def on_regions_known(proposed: RegionsProposed) -> None:
                stages.enter("answers")
                on_regions(proposed)

            stages.enter("regions")
            try:
                with self.backend.open_policy(context) as policy:
                    counted = _CountingPolicy(policy, tokens)
                    return answer_question(asked, counted, self.settings, decoding=decoding, tell=on_regions_known)
            except PromptTooLong as error:  # the code is OpenAI's
                raise ApiError(400, "context_length_exceeded", str(error), param="question") from None


class _CountingPolicy(PolicyWrapper):
    """A policy whose tokens are counted."""

    def __init__(self, policy: Policy, tokens: TokenCount) -> None:
        super().__init__(policy)
        self._tokens = tokens

    def generate(
        self, conversations: Sequence[Conversation], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        replies = super().generate(conversations, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)
        self._tokens.add_replies(replies)
        return replies


def _check_texts(request: AnswerRequest, settings: ServeSettings) -> AnswerRequest:
    """The request with its texts checked. Raises ApiError."""
    instructions, history = request.instructions.strip(), []
    if instructions:
        instructions = check_question(instructions, settings, "messages")
    for question, answer in request.history:
        history.append((check_question(question, settings, "messages"), check_question(answer, settings, "messages")))
    return replace(
        request,
        question=check_question(request.question, settings),
        instructions=instructions,
        history=tuple(history),
    )


def _encode_image(image: Image.Image) -> str:
    """The image as a data URI of a PNG, reduced to _SHOWN_PX."""
    image.thumbnail((_SHOWN_PX, _SHOWN_PX))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _draw_overlay(image: Path, answer: VisualAnswer) -> str:
    """Draw the winning region onto the image; returns a data URI of a PNG."""
    region = answer.regions[answer.winner]
    panel = ImagePanel(
        open_image(image),
        (BoxAnnotation(region.box, BLUE),),
        f"{answer.answer} ({answer.confidence:.2f})",
        (f"{region.hypothesis}, by {region.grounder}",),
    )
    return _encode_image(render_panels([panel], "where it was seen"))
