"""Conversations as trees of tokens, in which every common beginning occurs once.

Questions about one image, the regions of a question, the answers from a region and the findings that are looked for in
a crop begin with the same pictures and words. A tree holds such conversations in one sequence, depth first: a token is
followed by everything that continues it, so the tokens after which it may be seen are one interval. A forward pass over
that sequence, with each token's position in its conversation and a mask that shows it its ancestors only, gives the
hidden states of separate conversations (training/packing.py does the same for the two sides of a pair).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clincot.models.encoding import EncodedConversation

Indices = npt.NDArray[np.int64]

# Shape suffixes: N members, T tokens of a tree, L tokens of a conversation.

# Conversations share a tree if at least this share of the shorter one is common. Nearly all conversations have the
# template's first words in common; one tree of all of them would compute attention between strangers for nothing.
MIN_COMMON_SHARE = 0.25


TREE_TOKENS = 8192  # of one tree, at most; its attention mask grows with their square
BATCH_TOKENS = 8192  # of a batch of trees on a processor, which is no faster with more
LEAVE_SHARE = 0.125  # of a batch: replies that have ended leave it once there are as many


@dataclass(frozen=True)
class PrefixTree:
    """Conversations whose common beginnings are computed once.

    members: indices of the conversations. paths: for each member the (L,) indices of its tokens in the tree.
    owners, depths (T,): the conversation from which a token is taken, and its position there. ends (T,): the index
    after the last token that continues a token; a token is visible to those from itself up to there.
    """

    members: tuple[int, ...]
    paths: tuple[Indices, ...]
    owners: Indices
    depths: Indices
    ends: Indices

    def __len__(self) -> int:
        return len(self.owners)


def build_keys(
    conversations: Sequence[EncodedConversation],
    image_ids: frozenset[int],
    numbers: dict[tuple[str, bool], int] | None = None,
) -> list[Indices]:
    """(L,) keys of each conversation's tokens: two tokens with equal keys and equal tokens before them are the same.

    The key of an image token is negative and says which picture it belongs to, because two crops have the same ids. A
    picture that its conversation shows by itself is another one than the same picture among others: LLaVA-OneVision
    tiles only the former. numbers: of the pictures so far, for keys that are compared with those of another call.
    """
    numbers = {} if numbers is None else numbers
    images = sorted(image_ids)  # few: comparing with each is cheaper than np.isin
    keys = []
    for conversation in conversations:
        key_L = np.array(conversation.ids, dtype=np.int64)
        alone = len(conversation.pictures) == 1
        shown = [numbers.setdefault((picture.key, alone), len(numbers)) for picture in conversation.pictures]
        if shown:
            is_image_L = np.logical_or.reduce([key_L == image for image in images])
            key_L[is_image_L] = np.repeat(-1 - np.array(shown), conversation.picture_tokens)
        keys.append(key_L)
    return keys


def build_trees(keys: Sequence[Indices], *, max_tokens: int) -> list[PrefixTree]:
    """Trees of all conversations, given their keys; each has at most `max_tokens`, unless one conversation has more."""
    order = sorted(range(len(keys)), key=lambda index: keys[index].tolist())
    trees: list[PrefixTree] = []
    builder = _TreeBuilder()
    before: Indices | None = None
    for index in order:
        key_L = keys[index]
        common = 0 if before is None else _count_common(before, key_L)
        related = before is not None and common >= MIN_COMMON_SHARE * min(len(before), len(key_L))
        if before is not None and not (related and builder.length + len(key_L) - common <= max_tokens):
            trees.append(builder.finish())
            builder, common = _TreeBuilder(), 0
        builder.add(index, len(key_L), common)
        before = key_L
    if before is not None:
        trees.append(builder.finish())
    return trees


def batch_trees(trees: Sequence[PrefixTree], max_tokens: int) -> Iterator[list[PrefixTree]]:
    """Batches of trees of similar length whose tokens, padding included, stay within the limit."""
    batch: list[PrefixTree] = []
    for tree in sorted(trees, key=len):
        if batch and len(tree) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def group_replies(
    trees: Sequence[PrefixTree], *, batch_size: int, max_tokens: int, max_new_tokens: int
) -> Iterator[list[PrefixTree]]:
    """Trees whose conversations are continued at once, so many that their tokens stay within the limit."""
    group: list[PrefixTree] = []
    count = longest = 0
    for tree in trees:
        longest_here = max(len(path) for path in tree.paths) + max_new_tokens
        many = count + len(tree.members)
        if group and (many > batch_size or many * max(longest, longest_here) > max_tokens):
            yield group
            group, count, longest = [], 0, 0
        group.append(tree)
        count, longest = count + len(tree.members), max(longest, longest_here)
    if group:
        yield group


class _TreeBuilder:
    """Adds conversations in sorted order, so that those with a common beginning follow each other."""

    def __init__(self) -> None:
        self.length = 0
        self._members: list[int] = []
        self._paths: list[Indices] = []
        self._owners: list[Indices] = []
        self._depths: list[Indices] = []
        self._left: list[tuple[Indices, int]] = []  # tokens that nothing continues any more, and their end

    def add(self, index: int, tokens: int, common: int) -> None:
        """Add a conversation of which the first `common` tokens are those of the one before it."""
        before = self._paths[-1] if self._paths else np.zeros(0, np.int64)
        self._left.append((before[common:], self.length))
        new = np.arange(self.length, self.length + tokens - common)
        self._members.append(index)
        self._paths.append(np.concatenate([before[:common], new]))
        self._owners.append(np.full(len(new), index, np.int64))
        self._depths.append(np.arange(common, tokens))
        self.length += len(new)

    def finish(self) -> PrefixTree:
        ends_T = np.full(self.length, self.length, np.int64)
        for tokens, end in self._left:
            ends_T[tokens] = end
        return PrefixTree(
            tuple(self._members),
            tuple(self._paths),
            np.concatenate(self._owners),
            np.concatenate(self._depths),
            ends_T,
        )


def _count_common(a: Indices, b: Indices) -> int:
    """The length of the common beginning of two sequences."""
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(differs.argmax()) if differs.any() else shorter
