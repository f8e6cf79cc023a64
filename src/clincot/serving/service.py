"""From a checked question and image to an answer: waits for its turn, runs the chain in a thread, draws the overlay."""

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

from clincot.drawing import BLUE, BoxAnnotation, ImagePanel, render_panels
from clincot.generation.visual_cot import ImageQuestion, RegionsProposed, VisualAnswer, answer_question
from clincot.images import open_image
from clincot.serving import metrics
from clincot.serving.api_errors import build_deadline_error
from clincot.serving.backend import Backend
from clincot.serving.fetch import ImageFetcher
from clincot.serving.image_input import check_question, read_image, store_image
from clincot.serving.request_context import RequestContext, current_request
from clincot.serving.server_settings import ServeSettings

RegionsCallback = Callable[[RegionsProposed], None]


@dataclass(frozen=True)
class AnswerRequest:
    """What a client asks for, as sent: nothing is checked yet."""

    question: str
    image: str  # data URI, base64, or an address
    overlay: bool = False


class AnswerService:
    """Answers orders with one backend. `waiting` is bounded before, by the gate."""

    def __init__(self, backend: Backend, settings: ServeSettings, fetcher: ImageFetcher | None = None) -> None:
        self.backend, self.settings = backend, settings
        self._fetcher = fetcher or ImageFetcher(
            settings.url_hosts, max_bytes=settings.max_image_bytes, timeout_s=settings.url_s
        )
        self._turns = asyncio.Semaphore(settings.running)
        self._threads = ThreadPoolExecutor(max_workers=settings.running, thread_name_prefix="chain")

    async def handle_request(self, order: AnswerRequest, tell: RegionsCallback = lambda _: None) -> VisualAnswer:
        """`tell` is called, in another thread, when the regions are known. Raises Refused, Cancelled or ModelFailed."""
        question = check_question(order.question, self.settings)
        ticket = current_request.get()
        async with self._wait_for_turn(ticket):
            loop = asyncio.get_running_loop()
            try:
                given = await loop.run_in_executor(self._threads, self._run_chain, question, order, ticket, tell)
            except asyncio.CancelledError:
                ticket.cancel()
                raise
        metrics.REGIONS.observe(len(given.regions))
        metrics.CONFIDENCE.observe(given.confidence)
        metrics.ABSTENTIONS.inc(given.abstained)
        return given

    def close(self) -> None:
        self._threads.shutdown()
        self.backend.close()

    @asynccontextmanager
    async def _wait_for_turn(self, ticket: RequestContext) -> AsyncIterator[None]:
        metrics.WAITING.inc()
        try:
            async with asyncio.timeout(max(0.0, ticket.remaining_s)):
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
        self, question: str, order: AnswerRequest, ticket: RequestContext, tell: RegionsCallback
    ) -> VisualAnswer:
        ticket.check_alive()
        with tempfile.TemporaryDirectory(prefix="clincot-") as name:
            folder = Path(name)
            study = store_image(read_image(order.image, self.settings, self._fetcher), folder, self.settings)
            with self.backend.open_policy(ticket) as policy:
                answer = answer_question(ImageQuestion(study, folder, question), policy, self.settings, tell=tell)
            if not order.overlay:
                return answer
            return answer.model_copy(update={"overlay": _draw_overlay(folder / study.image, answer)})


def _draw_overlay(image: Path, answer: VisualAnswer) -> str:
    """The image with the winning region drawn, as a data URI of a PNG."""
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
