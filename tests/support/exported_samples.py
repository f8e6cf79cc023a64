"""The names and labels of what a server exports to Prometheus."""

from __future__ import annotations

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[str, frozenset[str]]  # name of a sample: its labels


def read_samples(text: str) -> Samples:
    """Return the samples in Prometheus' text format, also those of metrics without a value yet."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        found |= {name: frozenset() for name in _list_names(family)}
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, frozenset()) | set(sample.labels)
    return found


def _list_names(family: Metric) -> list[str]:
    suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    return [family.name + suffix for suffix in suffixes.get(family.type, ("",))]
