"""Units of questions: what is batched together. Batches never cross from one unit to the next.

On most hardware a number comes out a last digit otherwise in another batch. Since units are cut by the number of
questions alone, the same questions in the same unit give the same bytes, whether the round is worked on whole or in
shards (shards.py), which are runs of whole units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import TypeVar

BLOCK_SIZE = 64  # questions
T = TypeVar("T")


def iter_blocks(items: Iterable[T], question: Callable[[T], str]) -> Iterator[tuple[int, T]]:
    """Every item with the number of its unit; the items of a question stand together."""
    for number, (_, group) in enumerate(groupby(items, key=question)):
        for item in group:
            yield number // BLOCK_SIZE, item
