"""Another family: Llava, whose pictures have no frames, so that it is trained on pixels and has no relevance maps."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.geometry import box_from_xyxy
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import ChainStep, chain_prompt, finding_prompt, with_answer
from clincot.records import Study
from tests.training.test_training_families import llava

__all__ = ["llava"]  # the fixture: built from a config, its processor made by hand

LEFT = box_from_xyxy((0.05, 0.1, 0.4, 0.45))


@pytest.fixture(scope="module")
def model(llava: Path) -> VisionLanguageModel:
    return VisionLanguageModel(llava)


def test_llava_answers_and_judges(model: VisionLanguageModel, shown: list[Study], films: Path) -> None:
    asked = [chain_prompt(s, films, model.views, [ChainStep("Is there a nodule?", LEFT, False)]) for s in shown[:3]]
    asked.append(finding_prompt(shown[0], films, model.views, finding="a nodule", box=LEFT))  # fewer pictures
    assert not model.has_frames
    replies = model.generate(asked, max_new_tokens=4, temperature=1.0, seeds=[1, 2, 3, 4])
    alone = [model.generate([c], max_new_tokens=4, temperature=1.0, seeds=[s])[0] for s, c in enumerate(asked, start=1)]
    assert [r.text for r in replies] == [r.text for r in alone]
    scores = model.p_yes(asked)
    assert all(p is not None and 0 < p < 1 for p in scores)
    assert len(set(scores)) == 4
    assert model.p_yes(asked[1:2])[0] == pytest.approx(scores[1], abs=1e-5)
    together = model.compute_answer_logprobs([with_answer(c, "yes") for c in asked])
    assert together[2] == pytest.approx(model.compute_answer_logprobs([with_answer(asked[2], "yes")])[0], abs=1e-4)


def test_llava_tokens_a_picture(model: VisionLanguageModel, shown: list[Study], films: Path) -> None:
    """32 px in patches of 8 px: 16 tokens a picture (the class token is left out); whole image and crop."""
    conversation = chain_prompt(shown[0], films, model.views, [ChainStep("Is there a nodule?", LEFT, False)])
    ids = model.encoder.encode(conversation).ids
    assert ids.count(model.encoder.tokenizer.convert_tokens_to_ids("<image>")) == 2 * 16


def test_relevance_maps_are_not_read_from_a_family_without_them(
    model: VisionLanguageModel, shown: list[Study], films: Path
) -> None:
    conversation = chain_prompt(shown[0], films, model.views, [ChainStep("Is there a nodule?", LEFT, False)])
    with pytest.raises(UnsupportedCheckpoint, match="'llava'; use the windows, written or http grounder"):
        model.compute_relevance([conversation])
