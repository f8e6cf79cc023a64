"""The queries of the chart's dashboards and alerts, and the metrics and labels in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.chart.rendering import CHART, of_kind, rendered

DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
# Labels that Prometheus adds to every series of a ServiceMonitor's target.
TARGET_LABELS = frozenset({"namespace", "pod", "service", "job", "instance", "endpoint", "container"})
_WORDS = {"by", "without", "on", "ignoring", "group_left", "group_right", "and", "or", "unless", "bool", "offset"}
_MATCHER = re.compile(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"")
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_NAME = re.compile(r"[a-zA-Z_:][\w:]*")


class Query(NamedTuple):
    """A query in PromQL, and where it is."""

    where: str
    expression: str


class Selected(NamedTuple):
    """The metrics of a query with the labels by which it selects their series, and the labels of its groups."""

    metrics: dict[str, frozenset[str]]
    groups: frozenset[str]


def list_panels() -> list[dict[str, Any]]:
    """Return the panels of all dashboards, without the headings of rows."""
    found = [json.loads(path.read_text(encoding="utf-8"))["panels"] for path in DASHBOARDS]
    return [panel for panels in found for panel in panels if panel["type"] != "row"]


def list_queries() -> Iterator[Query]:
    """Yield every query of the dashboards and of the alerts of values-production.yaml."""
    for panel in list_panels():
        for target in panel["targets"]:
            yield Query(f"panel {panel['title']}", target["expr"])
    for path in DASHBOARDS:
        for variable in json.loads(path.read_text(encoding="utf-8"))["templating"]["list"]:
            if variable["type"] == "query":
                yield Query(f"variable {variable['name']}", _read_variable(variable["query"]["query"]))
    (rule,) = of_kind(rendered("production"), "PrometheusRule")
    for group in rule["spec"]["groups"]:
        for one in group["rules"]:
            yield Query(f"alert {one['alert']}", one["expr"])


def _read_variable(text: str) -> str:
    """label_values(METRIC, LABEL) lists the values of a label -> the query `sum by (LABEL) (METRIC)`."""
    found = re.fullmatch(r"label_values\((.*), *(\w+)\)", text)
    assert found is not None, text
    return f"sum by ({found[2]}) ({found[1]})"


def read_query(expression: str) -> Selected:
    """Return what a query selects. It knows the part of PromQL that the chart uses, and refuses `}` in a text."""
    metrics: dict[str, frozenset[str]] = {}
    for name, matchers in _SELECTOR.findall(expression):
        metrics[name] = metrics.get(name, frozenset()) | set(_MATCHER.findall(matchers))
    groups = {label for part in _GROUPING.findall(expression) for label in _NAME.findall(part)}
    rest = _SELECTOR.sub(" ", _GROUPING.sub(" ", expression))
    rest = re.sub(r"\[[^\]]*\]", " ", rest)
    for found in _NAME.finditer(rest):
        is_function = rest[found.end() :].lstrip().startswith("(")
        if not is_function and found[0] not in _WORDS:
            metrics.setdefault(found[0], frozenset())
    return Selected(metrics, frozenset(groups))


def fill_in_variables(expression: str) -> str:
    """Return a panel's query as Grafana sends it."""
    return expression.replace("$__rate_interval", "5m").replace("$namespace", "clincot")
