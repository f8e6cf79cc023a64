"""Conversations with common beginnings say the same as each of them computed as a whole, for less."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from clincot.geometry import WHOLE_IMAGE, box_from_xyxy
from clincot.models.features import clear_feature_caches
from clincot.models.shared_prefixes import find_unshared_reason
from clincot.models.vlm import VisionLanguageModel
from clincot.models.work_count import WorkCount
from clincot.prompts import ChainStep, Conversation, chain_prompt, collect_views, finding_prompt, judge_prompt
from clincot.records import Study

BOXES = [*(box_from_xyxy((x / 10, 0.1, x / 10 + 0.4, 0.5)) for x in range(4)), WHOLE_IMAGE]
QUESTIONS = ["Is there a nodule in the left lung?", "Is the heart enlarged?"]


def ask_regions(model: VisionLanguageModel, shown: list[Study], films: Path, *, samples: int = 2) -> list[Conversation]:
    """Two questions about each of two films, five regions each, `samples` times."""
    return [
        chain_prompt(study, films, model.views, [ChainStep(question, box, False)])
        for study, question, box in product(shown[:2], QUESTIONS, BOXES * samples)
    ]


def ask_judge(model: VisionLanguageModel, shown: list[Study], films: Path) -> list[Conversation]:
    """Three answers from each of five regions."""
    return [
        judge_prompt(shown[0], films, model.views, question=QUESTIONS[0], answer=answer, box=box)
        for box, answer in product(BOXES, ("yes", "no", "in the left lung"))
    ]


def compute_whole(folder: Path) -> VisionLanguageModel:
    """The model with every conversation computed as a whole."""
    model = VisionLanguageModel(folder)
    model.unshared_reason = "compared with the other way"
    return model


def take_work(model: VisionLanguageModel, before: WorkCount) -> WorkCount:
    after = vars(model.work)
    return WorkCount(**{name: after[name] - value for name, value in vars(before).items()})


def count_distinct(model: VisionLanguageModel, asked: list[Conversation]) -> int:
    """Tokens of a trie of the conversations, in which a picture's tokens are its own."""
    seen: set[tuple[object, ...]] = set()
    for conversation in asked:
        encoded = model.encoder.encode(conversation, reply=True)
        pictures = iter(
            [
                view.key
                for view, count in zip(encoded.pictures, encoded.picture_tokens, strict=True)
                for _ in range(count)
            ]
        )
        tokens = [next(pictures) if token in model.encoder.image_ids else token for token in encoded.ids]
        seen.update(tuple(tokens[: end + 1]) for end in range(len(tokens)))
    return len(seen)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_are_those_of_whole_conversations(
    temperature: float, small: VisionLanguageModel, small_dir: Path, shown: list[Study], films: Path
) -> None:
    asked = ask_regions(small, shown, films)
    options = {"max_new_tokens": 8, "temperature": temperature, "seeds": list(range(len(asked)))}
    shared, whole = small.generate(asked, **options), compute_whole(small_dir).generate(asked, **options)
    assert [reply.text for reply in shared] == [reply.text for reply in whole]
    assert [reply.cut_off for reply in shared] == [reply.cut_off for reply in whole]
    for one, other in zip(shared, whole, strict=True):
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=2e-4)
    assert len({reply.text for reply in shared}) > 3


def test_scores_are_those_of_whole_conversations(
    small: VisionLanguageModel, small_dir: Path, shown: list[Study], films: Path
) -> None:
    asked = ask_judge(small, shown, films)
    asked += [
        finding_prompt(shown[0], films, small.views, finding=finding, box=box)
        for box, finding in product(BOXES, ("a nodule", "an effusion"))
    ]
    shared = small.p_yes(asked)
    assert shared == pytest.approx(compute_whole(small_dir).p_yes(asked), abs=2e-5)
    assert len(set(shared)) > len(asked) // 2


def test_prompts_are_computed_once_where_they_are_the_same(
    small: VisionLanguageModel, shown: list[Study], films: Path
) -> None:
    """The prefill is the distinct tokens of the prompts, but for the template's first words before a film."""
    asked = ask_regions(small, shown, films)
    before = replace(small.work)
    small.generate(asked, max_new_tokens=2, temperature=0.0, seeds=[0] * len(asked))
    work, distinct = take_work(small, before), count_distinct(small, asked)
    assert work.requests == len(asked) == 2 * 2 * 5 * 2
    assert distinct <= work.prefill_tokens <= 1.05 * distinct
    assert work.prefill_tokens < work.prompt_tokens / 4


def test_every_picture_is_encoded_once(small_dir: Path, shown: list[Study], films: Path) -> None:
    model = VisionLanguageModel(small_dir)
    asked = ask_regions(model, shown, films)
    keys: set[str] = set()
    for conversation in asked:
        keys.update(view.key for view in collect_views(conversation))
    clear_feature_caches()
    model.generate(asked, max_new_tokens=2, temperature=0.0, seeds=[0] * len(asked))
    assert model.work.encodes == len(keys)
    model.p_yes(ask_judge(model, shown, films))  # the same film and regions
    assert model.work.encodes == len(keys)


@pytest.mark.parametrize("batch_tokens", [1, 200])
def test_small_batches_say_the_same(
    batch_tokens: int, small: VisionLanguageModel, small_dir: Path, shown: list[Study], films: Path
) -> None:
    """A limit of one token makes each conversation a tree and a batch of its own."""
    asked = ask_regions(small, shown, films, samples=1)
    options = {"max_new_tokens": 6, "temperature": 1.0, "seeds": list(range(len(asked)))}
    few = VisionLanguageModel(small_dir, batch_size=3)
    few._shared._fixed_batch_tokens = batch_tokens
    assert [r.text for r in few.generate(asked, **options)] == [r.text for r in small.generate(asked, **options)]
    assert few.p_yes(asked) == pytest.approx(small.p_yes(asked), abs=2e-5)


def test_ended_replies_leave_their_batch(small_dir: Path, shown: list[Study], films: Path) -> None:
    """Every decoded row writes a token, but for fewer than an eighth of a batch that wait for others to end; one token
    of eight ends a turn here."""
    model = VisionLanguageModel(small_dir)
    model.encoder.end_ids = frozenset(range(0, len(model.encoder.tokenizer), 8))
    asked = ask_regions(model, shown, films)
    before = replace(model.work)
    replies = model.generate(asked, max_new_tokens=24, temperature=1.5, seeds=list(range(len(asked))))
    work = take_work(model, before)
    lengths = [len(reply.token_logprobs) for reply in replies]
    assert len(set(lengths)) > 1
    needed = sum(lengths) - len(asked)  # the first token of each comes from the prefill
    assert needed <= work.decode_tokens <= needed * 8 / 7 + 1
    assert work.decode_tokens < len(asked) * (max(lengths) - 1)


def test_nothing_asked_is_nothing_said(small: VisionLanguageModel) -> None:
    assert small.generate([], max_new_tokens=1, temperature=0.0, seeds=[]) == []
    assert small.p_yes([]) == []


def test_a_model_that_cannot_share_says_why(small: VisionLanguageModel) -> None:
    assert find_unshared_reason(small.model.config) == ""
    config = small.model.config
    kind = config.text_config._attn_implementation
    try:
        config.text_config._attn_implementation = "flash_attention_2"
        assert find_unshared_reason(small.model.config) == "the attention 'flash_attention_2' takes no mask"
    finally:
        config.text_config._attn_implementation = kind
