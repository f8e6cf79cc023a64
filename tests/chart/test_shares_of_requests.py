"""Shares of requests are those of questions: probes and scrapes, which ask nothing, would hide what fails."""

from __future__ import annotations

import json
import re

from tests.chart.rendering import CHART, of_kind, rendered


def test_probes_never_dilute_a_share_of_requests() -> None:
    """Four probes and scrapes a minute succeed for each replica; one question of ten a minute that fails is 10 %."""
    (rule,) = of_kind(rendered("cpu", "--set", "monitoring.rules.enabled=true"), "PrometheusRule", "clincot")
    expressions = [one["expr"] for group in rule["spec"]["groups"] for one in group["rules"]]
    panels = json.loads((CHART / "dashboards" / "clincot.json").read_text(encoding="utf-8"))["panels"]
    expressions += [target["expr"] for panel in panels for target in panel.get("targets", ())]
    shares = [text for text in expressions if text.count("clincot_requests_total{") == 2]
    assert len(shares) == 2  # the alert and the panel
    for share in shares:
        selected = re.findall(r"clincot_requests_total\{([^}]*)\}", share)
        assert all('protocol!="other"' in labels for labels in selected), share
