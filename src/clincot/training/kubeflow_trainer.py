"""Training as a Kubeflow Trainer v2 TrainJob: build its manifest, run it and fetch the checkpoint.

Inputs and checkpoint are exchanged over a volume that this pod and the job's pods mount. Inputs outside that volume are
copied to it, and the checkpoint is copied from it. The job's name is derived from its content, so a repeated call waits
for the job that is already running, or takes its result, instead of starting another one.

`spec.runtimePatches` (volumes, mounts, selectors) follows the CRD as of August 2026. Earlier releases have
`podTemplateOverrides` instead and refuse this manifest, which is sent with strict field validation.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from clincot.clients.kubernetes import Permission, connect_cluster
from clincot.errors import InvalidInput
from clincot.jsonl import read_json, write_json
from clincot.records import hash_json
from clincot.training.job import INPUT_NAMES, TrainingFailed, TrainingJob, read_failures
from clincot.training.launch_settings import TrainJobSettings
from clincot.training.trainjob_watch import run_train_job

TRAINJOB_GROUP, TRAINJOB_VERSION, TRAINJOB_PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE_NAME = "node"  # replicated job and container of the runtime torch-distributed
_PATCH_MANAGER = "clincot.io/training"  # Trainer's webhook requires a domain-prefixed path

Json = dict[str, Any]


def train_on_nodes(job: TrainingJob, settings: TrainJobSettings) -> dict[str, float]:
    """Train on the nodes of a TrainJob and return the metrics; the checkpoint is then at `job.checkpoint`.

    Raises TrainingFailed, ClusterFailed, and InvalidInput (a batch that the processes cannot share, a missing mount).
    """
    total = settings.nodes * settings.processes_per_node
    if job.config.batch_size % total:
        raise InvalidInput(
            f"train.batch_size is {job.config.batch_size}, which {total} processes ({settings.nodes} nodes x "
            f"{settings.processes_per_node}) cannot share evenly"
        )
    if not settings.mount.is_dir():
        raise InvalidInput(f"{settings.mount}: the volume {settings.claim} of the job is not mounted here")
    name = derive_job_name(job, settings)
    on_volume = copy_to_volume(job, settings.mount / "jobs" / name, settings.mount)
    cluster = connect_cluster()
    try:
        run_train_job(cluster, build_train_job(name, on_volume.folder / "work.json", settings), settings)
    except TrainingFailed as error:
        errors = "; ".join(read_failures(on_volume))
        raise TrainingFailed(f"{errors}: {error}" if errors else str(error)) from None
    finally:
        cluster.close()
    if not on_volume.result.is_file():
        raise TrainingFailed(
            f"TrainJob {name} is complete, but {on_volume.result} does not exist; do the job's pods mount "
            f"{settings.claim} at {settings.mount}? If the file was deleted, delete the TrainJob and run this again"
        )
    metrics: dict[str, float] = read_json(on_volume.result)
    _copy_atomically(on_volume.checkpoint, job.checkpoint)
    return metrics


def derive_job_name(job: TrainingJob, settings: TrainJobSettings) -> str:
    """Name a job after everything that decides its result: its content and the container image."""
    return f"{settings.prefix}-{hash_json([job.digest, settings.image])[:12]}"


def copy_to_volume(job: TrainingJob, folder: Path, mount: Path) -> TrainingJob:
    """Copy inputs outside the volume into `folder` and write work.json; return the job with paths on the volume."""
    paths = {name: getattr(job, name) for name in INPUT_NAMES}
    for name, path in paths.items():
        if not path.resolve().is_relative_to(mount.resolve()):
            paths[name] = folder / "inputs" / name
            # copies appear only when they are complete, and the folder's name is derived from their content
            if not paths[name].exists():
                _copy_atomically(path, paths[name])
    on_volume = job.model_copy(update={**paths, "checkpoint": folder / "checkpoint"})
    for old_failure in on_volume.folder.glob("failure.*"):
        old_failure.unlink()
    write_json(on_volume.folder / "work.json", on_volume.model_dump(mode="json"))
    return on_volume


def build_train_job(name: str, job_file: Path, settings: TrainJobSettings) -> Json:
    """The TrainJob manifest: one worker for each process on every node; the runtime configures rendezvous (PET_…).

    job_file: path of work.json in the job's pods.
    """
    env: list[Json] = [{"name": key, "value": value} for key, value in sorted(settings.env.items())]
    env += [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": source.secret, "key": source.key}}}
        for key, source in sorted(settings.secret_env.items())
    ]
    labels = {"app.kubernetes.io/managed-by": "clincot"} | settings.pod_labels
    if settings.queue:
        labels["kueue.x-k8s.io/queue-name"] = settings.queue
    return {
        "apiVersion": f"{TRAINJOB_GROUP}/{TRAINJOB_VERSION}",
        "kind": "TrainJob",
        "metadata": {"name": name, "namespace": settings.namespace, "labels": labels},
        "spec": {
            "activeDeadlineSeconds": settings.timeout_s,
            "runtimeRef": {"apiGroup": TRAINJOB_GROUP, "kind": settings.runtime_kind, "name": settings.runtime},
            "trainer": {
                "image": settings.image,
                "command": ["python", "-m", "torch.distributed.run", "-m", "clincot.training.worker"],
                "args": [str(PurePosixPath(job_file))],
                "numNodes": settings.nodes,
                "numProcPerNode": settings.processes_per_node,
                "resourcesPerNode": settings.resources,
                **({"env": env} if env else {}),
            },
            "runtimePatches": [_build_runtime_patch(settings)],
        },
    }


def _build_runtime_patch(settings: TrainJobSettings) -> Json:
    """Settings of the runtime's pods that `spec.trainer` cannot express: volumes, selectors, accounts."""
    mount: Json = {"name": "shared", "mountPath": str(PurePosixPath(settings.mount))}
    if settings.sub_path:
        mount["subPath"] = settings.sub_path
    pod: Json = {
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": settings.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
            {"name": "tmp", "emptyDir": {}},  # the root is read-only; HOME and the caches of the image are in /tmp
        ],
        "containers": [
            {
                "name": NODE_NAME,
                "volumeMounts": [
                    mount,
                    {"name": "shm", "mountPath": "/dev/shm"},
                    {"name": "tmp", "mountPath": "/tmp"},
                ],
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": True,
                },
            }
        ],
        # required by Pod Security "restricted"; the user is that of the images (Dockerfile), the group owns the volume
        "securityContext": {
            "runAsNonRoot": True,
            "seccompProfile": {"type": "RuntimeDefault"},
            **_build_user(settings),
        },
    }
    # `automountServiceAccountToken` is no field of a patch; the account decides whether its token is mounted.
    optional = {
        "nodeSelector": settings.node_selector,
        "tolerations": list(settings.tolerations),
        "serviceAccountName": settings.service_account,
        "imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets],
    }
    pod |= {key: value for key, value in optional.items() if value}
    template: Json = {"spec": pod}
    if settings.pod_labels:
        template["metadata"] = {"labels": dict(settings.pod_labels)}
    replicated = {"name": NODE_NAME, "template": {"spec": {"template": template}}}
    return {
        "manager": _PATCH_MANAGER,
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
    }


def _build_user(settings: TrainJobSettings) -> Json:
    if not settings.user:
        return {}
    return {"runAsUser": settings.user, "runAsGroup": settings.group, "fsGroup": settings.group}


def list_job_permissions(settings: TrainJobSettings) -> list[Permission]:
    """The permissions that running a job needs: on the job itself, and on its pods to report why one failed."""
    here = settings.namespace
    needed = [Permission(verb, TRAINJOB_GROUP, TRAINJOB_PLURAL, here) for verb in ("get", "create", "delete")]
    return [*needed, Permission("list", "", "pods", here), Permission("get", "", "pods/log", here)]


def _copy_atomically(path: Path, to: Path) -> None:
    """Copy a file or folder so that it appears under its new name only when complete; replaces an existing one."""
    partial = to.with_name(to.name + ".copying")
    to.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_dir():
        shutil.rmtree(partial)
    if path.is_dir():
        shutil.copytree(path, partial)
        shutil.rmtree(to, ignore_errors=True)
    else:
        shutil.copyfile(path, partial)
    partial.rename(to)
