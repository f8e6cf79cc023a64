"""A published checkpoint onto an endpoint, for whoever has no terminal: begin (or take up) its rollout and drive it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clincot.config import DeployConfig, PublishConfig
from clincot.deployment.deployment import resume_rollout, start_rollout
from clincot.deployment.rollout import RolloutTarget
from clincot.deployment.service_settings import ServiceSettings, get_user_name
from clincot.registry.manifest import Manifest, read_manifest
from clincot.storage.open import open_store
from clincot.storage.store import Store


def deploy_checkpoint(
    settings: DeployConfig,
    publish: PublishConfig,
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
    where = _build_target(store, manifest, settings, service, target, state)
    of = service if target == "kserve" else None
    journal = start_rollout(store, manifest, settings, target=target, service=of, by=get_user_name())
    try:
        return resume_rollout(store, journal, where)
    finally:
        for event in journal.events:
            print(f"{event.at} {event.kind} {event.detail}".rstrip())


def _build_target(
    store: Store, manifest: Manifest, settings: DeployConfig, service: ServiceSettings, kind: str, state: Path
) -> RolloutTarget:
    if kind == "local":
        from clincot.deployment.targets.local import SERVE_COMMAND, LocalTarget

        return LocalTarget(state, store, manifest, settings.steps, command=SERVE_COMMAND, port=0)
    from clincot.clients.kubernetes import connect_cluster
    from clincot.deployment.targets.select import build_kserve_target

    target = build_kserve_target(connect_cluster(), service, manifest, settings.steps, None)
    target.validate_manifest()
    return target
