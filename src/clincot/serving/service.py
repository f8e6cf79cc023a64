"""The service that answers requests of all protocols.

A request waits for a free slot, its chain runs in a thread, and the overlay is drawn if the client wants one.
"""

from __future__ import annotations

import asyncio
import base64
import contextvars
import io
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from clincot.drawing import BLUE, BoxAnnotation, ImagePanel, render_panels
from clincot.errors import PromptTooLong
from clincot.generation.visual_cot import ImageQuestion, RegionsProposed, VisualAnswer, answer_question
from clincot.images import open_image
from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, build_deadline_error
from clincot.serving.backend import Backend
from clincot.serving.fetch import ImageFetcher
from clincot.serving.image_decoder import ImageDecoder
from clincot.serving.image_input import check_question, is_url, read_image
from clincot.serving.request_context import RequestContext, current_request
from clincot.serving.server_settings import ServeSettings
from clincot.serving.spool import Spool, open_spool
from clincot.serving.tracing import StageSequence, measure_stage

DOWNLOADS = 2  # images from URLs that are in memory at the same time, besides those in request bodies
RegionsCallback = Callable[[RegionsProposed], None]


@dataclass(frozen=True)
class AnswerRequest:
    """A client's request as received; nothing is checked yet."""

    question: str
    image: str  # data URI, base64 or URL
    overlay: bool = False


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
    ) -> VisualAnswer:
        """Answer one request.

        on_regions: called in another thread when the regions are known. Raises ApiError, RequestCancelled, ModelFailed.
        """
        question = check_question(request.question, self.settings)
        context = current_request.get()
        async with self._wait_for_turn(context):
            loop = asyncio.get_running_loop()
            try:
                chain = partial(self._run_chain, question, request, context, on_regions)
                # in a copy of this coroutine's context, so that the thread's spans belong to the request's
                answer = await loop.run_in_executor(self._threads, contextvars.copy_context().run, chain)
            except asyncio.CancelledError:
                context.cancel()
                raise
        metrics.REGIONS.observe(len(answer.regions))
        metrics.CONFIDENCE.observe(answer.confidence)
        metrics.ABSTENTIONS.inc(answer.abstained)
        return answer

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

    def _run_chain(
        self, question: str, request: AnswerRequest, context: RequestContext, on_regions: RegionsCallback
    ) -> VisualAnswer:
        context.check_alive()
        with ExitStack() as stack:
            folder = stack.enter_context(self._spool.open_folder())
            if is_url(request.image):
                stack.enter_context(self._downloads)
            encoded = read_image(request.image, self.settings, self._fetcher)
            study = stack.enter_context(self.decoder.open_picture(encoded, folder, context))
            del encoded
            answer = self._answer_question(ImageQuestion(study, folder, question), context, on_regions)
            if not request.overlay:
                return answer
            with measure_stage("overlay"):
                return answer.model_copy(update={"overlay": _draw_overlay(folder / study.image, answer)})

    def _answer_question(
        self, asked: ImageQuestion, context: RequestContext, on_regions: RegionsCallback
    ) -> VisualAnswer:
        with StageSequence() as stages:

            def on_regions_known(proposed: RegionsProposed) -> None:
                stages.enter("answers")
                on_regions(proposed)

            stages.enter("regions")
            try:
                with self.backend.open_policy(context) as policy:
                    return answer_question(asked, policy, self.settings, tell=on_regions_known)
            except PromptTooLong as error:  # the code is OpenAI's
                raise ApiError(400, "context_length_exceeded", str(error), param="question") from None


def _draw_overlay(image: Path, answer: VisualAnswer) -> str:
    """Draw the winning region onto the image; returns a data URI of a PNG."""
    region = answer.regions[answer.winner]
    panel = ImagePanel(
        open_image(image),
        (BoxAnnotation(region.box, BLUE),),
        f"{answer.answer} ({answer.confidence:.2f})",
        (f"{region.hypothesis}, by {region.grounder}",),
    )
    buffer = io.BytesIO()
    render_panels([panel], "where it was seen").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
