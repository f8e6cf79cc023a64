"""Encode conversations as token ids and tensors, in the same way for answering, judging and training.

A conversation is rendered by the checkpoint's own chat template, cut at the picture placeholders and at the action
turns, and tokenised piece by piece. The tokens in training are therefore exactly those of generation, each picture is
processed once for any number of conversations that show it, and the pieces that count in a loss are known without a
search.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clincot.errors import InvalidInput
from clincot.images import open_image, render_view
from clincot.prompts import Conversation, ImageView, collect_views

# Shape suffixes: B conversations, T tokens.


@dataclass(frozen=True)
class EncodedPicture:
    """A picture as token ids and image tensors."""

    ids: tuple[int, ...]  # the placeholder as the processor expands it
    tensors: dict[str, torch.Tensor]  # the processor's image tensors for this picture


@dataclass(frozen=True)
class EncodedConversation:
    """One conversation: token ids, which of them the policy wrote, and its pictures in order."""

    ids: tuple[int, ...]
    actions: tuple[bool, ...]
    pictures: tuple[ImageView, ...]


class ChatTemplateError(InvalidInput):
    """The checkpoint's chat template or processor cannot express the conversation."""


def read_picture(picture: ImageView) -> Image.Image:
    """The picture as shown: cropped to its box and scaled."""
    return render_view(_open_cached(picture.path), picture.box, picture.side_px)


@lru_cache(maxsize=16)
def _open_cached(path: str) -> Image.Image:
    return open_image(Path(path))  # a question's crops all come from the same file


class ConversationEncoder:
    """Tokenises conversations for one processor (tokenizer + image processor + chat template)."""

    def __init__(self, processor: Any, *, pictures_kept: int = 128) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.placeholder: str = getattr(processor, "boi_token", None) or processor.image_token
        self.end_ids = _find_end_ids(self.tokenizer)
        self.pad_id: int = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids)
        # A control word in a question or an answer is plain text. It is replaced by a private-use character while the
        # template is rendered and cut, and then spelled out, so that no data set can end a turn or insert a picture.
        self._hidden = {
            word: chr(0xF0000 + n) for n, word in enumerate(_list_control_words(self.tokenizer, self.placeholder))
        }
        self._words = {hidden: word for word, hidden in self._hidden.items()}
        self._control = re.compile("|".join(re.escape(word) for word in self._hidden))
        self._spelled = re.compile(f"([{''.join(self._words)}])")
        self._text = lru_cache(maxsize=65536)(self._tokenise_text)
        self._template = lru_cache(maxsize=16384)(self._apply_template)
        # pixels are large and needed once; placeholder ids are small and needed by every conversation
        self._pictures: Callable[[ImageView], EncodedPicture] = lru_cache(maxsize=pictures_kept)(self._process_picture)
        self._picture_ids = lru_cache(maxsize=200_000)(lambda picture: self.encode_picture(picture).ids)
        # Idefics3 without splitting makes one frame of any picture, so all pictures have the same placeholder ids
        self._one_frame = getattr(processor.image_processor, "do_image_splitting", None) is False
        self._frame_ids: tuple[int, ...] = ()

    def encode_picture(self, picture: ImageView) -> EncodedPicture:
        """Process a picture; the most recent ones are cached."""
        return self._pictures(picture)

    def encode_picture_ids(self, picture: ImageView) -> tuple[int, ...]:
        """The token ids that represent a picture, without caching its pixels."""
        if self._one_frame:
            self._frame_ids = self._frame_ids or self.encode_picture(picture).ids
            return self._frame_ids
        ids: tuple[int, ...] = self._picture_ids(picture)
        return ids

    def encode(self, conversation: Conversation, *, reply: bool = False) -> EncodedConversation:
        """Encode a conversation; with `reply` it ends where the assistant's next turn begins.

        Raises ChatTemplateError if the template does not show the conversation's pictures.
        """
        ids: list[int] = []
        actions: list[bool] = []
        pictures = collect_views(conversation)
        remaining = iter(pictures)
        for text, action in self._split_pieces(conversation, reply=reply):
            for position, part in enumerate(text.split(self.placeholder)):
                if position:
                    expanded = self.encode_picture_ids(_next_picture(remaining, conversation))
                    ids.extend(expanded)
                    actions.extend([False] * len(expanded))
                tokens = self._text(part)
                ids.extend(tokens)
                actions.extend([action] * len(tokens))
        if next(remaining, None) is not None:
            raise ChatTemplateError(
                f"the chat template shows fewer pictures than the {len(pictures)} of the conversation"
            )
        return EncodedConversation(tuple(ids), tuple(actions), tuple(pictures))

    def _split_pieces(self, conversation: Conversation, *, reply: bool) -> list[tuple[str, bool]]:
        """Split the rendered conversation into (text, is action) pieces."""
        pieces: list[tuple[str, bool]] = []
        done = 0  # characters of the rendering that are already in pieces
        whole = self._render_conversation(conversation, reply=reply)
        for position, turn in enumerate(conversation):
            if turn.role != "assistant":
                continue
            before = self._render_conversation(conversation[:position], reply=True)
            after = self._render_conversation(conversation[: position + 1], reply=False)
            if not (whole.startswith(before) and after.startswith(before)):
                raise ChatTemplateError("the chat template rewrites earlier turns when later ones are added")
            spoken = after[len(before) :]
            # the text after the end-of-turn token (mostly a newline) comes from the template, not from the policy
            ends = [spoken.find(text) + len(text) for text in self._list_end_texts() if text in spoken]
            end = max(ends, default=len(spoken))
            pieces += [(whole[done : len(before)], False), (spoken[:end], turn.action)]
            done = len(before) + end
        return [*pieces, (whole[done:], False)]

    @lru_cache(maxsize=1)  # noqa: B019 - an encoder lives as long as its model
    def _list_end_texts(self) -> tuple[str, ...]:
        return tuple(self.tokenizer.convert_ids_to_tokens(sorted(self.end_ids)))

    def _render_conversation(self, conversation: Conversation, *, reply: bool) -> str:
        # a rendering depends on the number of pictures in a turn, not on the pictures, so it can often be reused
        turns = tuple((turn.role, len(turn.pictures), self._hide_control_words(turn.text)) for turn in conversation)
        return self._template(turns, reply)

    def _hide_control_words(self, text: str) -> str:
        return self._control.sub(lambda match: self._hidden[match[0]], text)

    def _apply_template(self, turns: tuple[tuple[str, int, str], ...], reply: bool) -> str:
        messages = []
        for role, pictures, text in turns:
            content: list[dict[str, str]] = [{"type": "image"} for _ in range(pictures)]
            messages.append({"role": role, "content": [*content, {"type": "text", "text": text}]})
        rendered: str = self.processor.apply_chat_template(messages, add_generation_prompt=reply, tokenize=False)
        return rendered

    def _tokenise_text(self, text: str) -> tuple[int, ...]:
        ids: list[int] = []
        for part in self._spelled.split(text):
            is_control_word = part in self._words
            if part:
                options = {"split_special_tokens": True} if is_control_word else {}
                plain = self._words[part] if is_control_word else part
                ids += self.tokenizer(plain, add_special_tokens=False, **options)["input_ids"]
        return tuple(ids)

    def _process_picture(self, picture: ImageView) -> EncodedPicture:
        if self._frame_ids:  # known already; tokenising the same placeholder again would double the time
            out = self.processor.image_processor([[read_picture(picture)]], return_tensors="pt")
            return EncodedPicture(self._frame_ids, {k: v for k, v in out.items() if isinstance(v, torch.Tensor)})
        out = self.processor(
            text=[self.placeholder],
            images=[[read_picture(picture)]],
            return_tensors="pt",
            add_special_tokens=False,
        )
        ids = tuple(out.pop("input_ids")[0].tolist())
        tensors = {k: v for k, v in out.items() if isinstance(v, torch.Tensor) and k not in _TEXT_TENSOR_NAMES}
        return EncodedPicture(ids, tensors)


_TEXT_TENSOR_NAMES = {"attention_mask", "token_type_ids", "mm_token_type_ids"}


def _next_picture(remaining: Iterator[ImageView], conversation: Conversation) -> ImageView:
    picture = next(remaining, None)
    if picture is None:
        raise ChatTemplateError(
            "the rendered conversation has more picture placeholders than its "
            f"{len(collect_views(conversation))} pictures"
        )
    return picture


def _list_control_words(tokenizer: Any, placeholder: str) -> list[str]:
    """The tokenizer's special tokens as text, the longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(special | {placeholder}, key=lambda word: (-len(word), word))


def _find_end_ids(tokenizer: Any) -> frozenset[int]:
    ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_utterance>")}
    return frozenset(i for i in ids if isinstance(i, int) and i != tokenizer.unk_token_id)


def pad_rows(
    rows: Sequence[Sequence[int | bool]], value: int | bool, *, side: str, dtype: torch.dtype = torch.long
) -> torch.Tensor:
    """Pad rows of different lengths to one (B, T) tensor; side: "left" or "right"."""
    longest = max(len(row) for row in rows)
    padded = []
    for row in rows:
        padding = [value] * (longest - len(row))
        padded.append([*padding, *row] if side == "left" else [*row, *padding])
    return torch.tensor(padded, dtype=dtype)


def stack_pictures(pictures: Sequence[EncodedPicture], counts: Sequence[int]) -> dict[str, torch.Tensor]:
    """The image tensors of a batch. `counts`: number of pictures of each conversation, in order.

    Idefics-style processors return (1, frames, C, H, W) for a picture, and their models expect (B, most frames, C, H,
    W) padded with zeros. The tensors of other processors are concatenated along the first dimension.
    """
    if not pictures:
        return {}
    first = pictures[0].tensors
    if first["pixel_values"].ndim != 5 or "pixel_attention_mask" not in first:
        return {name: _concatenate(pictures, name) for name in first}
    batch: dict[str, torch.Tensor] = {}
    for name in first:
        rows, start = [], 0
        for count in counts:
            rows.append(torch.cat([picture.tensors[name][0] for picture in pictures[start : start + count]]))
            start += count
        batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return batch


def _concatenate(pictures: Sequence[EncodedPicture], name: str) -> torch.Tensor:
    return torch.cat([picture.tensors[name] for picture in pictures])
