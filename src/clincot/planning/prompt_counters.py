"""Count the tokens and pictures of a conversation: by the checkpoint's own processor, or estimated from its config.

With a checkpoint's folder the counts are exact, because the conversation is encoded as the models encode it. Without
one, pictures are counted by the published config and texts by their length.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from clincot.models.checked_encoder import build_checked_encoder
from clincot.models.inspection import read_model_config, read_processor
from clincot.models.prefix_tree import Indices, build_keys
from clincot.planning.assumptions import Assumptions
from clincot.planning.published_models import PublishedModel
from clincot.prompts import (
    Conversation,
    ImageView,
    PromptFormat,
    build_prompt_format,
    load_prompt_format,
)
from clincot.records import Study
from clincot.training.packing import pack_conversations


@dataclass(frozen=True)
class CountedPicture:
    """A picture of a conversation: what identifies it, and its image tokens."""

    key: str
    tokens: int


@dataclass(frozen=True)
class CountedPrompt:
    """Tokens of a sequence, pictures included, and its pictures in order.

    keys: two prompts have as many tokens in common as their keys begin alike (models.prefix_tree); (tokens,).
    """

    tokens: int
    pictures: tuple[CountedPicture, ...]
    keys: Indices | None = None  # of prompts; rows of training have none


class PromptCounter(Protocol):
    """Counts the sequences of one model."""

    @property
    def views(self) -> PromptFormat: ...

    def count_prompt(self, conversation: Conversation) -> CountedPrompt:
        """A conversation up to where the model's next turn begins."""
        ...

    def count_text(self, text: str) -> int:
        """Tokens of a text by itself."""
        ...

    def count_row(self, conversations: Sequence[Conversation], *, packed: bool) -> list[CountedPrompt]:
        """The sequences of a training row: one for each conversation, or all packed into one."""
        ...


class EncodedPrompts:
    """Counts by the processor of a checkpoint's folder."""

    def __init__(self, checkpoint: Path) -> None:
        config = read_model_config(str(checkpoint))
        self.views = load_prompt_format(checkpoint)
        processor = read_processor(str(checkpoint), config.model_type)
        self._encoder = build_checked_encoder(checkpoint, processor, end_ids=[0])
        self._numbers: dict[tuple[str, bool], int] = {}

    def count_prompt(self, conversation: Conversation) -> CountedPrompt:
        """See PromptCounter."""
        encoded = self._encoder.encode(conversation, reply=True)
        (keys,) = build_keys([encoded], self._encoder.image_ids, self._numbers)
        return CountedPrompt(len(encoded.ids), _count_pictures(encoded.pictures, encoded.picture_tokens), keys)

    def count_text(self, text: str) -> int:
        """See PromptCounter."""
        return len(self._encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    def count_row(self, conversations: Sequence[Conversation], *, packed: bool) -> list[CountedPrompt]:
        """See PromptCounter."""
        encoded = [self._encoder.encode(conversation) for conversation in conversations]
        if packed:
            pack = pack_conversations(encoded, min(self._encoder.image_ids), self._encoder.count_image_tokens)
            return [CountedPrompt(len(pack.ids), _count_pictures(pack.pictures, pack.picture_tokens))]
        return [CountedPrompt(len(one.ids), _count_pictures(one.pictures, one.picture_tokens)) for one in encoded]


def _count_pictures(pictures: Sequence[ImageView], tokens: Sequence[int]) -> tuple[CountedPicture, ...]:
    return tuple(CountedPicture(view.key, count) for view, count in zip(pictures, tokens, strict=True))


def _hash_key(text: str) -> int:
    """A number for a text, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest())


class EstimatedPrompts:
    """Counts by a published config: image tokens by the size of a picture, text tokens by the length of a text.

    images: the studies by the sha256 of their images.
    """

    def __init__(self, model: PublishedModel, images: Mapping[str, Study], assumptions: Assumptions) -> None:
        self.views = build_prompt_format(model.model_type, model.resize)
        self._model, self._images, self._assumptions = model, images, assumptions

    def count_prompt(self, conversation: Conversation) -> CountedPrompt:
        """See PromptCounter."""
        return self._count(conversation, turns=len(conversation) + 1)

    def count_text(self, text: str) -> int:
        """See PromptCounter."""
        return math.ceil(len(text) / self._assumptions.characters_per_token)

    def count_row(self, conversations: Sequence[Conversation], *, packed: bool) -> list[CountedPrompt]:
        """See PromptCounter. No family with a published config is trained on packs."""
        return [self._count(conversation, turns=len(conversation)) for conversation in conversations]

    def _count(self, conversation: Conversation, *, turns: int) -> CountedPrompt:
        """As many tokens as expected; the template's come first, each turn's pictures before its text."""
        pictures: list[CountedPicture] = []
        keys = [np.zeros(round(turns * self._assumptions.turn_tokens), np.int64)]
        for turn in conversation:
            for view in turn.pictures:
                picture = CountedPicture(view.key, self._count_picture(view))
                pictures.append(picture)
                keys.append(np.full(picture.tokens + self._model.markers, _hash_key(view.key)))
            keys.append(self._draw_text_keys(turn.text))
        joined = np.concatenate(keys)
        return CountedPrompt(len(joined), tuple(pictures), joined)

    def _draw_text_keys(self, text: str) -> Indices:
        """A key for each token of a text: equal for texts that are equal up to there."""
        width = self._assumptions.characters_per_token
        return np.array(
            [_hash_key(text[: math.ceil((n + 1) * width)]) for n in range(self.count_text(text))], dtype=np.int64
        )

    def _count_picture(self, view: ImageView) -> int:
        width, height = self._images[view.sha256].width, self._images[view.sha256].height
        if view.box is not None:
            box = view.box
            width, height = max(1, round((box.x1 - box.x0) * width)), max(1, round((box.y1 - box.y0) * height))
        if view.side_px is not None:
            longest = max(width, height)
            width, height = (max(1, round(length * view.side_px / longest)) for length in (width, height))
        return self._model.count_picture_tokens(width, height)
