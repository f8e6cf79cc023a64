"""The Grafana dashboard uses metrics that exist, and the chart installs it."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.chart.rendering import CHART, ROOT, of_kind, pods, rendered

DASHBOARD = CHART / "dashboards" / "clincot.json"
REFERENCE = ROOT / "docs" / "reference" / "metrics.md"  # generated from the code
SUFFIXES = re.compile(r"_(bucket|sum|count)$")
# vLLM 0.32, vllm/v1/metrics/loggers.py; prometheus_client adds _total to counters
VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_preemptions_total",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:request_queue_time_seconds",
    "vllm:time_to_first_token_seconds",
    "vllm:e2e_request_latency_seconds",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
}


def list_panels() -> list[dict[str, Any]]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [panel for panel in panels if panel["type"] != "row"]


def test_every_metric_exists() -> None:
    known = set(re.findall(r"^\| `(clincot_\w+)`", REFERENCE.read_text(encoding="utf-8"), re.MULTILINE))
    known |= VLLM | {"process_resident_memory_bytes"}  # the last is prometheus_client's own
    used = set()
    for panel in list_panels():
        for target in panel["targets"]:
            names = re.findall(r"\b(?:clincot|process|vllm:)\w+", target["expr"])
            assert names, panel["title"]
            used |= {SUFFIXES.sub("", name) for name in names}
    assert used <= known, used - known
    assert {"clincot_stage_seconds", "vllm:kv_cache_usage_perc"} <= used


def test_every_panel_says_what_it_shows() -> None:
    panels = list_panels()
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [panel["title"] for panel in panels if not panel["description"].endswith(".")] == []


def test_the_chart_installs_the_dashboard_on_demand() -> None:
    assert of_kind(rendered("cpu"), "ConfigMap", "clincot-dashboards") == []
    (found,) = of_kind(
        rendered("cpu", "--set", "monitoring.dashboards.enabled=true"), "ConfigMap", "clincot-dashboards"
    )
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["clincot.json"]) == json.loads(DASHBOARD.read_text(encoding="utf-8"))


def test_every_container_that_serves_has_a_liveness_probe() -> None:
    """Of Deployments, StatefulSets, runtimes and InferenceServices; Jobs end by themselves."""
    arguments = ("--set", "monitoring.serviceMonitor=true")
    for profile in ("cpu", "production", "trial"):
        for name, pod in pods(rendered(profile, *arguments)):
            if not name.startswith(("Job", "Pod")):
                missing = [one["name"] for one in pod["containers"] if "livenessProbe" not in one]
                assert missing == [], (profile, name)


def test_the_time_of_a_pod_to_end_comes_from_one_value() -> None:
    settings = rendered("cpu", "--set", "server.graceSeconds=120", "--set", "server.drainSeconds=7")
    (config,) = of_kind(settings, "ConfigMap", "clincot", "clincot")
    assert "grace_s: 120" in config["data"]["service.yaml"]
    assert "drain_s: 7" in config["data"]["service.yaml"]
