"""Settings of the cluster (cluster.yaml): where the tasks of a round run. They name Secrets but contain none.

Each field describes its key, and pipelines/cluster.yaml is a commented example with all keys. A task gets the profile
`gpu` or `cpu` according to the device of its stage, and then the changes under `stages` for this task.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from clincot.config import FrozenConfig, parse_config, read_settings
from clincot.jsonl import InvalidRecord
from clincot.stages.catalog import get_stage
from clincot.waiting import DEFAULT_BUDGET_S

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
ImageReference = Annotated[str, Field(pattern=r"^[a-z0-9][-\w./:]*(@sha256:[0-9a-f]{64})?$")]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[kMGTPE]|[KMGTPE]i)?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Seconds = Annotated[int, Field(ge=1)]
# Tasks of the pipeline, each of which is a folder of components/: {task: stages that it runs}. A task needs an
# accelerator if one of its stages does.
TASK_STAGES: Mapping[str, tuple[str, ...]] = {
    "preflight": ("preflight",),
    "start_round": (),
    "evaluate_champion": ("evaluate",),
    "prepare": ("prepare",),
    "generate": ("propose", "answer", "judge"),
    "judge": (),  # the stage judge where all judges are endpoints, which need no accelerator here
    "pair": ("pair",),
    "version": ("version",),
    "train": ("train",),
    "evaluate_challenger": ("evaluate",),
    "decide": ("decide",),
    "record_round": (),
    "publish": ("publish",),
    "deploy": (),
    "end_round": (),
    "page": (),
    "select_champion": (),
    "record_run_status": (),
}
TASK_NAMES = tuple(TASK_STAGES)
# Tasks of the comparison (comparison_pipeline.py), each with the task of a round whose place it takes: image, resources
# secrets and time limits. They are components too.
COMPARISON_TASKS: Mapping[str, str] = {
    "start_comparison": "page",
    "compare_seed": "train",
    "compare_table": "page",
}
GPU_TASKS = frozenset(
    task for task, stages in TASK_STAGES.items() if "gpu" in {*map(attrgetter("device"), map(get_stage, stages))}
)
# Names by which cluster.yaml knows the tasks: both evaluations have the same resources.
PROFILE_NAMES: Mapping[str, str] = {task: "evaluate" if task.startswith("evaluate_") else task for task in TASK_NAMES}
# Shards are divided among so many tasks of a round and of a run, unless parallel_shards says otherwise. Each of these
# tasks takes some 40 kB of the Workflow object, 4 kB when compressed. Within these bounds a run of three rounds takes
# less than half of what Argo allows, however many shards there are (workflow_size.py).
MAX_SHARD_TASKS, MAX_RUN_SHARD_TASKS = 8, 16
_SHARD_STAGES = ("propose", "answer")
_HOST_LABEL = "kubernetes.io/hostname"
_SECRET_NAME = re.compile(r"(?i)(secret|token|passw|_key$|credential)")


class Images(FrozenConfig):
    """Images of the tasks. Only a digest (…@sha256:…) fixes the code of a run; a tag can move in the registry."""

    cpu: Annotated[ImageReference, Field(description="image of tasks without a GPU")] = "clincot-cpu:latest"
    gpu: Annotated[ImageReference, Field(description="image of tasks with an accelerator")] = "clincot-cuda:latest"
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pull_secrets: Annotated[tuple[Name, ...], Field(description="Secrets with registry credentials")] = ()


class ContainerResources(FrozenConfig):
    """CPU and memory of one container."""

    cpu: Annotated[str, Field(pattern=r"^\d+(\.\d+)?m?$")]
    memory: Quantity


class Toleration(FrozenConfig):
    """A toleration, as in the spec of a pod."""

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    seconds: Annotated[int | None, Field(ge=0, description="tolerationSeconds for NoExecute")] = None


class RetryPolicy(FrozenConfig):
    """Retries of a task by Kubeflow Pipelines. Each pause is longer than the one before by the factor.

    From 2.17.0 on, its configuration of Argo (workflow-controller-configmap: retryPolicy OnError) retries only tasks
    whose pod was lost; up to 2.16, also those that ended with an error. What passes is waited for inside the task.
    """

    count: Annotated[int, Field(ge=0)] = 2
    backoff_s: Seconds = 30
    factor: Annotated[float, Field(ge=1)] = 2.0
    max_s: Seconds = 600


class ResourceProfile(FrozenConfig):
    """Resources, placement and time limit of a task."""

    requests: ContainerResources
    limits: ContainerResources
    accelerator: Annotated[str, Field(description="resource name, such as nvidia.com/gpu; unused if count is 0")] = ""
    count: Annotated[int, Field(ge=0, description="number of accelerators")] = 0
    node_selector: dict[str, str] = Field(default={})
    tolerations: tuple[Toleration, ...] = ()
    shm: Annotated[
        Quantity | Literal[""], Field(description="size of /dev/shm; empty: 64Mi, the default of the runtime")
    ] = ""
    timeout_s: Annotated[Seconds, Field(description="a task that takes longer is stopped and counts as failed")] = 3600
    retries: RetryPolicy = RetryPolicy()

    @model_validator(mode="after")
    def _check_accelerator(self) -> ResourceProfile:
        if self.count and not self.accelerator:
            raise ValueError(f"count is {self.count}, but accelerator names no resource (nvidia.com/gpu)")
        return self


class StageOverrides(FrozenConfig):
    """Changes of a profile for one task. Fields that are not set keep the value of the profile."""

    requests: ContainerResources | None = None
    limits: ContainerResources | None = None
    accelerator: str | None = None
    count: Annotated[int | None, Field(ge=0)] = None
    node_selector: dict[str, str] | None = None
    tolerations: tuple[Toleration, ...] | None = None
    shm: Quantity | Literal[""] | None = None
    timeout_s: Seconds | None = None
    retries: RetryPolicy | None = None


class CacheVolume(FrozenConfig):
    """Volume that keeps data sets and checkpoints between tasks. Without it, each task downloads what it needs."""

    claim: Annotated[
        Name | Literal[""], Field(description="PersistentVolumeClaim in the namespace of the runs; empty: none")
    ] = ""
    mount: Annotated[str, Field(pattern=r"^/[-\w./]+$")] = "/cache"
    sub_path: str = ""
    access_mode: Annotated[
        Literal["ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"],
        Field(
            description="of the claim; ReadWriteOnce: only pods on one node can mount it at the same time, so tasks "
            "run one after the other unless all are pinned to one node"
        ),
    ] = "ReadWriteMany"


class SecretEnv(FrozenConfig):
    """Keys of a Secret in the namespace of the runs, as environment variables."""

    name: Name
    env: Annotated[
        dict[str, VariableName], Field(min_length=1, description="{key of the Secret: environment variable}")
    ]
    optional: Annotated[bool, Field(description="the pod also starts if the Secret does not exist")] = False
    stages: Annotated[tuple[str, ...], Field(description="tasks that get the variables; empty: all")] = ()

    @field_validator("stages")
    @classmethod
    def _check_stages(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        return _check_task_names(stages)


class PodSecurity(FrozenConfig):
    """Security context of the pods, as far as a pipeline can set it.

    Kubeflow Pipelines 2.17 itself adds what Pod Security `restricted` asks for: no capabilities, no privilege
    escalation, seccomp RuntimeDefault (kfp/kubernetes/security_context.py; seen on a cluster). Nothing in a pipeline
    can set a read-only root; the images run with one if an admission policy adds it.
    """

    user: Annotated[
        int,
        Field(ge=0, description="the default is the user of the images (Dockerfile); 0: the platform assigns one"),
    ] = 10001
    group: Annotated[int, Field(ge=0, description="unused if user is 0")] = 10001
    non_root: Literal[True] = True


class ClusterSettings(FrozenConfig):
    """All settings of cluster.yaml."""

    namespace: Annotated[
        Name, Field(description="namespace of the run pods: that of Kubeflow Pipelines or of a profile")
    ] = "kubeflow"
    service_account: Annotated[
        Name | Literal[""], Field(description="account of the run pods; empty: the default of Kubeflow Pipelines")
    ] = ""
    images: Images = Images()
    cpu: ResourceProfile = ResourceProfile(
        requests=ContainerResources(cpu="2", memory="8Gi"),
        limits=ContainerResources(cpu="4", memory="16Gi"),
        timeout_s=3600,
    )
    gpu: ResourceProfile = ResourceProfile(
        requests=ContainerResources(cpu="4", memory="32Gi"),
        limits=ContainerResources(cpu="8", memory="64Gi"),
        timeout_s=86400,
        accelerator="nvidia.com/gpu",
        count=1,
        shm="8Gi",
        tolerations=(Toleration(key="nvidia.com/gpu", operator="Exists", effect="NoSchedule"),),
    )
    stages: Annotated[dict[str, StageOverrides], Field(description="{task: changes of its profile}")] = Field(
        default={}
    )
    cache: CacheVolume = CacheVolume()
    env: Annotated[
        dict[VariableName, str], Field(description="environment of every task: endpoints, CA bundles, proxies")
    ] = Field(default={})
    ca_config_map: Annotated[
        Name | Literal[""],
        Field(description="ConfigMap in the namespace of the runs with cabundle.crt: all CAs to trust"),
    ] = ""
    secrets: tuple[SecretEnv, ...] = ()
    security: PodSecurity = PodSecurity()
    labels: Annotated[dict[str, str], Field(description="labels of every pod")] = Field(default={})
    annotations: Annotated[dict[str, str], Field(description="annotations of every pod")] = Field(default={})
    queue: Annotated[str, Field(description="LocalQueue of Kueue for the pods; empty: none")] = ""
    wait_s: Annotated[
        int, Field(ge=0, description="how long a task waits for a store, judge or API server that is away; 0: never")
    ] = int(DEFAULT_BUDGET_S)
    parallel_shards: Annotated[
        int, Field(ge=0, description=f"tasks that process shards at the same time; 0: at most {MAX_SHARD_TASKS}")
    ] = 0
    deadline_s: Annotated[Seconds, Field(description="time limit of a whole run")] = 7 * 86400
    keep_s: Annotated[int, Field(ge=0, description="how long the workflow object of a finished run is kept")] = (
        7 * 86400
    )

    @field_validator("stages")
    @classmethod
    def _check_stages(cls, stages: dict[str, StageOverrides]) -> dict[str, StageOverrides]:
        _check_task_names(tuple(stages))
        return stages

    @model_validator(mode="after")
    def _check_wait(self) -> ClusterSettings:
        for task in TASK_NAMES:
            timeout_s = self.resolve_profile(task).timeout_s
            if self.wait_s >= timeout_s:
                raise ValueError(
                    f"wait_s is {self.wait_s}, but the task {task} is stopped after timeout_s = {timeout_s}, before it "
                    "could say why it fails; set a shorter wait_s or a longer timeout_s"
                )
        return self

    @model_validator(mode="after")
    def _check_cache_allows_parallel_tasks(self) -> ClusterSettings:
        if self.runs_one_task_at_a_time and self.parallel_shards > 1:
            raise ValueError(
                f"parallel_shards is {self.parallel_shards}, but cache.access_mode is {self.cache.access_mode} and "
                "tasks may run on several nodes, of which only one can mount the volume; use a ReadWriteMany claim, or "
                f"pin cpu and gpu to one node with node_selector {{{_HOST_LABEL}: NAME}}"
            )
        return self

    @property
    def runs_one_task_at_a_time(self) -> bool:
        """Whether the cache can be mounted on one node only, while the tasks may run on several.

        Kubeflow Pipelines 2.17.0 has no pod affinity that would bring them together (its proto has one, but
        backend/src/v2/driver/k8s.go does not read it).
        """
        if not self.cache.claim or self.cache.access_mode == "ReadWriteMany":
            return False
        if self.cache.access_mode == "ReadWriteOncePod":
            return True
        nodes = {self.resolve_profile(task).node_selector.get(_HOST_LABEL, "") for task in TASK_NAMES}
        return len(nodes) > 1 or "" in nodes

    def count_shard_tasks(self, rounds: int = 1) -> int:
        """Return the largest number of tasks that process shards at the same time, in a run of so many rounds."""
        if self.runs_one_task_at_a_time:
            return 1
        return self.parallel_shards or max(1, min(MAX_SHARD_TASKS, MAX_RUN_SHARD_TASKS // rounds))

    def resolve_profile(self, task: str) -> ResourceProfile:
        """Return the profile for the device of the task, with the changes for this task."""
        base: ResourceProfile = self.gpu if task in GPU_TASKS else self.cpu
        changes = self.stages.get(PROFILE_NAMES[task], StageOverrides()).model_dump(exclude_none=True)
        return ResourceProfile.model_validate(base.model_dump() | changes)

    def select_image(self, task: str) -> str:
        """Return the image for GPUs if the task gets one, else that for CPUs, which is several GB smaller."""
        return self.images.gpu if self.resolve_profile(task).count else self.images.cpu


def _check_task_names(names: tuple[str, ...]) -> tuple[str, ...]:
    known = tuple(dict.fromkeys(PROFILE_NAMES.values()))
    unknown = [name for name in names if name not in known]
    if unknown:
        merged = [name for name in unknown if name in _SHARD_STAGES]
        hint = f"; {', '.join(merged)}: part of the task generate" if merged else ""
        raise ValueError(f"no task is called {', '.join(unknown)}; the tasks are {', '.join(known)}{hint}")
    return names


def load_cluster_settings(path: Path | None) -> ClusterSettings:
    """Read cluster.yaml; without a path, return the defaults. Raises InvalidRecord that names the file and the key."""
    if path is None:
        return ClusterSettings()
    content = read_settings(path, "the cluster's settings (cluster.yaml)")
    settings = parse_config(ClusterSettings, content, where=str(path))
    for name, value in settings.env.items():
        if _SECRET_NAME.search(name) or ("://" in value and "@" in value):
            raise InvalidRecord(
                f"{path}: env.{name} looks like a secret and would appear in manifests; name a Secret instead"
            )
    return settings
