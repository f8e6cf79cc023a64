"""A pack says of each of its conversations what that conversation says alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import Conversation, PromptFormat
from clincot.records import Study
from clincot.training.collate import (
    ConversationCollator,
    compute_action_logprobs,
    make_feature_source,
    select_model_inputs,
    supports_packing,
)
from clincot.training.packing import PADDING_SEGMENT, SHARED_SEGMENT, build_attention_mask, find_common_prefix
from tests.support.training_builders import LEFT, RIGHT, conversation


@pytest.fixture(scope="module")
def policy(policy_dir: Path) -> VisionLanguageModel:
    return VisionLanguageModel(policy_dir)


@pytest.fixture(scope="module")
def alike(studies: list[Study], folder: Path, views: PromptFormat) -> list[Conversation]:
    """Four about one image (two crops, a written region, another question) and one about another image."""
    one, other = studies[:2]
    return [
        conversation(one, folder, views, box=LEFT, answer="yes"),
        conversation(one, folder, views, box=RIGHT, answer="no effusion"),
        conversation(one, folder, views, box=LEFT, answer="smooth", written=True),
        conversation(one, folder, views, box=RIGHT, answer="no", question="upper zone"),
        conversation(other, folder, views, box=LEFT, answer="yes"),
    ]


def test_packing_keeps_the_log_probabilities(policy: VisionLanguageModel, alike: list[Conversation]) -> None:
    """Packed, every conversation has the log-probabilities that it has in a sequence of its own."""
    assert supports_packing(policy.model)
    collator = ConversationCollator(policy.encoder, make_feature_source(policy.encode_pictures), packed=True)
    encoded = [collator.encode_conversation(c, "c") for c in alike]
    batch = collator(encoded, ["c"] * 5, [[2, 0, 3], [4], [1]])
    with torch.no_grad():
        acted = compute_action_logprobs(policy.model, batch, 5)
    assert batch["input_ids"].shape[0] == 3
    assert acted.sum_N.tolist() == pytest.approx(policy.compute_answer_logprobs(alike), abs=1e-5)
    assert acted.tokens_N.tolist() == [sum(e.actions) for e in encoded]


def test_a_turn_of_one_word_counts_as_much_as_one_of_many(
    policy: VisionLanguageModel, alike: list[Conversation]
) -> None:
    """NLL of a conversation: the mean over its turns of a turn's mean token NLL, from the model's own logits."""
    collator = ConversationCollator(policy.encoder, make_feature_source(policy.encode_pictures), packed=True)
    encoded = [collator.encode_conversation(c, "c") for c in alike]
    with torch.no_grad():
        packed_N = compute_action_logprobs(policy.model, collator(encoded, ["c"] * 5, [[2, 0, 3], [4], [1]]), 5).nll_N
    several = 0
    for number, one in enumerate(encoded):
        batch = collator([one], ["c"], [[0]])
        with torch.no_grad():
            logits_TV = policy.model(**select_model_inputs(batch), use_cache=False).logits[0]
        logps_T = torch.log_softmax(logits_TV.float(), -1)
        turns: list[list[float]] = []
        for at, action in enumerate(one.actions):
            if action:
                if not one.actions[at - 1]:
                    turns.append([])
                turns[-1].append(-float(logps_T[at - 1, batch["input_ids"][0, at]]))
        several += len(turns) > 1
        by_hand = sum(sum(turn) / len(turn) for turn in turns) / len(turns)
        assert float(packed_N[number]) == pytest.approx(by_hand, abs=1e-5)
    assert several


def test_a_pack_is_shorter_than_its_conversations(policy: VisionLanguageModel, alike: list[Conversation]) -> None:
    collator = ConversationCollator(policy.encoder, make_feature_source(policy.encode_pictures), packed=True)
    encoded = [collator.encode_conversation(c, "c") for c in alike[:2]]
    tokens, shown = find_common_prefix(encoded, collator.image_id, collator.count_image_tokens)
    assert shown == 4  # the 2 x 2 grid of the whole image
    batch = collator(encoded, ["a", "b"], [[0, 1]])
    assert batch["input_ids"].shape == (1, sum(len(e.ids) for e in encoded) - tokens)
    assert (batch["input_ids"] == collator.image_id).sum() == (4 + 1 + 1) * 4  # 4 tokens a frame


def test_prefix_ends_before_a_crop_that_differs(
    policy: VisionLanguageModel, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    """The prefix ends before a crop that differs, although its image tokens are equal."""
    collator = ConversationCollator(policy.encoder, make_feature_source(policy.encode_pictures), packed=True)
    a, b = (
        collator.encode_conversation(conversation(study, folder, views, box=LEFT, answer="yes"), "c")
        for study in studies[:2]
    )
    assert a.ids == b.ids
    tokens, shown = find_common_prefix([a, b], collator.image_id, collator.count_image_tokens)
    assert shown == 0
    assert collator.image_id not in a.ids[:tokens]


def test_prefix_ends_before_the_token_predicting_an_action(
    policy: VisionLanguageModel, studies: list[Study], folder: Path, views: PromptFormat
) -> None:
    """It once ran up to the action: its first token was then predicted by the other conversation's last token."""
    collator = ConversationCollator(policy.encoder, make_feature_source(policy.encode_pictures), packed=True)
    a, b = (
        collator.encode_conversation(
            conversation(studies[0], folder, views, box=LEFT, answer=answer, written=True), "c"
        )
        for answer in ("yes", "no")
    )
    tokens, _ = find_common_prefix([a, b], collator.image_id, collator.count_image_tokens)
    assert tokens == a.actions.index(True) - 1


def test_attention_is_causal_within_segment_and_prefix() -> None:
    """Attention is causal within a conversation and the shared prefix."""
    mask_TT = build_attention_mask(torch.tensor([[SHARED_SEGMENT, 0, 0, 1, PADDING_SEGMENT]]))[0, 0]
    assert mask_TT.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 0, 0, 1, 0],  # sees the beginning, not the other conversation
        [0, 0, 0, 0, 1],  # padding sees itself, so that no row of the softmax is empty
    ]
