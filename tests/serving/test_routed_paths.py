"""The chart's Ingress and HTTPRoute lead to every path that the server has for users, and to no other."""

from __future__ import annotations

import re

import httpx
import pytest

from clincot.config.server_settings import ServeSettings
from clincot.serving.middleware import CLOSED_PATHS
from tests.chart.draw_checks import routes_path
from tests.chart.test_route import DIRECT, INGRESS, find_routes
from tests.support.model_servers import Parrot, serving_here

UNROUTED = {"/metrics"}  # for Prometheus, which scrapes pods


@pytest.mark.parametrize("flags", [INGRESS, DIRECT], ids=["ingress", "httproute"])
def test_every_documented_path_but_metrics_is_routed(flags: tuple[str, ...]) -> None:
    (route,) = find_routes(*flags)
    with serving_here(Parrot(), ServeSettings()) as url:
        paths = {path.replace("{model_name}", "policy") for path in httpx.get(f"{url}/openapi.json").json()["paths"]}
        page = httpx.get(url, headers={"Accept": "text/html"}).text
    assert {"/", "/metrics", "/v1/chat/completions", "/v2/models/policy/infer"} <= paths
    parts = {f"/{part}" for part in re.findall(r'(?:href|src)="(page/[^"]+)"', page)}
    assert len(parts) == 2  # the style sheet and the script
    open_paths = {path for path in paths if not CLOSED_PATHS.fullmatch(path)} | parts | {"/openapi.json"}
    assert {path for path in open_paths if not routes_path(route, path)} == UNROUTED
