"""What an operator says about where training runs: `launch.yaml`, beside params.yaml, which a researcher sweeps.

It decides how fast a policy is trained, not which: a step's pairs, their order and the learning rate are those of one
process (training/distributed.py), so another launch makes no training undone. Secrets are named, never held.
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
    """One key of a Secret, as an environment variable's value."""

    secret: Name
    key: Annotated[str, Field(min_length=1)]


class TrainJobSettings(FrozenConfig):
    """A Kubeflow Trainer v2 TrainJob over several nodes. Inputs and checkpoint go over a volume that all pods mount."""

    image: Annotated[str, Field(min_length=1, description="with this package in it")]
    claim: Annotated[Name, Field(description="PersistentVolumeClaim, ReadWriteMany, mounted in this pod as well")]
    mount: Annotated[Path, Field(description="where it is mounted, here and in the job's pods")]
    sub_path: str = ""
    namespace: Name = "default"
    prefix: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,28}[a-z0-9])?$", description="of the job's name")] = (
        "clincot-train"
    )
    runtime: Annotated[Name, Field(description="whose replicated job and container are called node")] = (
        "torch-distributed"
    )
    runtime_kind: Literal["ClusterTrainingRuntime", "TrainingRuntime"] = "ClusterTrainingRuntime"
    nodes: PositiveInt = 2
    processes_per_node: Annotated[PositiveInt, Field(description="one a GPU")] = 1
    resources: dict[Literal["requests", "limits"], dict[str, str]] = Field(
        default={"requests": {"cpu": "8", "memory": "64Gi"}, "limits": {"memory": "64Gi", "nvidia.com/gpu": "1"}},
        description="of each node's pod",
    )
    env: Annotated[dict[str, str], Field(description="NCCL_… and the like; nothing secret")] = Field(default={})
    secret_env: Annotated[dict[str, SecretKey], Field(description="{variable: {secret, key}}")] = Field(default={})
    shm: Annotated[str, Field(description="size of /dev/shm, for NCCL")] = "8Gi"
    node_selector: dict[str, str] = Field(default={})
    tolerations: tuple[dict[str, str | int], ...] = ()
    service_account: str = ""
    image_pull_secrets: tuple[Name, ...] = ()
    queue: Annotated[str, Field(description="of Kueue; empty: none")] = ""
    schedule_s: Annotated[float, Field(gt=0, description="until all nodes must run, queueing included")] = 1800.0
    timeout_s: Annotated[int, Field(ge=1, description="of the whole job")] = 86400
    poll_s: Annotated[float, Field(gt=0)] = 5.0

    @model_validator(mode="after")
    def _check_mount(self) -> TrainJobSettings:
        if not PurePosixPath(self.mount).is_absolute():
            raise ValueError(f"mount is a path from the root, got {self.mount}")
        return self


class LaunchSettings(FrozenConfig):
    """How a training run is started."""

    how: Annotated[
        Literal["auto", "here", "torchrun", "train-job"],
        Field(description="auto: torchrun where several GPUs are visible, in this process otherwise"),
    ] = "auto"
    processes: Annotated[int, Field(ge=0, description="torchrun's; 0: one a GPU")] = 0
    sharding: Annotated[
        Sharding, Field(description="none: every process holds the whole model; fsdp: it is split among them")
    ] = "none"
    job: TrainJobSettings | None = None

    @model_validator(mode="after")
    def _check_combination(self) -> LaunchSettings:
        if (self.how == "train-job") != (self.job is not None):
            raise ValueError("`job` is the settings of how: train-job, and of nothing else")
        if self.processes and self.how != "torchrun":
            raise ValueError("`processes` is of how: torchrun")
        if self.how == "here" and self.sharding != "none":
            raise ValueError("one process has nothing to share a model with; set sharding: none")
        return self


def load_launch_settings(path: Path | None) -> LaunchSettings:
    """The settings of a YAML file, the defaults without one; raises BadRecord naming the file and the field."""
    if path is None:
        return LaunchSettings()
    content = read_settings(path, "how to launch a training (launch.yaml)")
    return parse_config(LaunchSettings, content, where=str(path))
