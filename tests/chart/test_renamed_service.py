"""A release whose endpoint gets another name: Helm and the rollout's Job together leave exactly one service.

Helm is the real one. The commands of the Job are run by the code of `clincot deploy`, on a KServe stub that shares its
objects with the API server stub of Helm.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clincot.clients.kubernetes import Cluster
from clincot.deployment.deployment import resume_rollout, start_rollout
from clincot.deployment.inference_service import SERVICE_LABEL
from clincot.deployment.journal import RolloutJournal
from clincot.deployment.service_settings import load_service_settings
from clincot.deployment.targets.kserve import CanaryTarget
from clincot.registry import champion
from clincot.registry.manifest import Manifest
from clincot.storage.folder_store import FolderStore
from tests.chart.rendering import CHART, GIVEN, run
from tests.support.chart_kube_server import KubeServer
from tests.support.deployment_builders import LINE, published
from tests.support.kube_api_server import ApiServer, Script, api_server
from tests.support.rollout_world import FAST, answering

Helm = Callable[..., subprocess.CompletedProcess[str]]
TRIAL = (
    *("--values", str(CHART / "values-trial.yaml"), *GIVEN["trial"]),
    *("--set", f"line={LINE},server.mode=standard,server.gatewayApi=yes"),
)


class Rollouts:
    """Runs the rollouts of the Jobs that Helm has created."""

    def __init__(self, server: KubeServer, api: ApiServer, cluster: Cluster, folder: Path) -> None:
        self.server, self.api, self.cluster, self.folder = server, api, cluster, folder
        self.store = FolderStore(folder / "store")
        self.base: Manifest = published(self.store, folder, 1.0)
        champion.create_champion_pointer(self.store, self.base, by="ann")
        api.scripts[self.base.sha256] = Script(chat=answering(self.base.golden))

    def run(self, release: str) -> RolloutJournal | None:
        """Run what the Job of a release would, with the settings that it mounts; None if there is no new Job."""
        deploys = [words for words in self.server.ran if words[0] == "deploy" and "--ask" not in words]
        self.server.ran.clear()
        if not deploys:
            return None
        name = release if "clincot" in release else f"{release}-clincot"
        path = self.folder / f"{name}.yaml"
        settings = self.server.objects[f"/api/v1/namespaces/clincot/configmaps/{name}"]["data"]
        path.write_text(settings["service.yaml"])
        service = load_service_settings(path).model_copy(update={"service_url": ""})  # a test has no pod network
        target = CanaryTarget(self.cluster, service, self.base.sha256, self.base.uri, FAST.steps)
        target.check_owner()
        journal = start_rollout(self.store, self.base, FAST, target="kserve", service=service, by=release)
        resume_rollout(self.store, journal, target, wait=lambda _: None)
        return journal

    def list_served(self) -> set[str]:
        """Return the names under which models are served."""
        found = [one for one in self.server.objects.values() if one["kind"] == "InferenceService"]
        return {one["metadata"]["labels"][SERVICE_LABEL] for one in found}


@pytest.fixture
def rollouts(server: KubeServer, tmp_path: Path) -> Iterator[Rollouts]:
    api = ApiServer(objects=server.objects)
    with api_server(api) as cluster:
        yield Rollouts(server, api, cluster, tmp_path)


def list_kinds(server: KubeServer) -> set[str]:
    return {one["kind"] for one in server.objects.values()}


def test_one_release_with_a_new_name(helm: Helm, server: KubeServer, rollouts: Rollouts, tmp_path: Path) -> None:
    """Install, rename, disable, uninstall; what is served survives all of them, under one name."""
    done = helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL)
    assert done.returncode == 0, done.stderr
    rollouts.run("clincot")
    assert rollouts.list_served() == {f"clincot-{LINE}"}

    done = helm("upgrade", "clincot", str(CHART), *TRIAL, "--set", "server.name=thorax")
    assert done.returncode == 0, done.stderr
    assert rollouts.list_served() == {f"clincot-{LINE}"}  # Helm itself takes nothing from clients
    journal = rollouts.run("clincot")
    assert journal is not None
    assert journal.last.detail == f"removed InferenceService clincot-{LINE}, a former name of the release clincot"
    assert rollouts.list_served() == {"thorax"}

    off = "server.name=thorax,server.first.enabled=false,pipeline.enabled=false"
    done = helm("upgrade", "clincot", str(CHART), *TRIAL, "--set", off)
    assert done.returncode == 0, done.stderr
    assert rollouts.run("clincot") is None
    assert rollouts.list_served() == {"thorax"}
    (command,) = [line.split() for line in done.stdout.splitlines() if " delete inferenceservice,service " in line]

    assert helm("uninstall", "clincot").returncode == 0
    assert rollouts.list_served() == {"thorax"}
    assert list_kinds(server) == {"Namespace", "InferenceService"}
    done = run("kubectl", "4", *command[1:], "--wait=false", "--kubeconfig", str(tmp_path / "kubeconfig"))
    assert done.returncode == 0, done.stderr
    assert list_kinds(server) == {"Namespace"}


def test_a_rename_while_nothing_is_rolled_out_keeps_the_old_name(
    helm: Helm, server: KubeServer, rollouts: Rollouts
) -> None:
    """Without the Job, the next promotion serves the new name; until then, the old one answers."""
    helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL)
    rollouts.run("clincot")
    off = "server.name=thorax,server.first.enabled=false"
    done = helm("upgrade", "clincot", str(CHART), *TRIAL, "--set", off)
    assert rollouts.run("clincot") is None
    assert rollouts.list_served() == {f"clincot-{LINE}"}
    assert "that one serves until the model thorax has been rolled out" in done.stdout
    assert helm("rollback", "clincot", "1").returncode == 0
    journal = rollouts.run("clincot")
    assert journal is not None
    assert journal.last.detail == ""
    assert rollouts.list_served() == {f"clincot-{LINE}"}


def test_two_releases_of_which_one_gets_a_new_name(helm: Helm, server: KubeServer, rollouts: Rollouts) -> None:
    """Each removes its own services only, and cannot take the other one's name."""
    for release in ("clincot", "second"):
        done = helm("install", release, str(CHART), "--create-namespace", *TRIAL)
        assert done.returncode == 0, done.stderr
        rollouts.run(release)
    assert rollouts.list_served() == {f"clincot-{LINE}", f"second-{LINE}"}

    for name in ("thorax", "lung"):
        done = helm("upgrade", "clincot", str(CHART), *TRIAL, "--set", f"server.name={name}")
        assert done.returncode == 0, done.stderr
        rollouts.run("clincot")
        assert rollouts.list_served() == {name, f"second-{LINE}"}

    helm("upgrade", "second", str(CHART), *TRIAL, "--set", "server.name=lung")
    with pytest.raises(Exception, match="lung in clincot is served by the release clincot, not by second"):
        rollouts.run("second")
    assert rollouts.list_served() == {"lung", f"second-{LINE}"}

    assert helm("uninstall", "clincot").returncode == 0
    helm("upgrade", "second", str(CHART), *TRIAL, "--set", "server.name=heart")
    rollouts.run("second")
    assert rollouts.list_served() == {"lung", "heart"}  # lung: of a release that is gone, and still serves
    assert helm("uninstall", "second").returncode == 0
    assert rollouts.list_served() == {"lung", "heart"}
    assert list_kinds(server) == {"Namespace", "InferenceService"}


def test_a_renamed_release_serves_on(helm: Helm, server: KubeServer, rollouts: Rollouts) -> None:
    """Another name of the chart's objects, of its ConfigMap too, changes nothing for clients."""
    helm("install", "clincot", str(CHART), "--create-namespace", *TRIAL)
    rollouts.run("clincot")
    before = {path for path, one in server.objects.items() if one["kind"] == "InferenceService"}
    done = helm("upgrade", "clincot", str(CHART), *TRIAL, "--set", "fullnameOverride=renamed-clincot")
    assert done.returncode == 0, done.stderr
    journal = rollouts.run("renamed-clincot")
    assert journal is not None
    assert journal.last.detail == ""
    assert {path for path, one in server.objects.items() if one["kind"] == "InferenceService"} == before
    assert helm("uninstall", "clincot").returncode == 0
    assert rollouts.list_served() == {f"clincot-{LINE}"}
