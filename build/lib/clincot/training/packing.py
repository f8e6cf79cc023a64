"""Pack conversations with a common prefix into one sequence, so that the prefix is computed once.

Questions about one image, and the two sides of a pair, start with the same pictures and often the same words. A pack is
that prefix followed by the remainder of every conversation. Positions restart after the prefix, and a token attends
only to the prefix and to its own remainder, so the log-probabilities equal those of separate conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clincot.models.encoding import EncodedConversation
from clincot.prompts import ImageView

# Shape suffixes: S packs, T tokens.

SHARED_SEGMENT, PADDING_SEGMENT = -1, -2  # segments that do not belong to one conversation


@dataclass(frozen=True)
class Pack:
    """A packed sequence; `segments` holds each token's conversation (index in the pack) or SHARED_SEGMENT."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    actions: tuple[bool, ...]
    segments: tuple[int, ...]
    pictures: tuple[ImageView, ...]


def pack_conversations(
    conversations: Sequence[EncodedConversation], image_id: int, image_tokens: Callable[[ImageView], int]
) -> Pack:
    """Pack the conversations into one sequence. `image_tokens` returns the number of `image_id` tokens of a picture."""
    if len(conversations) == 1:
        (only,) = conversations
        return Pack(only.ids, tuple(range(len(only.ids))), only.actions, (0,) * len(only.ids), only.pictures)
    shared, shown = find_common_prefix(conversations, image_id, image_tokens)
    first = conversations[0]
    ids, actions = list(first.ids[:shared]), [False] * shared
    positions, segments, pictures = list(range(shared)), [SHARED_SEGMENT] * shared, list(first.pictures[:shown])
    for index, conversation in enumerate(conversations):
        ids += conversation.ids[shared:]
        actions += conversation.actions[shared:]
        positions += range(shared, len(conversation.ids))
        segments += [index] * (len(conversation.ids) - shared)
        pictures += conversation.pictures[shown:]
    return Pack(tuple(ids), tuple(positions), tuple(actions), tuple(segments), tuple(pictures))


def find_common_prefix(
    conversations: Sequence[EncodedConversation], image_id: int, image_tokens: Callable[[ImageView], int]
) -> tuple[int, int]:
    """(tokens, pictures) in the prefix that all conversations have in common.

    The prefix ends before the token that predicts a conversation's first action, because that prediction belongs to one
    conversation. It also ends before the first picture that differs, which token ids do not show: two crops have the
    same image tokens.
    """
    first = conversations[0]
    tokens = min(_count_unacted_tokens(conversation) for conversation in conversations)
    shown = len(first.pictures)
    for other in conversations[1:]:
        tokens = _count_common_items(first.ids, other.ids, tokens)
        shown = _count_common_items(first.pictures, other.pictures, shown)
    # keep the pictures whose image tokens are all inside the prefix, then end the prefix before the next picture
    image_positions = [position for position, token in enumerate(first.ids) if token == image_id]
    used = whole_pictures = 0  # image tokens and pictures in the prefix
    for picture in first.pictures[:shown]:
        end = used + image_tokens(picture)
        if image_positions[end - 1] >= tokens:
            break
        used, whole_pictures = end, whole_pictures + 1
    return min([tokens, *image_positions[used : used + 1]]), whole_pictures


def _count_unacted_tokens(conversation: EncodedConversation) -> int:
    """The number of tokens before the one that predicts the first action."""
    if True not in conversation.actions:
        return len(conversation.ids)
    return max(0, conversation.actions.index(True) - 1)


def _count_common_items(a: Sequence[object], b: Sequence[object], limit: int) -> int:
    """The length of the common prefix of two sequences, at most `limit`."""
    limit = min(len(a), len(b), limit)
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def build_attention_mask(segments_ST: torch.Tensor) -> torch.Tensor:
    """(S, 1, T, T) mask: a token attends to itself and to earlier tokens of its own segment or the shared prefix."""
    own_STT = segments_ST[:, :, None] == segments_ST[:, None, :]
    shared_STT = (segments_ST == SHARED_SEGMENT)[:, None, :] & (segments_ST != PADDING_SEGMENT)[:, :, None]
    return ((own_STT | shared_STT).tril())[:, None]
