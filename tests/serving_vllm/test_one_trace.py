"""A question's trace goes on from its client through the transformer into vLLM."""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.support.model_servers import PREDICT, Served, data_uri, until, v1
from tests.support.trace_collector import Collector

TRACE = "0af7651916cd43dd8448eb211c80319c"


def test_transformer_and_predictor_have_one_trace(transformer: Served, collector: Collector, films: Path) -> None:
    """vLLM's spans belong to the client's trace, below the transformer's calls, and quote nothing of the question."""
    body = v1("Has Jane Roe a nodule?", data_uri(films / "images" / "0.png"))
    headers = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    assert httpx.post(transformer.url + PREDICT, json=body, headers=headers, timeout=600).status_code == 200
    until(lambda: collector.list_services(TRACE) == {"policy", "clincot-vllm"}, timeout_s=60)
    spans = [span for span in collector.spans if span.trace_id == TRACE]
    calls = {span.span_id for span in spans if span.name.startswith("predictor ")}
    parents = {span.span_id: span.parent_id for span in spans if span.service == "clincot-vllm"}
    assert set(parents.values()) <= calls | set(parents)
    assert set(parents.values()) & calls
    assert [span for span in spans if "Jane" in span.text or "nodule" in span.text] == []
