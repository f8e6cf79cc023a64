"""Prometheus metrics of the server, in addition to KServe's own.

No label contains request content.
"""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

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


def observe_batch(call: str, size: int) -> None:
    """Record a batch of `size` conversations."""
    BATCH.labels(call).observe(size)
