"""Fixed blocks of questions. A batch never crosses the border of a block.

Batch composition can change the last digit of a floating-point result. Blocks depend only on the order of the
questions, and a shard (pipelines/sharding.py) consists of whole blocks. So a round gives the same bytes whether it
runs as a whole or in shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise
from typing import TypeVar

BLOCK_SIZE = 64  # questions

T = TypeVar("T")


def iter_blocks(items: Iterable[T], question: Callable[[T], str]) -> Iterator[tuple[int, T]]:
    """Yield (block number, item) for every item. Items of one question must be adjacent and share a block."""
    for position, (_, group) in enumerate(groupby(items, key=question)):
        for item in group:
            yield position // BLOCK_SIZE, item


def bound_parts(blocks: int, count: int) -> list[tuple[int, int]]:
    """The first block and the one after the last of each part: at most `count`, as equal as can be, none empty."""
    count = max(1, min(count, blocks))
    return list(pairwise(blocks * number // count for number in range(count + 1)))
