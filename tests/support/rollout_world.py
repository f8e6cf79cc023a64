"""A store with published checkpoints and a cluster with KServe's stub, in which rollouts run.

The checkpoints are really published; the stub's KServe answers golden questions as its script says.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clincot.clients.kubernetes import Cluster, resource_path
from clincot.config import DeployConfig
from clincot.deployment.deployment import resume_rollout, start_rollout
from clincot.deployment.journal import RolloutJournal
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.targets.kserve import KServeTarget
from clincot.deployment.targets.select import TARGET_CLASSES, TrafficMode
from clincot.registry import champion
from clincot.registry.manifest import GoldenQuestion, Manifest
from clincot.storage.folder_store import FolderStore
from tests.support.deployment_builders import LINE, published
from tests.support.kube_api_server import ApiServer, Script, api_server

FAST = DeployConfig(steps=(10, 50, 100), step_s=0, poll_s=0.001, ready_s=20, request_s=10)
SERVICE = ServiceSettings(name=LINE, namespace="serving")


@dataclass
class World:
    """A store with a base that is champion and a promoted challenger, and a cluster."""

    store: FolderStore
    base: Manifest
    challenger: Manifest
    server: ApiServer
    cluster: Cluster

    service_settings: ServiceSettings = SERVICE

    def target(self, manifest: Manifest, mode: TrafficMode = "canary", settings: DeployConfig = FAST) -> KServeTarget:
        service = self.service_settings
        if mode == "knative":  # Knative refuses the two containers of the engine vllm
            service = service.model_copy(update={"engine": "clincot", "runtime": "clincot-serve"})
        service = service.with_measured(manifest.serve)
        return TARGET_CLASSES[mode](self.cluster, service, manifest.sha256, manifest.uri, settings.steps)

    def start(self, manifest: Manifest, settings: DeployConfig = FAST) -> RolloutJournal:
        service = self.service_settings
        return start_rollout(self.store, manifest, settings, target="kserve", service=service, by="ann")

    def deploy(self, manifest: Manifest, mode: TrafficMode = "canary", settings: DeployConfig = FAST) -> RolloutJournal:
        journal = self.start(manifest, settings)
        resume_rollout(self.store, journal, self.target(manifest, mode, settings), wait=lambda _: None)
        return journal

    @property
    def challenger_script(self) -> Script:
        return self.server.scripts[self.challenger.sha256]

    @property
    def champion(self) -> str:
        return champion.read_champion(self.store, LINE).now.sha256

    def service(self, name: str = LINE) -> dict[str, Any]:
        return self.cluster.get(resource_path("serving.kserve.io", "v1beta1", "serving", "inferenceservices", name))

    def list_services(self) -> list[dict[str, Any]]:
        """Read every InferenceService, after which the controller runs."""
        paths = [path for path in self.server.objects if "/inferenceservices/" in path]
        return [self.cluster.get(path) for path in paths]

    def shares(self) -> list[int | None]:
        """The canary's share in each written InferenceService, in order; None: no canary."""
        return [
            (one["spec"].get("canary") or [{"trafficPercent": None}])[0]["trafficPercent"]
            for one in self.server.history
            if one["kind"] == "InferenceService"
        ]


def answering(golden: tuple[GoldenQuestion, ...], *, wrong: int = 0) -> Any:
    """A server that answers golden questions, the first `wrong` of them incorrectly."""
    answers = {g.question: (g.answer if n >= wrong else "perhaps", g.box) for n, g in enumerate(golden)}

    def chat(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        (message,) = body["messages"]
        image, text = message["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,")
        answer, box = answers[text["text"]]
        regions = [{"box": box.model_dump(), "answer": answer, "grounder": "written"}]
        return 200, {
            "choices": [{"message": {"role": "assistant", "content": answer}}],
            "clincot": {"regions": regions, "winner": 0, "confidence": 0.9},
        }

    return chat


def kinds(journal: RolloutJournal) -> list[str]:
    return [event.kind for event in journal.events]


@contextmanager
def open_world(folder: Path) -> Iterator[World]:
    """A base that is champion, a challenger that was promoted over it, and an empty cluster."""
    store = FolderStore(folder / "store")
    base = published(store, folder, 1.0)
    challenger = published(store, folder, 2.0, over=base)
    champion.create_champion_pointer(store, base, by="ann")
    server = ApiServer()
    for manifest in (base, challenger):
        server.scripts[manifest.sha256] = Script(chat=answering(manifest.golden))
    with api_server(server) as cluster:
        yield World(store, base, challenger, server, cluster)
