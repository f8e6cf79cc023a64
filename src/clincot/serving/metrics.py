"""What Prometheus sees of a server, beside KServe's own histograms. No label holds content."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter("clincot_requests", "requests by protocol and status", ["protocol", "status"])
LATENCY = Histogram(
    "clincot_request_seconds",
    "from acceptance to the last byte",
    ["protocol"],
    buckets=(0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60),
)
REFUSED = Counter("clincot_refused", "requests that were not answered, by the error's code", ["code"])
WAITING = Gauge("clincot_queue_length", "requests that wait for their turn")
RUNNING = Gauge("clincot_running", "requests that are being answered")
BATCH = Histogram(
    "clincot_batch_size",
    "conversations of a forward pass (or of a call to the predictor)",
    ["call"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
)
REGIONS = Histogram("clincot_regions_per_answer", "regions that an answer was read from", buckets=range(1, 13))
CONFIDENCE = Histogram("clincot_confidence", "of answers", buckets=[n / 10 for n in range(1, 11)])
ABSTENTIONS = Counter("clincot_abstentions", "answers whose confidence was under the threshold")


def observe_batch(call: str, size: int) -> None:
    BATCH.labels(call).observe(size)
