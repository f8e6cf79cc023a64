"""Collate conversations into the tensors of a training step.

The two sides of a pair show different crops, so each side is a conversation with its own pictures (TRL's vision
collator repeats one list of images for both). Pictures enter as pixels or, while the vision tower is frozen, as
features that are computed once for each picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, product
from typing import Any, NamedTuple

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clincot.errors import InvalidInput
from clincot.models.encoding import ConversationEncoder, EncodedConversation, pad_rows
from clincot.models.features import FRAME_FEATURE_FAMILIES, PictureFeatures
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import Conversation, ImageView
from clincot.training.packing import PADDING_SEGMENT, Pack, build_attention_mask, pack_conversations
from clincot.training.rows import TrainingRow

# Shape suffixes: B pairs, N conversations (B chosen, B rejected and, with image pairs, B blanked), S sequences (N, or
# fewer packs), T tokens, K positions at which the vocabulary is projected, A action tokens, V vocabulary, F frames,
# H hidden size, U turns.

TOWER_CACHE_MB = 2048  # size of the cache of tower states; the tiny tower needs 0.16 MB for an image

Batch = dict[str, torch.Tensor]
PictureTensors = Callable[[Sequence[Sequence[ImageView]]], Batch]  # the pictures of each sequence


class ImageTokenMismatch(InvalidInput):
    """The number of image tokens does not match the pictures."""


class ConversationCollator:
    """Collates conversations into the tensors of one forward pass, padded on the right.

    Returns input_ids (S, T), attention_mask, picture tensors and `owners` (S, T): for an action token the index of its
    conversation, for every other token -1. With `packed`, each group of conversations becomes one sequence that holds
    their common prefix once (see packing.py), with position_ids (S, T) and an attention mask of (S, 1, T, T).
    """

    def __init__(self, encoder: ConversationEncoder, pictures: PictureTensors, *, packed: bool = False) -> None:
        self.encoder, self.pictures, self.packed = encoder, pictures, packed
        self.image_id = min(encoder.image_ids)
        self._image_tokens: dict[ImageView, int] = {}

    def encode_conversation(self, conversation: Conversation, name: str) -> EncodedConversation:
        """Encode a conversation; raises InvalidInput, naming it, if it has no action token to learn."""
        encoded = self.encoder.encode(conversation)
        if not any(encoded.actions):
            raise InvalidInput(
                f"{name}: no token of the conversation is the policy's own, so there is nothing to learn"
            )
        return encoded

    def __call__(
        self, encoded: Sequence[EncodedConversation], names: Sequence[str], groups: Sequence[Sequence[int]]
    ) -> Batch:
        """Collate encoded conversations; `groups` lists the indices of conversations with a common prefix.

        Raises ImageTokenMismatch, naming the conversation.
        """
        for conversation, name in zip(encoded, names, strict=True):
            self._check_image_tokens(conversation.ids, conversation.picture_tokens, name)
        groups = groups if self.packed else [[index] for index in range(len(encoded))]
        packs, owners = [], []
        for group in groups:
            members = [encoded[index] for index in group]
            pack = pack_conversations(members, self.image_id, self.count_image_tokens)
            packs.append(pack)
            owners.append(_list_owners(pack, group))
        ids_ST = pad_rows([pack.ids for pack in packs], self.encoder.pad_id, side="right")
        batch = {"input_ids": ids_ST, "owners": pad_rows(owners, -1, side="right")}
        if self.encoder.type_key:
            batch[self.encoder.type_key] = pad_rows([one.types for one in packs], 0, side="right")
        if self.packed:
            batch["position_ids"] = pad_rows([pack.positions for pack in packs], 0, side="right")
            segments_ST = pad_rows([pack.segments for pack in packs], PADDING_SEGMENT, side="right")
            batch["attention_mask"] = build_attention_mask(segments_ST)
        else:
            batch["attention_mask"] = pad_rows([[1] * len(pack.ids) for pack in packs], 0, side="right")
        for ids_T, pack, group in zip(ids_ST.tolist(), packs, groups, strict=True):
            self._check_image_tokens(ids_T, pack.picture_tokens, ", ".join(names[i] for i in group))
        if any(pack.pictures for pack in packs):
            batch |= self.pictures([pack.pictures for pack in packs])
        return batch

    def count_image_tokens(self, picture: ImageView) -> int:
        """The number of image tokens that represent a picture."""
        count = self._image_tokens.get(picture)
        if count is None:
            count = self._image_tokens[picture] = self.encoder.count_image_tokens(picture)
        return count

    def _check_image_tokens(self, ids: Sequence[int], picture_tokens: Sequence[int], name: str) -> None:
        actual, expected = sum(token in self.encoder.image_ids for token in ids), sum(picture_tokens)
        if actual != expected:
            raise ImageTokenMismatch(
                f"{name}: {len(picture_tokens)} pictures are {expected} image tokens, the sequence has {actual}"
            )


def _list_owners(pack: Pack, group: Sequence[int]) -> list[int]:
    """For each token of a pack the index of the conversation whose action it is, or -1."""
    return [group[segment] if action else -1 for segment, action in zip(pack.segments, pack.actions, strict=True)]


class PairCollator:
    """Collates rows of a data set (`row`, reference log-probabilities) into a batch of pairs.

    The order of the N conversations is chosen 1…B, rejected 1…B and, with `blanked`, the chosen texts on a blanked crop
    1…B. Returns the tensors of ConversationCollator, `margin` (B,) in logits, `is_pair` (B,) of 1 for a pair and 0 for
    an anchor, `row` (B,) of indices into `rows` and, if the examples have them, `ref_logps` (N,) in nats.
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
        sides = list(product(range(self.sides), indices))
        names = [f"pair {self.rows[index].pair}" for _, index in sides]
        # the sides of one pair share their beginning, so they are packed together
        pairs = [list(range(first, len(sides), len(indices))) for first in range(len(indices))]
        batch = self.collator([self._encode_side(side, index) for side, index in sides], names, pairs)
        batch["margin"] = torch.tensor([self.margins[index] for index in indices], dtype=torch.float32)
        batch["is_pair"] = torch.tensor([float(not self.rows[index].anchor) for index in indices])
        batch["row"] = torch.tensor(indices)
        if "ref_logps" in examples[0]:  # one value for each side of a row
            batch["ref_logps"] = torch.tensor([example["ref_logps"] for example in examples]).T.reshape(-1)
        return batch

    def _encode_side(self, side: int, index: int) -> EncodedConversation:
        """Encode one side of a pair, cached: rendering a chat template costs more than a small model's forward pass."""
        encoded = self._encoded.get((side, index))
        if encoded is None:
            row = self.rows[index]
            conversation = (row.chosen, row.rejected)[side] if side < 2 else self.blanked[index]
            encoded = self._encoded[side, index] = self.collator.encode_conversation(conversation, f"pair {row.pair}")
        return encoded


def make_pixel_source(encoder: ConversationEncoder) -> PictureTensors:
    """Pictures as the processor's image tensors, for models whose vision tower is trained or cannot be shared."""

    def load_pixels(pictures: Sequence[Sequence[ImageView]]) -> Batch:
        return encoder.stack_pictures(pictures)

    return load_pixels


def make_feature_source(encode_pictures: Callable[[Sequence[ImageView]], torch.Tensor]) -> PictureTensors:
    """Pictures as features (F, T, H) of a frozen tower (models.features.PictureFeatures)."""

    def load_features(pictures: Sequence[Sequence[ImageView]]) -> Batch:
        return {"features": encode_pictures(list(chain.from_iterable(pictures)))}

    return load_features


def make_tower_source(policy: VisionLanguageModel, dtype: str) -> PictureTensors:
    """Pictures as the states (F, T, H) of a frozen tower, for a projector that is trained.

    The states are computed once for each picture, in mixed precision where `dtype` is bfloat16.
    """
    states = PictureFeatures(policy.model, policy.encoder, output="last_hidden_state", kept_mb=TOWER_CACHE_MB)

    def load_states(pictures: Sequence[Sequence[ImageView]]) -> Batch:
        with torch.autocast(policy.model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return {"features": states(list(chain.from_iterable(pictures)))}

    return load_states


def supports_packing(model: Any) -> bool:
    """Whether the model can process packs.

    It must place image features by token ids only, and its attention must accept a boolean mask.
    """
    return (
        model.config.model_type in FRAME_FEATURE_FAMILIES
        and model.config.get_text_config()._attn_implementation == "sdpa"
    )


_NON_MODEL_KEYS = {"owners", "margin", "row", "ref_logps", "features", "weight"}


def select_model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The tensors of a batch that are keyword arguments of the model's forward method."""
    inputs: dict[str, Any] = {k: v for k, v in batch.items() if k not in _NON_MODEL_KEYS}
    if "features" in batch:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=batch["features"])}
    return inputs


class ActionLogprobs(NamedTuple):
    """Log-probabilities of each conversation's action tokens."""

    sum_N: torch.Tensor  # sum over the tokens, nats
    tokens_N: torch.Tensor  # number of tokens
    nll_N: torch.Tensor  # nats per token, averaged over the tokens of a turn and then over the turns


def compute_action_logprobs(model: Any, batch: Mapping[str, torch.Tensor], conversations: int) -> ActionLogprobs:
    """Log-probabilities that the model assigns to the actions of each of the N = `conversations` conversations.

    `nll_N` gives every turn the same weight: a region has many tokens and the answer after it one or two, so an average
    over tokens would anchor almost only the region. The vocabulary is projected only at positions where some sequence
    has an action token, in fp32 after the projection.
    """
    owners_ST = batch["owners"]
    positions_K = (owners_ST[:, 1:] >= 0).any(0).nonzero()[:, 0]  # position p predicts token p + 1
    logits_SKV = model(**select_model_inputs(batch), logits_to_keep=positions_K, use_cache=False).logits
    owners_SK = owners_ST[:, positions_K + 1]
    is_action_SK = owners_SK >= 0
    owners_A, ids_A = owners_SK[is_action_SK], batch["input_ids"][:, positions_K + 1][is_action_SK]
    logps_A = torch.log_softmax(logits_SKV[is_action_SK].float(), -1).gather(-1, ids_A[:, None])[:, 0]
    sum_N = logps_A.new_zeros(conversations).index_add(0, owners_A, logps_A)
    turns_A = _number_turns(owners_ST)[:, positions_K + 1][is_action_SK]
    lengths_U = torch.bincount(turns_A)  # tokens of each turn; a turn belongs to one conversation
    # every token of a turn of length n counts 1/n, so a turn counts 1 in the number of turns and its mean in the NLL
    turns_N = torch.zeros_like(sum_N).index_add(0, owners_A, 1 / lengths_U[turns_A])
    nll_N = torch.zeros_like(sum_N).index_add(0, owners_A, -logps_A / lengths_U[turns_A]) / turns_N
    return ActionLogprobs(sum_N, torch.bincount(owners_A, minlength=conversations), nll_N)


def _number_turns(owners_ST: torch.Tensor) -> torch.Tensor:
    """(S, T): a number for each run of action tokens of one conversation, counted through the batch."""
    before_ST = torch.nn.functional.pad(owners_ST, (1, 0), value=-1)[:, :-1]
    starts_ST = (owners_ST >= 0) & (owners_ST != before_ST)
    return (starts_ST.flatten().cumsum(0) - 1).reshape(owners_ST.shape)
