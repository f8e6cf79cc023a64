"""Training as a Kubeflow Trainer v2 TrainJob: its manifest, and from a piece of work to the checkpoint it makes.

Inputs and checkpoint go over a volume that this pod and the job's pods mount. Inputs that lie elsewhere are copied
there; the checkpoint is copied from there. The job's name is that of its content: asked for again, the same job is
waited for, or its result taken, and none is started twice.

`spec.runtimePatches` (volumes, mounts, selectors) is of the CRD as of August 2026; releases before it have
`podTemplateOverrides` and refuse this manifest, which is sent with strict field validation.
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
_PATCH_MANAGER = "clincot"
RUN_AS_USER = 10001  # of the images

Json = dict[str, Any]


def train_on_nodes(work: TrainingJob, settings: TrainJobSettings) -> dict[str, float]:
    """Train the work on the job's nodes; its checkpoint is at `work.checkpoint` when it returns.

    Raises TrainingFailed, ClusterFailed, BadInput (a batch that the processes cannot share, a mount that is not there).
    """
    total = settings.nodes * settings.processes_per_node
    if work.config.batch_size % total:
        raise InvalidInput(
            f"train.batch_size is {work.config.batch_size}, which {total} processes ({settings.nodes} nodes x "
            f"{settings.processes_per_node}) cannot share evenly"
        )
    if not settings.mount.is_dir():
        raise InvalidInput(f"{settings.mount}: the volume {settings.claim} of the job is not mounted here")
    name = derive_job_name(work, settings)
    there = copy_to_volume(work, settings.mount / "jobs" / name, settings.mount)
    cluster = connect_cluster()
    try:
        run_train_job(cluster, build_train_job(name, there.folder / "work.json", settings), settings)
    except TrainingFailed as error:
        said = "; ".join(read_failures(there))
        raise TrainingFailed(f"{said}: {error}" if said else str(error)) from None
    finally:
        cluster.close()
    if not there.result.is_file():
        raise TrainingFailed(
            f"TrainJob {name} is complete, but {there.result} is not there; do the job's pods mount {settings.claim} "
            f"at {settings.mount}? If it was removed since, delete the TrainJob and run this again"
        )
    metrics: dict[str, float] = read_json(there.result)
    _copy_when_whole(there.checkpoint, work.checkpoint)
    return metrics


def derive_job_name(work: TrainingJob, settings: TrainJobSettings) -> str:
    """Of what decides the result: the work's content and the image that does it."""
    return f"{settings.prefix}-{hash_json([work.digest, settings.image])[:12]}"


def copy_to_volume(work: TrainingJob, folder: Path, mount: Path) -> TrainingJob:
    """The work with every path on the volume: what lies elsewhere is copied into `folder`. Written as work.json."""
    places = {name: getattr(work, name) for name in INPUT_NAMES}
    for name, path in places.items():
        if not path.resolve().is_relative_to(mount.resolve()):
            places[name] = folder / "inputs" / name
            if not places[name].exists():  # whole since it is there, and the folder is of this content alone
                _copy_when_whole(path, places[name])
    there = work.model_copy(update={**places, "checkpoint": folder / "checkpoint"})
    for old in there.folder.glob("failure.*"):
        old.unlink()
    write_json(there.folder / "work.json", there.model_dump(mode="json"))
    return there


def build_train_job(name: str, work: Path, settings: TrainJobSettings) -> Json:
    """The TrainJob that runs a worker a process over the settings' nodes; rendezvous is the runtime's (PET_…)."""
    env: list[Json] = [{"name": key, "value": value} for key, value in sorted(settings.env.items())]
    env += [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": place.secret, "key": place.key}}}
        for key, place in sorted(settings.secret_env.items())
    ]
    labels = {"app.kubernetes.io/managed-by": "clincot"}
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
                "args": [str(PurePosixPath(work))],
                "numNodes": settings.nodes,
                "numProcPerNode": settings.processes_per_node,
                "resourcesPerNode": settings.resources,
                **({"env": env} if env else {}),
            },
            "runtimePatches": [_build_runtime_patch(settings)],
        },
    }


def _build_runtime_patch(settings: TrainJobSettings) -> Json:
    """What the runtime's pods get beside what a TrainJob's trainer can say: volumes, selectors, accounts."""
    mount: Json = {"name": "shared", "mountPath": str(PurePosixPath(settings.mount))}
    if settings.sub_path:
        mount["subPath"] = settings.sub_path
    pod: Json = {
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": settings.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shm}},
        ],
        "containers": [
            {
                "name": NODE_NAME,
                "volumeMounts": [mount, {"name": "shm", "mountPath": "/dev/shm"}],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
        # what Pod Security "restricted" asks for; the user is the images' (Dockerfile), the group owns the volume
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": RUN_AS_USER,
            "runAsGroup": RUN_AS_USER,
            "fsGroup": RUN_AS_USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    optional = {
        "nodeSelector": settings.node_selector,
        "tolerations": list(settings.tolerations),
        "serviceAccountName": settings.service_account,
        "imagePullSecrets": [{"name": name} for name in settings.image_pull_secrets],
    }
    pod |= {key: value for key, value in optional.items() if value}
    replicated = {"name": NODE_NAME, "template": {"spec": {"template": {"spec": pod}}}}
    return {
        "manager": _PATCH_MANAGER,
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [replicated]}}},
    }


def list_job_permissions(settings: TrainJobSettings) -> list[Permission]:
    """What running a job asks of the API server: the job itself, and its pods where one has to say why it failed."""
    here = settings.namespace
    needed = [Permission(verb, TRAINJOB_GROUP, TRAINJOB_PLURAL, here) for verb in ("get", "create", "delete")]
    return [*needed, Permission("list", "", "pods", here), Permission("get", "", "pods/log", here)]


def _copy_when_whole(path: Path, to: Path) -> None:
    """A file or folder, under its new name when it is whole; what is there already is replaced."""
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
