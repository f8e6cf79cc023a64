"""The chart's dashboards and alerts use only metrics and labels that servers really export.

The servers are scraped: `clincot serve` after answers and refusals, and the exporter of a line's rounds. vLLM's own
metrics are a list from its source (tests/support/vllm_metrics.py).
"""

from __future__ import annotations

import re

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from clincot.registry import champion
from clincot.runs.exporter import LineStateCollector
from clincot.serving.metrics import STAGES
from clincot.storage.folder_store import FolderStore
from tests.chart.metric_queries import TARGET_LABELS, Query, Selected, list_queries, read_query
from tests.runs.test_exporter import play
from tests.serving.conftest import KEY
from tests.support.deployment_builders import LINE, published
from tests.support.exported_samples import Samples, read_samples
from tests.support.model_servers import PREDICT, Served, v1
from tests.support.vllm_metrics import VLLM_SAMPLES

QUERIES = list(list_queries())


@pytest.fixture(scope="module")
def scrape(served: Served, film: str) -> str:
    """What the server exports after an answer with an overlay, a refused request and one without a key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    body = v1("Is there a nodule?", film, return_overlay=True)
    assert httpx.post(served.url + PREDICT, json=body, headers=headers, timeout=600).status_code == 200
    assert httpx.post(served.url + PREDICT, json={"instances": []}, headers=headers, timeout=60).status_code == 422
    assert httpx.post(served.url + PREDICT, json=body, timeout=60).status_code == 401
    return httpx.get(f"{served.url}/metrics", timeout=60).text


@pytest.fixture(scope="module")
def exported(scrape: str, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """All samples: of the server, of the exporter of a line with a champion and rounds, and of vLLM."""
    folder = tmp_path_factory.mktemp("line")
    store = FolderStore(folder / "store")
    champion.create_champion_pointer(store, published(store, folder, 1.0), by="ann")
    play(store, "promote", "keep")
    registry = CollectorRegistry()
    registry.register(LineStateCollector(store, LINE))
    return read_samples(scrape) | read_samples(generate_latest(registry).decode()) | VLLM_SAMPLES


@pytest.mark.parametrize("query", QUERIES, ids=[query.where for query in QUERIES])
def test_metrics_and_labels_are_exported(query: Query, exported: Samples) -> None:
    used = read_query(query.expression)
    assert used.metrics
    assert list_unknown(used, exported) == set()


def list_unknown(used: Selected, exported: Samples) -> set[str]:
    """Return the metrics that nothing exports, and the labels that no metric of the query has."""
    unknown = set(used.metrics) - set(exported)
    for name in set(used.metrics) - unknown:
        unknown |= {f"{name}{{{label}}}" for label in used.metrics[name] - exported[name] - TARGET_LABELS}
    labels = frozenset().union(*(exported.get(name, frozenset()) for name in used.metrics))
    return unknown | (used.groups - labels - TARGET_LABELS)


@pytest.mark.parametrize(
    ("expression", "unknown"),
    [
        ("clincot_rounds_since_promotions", {"clincot_rounds_since_promotions"}),
        ("clincot_requests", {"clincot_requests"}),  # its samples end in _total
        ('clincot_requests_total{code="500"}', {"clincot_requests_total{code}"}),
        ("sum by (phase) (clincot_stage_seconds_sum)", {"phase"}),
        ("vllm:kv_cache_usage", {"vllm:kv_cache_usage"}),
    ],
)
def test_a_misspelt_name_is_found(expression: str, unknown: set[str], exported: Samples) -> None:
    assert list_unknown(read_query(expression), exported) == unknown


def test_panels_show_every_stage_of_the_latency(scrape: str) -> None:
    """The stages in the panels are those that the metric's help names, and the server exports no other."""
    (family,) = STAGES.collect()
    named = family.documentation.partition("request: ")[2].replace("; and of each call of the model:", ",")
    stages = set(re.findall(r"\w+", named))
    assert {"queue", "regions", "answers", "write", "p_yes"} <= stages
    for sample in ("clincot_stage_seconds_bucket", "clincot_stage_seconds_sum"):
        queries = " ".join(query.expression for query in QUERIES if sample in query.expression)
        shown = {stage for part in re.findall(r'stage=~"([^"]+)"', queries) for stage in part.split("|")}
        assert shown == (stages if sample.endswith("bucket") else stages - {"write", "p_yes"})
    assert set(re.findall(r'clincot_stage_seconds_count\{stage="([^"]+)"', scrape)) <= stages
