"""A model that is split among the processes that train it: fully sharded data parallel, by accelerate.

Each decoder layer is gathered when it is needed and dropped afterwards; gradients and optimiser states are split too.
The configuration is what `accelerate launch` would pass on in the environment.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import DistributedType

from clincot.errors import InvalidInput

# Of accelerate.utils.FullyShardedDataParallelPlugin. FULL_STATE_DICT: a resumable checkpoint is read by any number of
# processes. The layers to wrap are what transformers' families name in `_no_split_modules`.
FSDP_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def enable_fsdp() -> None:
    """From here on this process trains models that are split. Before anything of accelerate is made."""
    os.environ.update(FSDP_ENVIRONMENT)


def is_fsdp_enabled() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def check_sharded(trainer: Any) -> None:
    """Raise BadInput where the model was to be split and is not: accelerate does so on GPUs alone, and says nothing."""
    if is_fsdp_enabled() and trainer.accelerator.distributed_type != DistributedType.FSDP:
        raise InvalidInput("sharding fsdp splits a model among GPUs, and there are none here; set sharding: none")


def gather_weights(trainer: Any) -> dict[str, torch.Tensor] | None:
    """The whole weights on the first process's CPU, of a split model; None of one that is whole. All must call it."""
    if not is_fsdp_enabled():
        return None
    weights: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    first: dict[int, str] = {}
    for name, parameter in trainer.model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(id(parameter), name)
        if name in weights and kept in weights:
            weights[name] = weights[kept]  # tied weights are one tensor again, and written once
    return weights
