"""Fully sharded data parallel (FSDP): accelerate splits the model among the training processes.

Each decoder layer is gathered when it is needed and released afterwards; gradients and optimiser states are sharded
too. The configuration is the environment that `accelerate launch` would set.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import DistributedType

from clincot.errors import InvalidInput

# Read by accelerate.utils.FullyShardedDataParallelPlugin. With FULL_STATE_DICT, any number of processes can resume from
# a checkpoint. The layers to wrap are those that a model class of transformers lists in `_no_split_modules`.
FSDP_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def enable_fsdp() -> None:
    """Shard the models that this process trains. Call it before any object of accelerate is created."""
    os.environ.update(FSDP_ENVIRONMENT)


def is_fsdp_enabled() -> bool:
    """Whether this process trains sharded models."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def check_sharded(trainer: Any) -> None:
    """Raise InvalidInput if sharding was requested but not applied: without GPUs, accelerate ignores it silently."""
    if is_fsdp_enabled() and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise InvalidInput("sharding fsdp splits a model among GPUs, and there are none here; set sharding: none")


def gather_weights(trainer: Any) -> dict[str, torch.Tensor] | None:
    """Gather the full weights of a sharded model on the CPU of the main process; None if the model is not sharded.

    All processes must call it.
    """
    if not is_fsdp_enabled():
        return None
    weights: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    first_names: dict[int, str] = {}
    for name, parameter in trainer.model.named_parameters(remove_duplicate=False):
        first_name = first_names.setdefault(id(parameter), name)
        if name in weights and first_name in weights:
            weights[name] = weights[first_name]  # tied weights become one tensor again, so they are written once
    return weights
