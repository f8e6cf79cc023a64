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

from clincot.drawing import BLUE, Marked, Panel, picture
from clincot.generation.visual_cot import Asked, Looking, VisualAnswer, answer_question
from clincot.images import open_image
from clincot.serving import metrics
from clincot.serving.api_errors import too_late
from clincot.serving.backend import Backend
from clincot.serving.fetch import Fetcher
from clincot.serving.image_input import check_question, read_image, store_image
from clincot.serving.request_context import Ticket, current
from clincot.serving.server_settings import ServeSettings

Tell = Callable[[Looking], None]


@dataclass(frozen=True)
class Order:
    """What a client asks for, as sent: nothing is checked yet."""

    question: str
    image: str  # data URI, base64, or an address
    overlay: bool = False


class Answering:
    """Answers orders with one backend. `waiting` is bounded before, by the gate."""

    def __init__(self, backend: Backend, settings: ServeSettings, fetcher: Fetcher | None = None) -> None:
        self.backend, self.settings = backend, settings
        self._fetcher = fetcher or Fetcher(
            settings.url_hosts, max_bytes=settings.max_image_bytes, timeout_s=settings.url_s
        )
        self._turns = asyncio.Semaphore(settings.running)
        self._threads = ThreadPoolExecutor(max_workers=settings.running, thread_name_prefix="chain")

    async def answer(self, order: Order, tell: Tell = lambda _: None) -> VisualAnswer:
        """`tell` is called, in another thread, when the regions are known. Raises Refused, Cancelled or ModelFailed."""
        question = check_question(order.question, self.settings)
        ticket = current.get()
        async with self._turn(ticket):
            loop = asyncio.get_running_loop()
            try:
                given = await loop.run_in_executor(self._threads, self._work, question, order, ticket, tell)
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
    async def _turn(self, ticket: Ticket) -> AsyncIterator[None]:
        metrics.WAITING.inc()
        try:
            async with asyncio.timeout(max(0.0, ticket.remaining_s)):
                await self._turns.acquire()
        except TimeoutError:
            raise too_late() from None
        finally:
            metrics.WAITING.dec()
        metrics.RUNNING.inc()
        try:
            yield
        finally:
            metrics.RUNNING.dec()
            self._turns.release()

    def _work(self, question: str, order: Order, ticket: Ticket, tell: Tell) -> VisualAnswer:
        ticket.check()
        with tempfile.TemporaryDirectory(prefix="clincot-") as name:
            folder = Path(name)
            study = store_image(read_image(order.image, self.settings, self._fetcher), folder, self.settings)
            with self.backend.policy(ticket) as policy:
                answer = answer_question(Asked(study, folder, question), policy, self.settings, tell=tell)
            if not order.overlay:
                return answer
            return answer.model_copy(update={"overlay": _overlay(folder / study.image, answer)})


def _overlay(image: Path, answer: VisualAnswer) -> str:
    """The image with the winning region drawn, as a data URI of a PNG."""
    region = answer.regions[answer.winner]
    panel = Panel(
        open_image(image),
        (Marked(region.box, BLUE),),
        f"{answer.answer} ({answer.confidence:.2f})",
        (f"{region.hypothesis}, by {region.grounder}",),
    )
    buffer = io.BytesIO()
    picture([panel], "where it was seen").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
