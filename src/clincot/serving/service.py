"""The service that answers requests of all protocols.

A request waits for a free slot, its chain runs in a thread, and the overlay is drawn if the client wants one.
"""

from __future__ import annotations

import asyncio
import base64
import contextvars
import io
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
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
from clincot.records import Study
from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, build_deadline_error, number_errors
from clincot.serving.backend import Backend
from clincot.serving.fetch import ImageFetcher
from clincot.serving.image_decoder import ImageDecoder
from clincot.serving.image_input import check_question, check_role, is_url, read_image
from clincot.serving.request_context import RequestContext, current_request
from clincot.serving.spool import Spool, open_spool
from clincot.serving.tracing import StageSequence, measure_stage

DOWNLOADS = 2  # images from URLs that are in memory at the same time, besides those in request bodies
_SHOWN_PX = 1600  # longest side of an image in a reply
RegionsCallback = Callable[[RegionsProposed], None]


@dataclass(frozen=True)
class FurtherImage:
    """An image that a question is also about, such as a prior, as received."""

    image: str | bytes
    role: str = ""  # "": its number, as in "image 2"


@dataclass(frozen=True)
class AnswerRequest:
    """A client's request as received; nothing is checked yet."""

    question: str
    image: str | bytes  # data URI, base64 or URL; bytes: the image file itself
    others: tuple[FurtherImage, ...] = ()  # in order, after `image`
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
        self.decoder = ImageDecoder(settings)
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
        checked = _check_request(request, self.settings)
        context = current_request.get()
        context.on_parsed()
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
            study, *others = stack.enter_context(self._open_images(request, folder, context))
            picture = folder / study.image
            tokens = TokenCount()
            asked = ImageQuestion(
                study,
                folder,
                request.question,
                request.instructions,
                request.history,
                tuple((other, further.role) for other, further in zip(others, request.others, strict=True)),
            )
            answer = self._answer_question(asked, request.decoding, tokens, context, on_regions)
            pictures = {}
            if request.overlay:
                with measure_stage("overlay"):
                    pictures["overlay"] = _draw_overlay(picture, answer)
            if request.with_image:
                pictures["image"] = _encode_image(open_image(picture))
            return ServedAnswer(answer.model_copy(update=pictures), tokens)

    @contextmanager
    def _open_images(self, request: AnswerRequest, folder: Path, context: RequestContext) -> Iterator[list[Study]]:
        """The images of a request, first the one that it is about, each in a folder of its own below `folder`.

        The paths of the studies are relative to `folder`.
        """
        images = [request.image, *(other.image for other in request.others)]
        folders = []
        for number, image in enumerate(images, start=1):
            place = folder / str(number)
            place.mkdir()
            with number_errors("image", number, len(images)):
                self._store_image(image, place, context)
            folders.append(place)
        with self.decoder.open_pictures(folders, context) as studies:
            yield [
                study.model_copy(update={"image": f"{place.name}/{study.image}"})
                for place, study in zip(folders, studies, strict=True)
            ]

    def _store_image(self, image: str | bytes, place: Path, context: RequestContext) -> None:
        with ExitStack() as stack:
            if isinstance(image, str) and is_url(image):
                if not self._downloads.acquire(timeout=max(0.0, context.remaining_s)):
                    raise build_deadline_error()
                stack.callback(self._downloads.release)
            self.decoder.store_upload(read_image(image, self.settings, self._fetcher), place)

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


def check_image_count(count: int, settings: ServeSettings, param: str = "image") -> None:
    """Raise ApiError (400) if a question has more images than the server's setting allows."""
    limit = settings.max_images
    if count <= limit:
        return
    message = f"expected at most {limit} image{'s' * (limit > 1)} of a question (max_images), got {count}"
    if limit == 1:
        message += (
            "; the model is trained and evaluated on questions about one image, so prior and lateral images are used "
            "only if the recipe or the operator allows them"
        )
    raise ApiError(400, "too_many_images", message, param=param)


def _check_request(request: AnswerRequest, settings: ServeSettings) -> AnswerRequest:
    """The request with its texts and the number of its images checked. Raises ApiError."""
    check_image_count(1 + len(request.others), settings)
    others = []
    for number, other in enumerate(request.others, start=2):
        role = check_role(other.role) if other.role else f"image {number}"
        others.append(replace(other, role=role))
    instructions, history = request.instructions.strip(), []
    if instructions:
        instructions = check_question(instructions, settings, "messages")
    for question, answer in request.history:
        history.append((check_question(question, settings, "messages"), check_question(answer, settings, "messages")))
    return replace(
        request,
        question=check_question(request.question, settings),
        others=tuple(others),
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
