"""Train/test splits by a seeded hash, and the grouping of images that must not be separated."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, TypeVar

from clincot.errors import InvalidInput

K = TypeVar("K", bound=Hashable)
SplitSide = Literal["train", "test"]


def hash_to_share(group: str, *, salt: str, seed: int) -> float:
    """Hash a group's name to a number in [0, 1) that depends only on the name, `salt` and `seed`."""
    return int.from_bytes(hashlib.sha256(f"{salt}:{seed}:{group}".encode()).digest()[:8]) / 2**64


def assign_split(group: str, *, salt: str, seed: int, test_share: float) -> SplitSide:
    """Assign a group to "test" with probability `test_share`, else to "train".

    The side depends only on the group's own hash, so groups that are added later move no other group.
    """
    return "test" if hash_to_share(group, salt=salt, seed=seed) < test_share else "train"


def check_test_share(test_share: float) -> None:
    """Raise InvalidInput unless 0 < test_share < 1."""
    if not 0 < test_share < 1:
        raise InvalidInput(f"test_share is a share of the images in (0, 1), got {test_share}")


def group_connected(bonds: Iterable[tuple[K, K]], members: Sequence[K]) -> dict[K, K]:
    """Group members that any chain of bonds connects (union-find).

    Returns {member: the first member of its group}; a member without bonds is its own group. Keys in `bonds` need not
    be members: two members are connected if both are bonded to the same key.
    """
    parents: dict[K, K] = {}

    def find_root(key: K) -> K:
        while parents.setdefault(key, key) != key:
            parents[key] = parents[parents[key]]  # path halving keeps later searches short
            key = parents[key]
        return key

    for a, b in bonds:
        parents[find_root(a)] = find_root(b)
    first: dict[K, K] = {}
    for member in members:
        first.setdefault(find_root(member), member)
    return {member: first[find_root(member)] for member in members}
