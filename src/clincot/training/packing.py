"""Conversations that begin alike, laid out so that their beginning is computed once.

Questions about one image, and the two sides of a pair, start with the same pictures and often the same words. A pack is
that beginning followed by every conversation's own remainder; positions restart after the beginning and a token
attends to the beginning and to its own remainder only, so the log-probabilities are those of the conversations alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from clincot.models.encoding import EncodedConversation
from clincot.prompts import ImageView

# Shape suffixes: S packs, T tokens.

SHARED_SEGMENT, PADDING_SEGMENT = -1, -2  # segments that are no conversation's own


@dataclass(frozen=True)
class Pack:
    """`segments`: the conversation (its index in the pack) that each token is of, or SHARED."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    actions: tuple[bool, ...]
    segments: tuple[int, ...]
    pictures: tuple[ImageView, ...]
    types: tuple[int, ...] = ()  # modality of each token; only unpacked conversations have it
    picture_tokens: tuple[int, ...] = ()


def pack_conversations(
    conversations: Sequence[EncodedConversation], image_id: int, image_tokens: Callable[[ImageView], int]
) -> Pack:
    """The conversations as one sequence. `image_tokens` says how many tokens `image_id` a picture has."""
    if len(conversations) == 1:
        (only,) = conversations
        segments = (0,) * len(only.ids)
        return Pack(
            only.ids,
            tuple(range(len(only.ids))),
            only.actions,
            segments,
            only.pictures,
            only.types,
            only.picture_tokens,
        )
    shared, shown = find_common_prefix(conversations, image_id, image_tokens)
    first = conversations[0]
    ids, actions = list(first.ids[:shared]), [False] * shared
    positions, own_segments, pictures = list(range(shared)), [SHARED_SEGMENT] * shared, list(first.pictures[:shown])
    picture_tokens = list(first.picture_tokens[:shown])
    for index, one in enumerate(conversations):
        ids += one.ids[shared:]
        actions += one.actions[shared:]
        positions += range(shared, len(one.ids))
        own_segments += [index] * (len(one.ids) - shared)
        pictures += one.pictures[shown:]
        picture_tokens += one.picture_tokens[shown:]
    return Pack(
        tuple(ids),
        tuple(positions),
        tuple(actions),
        tuple(own_segments),
        tuple(pictures),
        picture_tokens=tuple(picture_tokens),
    )


def find_common_prefix(
    conversations: Sequence[EncodedConversation], image_id: int, image_tokens: Callable[[ImageView], int]
) -> tuple[int, int]:
    """(tokens, pictures) that all the conversations begin with.

    It ends before the token that predicts a conversation's first action, since what is predicted there is that
    conversation's own, and before the first picture that differs: two crops look alike in token ids.
    """
    first = conversations[0]
    tokens = min(max(0, e.actions.index(True) - 1) if True in e.actions else len(e.ids) for e in conversations)
    shown = len(first.pictures)
    for other in conversations[1:]:
        tokens = _count_common_items(first.ids, other.ids, tokens)
        shown = _count_common_items(first.pictures, other.pictures, shown)
    places = [place for place, token in enumerate(first.ids) if token == image_id]
    done = kept = 0
    for picture in first.pictures[:shown]:
        upto = done + image_tokens(picture)
        if places[upto - 1] >= tokens:
            break
        done, kept = upto, kept + 1
    return min([tokens, *places[done : done + 1]]), kept


def _count_common_items(a: Sequence[object], b: Sequence[object], most: int) -> int:
    """How many of the first `most` members are the same."""
    most = min(len(a), len(b), most)
    return next((i for i in range(most) if a[i] != b[i]), most)


def build_attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """(S, 1, T, T) of whether a token attends to another: an earlier one (or itself) of its own segment or SHARED."""
    own_STT = segments[:, :, None] == segments[:, None, :]
    shared_STT = (segments == SHARED_SEGMENT)[:, None, :] & (segments != PADDING_SEGMENT)[:, :, None]
    return ((own_STT | shared_STT).tril())[:, None]
