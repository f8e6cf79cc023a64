"""Where training runs: the operator's `launch.yaml`, separate from params.yaml, which a researcher varies.

It decides how fast a policy is trained, not what it learns: the pairs of a step, their order and the learning rate do
not depend on the number of processes (training/distributed.py), so a training need not be repeated after a change here.
Secrets are referenced by name and never stored.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from clincot.config import FrozenConfig, parse_config, read_settings
from clincot.fields import PositiveInt
from clincot.training.job import Sharding

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]


class SecretKey(FrozenConfig):
    """A key of a Kubernetes Secret whose value an environment variable gets."""

    secret: Name
    key: Annotated[str, Field(min_length=1)]


class TrainJobSettings(FrozenConfig):
    """A Kubeflow Trainer v2 TrainJob over several nodes; all pods mount the volume with inputs and checkpoint."""

    image: Annotated[str, Field(min_length=1, description="Container image that contains this package.")]
    claim: Annotated[Name, Field(description="PersistentVolumeClaim (ReadWriteMany), also mounted in this pod.")]
    mount: Annotated[Path, Field(description="Path at which the volume is mounted, here and in the job's pods.")]
    sub_path: Annotated[str, Field(description="Folder of the volume to mount; empty: the whole volume.")] = ""
    namespace: Name = "default"
    prefix: Annotated[
        str, Field(pattern=r"^[a-z]([-a-z0-9]{0,28}[a-z0-9])?$", description="Prefix of the job's name.")
    ] = "clincot-train"
    runtime: Annotated[
        Name, Field(description="Training runtime; its replicated job and container must be named node.")
    ] = "torch-distributed"
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    nodes: PositiveInt = 2
    processes_per_node: Annotated[PositiveInt, Field(description="Processes on each node; one per GPU.")] = 1
    resources: dict[Literal["requests", "limits"], dict[str, str]] = Field(
        default={"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "64Gi", "nvidia.com/gpu": "1"}},
        description="Resources of each node's pod.",
    )
    env: Annotated[dict[str, str], Field(description="Environment variables such as NCCL_…; no secrets.")] = Field(
        default={}
    )
    secret_env: Annotated[
        dict[str, SecretKey], Field(description="Environment variables from Secrets: {variable: {secret, key}}.")
    ] = Field(default={})
    shm: Annotated[str, Field(description="Size of /dev/shm, which NCCL uses.")] = "8Gi"
    node_selector: dict[str, str] = Field(default={})
    tolerations: tuple[dict[str, str | int], ...] = ()
    service_account: str = ""
    user: Annotated[int, Field(ge=0, description="User of the pods; 0: the platform assigns one.")] = 10001
    group: Annotated[int, Field(ge=0, description="Group of the pods, which owns the volume.")] = 10001
    pod_labels: Annotated[
        dict[str, str], Field(description="Labels of the job and its pods, which network policies select.")
    ] = Field(default={})
    image_pull_secrets: tuple[Name, ...] = ()
    queue: Annotated[str, Field(description="Kueue queue; empty: none.")] = ""
    schedule_s: Annotated[
        float, Field(gt=0, description="Seconds until all nodes must be running, including time in the queue.")
    ] = 1800.0
    timeout_s: Annotated[int, Field(ge=1, description="Time limit of the whole job in seconds.")] = 86400
    poll_s: Annotated[float, Field(gt=0, description="Seconds between two status requests.")] = 5.0

    @model_validator(mode="after")
    def _check_mount(self) -> TrainJobSettings:
        if not PurePosixPath(self.mount).is_absolute():
            raise ValueError(f"expected an absolute path as mount, got {self.mount}")
        return self


class LaunchSettings(FrozenConfig):
    """How a training run is started."""

    how: Annotated[
        Literal["auto", "here", "torchrun", "train-job"],
        Field(description="How to start: auto uses torchrun if several GPUs are visible, otherwise this process."),
    ] = "auto"
    processes: Annotated[int, Field(ge=0, description="Processes of torchrun; 0: one per GPU.")] = 0
    sharding: Annotated[
        Sharding, Field(description="none: every process holds the whole model; fsdp: the processes share it.")
    ] = "none"
    job: Annotated[TrainJobSettings | None, Field(description="Settings of how: train-job.")] = None

    @model_validator(mode="after")
    def _check_combination(self) -> LaunchSettings:
        if (self.how == "train-job") != (self.job is not None):
            raise ValueError("`job` must be set for how: train-job, and only then")
        if self.processes and self.how != "torchrun":
            raise ValueError("`processes` can only be set for how: torchrun")
        if self.how == "here" and self.sharding != "none":
            raise ValueError("one process cannot shard a model; set sharding: none")
        return self


def load_launch_settings(path: Path | None) -> LaunchSettings:
    """Read the settings from a YAML file, or return the defaults; raises InvalidRecord naming the file and field."""
    if path is None:
        return LaunchSettings()
    content = read_settings(path, "how to launch a training (launch.yaml)")
    return parse_config(LaunchSettings, content, where=str(path))
