"""The processes that train together: coordination, and how they share the pairs of a step.

The pairs of a step and their order do not depend on the number of processes: every process draws the same global batch
and keeps its slice of it. A last, smaller batch that does not divide evenly is padded with pairs of weight 0, so the
mean over the processes is the mean over the batch and no pair counts twice.

A rank is a process of torch.distributed, started by torchrun. Without torch.distributed, the group is this process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import gather_object
from torch import distributed
from torch.utils.data import DataLoader

from clincot.errors import InvalidInput

# Shape suffixes: B pairs of this process.

Batch = dict[str, torch.Tensor]
T = TypeVar("T")
WEIGHT_KEY = "weight"  # (B,) weights of a batch's pairs in the mean over the processes; absent with one process


@dataclass(frozen=True)
class ProcessGroup:
    """rank: index of this process, 0-based; size: number of processes."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_torch(cls) -> ProcessGroup:
        """The group of torch.distributed, or a group of one if it is not initialised."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process of rank 0."""
        return self.rank == 0

    def wait_for_everyone(self) -> None:
        """Wait until every process has reached this call."""
        if self.size > 1:
            distributed.barrier()

    def on_main_process(self, action: Callable[[], object]) -> None:
        """Run an action on the main process while the others wait."""
        if self.is_main_process:
            action()
        self.wait_for_everyone()

    def per_process_batch(self, batch_size: int) -> int:
        """Pairs of one process in a step. Raises InvalidInput if the batch does not divide evenly."""
        if batch_size % self.size:
            raise InvalidInput(
                f"train.batch_size is {batch_size}, which {self.size} processes cannot share evenly; make it a "
                f"multiple of {self.size}, or train on another number of processes"
            )
        return batch_size // self.size

    def average_metrics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Average each value over the processes; the result is the same on all of them. All processes must call it."""
        if self.size == 1 or not values:
            return dict(values)
        gathered: list[dict[str, float]] = gather_object([dict(values)])
        averages = {}
        for name in values:
            averages[name] = sum(of_rank[name] for of_rank in gathered) / self.size
        return averages

    def gather_unique(self, items: Sequence[str]) -> list[str]:
        """The items of all processes in the order of their ranks, each once. All processes must call it."""
        if self.size == 1:
            return list(items)
        return list(dict.fromkeys(gather_object(list(items))))

    def keep_whole_batches(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """Make a loader that accelerate prepared give every process all batches, not only its own share of them."""
        shard = loader.batch_sampler
        if self.size > 1:
            if not isinstance(shard, BatchSamplerShard):
                raise TypeError(f"expected accelerate's BatchSamplerShard, got {type(shard).__name__}")
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader


class Collator(Protocol):
    """Collates examples of a data set; `sides` is the number of conversations of each pair."""

    @property
    def sides(self) -> int: ...

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch: ...


class DistributedCollator:
    """Collates this process's slice of a global batch, with the weight of each pair in the mean over the processes.

    Example with three pairs and two processes: the first gets pairs 0 and 1 with weights 2/3 and 2/3, the second pair 2
    and (again) pair 0 with weights 2/3 and 0. The loss of a process is its weighted sum, so the mean over both is
    (l0 + l1 + l2) / 3.
    """

    def __init__(self, collator: Collator, process_group: ProcessGroup) -> None:
        self.collator, self.process_group = collator, process_group

    @property
    def sides(self) -> int:
        """Conversations of each pair."""
        return self.collator.sides

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        if self.process_group.size == 1:
            return self.collator(examples)
        count = len(examples)
        share = -(-count // self.process_group.size)
        mine = range(self.process_group.rank * share, (self.process_group.rank + 1) * share)
        batch = self.collator([examples[index % count] for index in mine])
        weights = [self.process_group.size / count if index < count else 0.0 for index in mine]
        batch[WEIGHT_KEY] = torch.tensor(weights)
        return batch


def average_batch(value_B: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """This process's part of the mean over the global batch; the average over the processes is that mean."""
    if WEIGHT_KEY not in batch:
        return value_B.mean()
    return (value_B * batch[WEIGHT_KEY].to(value_B)).sum()
