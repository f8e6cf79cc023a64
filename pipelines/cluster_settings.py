"""cluster.yaml: what an operator says about where the tasks of a round run. Names of Secrets stand here, no secrets.

Every key is described at its field; `cluster.yaml` beside this file is a commented example of all of them. A task takes
the profile `gpu` or `cpu` by its stage's device (stages.py), and then what `stages` says of that very stage.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from clincot.config import FrozenConfig, parse_config, read_settings
from clincot.jsonl import InvalidRecord
from clincot.stages.catalog import STAGES

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
ImageReference = Annotated[str, Field(pattern=r"^[a-z0-9][-\w./:]*(@sha256:[0-9a-f]{64})?$")]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[kMGTPE]i?)?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Seconds = Annotated[int, Field(ge=1)]
# Tasks that are not stages; all of them run on CPUs.
NON_STAGE_TASKS = (
    "start_round",
    "merge",
    "record_round",
    "page",
    "deploy",
    "select_champion",
    "record_run_status",
)
TASK_NAMES = (*(stage.name for stage in STAGES), *NON_STAGE_TASKS)
_SECRET_NAME = re.compile(r"(?i)(secret|token|passw|_key$|credential)")


class Images(FrozenConfig):
    """The images of the tasks; by digest (…@sha256:…) a run is what it says, by tag it is what the registry says."""

    cpu: Annotated[ImageReference, Field(description="of tasks without a GPU")] = "clincot-cpu:latest"
    gpu: Annotated[ImageReference, Field(description="of the stages whose device is gpu")] = "clincot-cuda:latest"
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    pull_secrets: Annotated[tuple[Name, ...], Field(description="Secrets with registry credentials")] = ()


class ContainerResources(FrozenConfig):
    """Of one container."""

    cpu: Annotated[str, Field(pattern=r"^\d+(\.\d+)?m?$")]
    memory: Quantity


class Toleration(FrozenConfig):
    """As in a pod's spec."""

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""
    seconds: Annotated[int | None, Field(ge=0, description="tolerationSeconds, of NoExecute")] = None


class RetryPolicy(FrozenConfig):
    """Of a task that failed; the pause grows by the factor each time."""

    count: Annotated[int, Field(ge=0)] = 2
    backoff_s: Seconds = 30
    factor: Annotated[float, Field(ge=1)] = 2.0
    max_s: Seconds = 600


class ResourceProfile(FrozenConfig):
    """What a task asks for."""

    requests: ContainerResources
    limits: ContainerResources
    accelerator: Annotated[str, Field(description="resource name, such as nvidia.com/gpu; with count 0: none")] = ""
    count: Annotated[int, Field(ge=0, description="accelerators")] = 0
    node_selector: dict[str, str] = Field(default={})
    tolerations: tuple[Toleration, ...] = ()
    shm: Annotated[Quantity | Literal[""], Field(description="size of /dev/shm; empty: the runtime's 64Mi")] = ""
    timeout_s: Annotated[Seconds, Field(description="a task that takes longer is ended, and counts as failed")] = 3600
    retries: RetryPolicy = RetryPolicy()

    @model_validator(mode="after")
    def _check_accelerator(self) -> ResourceProfile:
        if self.count and not self.accelerator:
            raise ValueError(f"count is {self.count}, but accelerator names no resource (nvidia.com/gpu)")
        return self


class StageOverrides(FrozenConfig):
    """What one stage asks for otherwise than its profile; what is left out stays as in the profile."""

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
    """A claim where data sets and checkpoints stay between tasks. Without it every task fetches what it needs."""

    claim: Annotated[
        Name | Literal[""], Field(description="PersistentVolumeClaim in the run namespace; empty: none")
    ] = ""
    mount: Annotated[str, Field(pattern=r"^/[-\w./]+$")] = "/cache"
    sub_path: str = ""


class SecretEnv(FrozenConfig):
    """Keys of a Secret (in the run namespace) as environment variables."""

    name: Name
    env: Annotated[dict[str, VariableName], Field(min_length=1, description="{key of the Secret: variable}")]
    optional: Annotated[bool, Field(description="the pod starts without it, too")] = False
    stages: Annotated[tuple[str, ...], Field(description="tasks that see it; empty: all")] = ()

    @field_validator("stages")
    @classmethod
    def _check_stages(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        return _check_task_names(stages)


class PodSecurity(FrozenConfig):
    """As far as Kubeflow Pipelines can say it. Read-only root, dropped capabilities and seccomp it cannot: those are
    set by the namespace's Pod Security level or an admission policy, and the image runs with them."""

    user: Annotated[int, Field(ge=1, description="the default is the images' (Dockerfile)")] = 10001
    group: Annotated[int, Field(ge=1)] = 10001
    non_root: Literal[True] = True


class ClusterSettings(FrozenConfig):
    """cluster.yaml, whole."""

    namespace: Annotated[Name, Field(description="of run pods: that of Kubeflow Pipelines, or a profile's")] = (
        "kubeflow"
    )
    service_account: Annotated[Name | Literal[""], Field(description="of run pods; empty: KFP's default")] = ""
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
    stages: Annotated[dict[str, StageOverrides], Field(description="{task: what it asks for otherwise}")] = Field(
        default={}
    )
    cache: CacheVolume = CacheVolume()
    env: Annotated[dict[VariableName, str], Field(description="of every task: endpoints, CA bundles, proxies")] = Field(
        default={}
    )
    ca_config_map: Annotated[
        Name | Literal[""], Field(description="ConfigMap (in the run namespace) with cabundle.crt: all CAs to trust")
    ] = ""
    secrets: tuple[SecretEnv, ...] = ()
    security: PodSecurity = PodSecurity()
    labels: Annotated[dict[str, str], Field(description="of every pod")] = Field(default={})
    annotations: Annotated[dict[str, str], Field(description="of every pod")] = Field(default={})
    queue: Annotated[str, Field(description="Kueue's LocalQueue for the pods; empty: none")] = ""
    parallel_shards: Annotated[int, Field(ge=0, description="shards that run at once; 0: all")] = 0
    deadline_s: Annotated[Seconds, Field(description="of a whole run")] = 7 * 86400
    keep_s: Annotated[int, Field(ge=0, description="how long a finished run's workflow object is kept")] = 7 * 86400

    @field_validator("stages")
    @classmethod
    def _check_stages(cls, stages: dict[str, StageOverrides]) -> dict[str, StageOverrides]:
        _check_task_names(tuple(stages))
        return stages

    def resolve_profile(self, task: str) -> ResourceProfile:
        """What the task asks for: its device's profile, with its stage's changes."""
        device = next((stage.device for stage in STAGES if stage.name == task), "cpu")
        base: ResourceProfile = self.gpu if device == "gpu" else self.cpu
        changes = self.stages.get(task, StageOverrides()).model_dump(exclude_none=True)
        return ResourceProfile.model_validate(base.model_dump() | changes)

    def select_image(self, task: str) -> str:
        device = next((stage.device for stage in STAGES if stage.name == task), "cpu")
        return self.images.gpu if device == "gpu" else self.images.cpu


def _check_task_names(names: tuple[str, ...]) -> tuple[str, ...]:
    strange = [name for name in names if name not in TASK_NAMES]
    if strange:
        raise ValueError(f"no task is called {', '.join(strange)}; there are {', '.join(TASK_NAMES)}")
    return names


def load_cluster_settings(path: Path | None) -> ClusterSettings:
    """cluster.yaml; None: the defaults. Raises BadRecord naming the file and the key."""
    if path is None:
        return ClusterSettings()
    content = read_settings(path, "the cluster's settings (cluster.yaml)")
    settings = parse_config(ClusterSettings, content, where=str(path))
    for name, value in settings.env.items():
        if _SECRET_NAME.search(name) or ("://" in value and "@" in value):
            raise InvalidRecord(
                f"{path}: env.{name} looks like a secret; it would stand in manifests: name a Secret instead"
            )
    return settings
