"""Non-interactive rollout of a published checkpoint, used by the Kubeflow task.

`build_target` is shared with the CLI.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clincot.config import DeployConfig, PublishConfig
from clincot.deployment.deployment import resume_rollout, start_rollout
from clincot.deployment.rollout import RolloutTarget
from clincot.deployment.service_settings import ServiceSettings, get_user_name
from clincot.deployment.targets.local import SERVE_COMMAND, LocalTarget
from clincot.errors import InvalidInput, require_extra
from clincot.processes import exit_on_sigterm
from clincot.registry.manifest import Manifest, read_manifest
from clincot.storage.open import open_store
from clincot.storage.store import Store

TargetKind = Literal["kserve", "local"]


@dataclass(frozen=True)
class TargetOptions:
    """How a target is reached.

    A local rollout uses the first group, one on a cluster the second.
    """

    state: Path = Path("runs/serving")  # folder of the local processes' state
    serve_command: Sequence[str] = SERVE_COMMAND  # with the placeholders {checkpoint}, {port} and {name}
    port: int = 0  # of the address that clients use; 0: any free port

    service: ServiceSettings | None = None
    context: str = ""  # of the kubeconfig; "": the current one, or the pod's own account
    crd: Path | None = None  # the InferenceService CRD, if the cluster's may not be read
    validate: bool = True  # check the manifests against the CRD


def deploy_checkpoint(
    settings: DeployConfig,
    publish: PublishConfig,
    service: ServiceSettings,
    digest: str,
    *,
    target: TargetKind,
    state: Path,
) -> Literal["awaiting approval", "finished"]:
    """Roll out the published checkpoint `digest` and return how that ended.

    state: the folder of the processes' state, for a local rollout. Raises what build_target, start_rollout and
    resume_rollout raise.
    """
    store = open_store(publish.store)
    manifest = read_manifest(store, publish.name, digest)
    options = TargetOptions(state=state, service=service)
    rollout_target = build_target(store, manifest, target, steps=settings.steps, options=options)
    used_service = service if target == "kserve" else None
    journal = start_rollout(store, manifest, settings, target=target, service=used_service, by=get_user_name())
    journal.tell = lambda event: print(f"{event.at} {event.kind} {event.detail}".rstrip(), flush=True)
    with exit_on_sigterm():
        return resume_rollout(store, journal, rollout_target, settings=settings)


def build_target(
    store: Store, manifest: Manifest, kind: TargetKind, *, steps: tuple[int, ...], options: TargetOptions
) -> RolloutTarget:
    """Build the target of a rollout: local processes, or KServe on a cluster.

    Nothing is started or changed. Raises InvalidInput (no service settings, or the extra `cluster` is not installed),
    TargetFailed (the cluster cannot be used, or another release has the service's name) and InvalidResource (the CRD
    does not allow the manifests).
    """
    if kind == "local":
        return LocalTarget(options.state, store, manifest, steps, command=options.serve_command, port=options.port)
    with require_extra("cluster", "a rollout to kserve"):
        from clincot.clients.kubernetes import connect_cluster
        from clincot.deployment.crd import build_validator, read_crd
        from clincot.deployment.inference_service import VERSION
        from clincot.deployment.targets.select import build_kserve_target
    if options.service is None:
        raise InvalidInput("a rollout to kserve needs the settings of its service")
    validator = build_validator(read_crd(options.crd), VERSION) if options.crd else None
    target = build_kserve_target(connect_cluster(options.context), options.service, manifest, steps, validator)
    if options.validate:
        target.validate_manifest()
        target.check_owner()
    return target
