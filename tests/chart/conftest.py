"""Fixtures of the chart's tests: a cluster stub, and Helm 3 and 4 that talk to it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.chart.rendering import HELMS, run
from tests.support.chart_kube_server import KubeServer, kube_server


@pytest.fixture
def server() -> KubeServer:
    return KubeServer()


@pytest.fixture(params=HELMS)
def helm(
    request: pytest.FixtureRequest, server: KubeServer, tmp_path: Path
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Helm in the namespace clincot of the stub; the kubeconfig is in tmp_path."""
    with kube_server(server, tmp_path) as config:
        cluster = ("--namespace", "clincot", "--kubeconfig", str(config))

        def call(*words: str) -> subprocess.CompletedProcess[str]:
            waits = () if words[0] == "get" else ("--timeout", "40s")
            return run("helm", request.param, *words, *cluster, *waits)

        yield call
