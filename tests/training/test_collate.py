"""What a batch says of its conversations: which tokens count, which pictures they show."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clincot.geometry import box_to_text
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import PromptFormat
from clincot.records import Study
from clincot.training.collate import (
    Batch,
    ConversationCollator,
    ImageTokenMismatch,
    PairCollator,
    make_feature_source,
    make_pixel_source,
)
from tests.support.training_builders import LEFT, RIGHT, differing_crops

END = "<end_of_utterance>"


@pytest.fixture(scope="module")
def policy(policy_dir: Path) -> VisionLanguageModel:
    return VisionLanguageModel(policy_dir)


@pytest.fixture(params=["packed", "features", "pixels"])
def collator(request: pytest.FixtureRequest, policy: VisionLanguageModel) -> ConversationCollator:
    source = (
        make_pixel_source(policy.encoder) if request.param == "pixels" else make_feature_source(policy.encode_pictures)
    )
    return ConversationCollator(policy.encoder, source, packed=request.param == "packed")


@pytest.fixture
def batch(collator: ConversationCollator, studies: list[Study], folder: Path, views: PromptFormat) -> Batch:
    rows = differing_crops(studies[:3], folder, views)
    return PairCollator(rows, [0.5, 0.25, 0.125], collator)([{"row": 2}, {"row": 0}])


def _action_texts(batch: Batch, collator: ConversationCollator) -> list[str]:
    """The tokens that count, decoded, conversation by conversation."""
    owners_ST, ids_ST = batch["owners"], batch["input_ids"]
    return [collator.encoder.tokenizer.decode(ids_ST[owners_ST == n]) for n in range(int(owners_ST.max()) + 1)]


def test_answers_and_written_regions_are_the_actions(batch: Batch, collator: ConversationCollator) -> None:
    """Only answers are actions, and regions only if the policy wrote them."""
    chosen, rejected = f"{box_to_text(LEFT)}{END}yes{END}", f"no effusion{END}"
    assert _action_texts(batch, collator) == [chosen, chosen, rejected, rejected]
    whole = collator.encoder.tokenizer.decode(batch["input_ids"].flatten())
    assert box_to_text(RIGHT) in whole  # the tool's region is there, as input


def test_margin_and_row_are_in_the_order_of_the_pairs(batch: Batch) -> None:
    assert batch["margin"].tolist() == [0.125, 0.5]
    assert batch["row"].tolist() == [2, 0]


def test_image_tokens_survive_collation(batch: Batch, collator: ConversationCollator) -> None:
    """4 tokens for each of 4 frames of the whole image and one crop; a pack holds the whole image once."""
    image_tokens = int((batch["input_ids"] == collator.image_id).sum())
    frames = 2 * (4 + 2) if collator.packed else 4 * (4 + 1)
    assert image_tokens == 4 * frames
    if "features" in batch:
        assert batch["features"].shape[:2] == (frames, 4)
    else:
        assert batch["pixel_values"].shape[:2] == (4, 5)


def test_the_two_sides_show_different_crops(
    policy: VisionLanguageModel, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    """TRL's own collator repeats one list of images for both sides."""
    rows = differing_crops(studies[:1], folder, views)
    collator = ConversationCollator(policy.encoder, make_pixel_source(policy.encoder))
    pixel_values = PairCollator(rows, [0.0], collator)([{"row": 0}])["pixel_values"]
    assert torch.equal(pixel_values[0, :4], pixel_values[1, :4])
    assert not torch.equal(pixel_values[0, 4], pixel_values[1, 4])


def test_lost_image_tokens_name_the_pair(
    collator: ConversationCollator, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    encoded = collator.encode_conversation(differing_crops(studies[:1], folder, views)[0].chosen, "pair pair-0")
    place = encoded.ids.index(collator.image_id)
    cut = replace(
        encoded,
        ids=encoded.ids[:place] + encoded.ids[place + 1 :],
        actions=encoded.actions[:place] + encoded.actions[place + 1 :],
    )
    with pytest.raises(ImageTokenMismatch, match="pair pair-0: 5 pictures are 20 image tokens, the sequence has 19"):
        collator([cut], ["pair pair-0"], [[0]])


def test_a_conversation_without_actions_is_refused_by_name(
    collator: ConversationCollator, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    rejected = differing_crops(studies[:1], folder, views)[0].rejected
    with pytest.raises(ValueError, match="row 7: no token"):
        collator.encode_conversation(rejected[:-1], "row 7")


def test_reference_log_probabilities_come_side_by_side(
    collator: ConversationCollator, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    rows = differing_crops(studies[:2], folder, views)
    examples = [{"row": 0, "ref_logps": [-1.0, -2.0]}, {"row": 1, "ref_logps": [-3.0, -4.0]}]
    assert PairCollator(rows, [0.0, 0.0], collator)(examples)["ref_logps"].tolist() == [-1.0, -3.0, -2.0, -4.0]
