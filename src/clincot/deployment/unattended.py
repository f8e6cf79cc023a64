"""A published checkpoint onto an endpoint, for whoever has no terminal: begin (or take up) its rollout and drive it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clincot.config import DeploySection, PublishSection
from clincot.deployment.deployment import begin, go
from clincot.deployment.rollout import Target
from clincot.deployment.service_settings import ServiceSettings, who
from clincot.registry.manifest import Manifest, read_manifest
from clincot.storage.open import open_store
from clincot.storage.store import Store


def roll_out_published(
    settings: DeploySection,
    publish: PublishSection,
    service: ServiceSettings,
    digest: str,
    *,
    target: Literal["kserve", "local"],
    state: Path,
) -> str:
    """Roll the checkpoint out; returns how that ended: finished, or awaiting approval. Raises what `go` raises.

    state: of the local target, the folder of its processes.
    """
    store = open_store(publish.store)
    manifest = read_manifest(store, publish.name, digest)
    where = _target(store, manifest, settings, service, target, state)
    of = service if target == "kserve" else None
    journal = begin(store, manifest, settings, target=target, service=of, by=who())
    try:
        return go(store, journal, where)
    finally:
        for event in journal.events:
            print(f"{event.at} {event.kind} {event.detail}".rstrip())


def _target(
    store: Store, manifest: Manifest, settings: DeploySection, service: ServiceSettings, kind: str, state: Path
) -> Target:
    if kind == "local":
        from clincot.deployment.targets.local import SERVE, LocalTarget

        return LocalTarget(state, store, manifest, settings.steps, command=SERVE, port=0)
    from clincot.clients.kubernetes import connect
    from clincot.deployment.targets.select import kserve_target

    target = kserve_target(connect(), service, manifest, settings.steps, None)
    target.validate()
    return target
