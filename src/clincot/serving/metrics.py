"""Prometheus metrics of the server, in addition to KServe's own.

No label contains request content.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram, generate_latest

_MOST_STALE_S = 1.0  # also if a predictor answers slowly

REQUESTS = Counter("clincot_requests", "Counts requests by protocol and HTTP status.", ["protocol", "status"])
LATENCY = Histogram(
    "clincot_request_seconds",
    "Measures the seconds from a request's acceptance to the last byte of its reply.",
    ["protocol"],
    buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
REFUSED = Counter("clincot_refused", "Counts requests that got an error instead of an answer, by error code.", ["code"])
WAITING = Gauge("clincot_queue_length", "Shows how many requests wait for a free slot.")
RUNNING = Gauge("clincot_running", "Shows how many requests are being answered.")
STAGES = Histogram(
    "clincot_stage_seconds",
    "Measures the seconds of each stage of a request: body, queue, measure, decode, regions, answers, overlay; and of "
    "each call of the model: write, p_yes.",
    ["stage"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
HELD_BYTES = Gauge("clincot_body_bytes", "Shows how many bytes of request bodies are held.")
DECODERS_LOST = Counter("clincot_decoders_lost", "Counts image decoding processes that reached a limit or crashed.")
BATCH = Histogram(
    "clincot_batch_size",
    "Measures how many conversations share a forward pass or a call to the predictor.",
    ["call"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
)
REGIONS = Histogram(
    "clincot_regions_per_answer", "Measures how many regions an answer was derived from.", buckets=range(1, 13)
)
CONFIDENCE = Histogram(
    "clincot_confidence", "Measures the confidence of answers.", buckets=[n / 10 for n in range(1, 11)]
)
ABSTENTIONS = Counter("clincot_abstentions", "Counts answers whose confidence was below the threshold.")


class Exposition:
    """The metrics as Prometheus reads them, rendered in at most a tenth of the time however often they are asked for.

    Between two renderings, which take milliseconds, the last one is returned.
    """

    def __init__(self, read_predictor: Callable[[], str]) -> None:
        self._read_predictor = read_predictor  # the metrics of a predictor beside this server; blocks
        self._lock = asyncio.Lock()
        self._text, self._valid_until = b"", 0.0

    async def render(self) -> bytes:
        """Return the metrics of this process and of the predictor."""
        async with self._lock:
            began = time.monotonic()
            if began >= self._valid_until:
                predictor = await asyncio.to_thread(self._read_predictor)
                self._text = generate_latest() + predictor.encode()
                ended = time.monotonic()
                self._valid_until = ended + min(_MOST_STALE_S, 9 * (ended - began))
            return self._text


def observe_batch(call: str, size: int, seconds: float) -> None:
    """Record a batch of `size` conversations, and how long the model took for it."""
    BATCH.labels(call).observe(size)
    observe_stage(call, seconds)


def observe_stage(stage: str, seconds: float) -> None:
    """Record the duration of one stage of a request."""
    STAGES.labels(stage).observe(seconds)
