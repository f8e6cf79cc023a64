"""Conversations to the tensors of a training step.

The two sides of a pair show different crops, so each side is a conversation with its own pictures (TRL's vision
collator repeats one list of images for both). Pictures enter as pixels, or, while the vision tower is frozen, as
features computed once a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clincot.errors import InvalidInput
from clincot.models.encoding import ConversationEncoder, EncodedConversation, pad_rows
from clincot.models.features import SHARED_FEATURE_FAMILIES
from clincot.prompts import Conversation, ImageView
from clincot.training.packing import PADDING_SEGMENT, build_attention_mask, pack_conversations
from clincot.training.rows import TrainingRow

# Shape suffixes: B pairs, N conversations (B chosen, B rejected and, with image pairs, B blanked), S sequences (N, or
# fewer packs), T tokens, K kept positions, A action tokens, V vocabulary, F frames, H hidden size.

Batch = dict[str, torch.Tensor]
PictureTensors = Callable[[Sequence[Sequence[ImageView]]], Batch]  # the pictures of each sequence


class ImageTokenMismatch(InvalidInput):
    """A batch whose image tokens are not those of its pictures."""


class ConversationCollator:
    """Conversations to the tensors of one forward pass, padded on the right.

    Emits input_ids (S, T), attention_mask, picture tensors and `owners` (S, T): the index of the conversation whose
    action a token is, -1 for every token that is no action. With `packed`, each group of conversations is one sequence
    that holds their common beginning once (see packing), with position_ids (S, T) and a mask of (S, 1, T, T).
    """

    def __init__(self, encoder: ConversationEncoder, pictures: PictureTensors, *, packed: bool = False) -> None:
        self.encoder, self.pictures, self.packed = encoder, pictures, packed
        self.image_id = min(encoder.image_ids)
        self._image_tokens: dict[ImageView, int] = {}

    def encode_conversation(self, conversation: Conversation, name: str) -> EncodedConversation:
        """Raises ValueError where nothing could be learned."""
        encoded = self.encoder.encode(conversation)
        if not any(encoded.actions):
            raise InvalidInput(
                f"{name}: no token of the conversation is the policy's own, so there is nothing to learn"
            )
        return encoded

    def __call__(
        self, encoded: Sequence[EncodedConversation], names: Sequence[str], groups: Sequence[Sequence[int]]
    ) -> Batch:
        """`groups`: the conversations (indices) that begin alike; raises LostPictures naming a conversation."""
        for conversation, name in zip(encoded, names, strict=True):
            self._check_image_tokens(conversation.ids, conversation.picture_tokens, name)
        groups = groups if self.packed else [[index] for index in range(len(encoded))]
        packs = [
            pack_conversations([encoded[i] for i in group], self.image_id, self.count_image_tokens) for group in groups
        ]
        owners = [
            [group[segment] if action else -1 for segment, action in zip(one.segments, one.actions, strict=True)]
            for group, one in zip(groups, packs, strict=True)
        ]
        ids_ST = pad_rows([one.ids for one in packs], self.encoder.pad_id, side="right")
        batch = {"input_ids": ids_ST, "owners": pad_rows(owners, -1, side="right")}
        if self.encoder.type_key:
            batch[self.encoder.type_key] = pad_rows([one.types for one in packs], 0, side="right")
        if self.packed:
            batch["position_ids"] = pad_rows([one.positions for one in packs], 0, side="right")
            batch["attention_mask"] = build_attention_mask(
                pad_rows([one.segments for one in packs], PADDING_SEGMENT, side="right")
            )
        else:
            batch["attention_mask"] = pad_rows([[1] * len(one.ids) for one in packs], 0, side="right")
        for ids_T, one, group in zip(ids_ST.tolist(), packs, groups, strict=True):
            self._check_image_tokens(ids_T, one.picture_tokens, ", ".join(names[i] for i in group))
        if any(one.pictures for one in packs):
            batch |= self.pictures([one.pictures for one in packs])
        return batch

    def count_image_tokens(self, picture: ImageView) -> int:
        """How many image tokens stand for a picture."""
        count = self._image_tokens.get(picture)
        if count is None:
            count = self._image_tokens[picture] = self.encoder.count_image_tokens(picture)
        return count

    def _check_image_tokens(self, ids: Sequence[int], picture_tokens: Sequence[int], name: str) -> None:
        found, expected = sum(token in self.encoder.image_ids for token in ids), sum(picture_tokens)
        if found != expected:
            raise ImageTokenMismatch(
                f"{name}: {len(picture_tokens)} pictures are {expected} image tokens, the sequence has {found}"
            )


class PairCollator:
    """Rows of a data set (`row`, reference log-probabilities) to a batch of pairs.

    The order of the N conversations is chosen 1…B, rejected 1…B and, with `blanked`, the chosen texts on a blanked crop
    1…B. Emits what ConversationCollator emits, `margin` (B, logits), `row` (B, indices into `rows`) and, where the rows
    have them, `ref_logps` (N, nats).
    """

    def __init__(
        self,
        rows: Sequence[TrainingRow],
        margins: Sequence[float],
        collator: ConversationCollator,
        *,
        blanked: Sequence[Conversation] = (),
    ) -> None:
        self.rows, self.margins, self.collator, self.blanked = rows, margins, collator, blanked
        self.sides = 3 if blanked else 2
        self._encoded: dict[tuple[int, int], EncodedConversation] = {}

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        indices = [int(example["row"]) for example in examples]
        sides = [(side, index) for side in range(self.sides) for index in indices]
        names = [f"pair {self.rows[index].pair}" for _, index in sides]
        pairs = [list(range(at, len(sides), len(indices))) for at in range(len(indices))]
        batch = self.collator([self._encode_side(*s) for s in sides], names, pairs)
        batch["margin"] = torch.tensor([self.margins[index] for index in indices], dtype=torch.float32)
        batch["row"] = torch.tensor(indices)
        if "ref_logps" in examples[0]:  # one value a side and row
            batch["ref_logps"] = torch.tensor([example["ref_logps"] for example in examples]).T.reshape(-1)
        return batch

    def _encode_side(self, side: int, index: int) -> EncodedConversation:
        """Encoded once: rendering a chat template costs more than a small model's forward pass."""
        encoded = self._encoded.get((side, index))
        if encoded is None:
            row = self.rows[index]
            conversation = (row.chosen, row.rejected)[side] if side < 2 else self.blanked[index]
            encoded = self._encoded[side, index] = self.collator.encode_conversation(conversation, f"pair {row.pair}")
        return encoded


def make_pixel_source(encoder: ConversationEncoder) -> PictureTensors:
    """Pictures as the processor's image tensors, for models whose vision tower is trained or cannot be shared."""

    def tensors(pictures: Sequence[Sequence[ImageView]]) -> Batch:
        return encoder.stack_pictures(pictures)

    return tensors


def make_feature_source(features_of: Callable[[Sequence[ImageView]], torch.Tensor]) -> PictureTensors:
    """Pictures as features (F, T, H) of a frozen tower (models.features.PictureFeatures)."""

    def tensors(pictures: Sequence[Sequence[ImageView]]) -> Batch:
        return {"features": features_of([p for of_one in pictures for p in of_one])}

    return tensors


def supports_packing(model: Any) -> bool:
    """Whether the model takes packs: image tokens placed by ids alone, and an attention that reads a boolean mask."""
    return (
        model.config.model_type in SHARED_FEATURE_FAMILIES
        and model.config.get_text_config()._attn_implementation == "sdpa"
    )


_NON_MODEL_KEYS = {"owners", "margin", "row", "ref_logps", "features", "weight"}


def select_model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The keyword arguments of the model's forward among a batch's tensors."""
    inputs: dict[str, Any] = {k: v for k, v in batch.items() if k not in _NON_MODEL_KEYS}
    if "features" in batch:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=batch["features"])}
    return inputs


class ActionLogprobs(NamedTuple):
    """Of each conversation's action tokens."""

    sum_N: torch.Tensor  # log-probability, nats
    tokens_N: torch.Tensor
    nll_N: torch.Tensor  # nats a token, averaged over a turn's tokens and then over its turns


def compute_action_logprobs(model: Any, batch: Mapping[str, torch.Tensor], conversations: int) -> ActionLogprobs:
    """How probable the model finds what each conversation did.

    `nll_N` counts a turn of one word as much as one of ten: a region has many tokens, the answer after it one or two,
    and an average over tokens would anchor the region alone. The vocabulary is projected only at positions where some
    sequence has an action; fp32 after the projection.
    """
    owners_ST = batch["owners"]
    kept_K = (owners_ST[:, 1:] >= 0).any(0).nonzero()[:, 0]  # position p predicts token p + 1
    logits_SKV = model(**select_model_inputs(batch), logits_to_keep=kept_K, use_cache=False).logits
    owners_SK = owners_ST[:, kept_K + 1]
    acting_SK = owners_SK >= 0
    owners_A, ids_A = owners_SK[acting_SK], batch["input_ids"][:, kept_K + 1][acting_SK]
    logps_A = torch.log_softmax(logits_SKV[acting_SK].float(), -1).gather(-1, ids_A[:, None])[:, 0]
    sum_N = logps_A.new_zeros(conversations).index_add(0, owners_A, logps_A)
    turns_A = _number_turns(owners_ST)[:, kept_K + 1][acting_SK]
    lengths_T = torch.bincount(turns_A)  # T turns here; a turn belongs to one conversation
    turns_N = torch.zeros_like(sum_N).index_add(0, owners_A, 1 / lengths_T[turns_A])
    nll_N = torch.zeros_like(sum_N).index_add(0, owners_A, -logps_A / lengths_T[turns_A]) / turns_N
    return ActionLogprobs(sum_N, torch.bincount(owners_A, minlength=conversations), nll_N)


def _number_turns(owners_ST: torch.Tensor) -> torch.Tensor:
    """(S, T) a number for each run of tokens that one conversation acts, counted through the batch."""
    before_ST = torch.nn.functional.pad(owners_ST, (1, 0), value=-1)[:, :-1]
    starts_ST = (owners_ST >= 0) & (owners_ST != before_ST)
    return (starts_ST.flatten().cumsum(0) - 1).reshape(owners_ST.shape)
