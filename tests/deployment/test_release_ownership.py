"""A release that serves under a new name loses the old service only when the new one has all traffic.

A release whose own objects are renamed keeps what it serves.

A service of the release `a` is first called `chest`, then `thorax`; its ConfigMap says which name holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from clincot.clients.kubernetes import Cluster
from clincot.deployment.deployment import resume_rollout, start_rollout
from clincot.deployment.inference_service import INSTANCE_LABEL, RELEASE_LABEL, SERVICE_LABEL, build_inference_service
from clincot.deployment.journal import RolloutJournal
from clincot.deployment.rollout import RolledBack, TargetFailed
from clincot.deployment.service_settings import OwningRelease, ServiceSettings, load_service_settings
from clincot.deployment.targets.select import TARGET_CLASSES, TrafficMode
from clincot.registry import champion
from clincot.registry.manifest import Manifest
from clincot.storage.folder_store import FolderStore
from tests.support.deployment_builders import published
from tests.support.kube_api_server import ApiServer, Script, api_server
from tests.support.rollout_world import FAST, answering

SERVICES = "/apis/serving.kserve.io/v1beta1/namespaces/serving/inferenceservices"
FRONTS = "/api/v1/namespaces/serving/services"
MODES: tuple[TrafficMode, ...] = ("canary", "knative", "blue-green")


def build_settings(name: str, release: str = "a") -> ServiceSettings:
    owner = OwningRelease(name=release, config_map=f"{release}-clincot")
    return ServiceSettings(name=name, namespace="serving", instance=release, release=owner)


@dataclass
class Namespace:
    """A namespace with releases, and a store with a base and a promoted challenger."""

    store: FolderStore
    base: Manifest
    challenger: Manifest
    server: ApiServer
    cluster: Cluster
    mode: TrafficMode = "canary"

    def install(self, name: str, release: str = "a") -> None:
        """Install or upgrade a release, which then serves under this name."""
        service = build_settings(name, release).model_dump(mode="json", include={"name"})
        path = f"/api/v1/namespaces/serving/configmaps/{release}-clincot"
        self.server.objects[path] = {
            "metadata": {"name": path.rpartition("/")[2]},
            "data": {"service.yaml": yaml.safe_dump(service)},
        }

    def deploy(self, name: str, release: str = "a", *, manifest: Manifest | None = None) -> RolloutJournal:
        """Roll out under this name, whatever the release's ConfigMap says."""
        service, chosen = build_settings(name, release), manifest or self.base
        if self.mode == "knative":  # which refuses the two containers of the engine vllm
            service = service.model_copy(update={"engine": "clincot", "runtime": "clincot-serve"})
        target = TARGET_CLASSES[self.mode](self.cluster, service, chosen.sha256, chosen.uri, FAST.steps)
        target.check_owner()
        journal = start_rollout(self.store, chosen, FAST, target="kserve", service=service, by="ann")
        resume_rollout(self.store, journal, target, wait=lambda _: None)
        return journal

    def list_names(self) -> set[str]:
        """Return the names of the services of all InferenceServices, and of the Services in front of pairs."""
        found = [(path, one) for path, one in self.server.objects.items() if path.startswith((SERVICES, FRONTS))]
        return {one["metadata"]["labels"].get(SERVICE_LABEL, path.rpartition("/")[2]) for path, one in found}


@pytest.fixture
def namespace(tmp_path: Path) -> Iterator[Namespace]:
    store, server = FolderStore(tmp_path / "store"), ApiServer()
    base = published(store, tmp_path, 1.0)
    challenger = published(store, tmp_path, 2.0, over=base)
    champion.create_champion_pointer(store, base, by="ann")
    for manifest in (base, challenger):
        server.scripts[manifest.sha256] = Script(chat=answering(manifest.golden))
    with api_server(server) as cluster:
        yield Namespace(store, base, challenger, server, cluster)


@pytest.mark.parametrize("mode", MODES)
def test_a_rename_removes_the_old_service_after_the_new_one_is_served(namespace: Namespace, mode: TrafficMode) -> None:
    there = replace(namespace, mode=mode)
    there.install("chest")
    there.deploy("chest")
    old = {path for path in there.server.objects if "configmaps" not in path}
    there.install("thorax")
    there.server.requests.clear()
    journal = there.deploy("thorax")
    assert there.list_names() == {"thorax"}
    assert not old & set(there.server.objects)
    assert journal.last.kind == "finished"
    assert journal.last.detail.startswith("removed InferenceService chest")
    removed = [index for index, one in enumerate(there.server.requests) if one[0] == "DELETE"]
    written = [
        index
        for index, one in enumerate(there.server.requests)
        if one[0] in ("POST", "PUT") and ("thorax" in one[1] or one[1].endswith("/inferenceservices"))
    ]
    assert max(written) < min(removed)  # the last change that gives the new service its traffic comes before


def test_a_service_that_does_not_come_up_leaves_the_old_one(namespace: Namespace) -> None:
    namespace.install("chest")
    namespace.deploy("chest")
    namespace.install("thorax")
    namespace.server.scripts[namespace.base.sha256] = Script(failure="out of memory")
    with pytest.raises(RolledBack):
        namespace.deploy("thorax")
    assert namespace.list_names() == {"chest"}


def test_nothing_of_others_is_removed(namespace: Namespace) -> None:
    """Another release, a person's own service with the release's policies, and an object that KServe made."""
    for name, release in (("chest", "a"), ("knee", "b")):
        namespace.install(name, release)
        namespace.deploy(name, release)
    own = build_inference_service(
        ServiceSettings(name="hand", namespace="serving", instance="a"), "4f" * 32, "s3://b/x", mode="Standard"
    )
    namespace.cluster.create(f"{SERVICES}/hand", own)
    made = {"name": "chest", "labels": {RELEASE_LABEL: "a"}, "ownerReferences": [{"kind": "InferenceService"}]}
    namespace.server.objects[f"{FRONTS}/chest"] = {"metadata": made, "spec": {}}
    namespace.install("thorax")
    namespace.server.requests.clear()
    namespace.deploy("thorax")
    assert own["metadata"]["labels"][INSTANCE_LABEL] == "a"
    assert [path for method, path in namespace.server.requests if method == "DELETE"] == [f"{SERVICES}/chest"]
    assert namespace.list_names() == {"thorax", "knee", "hand", "chest"}  # chest: KServe removes its Service itself


def test_a_run_from_before_the_rename_removes_nothing(namespace: Namespace) -> None:
    """It serves under the old name again; the next rollout under the present name removes that."""
    namespace.install("chest")
    namespace.deploy("chest")
    namespace.install("thorax")
    namespace.deploy("thorax")
    journal = namespace.deploy("chest", manifest=namespace.challenger)
    assert namespace.list_names() == {"chest", "thorax"}
    assert journal.last.detail == ("kept thorax: the release a is called thorax now, and this rollout has served chest")
    namespace.deploy("thorax", manifest=namespace.challenger)
    assert namespace.list_names() == {"thorax"}


def test_an_uninstalled_release_removes_nothing(namespace: Namespace) -> None:
    namespace.install("chest")
    namespace.deploy("chest")
    del namespace.server.objects["/api/v1/namespaces/serving/configmaps/a-clincot"]
    assert "has no ConfigMap a-clincot with a name" in namespace.deploy("thorax").last.detail
    assert namespace.list_names() == {"chest", "thorax"}


def test_a_service_with_an_open_rollout_stays(namespace: Namespace) -> None:
    """Of a run of the line that the release served before, which would lose its challenger's traffic."""
    namespace.install("chest")
    namespace.deploy("chest")
    predictor = {"name": "r5", "minReplicas": 1, "model": {"storageUri": namespace.challenger.uri}}
    canary: dict[str, Any] = {"trafficPercent": 10, "predictor": predictor}
    namespace.server.objects[f"{SERVICES}/chest"]["spec"]["canary"] = [canary]
    namespace.install("thorax")
    assert namespace.deploy("thorax").last.detail == "kept InferenceService chest: a rollout to it is open"
    assert namespace.list_names() == {"chest", "thorax"}


def test_a_missing_permission_is_told_and_fails_nothing(namespace: Namespace) -> None:
    namespace.install("chest")
    namespace.deploy("chest")
    namespace.install("thorax")
    namespace.server.forbidden = {("GET", "configmaps/a-clincot")}
    journal = namespace.deploy("thorax")
    assert "were not looked for" in journal.last.detail
    assert "the account needs a Role that allows 'get' here" in journal.last.detail
    namespace.server.forbidden = {("DELETE", f"{SERVICES}/chest")}
    assert namespace.deploy("thorax").last.detail.startswith("kept InferenceService chest: DELETE")
    assert namespace.list_names() == {"chest", "thorax"}


@pytest.mark.parametrize("mode", MODES)
def test_the_name_of_another_releases_service_is_refused(namespace: Namespace, mode: TrafficMode) -> None:
    there = replace(namespace, mode=mode)
    there.install("chest")
    there.deploy("chest")
    there.install("chest", "b")
    with pytest.raises(TargetFailed, match=r"chest in serving is served by the release a, not by b"):
        there.deploy("chest", "b")


def test_without_a_release_nothing_is_looked_for(namespace: Namespace) -> None:
    namespace.install("chest")
    namespace.deploy("chest")
    namespace.install("thorax")
    service = build_settings("thorax").model_copy(update={"release": None})
    target = TARGET_CLASSES["canary"](namespace.cluster, service, namespace.base.sha256, namespace.base.uri, (100,))
    assert target.remove_former_services() == ""


def test_the_settings_file_names_the_release(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("name: chest\nrelease: {name: a, config_map: a-clincot}\n")
    assert load_service_settings(path).release == OwningRelease(name="a", config_map="a-clincot")
    assert "release" not in ServiceSettings().model_dump()  # the ids of plans without one stay what they were


@pytest.mark.parametrize("mode", MODES)
def test_what_is_served_refers_to_renamed_objects(namespace: Namespace, mode: TrafficMode) -> None:
    """Helm removes the runtime, the account and the storage container of the former fullname."""
    there = replace(namespace, mode=mode)
    engine = {"engine": "clincot"} if mode == "knative" else {}

    def name_objects(fullname: str) -> ServiceSettings:
        owner = OwningRelease(name="a", config_map=fullname)
        names = {"runtime": f"{fullname}-x", "service_account": f"{fullname}-server", "storage_container": fullname}
        settings = build_settings("chest").model_copy(update={"release": owner, **engine, **names})
        content = settings.model_dump(mode="json", include={"name", "engine", *names})
        there.server.objects = {path: one for path, one in there.server.objects.items() if "configmaps" not in path}
        there.server.objects[f"/api/v1/namespaces/serving/configmaps/{fullname}"] = {
            "metadata": {"name": fullname},
            "data": {"service.yaml": yaml.safe_dump(content)},
        }
        return settings

    def read_references() -> list[tuple[str, str, str]]:
        found = [one["spec"]["predictor"] for path, one in there.server.objects.items() if path.startswith(SERVICES)]
        return [(one["model"]["runtime"], one["serviceAccountName"], one["storageContainerName"]) for one in found]

    for fullname in ("old", "new"):
        service = name_objects(fullname)
        target = TARGET_CLASSES[mode](there.cluster, service, there.base.sha256, there.base.uri, FAST.steps)
        journal = start_rollout(there.store, there.base, FAST, target="kserve", service=service, by="ann")
        resume_rollout(there.store, journal, target, wait=lambda _: None)
        assert read_references() == [(f"{fullname}-x", f"{fullname}-server", fullname)]
    (started,) = [event.detail for event in journal.events if event.kind == "started"]
    assert "refers to the present objects of a" in started
