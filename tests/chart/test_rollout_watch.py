"""The watch of a rollout with the settings that the chart gives to production."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.config import load_params
from clincot.deployment.deployment import resume_rollout, start_rollout
from clincot.deployment.rollout import RolledBack
from clincot.deployment.service_settings import ServiceSettings, load_service_settings
from clincot.deployment.targets.kserve import CanaryTarget
from clincot.registry import champion
from clincot.registry.manifest import Manifest
from clincot.storage.folder_store import FolderStore
from tests.chart.rendering import rendered, settings_of
from tests.deployment.test_rollout_kserve import FAST, answering
from tests.support.deployment_builders import published
from tests.support.kube_api_server import ApiServer, Script, api_server


@pytest.fixture
def service(tmp_path: Path) -> ServiceSettings:
    path = tmp_path / "service.yaml"
    path.write_text(settings_of(rendered("production"))["service.yaml"])
    return load_service_settings(path)


def test_production_counts_the_errors_of_both_replicas(tmp_path: Path, service: ServiceSettings) -> None:
    """Its server has two replicas, API keys and no route through the API server, and the watch is on all the same.

    The second replica fails 1 of 10 users' requests: 1 of 20 is more than deploy.max_error_rate (2 %).
    """
    assert (service.replicas, bool(service.api_keys_secret), bool(service.service_url)) == (2, True, True)
    store, server = FolderStore(tmp_path / "store"), ApiServer()
    base = published(store, tmp_path, 1.0)
    better = published(store, tmp_path, 2.0, over=base)
    champion.create_champion_pointer(store, base, by="ann")
    for manifest in (base, better):
        server.scripts[manifest.sha256] = Script(chat=answering(manifest.golden))
    reads = {"0": 0, "1": 0}

    def count(pod: str) -> str:
        reads[pod[-1]] += 1
        past, failed = reads[pod[-1]] - 1, pod[-1] == "1"
        good = 10 * past - past * failed + 2 * past * (not failed)  # the first also answers the two golden questions
        return (
            f'clincot_requests_total{{protocol="openai",status="200"}} {good}\n'
            f'clincot_requests_total{{protocol="openai",status="502"}} {past * failed}\n'
        )

    server.scripts[better.sha256].metrics = count
    with api_server(server) as cluster:
        # a test has no pod network, so the addresses of Services and pods are the stub's
        urls = {"service_url": server.url + "/own/{service}", "pod_metrics_url": server.url + "/pods/{pod}/metrics"}
        reached = service.model_copy(update=urls)

        def deploy(manifest: Manifest) -> None:
            target = CanaryTarget(cluster, reached, manifest.sha256, manifest.uri, FAST.steps)
            journal = start_rollout(store, manifest, FAST, target="kserve", service=reached, by="ann")
            resume_rollout(store, journal, target, wait=lambda _: None)

        deploy(base)
        with pytest.raises(RolledBack, match="1 of 20 users' requests failed"):
            deploy(better)


def test_production_decides_on_what_clients_get(tmp_path: Path) -> None:
    """The gate's arm is the one of the server's code, and both sides of a decision are evaluated with it."""
    path = tmp_path / "params.yaml"
    path.write_text(settings_of(rendered("production"))["params.yaml"])
    params = load_params(path)
    assert params.decide.arm == "served"
    assert params.decide.arm in params.evaluate.arms
