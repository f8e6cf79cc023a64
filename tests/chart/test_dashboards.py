"""The Grafana dashboard has queries that Prometheus accepts and panels that say what they show; the chart installs it.

tests/serving/test_watched_metrics.py compares its metrics with what servers export.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.chart.metric_queries import DASHBOARDS, fill_in_variables, list_panels, list_queries, read_query
from tests.chart.rendering import CHART, of_kind, pods, rendered
from tests.chart.test_alerts import run_promtool

DASHBOARD = CHART / "dashboards" / "clincot.json"


def test_every_panel_says_what_it_shows() -> None:
    panels = list_panels()
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert [panel["title"] for panel in panels if not panel["description"].endswith(".")] == []


def test_panels_do_not_overlap() -> None:
    """A dashboard is 24 columns wide."""
    for path in DASHBOARDS:
        taken: dict[tuple[int, int], str] = {}
        for panel in json.loads(path.read_text(encoding="utf-8"))["panels"]:
            place = panel["gridPos"]
            for x in range(place["x"], place["x"] + place["w"]):
                for y in range(place["y"], place["y"] + place["h"]):
                    assert (x, y) not in taken, (panel["title"], taken[x, y])
                    assert x < 24, panel["title"]
                    taken[x, y] = panel["title"]


def test_prometheus_accepts_every_query(tmp_path: Path) -> None:
    """Each query is the expression of a recording rule, which promtool checks."""
    rules = [
        {"record": f"query:{number}", "expr": fill_in_variables(query.expression)}
        for number, query in enumerate(list_queries())
    ]
    assert len(rules) > 30
    assert not any("$" in rule["expr"] for rule in rules)
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    done = run_promtool("check", "rules", "queries.yaml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("expression", "metrics", "groups"),
    [
        ("up", {"up": set()}, set()),
        ('sum by (le, a) (rate(x_bucket{b="1",c=~"2|3"}[5m]))', {"x_bucket": {"b", "c"}}, {"le", "a"}),
        ('x{a!="1"} / ignoring (b) group_left y > 0.5', {"x": {"a"}, "y": set()}, {"b"}),
        ("histogram_quantile(0.9, rate(v:w[$__rate_interval])) and on (pod) up", {"v:w": set(), "up": set()}, {"pod"}),
        ('x == 0 or absent(y{a="b"})', {"x": set(), "y": {"a"}}, set()),
    ],
)
def test_metrics_and_labels_of_a_query(expression: str, metrics: dict[str, set[str]], groups: set[str]) -> None:
    found = read_query(expression)
    assert ({name: set(labels) for name, labels in found.metrics.items()}, set(found.groups)) == (metrics, groups)


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
    assert "grpc" not in config["data"]["service.yaml"]


def test_a_pod_may_not_end_before_its_requests() -> None:
    """deadline_s is 60 by default, and may be set among the server's settings."""
    for flags in (("server.graceSeconds=59",), ("server.settings.deadline_s=90",)):
        with pytest.raises(AssertionError, match="seconds; a pod that ends would cut it off"):
            rendered("cpu", "--set", ",".join(flags))
    rendered("cpu", "--set", "server.settings.deadline_s=90,server.graceSeconds=90")


def test_grpc_is_served_on_demand() -> None:
    (config,) = of_kind(rendered("cpu", "--set", "server.grpc=true"), "ConfigMap", "clincot", "clincot")
    assert "grpc: true" in config["data"]["service.yaml"]
    with pytest.raises(AssertionError, match="Knative allows one in a pod"):
        rendered("cpu", "--set", "server.grpc=true,server.mode=knative")
