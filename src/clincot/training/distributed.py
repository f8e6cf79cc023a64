"""The processes that train together: what one does for all, and how a step's pairs are shared.

A step's pairs and their order are those of one process, whatever the number of processes: every process draws the same
global batch and keeps its slice of it. A last, smaller batch that does not divide is filled up with pairs that weigh
nothing, so the mean over the team is the mean over the batch and nothing is seen twice.

A rank is a process of torch.distributed (torchrun starts them); without one, the team is this process alone.
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
WEIGHT_KEY = "weight"  # (B,) of a batch's pairs in the mean over the team; absent in a team of one


@dataclass(frozen=True)
class ProcessGroup:
    """rank: of this process, 0-based; size: how many there are."""

    rank: int = 0
    size: int = 1

    @classmethod
    def from_torch(cls) -> ProcessGroup:
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def wait_for_everyone(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()

    def on_main_process(self, work: Callable[[], object]) -> None:
        """Done by the first process; the others wait."""
        if self.is_main_process:
            work()
        self.wait_for_everyone()

    def per_process_batch(self, batch_size: int) -> int:
        """Pairs a process and step. Raises BadInput where the batch does not divide."""
        if batch_size % self.size:
            raise InvalidInput(
                f"train.batch_size is {batch_size}, which {self.size} processes cannot share evenly; make it a "
                f"multiple of {self.size}, or train on another number of processes"
            )
        return batch_size // self.size

    def average_metrics(self, values: Mapping[str, float]) -> dict[str, float]:
        """Each value averaged over the team; the same on every process. All of them must call it."""
        if self.size == 1 or not values:
            return dict(values)
        everyone: list[dict[str, float]] = gather_object([dict(values)])
        return {name: sum(one[name] for one in everyone) / self.size for name in values}

    def gather_unique(self, found: Sequence[str]) -> list[str]:
        """What any process found, each once, in the order of the ranks. All of them must call it."""
        if self.size == 1:
            return list(found)
        return list(dict.fromkeys(gather_object(list(found))))

    def keep_whole_batches(self, loader: DataLoader[Any]) -> DataLoader[Any]:
        """A loader that accelerate prepared, giving every process the whole batches instead of every so-many-th one."""
        shard = loader.batch_sampler
        if self.size > 1:
            if not isinstance(shard, BatchSamplerShard):
                raise TypeError(f"expected accelerate's BatchSamplerShard, got {type(shard).__name__}")
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader


class Collator(Protocol):
    @property
    def sides(self) -> int: ...

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch: ...


class DistributedCollator:
    """A global batch, collated to this process's slice of it, with the weight of each pair in the team's mean.

    Three pairs and two processes: pairs 0 and 1 here with weights 2/3, pair 2 and (again) pair 0 there with weights 2/3
    and 0. A process's loss is its weighted sum; the mean of both is (l0 + l1 + l2) / 3.
    """

    def __init__(self, collator: Collator, team: ProcessGroup) -> None:
        self.collator, self.process_group = collator, team

    @property
    def sides(self) -> int:
        return self.collator.sides

    def __call__(self, examples: Sequence[dict[str, Any]]) -> Batch:
        if self.process_group.size == 1:
            return self.collator(examples)
        count = len(examples)
        share = -(-count // self.process_group.size)
        mine = range(self.process_group.rank * share, (self.process_group.rank + 1) * share)
        batch = self.collator([examples[at % count] for at in mine])
        batch[WEIGHT_KEY] = torch.tensor([self.process_group.size / count if at < count else 0.0 for at in mine])
        return batch


def average_batch(value_B: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """This process's part of the mean over the global batch: averaged over the team it is that mean."""
    if WEIGHT_KEY not in batch:
        return value_B.mean()
    return (value_B * batch[WEIGHT_KEY].to(value_B)).sum()
