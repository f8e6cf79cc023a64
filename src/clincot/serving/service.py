"""The service that answers requests of all protocols.

A request waits for a free slot, its chain runs in a thread, and the overlay is drawn if the client wants one.
"""

from __future__ import annotations

import asyncio
import base64
import io
import tempfile
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from clincot.config.server_settings import ServeSettings
from clincot.drawing import BLUE, BoxAnnotation, ImagePanel, render_panels
from clincot.errors import PromptTooLong
from clincot.generation.visual_cot import ImageQuestion, RegionsProposed, VisualAnswer, answer_question
from clincot.images import open_image
from clincot.serving import metrics
from clincot.serving.api_errors import ApiError, build_deadline_error
from clincot.serving.backend import Backend
from clincot.serving.fetch import ImageFetcher
from clincot.serving.image_input import check_question, read_image, store_image
from clincot.serving.request_context import RequestContext, current_request

RegionsCallback = Callable[[RegionsProposed], None]


@dataclass(frozen=True)
class AnswerRequest:
    """A client's request as received; nothing is checked yet."""

    question: str
    image: str  # data URI, base64 or URL
    overlay: bool = False


class AnswerService:
    """Answers requests with one backend.

    RequestMiddleware has limited the number of waiting requests before.
    """

    def __init__(self, backend: Backend, settings: ServeSettings, fetcher: ImageFetcher | None = None) -> None:
        self.backend, self.settings = backend, settings
        self._fetcher = fetcher or ImageFetcher(
            settings.url_hosts, max_bytes=settings.max_image_bytes, timeout_s=settings.url_s
        )
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
                answer = await loop.run_in_executor(
                    self._threads, self._run_chain, question, request, context, on_regions
                )
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

    @asynccontextmanager
    async def _wait_for_turn(self, context: RequestContext) -> AsyncIterator[None]:
        metrics.WAITING.inc()
        try:
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
        with tempfile.TemporaryDirectory(prefix="clincot-") as name:
            folder = Path(name)
            study = store_image(read_image(request.image, self.settings, self._fetcher), folder, self.settings)
            try:
                with self.backend.open_policy(context) as policy:
                    asked = ImageQuestion(study, folder, question)
                    answer = answer_question(asked, policy, self.settings, tell=on_regions)
            except PromptTooLong as error:  # the code is OpenAI's
                raise ApiError(400, "context_length_exceeded", str(error), param="question") from None
            if not request.overlay:
                return answer
            return answer.model_copy(update={"overlay": _draw_overlay(folder / study.image, answer)})


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
