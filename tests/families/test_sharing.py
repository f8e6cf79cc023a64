"""What each family shares between conversations: features of pictures, and the beginnings of prompts.

Compared with each conversation computed as a whole from its own pixels, which is what the processor and the model's
forward method do by themselves (test_encoding.py).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from clincot.geometry import WHOLE_IMAGE, box_from_xyxy
from clincot.models.features import clear_feature_caches
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import ChainStep, Conversation, chain_prompt, collect_views, finding_prompt, judge_prompt
from clincot.records import Study
from tests.support.families import Family

LEFT, RIGHT = box_from_xyxy((0.05, 0.1, 0.45, 0.5)), box_from_xyxy((0.5, 0.3, 0.9, 0.8))
UNSHARED = {"paligemma": "it reads a whole prompt in both directions, so no part of it is computed apart"}


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> VisionLanguageModel:
    """Pixels into every conversation, each computed as a whole."""
    model = VisionLanguageModel(checkpoint)
    model.shares_features, model.unshared_reason = False, "compared"
    return model


def ask_everything(model: VisionLanguageModel, studies: list[Study], films: Path) -> list[Conversation]:
    """Answers from three regions, twice each, a judge's questions and a window with two findings, of films of different
    shapes: with one and with two pictures, with and without common beginnings."""
    steps = [ChainStep("Is there a nodule in the left lung?", box, False) for box in (LEFT, RIGHT, WHOLE_IMAGE)]
    views = model.views
    asked = [chain_prompt(study, films, views, [step]) for study, step in product(studies[:3], steps * 2)]
    asked += [
        judge_prompt(studies[0], films, views, question="Where?", answer=answer, box=LEFT)
        for answer in ("yes", "no", "in the upper zone")
    ]
    asked += [
        finding_prompt(studies[1], films, views, finding=finding, box=RIGHT) for finding in ("a nodule", "an effusion")
    ]
    return asked


def test_family_shares_what_it_is_known_to_share(family: Family, model: VisionLanguageModel) -> None:
    assert model.shares_features
    assert model.unshared_reason == UNSHARED.get(family.name, "")


def test_scores_are_those_of_whole_conversations(
    model: VisionLanguageModel, whole: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    asked = ask_everything(model, studies, films)
    logprobs = [
        one.compute_next_token_logprobs([one.encoder.encode(conversation, reply=True) for conversation in asked])
        for one in (model, whole)
    ]
    assert (logprobs[0] - logprobs[1]).abs().max() < 1e-4
    scores = model.p_yes(asked)
    assert scores == pytest.approx(whole.p_yes(asked), abs=1e-5)
    assert len({score for score in scores if score is not None}) > 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_those_of_whole_conversations(
    temperature: float, model: VisionLanguageModel, whole: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    asked = ask_everything(model, studies, films)
    options = {"max_new_tokens": 6, "temperature": temperature, "seeds": list(range(len(asked)))}
    shared, apart = model.generate(asked, **options), whole.generate(asked, **options)
    assert [reply.text for reply in shared] == [reply.text for reply in apart]
    for one, other in zip(shared, apart, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=5e-4)
        assert one.prompt_tokens == other.prompt_tokens


def test_every_picture_is_encoded_once_and_common_beginnings_too(
    model: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    asked = ask_everything(model, studies, films)
    keys = set()
    for conversation in asked:
        views = collect_views(conversation)
        alone = len(views) == 1 and not model.encoder.pictures_are_independent
        keys |= {(view.key, alone) for view in views}
    clear_feature_caches()
    before = replace(model.work)
    model.p_yes(asked)
    assert model.work.encodes - before.encodes == len(keys)
    computed = model.work.prefill_tokens - before.prefill_tokens
    prompts = model.work.prompt_tokens - before.prompt_tokens
    if model.unshared_reason:
        assert computed == prompts
    else:
        assert computed < 0.7 * prompts  # the six regions of a film are three, and share its picture and its question
