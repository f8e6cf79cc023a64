"""The tests of the families can fail: each part of the encoder is taken away, and the comparison that holds it fails.

Where a family does not have the part (a template that writes the BOS token itself, a model that reads no token types),
nothing changes, and the same comparison passes. The table below is therefore also a list of who needs what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from clincot.models.encoding import read_picture
from clincot.models.vlm import VisionLanguageModel, list_end_ids
from clincot.prompts import Conversation, with_answer
from clincot.records import Study
from tests.families import test_encoding as held
from tests.families.test_encoding import conversations
from tests.support.families import Family

__all__ = ["conversations"]  # the fixture

QWEN = frozenset({"qwen2-vl", "qwen2.5-vl", "qwen3-vl"})
LLAVA = frozenset({"llava-vicuna", "llava-mistral", "llava-next"})  # with a tokenizer of Llama's
# A model that is fed wrong gives other values, or refuses what it gets.
FAILURES = (AssertionError, ValueError, RuntimeError)


@dataclass(frozen=True)
class Subject:
    """What a comparison looks at."""

    family: Family
    model: VisionLanguageModel
    conversations: list[Conversation]
    studies: list[Study]
    films: Path


def compare_ids(subject: Subject) -> None:
    held.test_ids_are_the_processors_own(subject.model, subject.conversations)


def compare_logits(subject: Subject) -> None:
    """At every position: what a picture's own tokens see matters little at the last one of a model of two layers."""
    model = subject.model
    for conversation in subject.conversations:
        inputs = held.run_processor(model, conversation, reply=True)
        inputs.pop("labels", None)
        ours = model._build_inputs([model.encoder.encode(conversation, reply=True)], side="left")
        with torch.inference_mode():
            difference = model.model(**ours).logits - model.model(**inputs).logits
        assert difference.abs().max() < held.TOLERANCE


def compare_ends(subject: Subject) -> None:
    held.test_every_end_token_ends_a_turn(subject.family, subject.model, subject.conversations)


def compare_trained_turn(subject: Subject) -> None:
    held.test_the_trained_turn_ends_with_an_end_token(subject.model, subject.studies, subject.films)


def compare_prefix_layout(subject: Subject) -> None:
    """PaliGemma's processor lays out the prompt and the answer (its "suffix") itself, types and labels included."""
    if subject.family.name != "paligemma":
        return
    encoder = subject.model.encoder
    for conversation in subject.conversations:
        images = [[read_picture(picture) for turn in conversation for picture in turn.pictures]]
        text = encoder.placeholder * len(images[0]) + "\n".join(turn.text for turn in conversation)
        expected = encoder.processor(text=[text], images=images, suffix=["yes"], return_tensors="pt")
        encoded = encoder.encode(with_answer(conversation, "yes"))
        assert list(encoded.ids) == expected["input_ids"][0].tolist()
        assert list(encoded.types) == expected["token_type_ids"][0].tolist()
        assert list(encoded.actions) == (expected["labels"][0] != -100).tolist()


def drop_types(model: VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    """No token types: 1-D positions in Qwen-VL, causal attention within a picture in Gemma3."""
    patch.setattr(model.encoder, "type_key", "")


def blank_types(model: VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    """Token types that call every token text."""
    patch.setattr(model.encoder, "_find_types", lambda ids, actions: (0,) * len(ids))


def flatten_positions(model: VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    """Positions 0, 1, 2, … in place of the model's own."""
    build_inputs = model._build_inputs

    def build_flat(*args: Any, **options: Any) -> dict[str, Any]:
        inputs = build_inputs(*args, **options)
        ids = inputs["input_ids"]
        start = model.model.config.model_type == "paligemma"  # its positions count from 1
        return {**inputs, "position_ids": torch.arange(ids.shape[1])[None].expand_as(ids) + int(start)}

    patch.setattr(model, "_build_inputs", build_flat)


def drop_bos(model: VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    """Ids as by add_special_tokens=False."""
    patch.setattr(model.encoder, "_adds_special", False)


def keep_eos_only(model: VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    """The tokenizer's end token, without those of the generation config and of the chat template."""
    patch.setattr(model.encoder, "end_ids", frozenset({model.encoder.tokenizer.eos_token_id}))


def drop_end_ids(model: VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(model.encoder, "end_ids", model.encoder.end_ids - {*list_end_ids(model.model)} | {0})


def leave_turn_open(model: VisionLanguageModel, patch: pytest.MonkeyPatch) -> None:
    """The trained turn as the chat template renders it, without an end token of our own."""
    patch.setattr(model.encoder, "_end_text", "")


@dataclass(frozen=True)
class Sabotage:
    """A part that is taken away, the comparison that must notice it, and the families that have the part."""

    apply: Callable[[VisionLanguageModel, pytest.MonkeyPatch], None]
    compare: Callable[[Subject], None]
    families: frozenset[str]


SABOTAGES: dict[str, Sabotage] = {
    "no token types": Sabotage(drop_types, compare_logits, QWEN | {"gemma3"}),
    "blank token types": Sabotage(blank_types, compare_ids, QWEN | {"gemma3"}),
    "flat positions": Sabotage(flatten_positions, compare_logits, QWEN),
    "no BOS": Sabotage(drop_bos, compare_ids, LLAVA),
    "tokenizer's EOS only": Sabotage(keep_eos_only, compare_ends, QWEN | {"gemma3", "idefics3"}),
    "no end token": Sabotage(drop_end_ids, compare_ends, frozenset({"*"})),
    "open turn": Sabotage(leave_turn_open, compare_trained_turn, frozenset({"llava-vicuna", "paligemma"})),
    "blank types of an answer": Sabotage(blank_types, compare_prefix_layout, frozenset({"paligemma"})),
    "open answer": Sabotage(leave_turn_open, compare_prefix_layout, frozenset({"paligemma"})),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_what_is_taken_away_is_missed(
    name: str,
    family: Family,
    model: VisionLanguageModel,
    conversations: list[Conversation],
    studies: list[Study],
    films: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sabotage = SABOTAGES[name]
    subject = Subject(family, model, conversations, studies, films)
    sabotage.compare(subject)
    monkeypatch.setattr(model.encoder, "_encode_row", model.encoder._encode_text)  # without what it remembers
    sabotage.apply(model, monkeypatch)
    if sabotage.families & {family.name, "*"}:
        with pytest.raises(FAILURES):
            sabotage.compare(subject)
    else:
        sabotage.compare(subject)
