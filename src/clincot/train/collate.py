"""Conversations to the tensors of a training step.

The two sides of a pair show different crops, so each side is a conversation with its own pictures (TRL's vision
collator repeats one list of images for both). Pictures enter as pixels, or, while the vision tower is frozen, as
features computed once a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clincot.conversation import Conversation, Picture
from clincot.models.encoding import Encoded, Encoder, pad, stack_pictures
from clincot.train.rows import TrainingRow

# Shape suffixes: B pairs, S conversations (B chosen, B rejected and, with image pairs, B blanked), T tokens,
# K kept positions, V vocabulary, F frames, P patches, H hidden size.

Batch = dict[str, torch.Tensor]
PictureTensors = Callable[[Sequence[Encoded]], Batch]


class LostPictures(ValueError):
    """A batch whose image tokens are not those of its pictures."""


class ConversationCollator:
    """Conversations to input_ids_ST, attention_mask_ST, actions_ST and picture tensors, padded on the right."""

    def __init__(self, encoder: Encoder, pictures: PictureTensors) -> None:
        self.encoder = encoder
        self.pictures = pictures
        self.image_id: int = encoder.tokenizer.convert_tokens_to_ids(encoder.processor.image_token)

    def encode(self, conversation: Conversation, name: str) -> Encoded:
        """Raises LostPictures where image tokens and pictures disagree, ValueError where nothing could be learned."""
        encoded = self.encoder.encode(conversation)
        if not any(encoded.actions):
            raise ValueError(f"{name}: no token of the conversation is the policy's own, so there is nothing to learn")
        return encoded

    def __call__(self, encoded: Sequence[Encoded], names: Sequence[str]) -> Batch:
        ids_ST = pad([e.ids for e in encoded], self.encoder.pad_id, side="right")
        batch = {
            "input_ids": ids_ST,
            "attention_mask": pad([[1] * len(e.ids) for e in encoded], 0, side="right"),
            "actions": pad([e.actions for e in encoded], False, side="right", dtype=torch.bool),
        }
        self._check_image_tokens(ids_ST, encoded, names)
        if any(e.pictures for e in encoded):
            batch |= self.pictures(encoded)
        return batch

    def _check_image_tokens(self, ids_ST: torch.Tensor, encoded: Sequence[Encoded], names: Sequence[str]) -> None:
        found_S = (ids_ST == self.image_id).sum(1).tolist()
        for found, one, name in zip(found_S, encoded, names, strict=True):
            expected = sum(self.encoder.picture_ids(p).count(self.image_id) for p in one.pictures)
            if found != expected:
                raise LostPictures(f"{name}: its {len(one.pictures)} pictures are {expected} image tokens, got {found}")


class PairCollator:
    """Rows of a data set (`row`, reference log-probabilities) to a batch of pairs.

    The order of the S conversations is chosen 1…B, rejected 1…B and, with `blanked`, the chosen texts on a blanked crop
    1…B. Emits what ConversationCollator emits, `margin` (B, logits), `row` (B, indices into `rows`) and, where the rows
    have them, `ref_logps` (S, nats).
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
        self._encoded: dict[tuple[int, int], Encoded] = {}

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        indices = [int(example["row"]) for example in examples]
        sides = [(side, index) for side in range(self.sides) for index in indices]
        batch = self.collator([self._side(*s) for s in sides], [self.rows[index].pair for _, index in sides])
        batch["margin"] = torch.tensor([self.margins[index] for index in indices], dtype=torch.float32)
        batch["row"] = torch.tensor(indices)
        if "ref_logps" in examples[0]:
            ref_BS = torch.tensor([example["ref_logps"] for example in examples], dtype=torch.float32)
            batch["ref_logps"] = ref_BS.T.reshape(-1)
        return batch

    def _side(self, side: int, index: int) -> Encoded:
        """Encoded once: rendering a chat template costs more than a small model's forward pass."""
        encoded = self._encoded.get((side, index))
        if encoded is None:
            row = self.rows[index]
            conversation = (row.chosen, row.rejected)[side] if side < 2 else self.blanked[index]
            encoded = self._encoded[side, index] = self.collator.encode(conversation, f"pair {row.pair}")
        return encoded


def pixels(encoder: Encoder) -> PictureTensors:
    """Pictures as the processor's image tensors, for models whose vision tower is trained or cannot be shared."""

    def tensors(encoded: Sequence[Encoded]) -> Batch:
        pictures = [encoder.picture(p) for e in encoded for p in e.pictures]
        return stack_pictures(pictures, [len(e.pictures) for e in encoded])

    return tensors


def features(features_of: Callable[[Sequence[Picture]], torch.Tensor]) -> PictureTensors:
    """Pictures as features_FTH of a frozen tower (models.vlm.VisionLanguageModel.features)."""

    def tensors(encoded: Sequence[Encoded]) -> Batch:
        return {"features": features_of([p for e in encoded for p in e.pictures])}

    return tensors


_NOT_FOR_THE_MODEL = {"actions", "margin", "row", "ref_logps", "features"}


def model_inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The keyword arguments of the model's forward among a batch's tensors."""
    inputs: dict[str, Any] = {k: v for k, v in batch.items() if k not in _NOT_FOR_THE_MODEL}
    if "features" in batch:
        inputs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=batch["features"])}
    return inputs


def action_logprobs(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(logps_SK, actions_SK): log-probabilities (nats) at the K positions where some conversation has an action.

    0 where actions_SK is False. The vocabulary is projected at these positions only, in fp32 after the projection.
    """
    actions_ST = batch["actions"]
    kept_K = actions_ST[:, 1:].any(0).nonzero()[:, 0]  # position p predicts token p + 1
    logits_SKV = model(**model_inputs(batch), logits_to_keep=kept_K, use_cache=False).logits
    targets_SK = batch["input_ids"][:, kept_K + 1]
    logps_SK = torch.log_softmax(logits_SKV.float(), -1).gather(-1, targets_SK[..., None])[..., 0]
    actions_SK = actions_ST[:, kept_K + 1]
    return logps_SK.masked_fill(~actions_SK, 0.0), actions_SK
