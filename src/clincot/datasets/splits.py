"""Splits: who belongs together, and who is in the test set."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, TypeVar

from clincot.errors import InvalidInput

K = TypeVar("K", bound=Hashable)
SplitSide = Literal["train", "test"]


def hash_to_share(group: str, *, salt: str, seed: int) -> float:
    """A number in [0, 1) that depends on nothing but the group, the seed and the data set's `salt`."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{seed}:{group}".encode()).digest()[:8]) / 2**64


def assign_split(group: str, *, salt: str, seed: int, test_share: float) -> SplitSide:
    """Test for an expected `test_share` of the groups. More groups move none to the other side."""
    return "test" if hash_to_share(group, salt=salt, seed=seed) < test_share else "train"


def check_test_share(test_share: float) -> None:
    if not 0 < test_share < 1:
        raise InvalidInput(f"test_share is a share of the images in (0, 1), got {test_share}")


def group_connected(bonds: Iterable[tuple[K, K]], members: Sequence[K]) -> dict[K, K]:
    """{member: the first of the members it is tied to, through any chain of bonds}; alone, that is itself."""
    above: dict[K, K] = {}

    def top(one: K) -> K:
        while above.setdefault(one, one) != one:
            above[one] = above[above[one]]  # halves the way for the next
            one = above[one]
        return one

    for a, b in bonds:
        above[top(a)] = top(b)
    first: dict[K, K] = {}
    for one in members:
        first.setdefault(top(one), one)
    return {one: first[top(one)] for one in members}
