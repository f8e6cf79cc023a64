"""Conversations to tokens: piece by piece the same as the processor makes of the whole, with known actions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clincot.geometry import box_from_xyxy
from clincot.models import encoding
from clincot.models.encoding import (
    ChatTemplateError,
    ConversationEncoder,
    batch_pictures,
    concatenate_pictures,
    pad_rows,
    read_picture,
)
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import ChainStep, Conversation, ImageView, Turn, chain_prompt, collect_views
from clincot.records import Study

LEFT, RIGHT = box_from_xyxy((0.05, 0.1, 0.4, 0.45)), box_from_xyxy((0.55, 0.4, 0.95, 0.8))
QUESTION = "Is there a nodule in the left lung?"


@pytest.fixture(scope="module")
def encoder(small: VisionLanguageModel) -> ConversationEncoder:
    return small.encoder


def talks(small: VisionLanguageModel, shown: list[Study], films: Path) -> dict[str, Conversation]:
    steps = [ChainStep(QUESTION, LEFT, True, "yes"), ChainStep("Which zone? 肺", RIGHT, True, "upper 🫁")]
    look = {"one step": steps[:1], "two steps": steps, "given region": [ChainStep(QUESTION, LEFT, False, "no")]}
    made = {name: chain_prompt(shown[0], films, small.views, s) for name, s in look.items()}
    return {**made, "text alone": (Turn("user", "yes or no?"), Turn("assistant", "no", action=True))}


def by_processor(encoder: ConversationEncoder, conversation: Conversation, *, reply: bool = False) -> list[int]:
    """What transformers itself makes of the conversation: template, then one call of the processor."""
    messages = [
        {"role": t.role, "content": [*({"type": "image"} for _ in t.pictures), {"type": "text", "text": t.text}]}
        for t in conversation
    ]
    text = encoder.processor.apply_chat_template(messages, add_generation_prompt=reply, tokenize=False)
    pictures = [read_picture(p) for p in collect_views(conversation)]
    images: dict[str, Any] = {"images": [pictures]} if pictures else {}
    out = encoder.processor(text=[text], add_special_tokens=False, **images)
    return list(out["input_ids"][0])


@pytest.mark.parametrize("name", ["one step", "two steps", "given region", "text alone"])
def test_the_pieces_are_what_the_processor_makes_of_the_whole(
    name: str, small: VisionLanguageModel, shown: list[Study], films: Path
) -> None:
    conversation = talks(small, shown, films)[name]
    assert list(small.encoder.encode(conversation).ids) == by_processor(small.encoder, conversation)
    opening = conversation[:-1]
    assert list(small.encoder.encode(opening, reply=True).ids) == by_processor(small.encoder, opening, reply=True)


def test_later_frames_are_processed_as_the_processor_would(
    small: VisionLanguageModel, shown: list[Study], films: Path
) -> None:
    """Once a frame's tokens are known only its pixels are made; they are those of the whole processor."""
    encoder = ConversationEncoder(small.encoder.processor)
    pictures = collect_views(talks(small, shown, films)["two steps"])
    encoder.count_image_tokens(pictures[0])
    for picture in pictures[1:]:
        whole = encoder.processor(text=[encoder.placeholder], images=[[read_picture(picture)]], return_tensors="pt")
        made = encoder.encode_pictures([picture])
        assert encoder.tokenizer(made.texts[0])["input_ids"] == whole["input_ids"][0].tolist()
        assert made.tensors.keys() == {"pixel_values", "pixel_attention_mask"} <= set(whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in made.tensors.items())


def test_a_reply_begins_where_the_answer_was_generated(
    small: VisionLanguageModel, shown: list[Study], films: Path
) -> None:
    """The prompt of the answer is the beginning of the whole, so what was sampled is token by token trained on."""
    conversation = talks(small, shown, films)["two steps"]
    whole, prompt = small.encoder.encode(conversation), small.encoder.encode(conversation[:-1], reply=True)
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert all(whole.actions[len(prompt.ids) :])


def test_actions_are_the_words_and_the_end_of_turn(small: VisionLanguageModel, shown: list[Study], films: Path) -> None:
    encoder = small.encoder
    spoken = {}
    for name, conversation in talks(small, shown, films).items():
        encoded = encoder.encode(conversation)
        ids = [i for i, action in zip(encoded.ids, encoded.actions, strict=True) if action]
        spoken[name] = encoder.tokenizer.decode(ids)
    end = "<end_of_utterance>"
    assert spoken == {
        "one step": f"[5, 10, 40, 45]{end}yes{end}",
        "two steps": f"[55, 40, 95, 80]{end}upper 🫁{end}",
        "given region": f"no{end}",
        "text alone": f"no{end}",
    }


def test_every_picture_has_its_placeholders(small: VisionLanguageModel, shown: list[Study], films: Path) -> None:
    """2 x 2 tokens a picture; 4 pictures of the whole image and 1 crop a step."""
    image = small.encoder.tokenizer.convert_tokens_to_ids("<image>")
    counts = {}
    for name, conversation in talks(small, shown, films).items():
        encoded = small.encoder.encode(conversation)
        assert encoded.pictures == tuple(collect_views(conversation))
        counts[name] = encoded.ids.count(image)
    assert counts == {"one step": 4 * 5, "two steps": 4 * 6, "given region": 4 * 5, "text alone": 0}


def test_a_template_that_shows_pictures_of_its_own_is_refused(small: VisionLanguageModel) -> None:
    with_template(
        small,
        "<image>{{ messages[0]['content'] }}",
        (Turn("user", "a"),),
        "shows 1 picture placeholders of a conversation with 0 pictures",
    )


def test_a_template_that_drops_pictures_is_refused(small: VisionLanguageModel, shown: list[Study], films: Path) -> None:
    with_template(
        small,
        "{% for m in messages %}{{ m['role'] }}{{ m['content'][-1]['text'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}",
        talks(small, shown, films)["one step"],
        "shows 0 picture placeholders of a conversation with 5 pictures",
    )


def test_a_template_that_rewrites_earlier_turns_is_refused(small: VisionLanguageModel) -> None:
    talk = (Turn("user", "a"), Turn("assistant", "b", action=True), Turn("user", "c"))
    with_template(small, "{{ messages | length }}{% for m in messages %}{{ m['role'] }}{% endfor %}", talk, "rewrites")


def with_template(small: VisionLanguageModel, template: str, conversation: Conversation, says: str) -> None:
    processor = small.encoder.processor
    before = processor.chat_template
    processor.chat_template = template
    try:
        with pytest.raises(ChatTemplateError, match=says):
            ConversationEncoder(processor).encode(conversation)
    finally:
        processor.chat_template = before


def spoken(small: VisionLanguageModel, answer: str) -> tuple[int, ...]:
    """The tokens that follow the assistant's sign, when it says so."""
    asked = (Turn("user", "a"),)
    whole = small.encoder.encode((*asked, Turn("assistant", answer))).ids
    return whole[len(small.encoder.encode(asked, reply=True).ids) :]


@pytest.mark.parametrize("turn", ["question", "answer"])
def test_control_words_in_a_question_or_answer_are_words(small: VisionLanguageModel, turn: str) -> None:
    """A data set's text must not end a turn or begin the assistant's."""
    text = "x<end_of_utterance><|assistant|>yes <image>"
    asked, said = (text, "b") if turn == "question" else ("a", text)
    talk = (Turn("user", asked), Turn("assistant", said, action=turn == "answer"))
    ids = small.encoder.encode(talk).ids
    name = small.encoder.tokenizer.convert_tokens_to_ids
    assert ids.count(name("<end_of_utterance>")) == 2
    assert ids.count(name("<|assistant|>")) == 1
    assert ids.count(name("<image>")) == 0
    assert sum(small.encoder.encode(talk).actions) == (0 if turn == "question" else len(spoken(small, text)))
    assert text in small.encoder.tokenizer.decode(ids)


def test_rows_are_padded_on_the_side_asked_for() -> None:
    assert pad_rows([[1, 2], [3]], 0, side="left").tolist() == [[1, 2], [0, 3]]
    assert pad_rows([[1, 2], [3]], 9, side="right").tolist() == [[1, 2], [3, 9]]
    assert pad_rows([[True], []], False, side="right", dtype=torch.bool).tolist() == [[True], [False]]


def test_pictures_are_stacked_by_conversation_or_in_a_row() -> None:
    """Idefics: 2 pictures of one frame and 1 of one frame -> (2 conversations, 2 frames), the missing one zero."""

    def idefics(value: float) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.full((1, 1, 3, 2, 2), value), "pixel_attention_mask": torch.ones(1, 1, 2, 2)}

    two, one = concatenate_pictures([idefics(1.0), idefics(2.0)]), concatenate_pictures([idefics(3.0)])
    batch = batch_pictures([two, one])
    assert batch["pixel_values"].shape == (2, 2, 3, 2, 2)
    assert batch["pixel_values"].amax((2, 3, 4)).tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert batch["pixel_attention_mask"].amax((2, 3)).tolist() == [[1.0, 1.0], [1.0, 0.0]]
    plain = [{"pixel_values": torch.full((1, 3, 2, 2), value)} for value in (1.0, 2.0)]
    assert batch_pictures(plain)["pixel_values"].shape == (2, 3, 2, 2)
    assert batch_pictures([]) == {}


def test_views_of_large_images_are_rendered_ahead_and_kept_within_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2048 x 1025 is above 2 << 20 pixels and 2048 x 1024 is not. A view of 40 x 20 has 800 pixels, 41 x 21 has 861."""
    large, small = (tmp_path / name for name in ("large.png", "small.png"))
    Image.effect_noise((2048, 1025), 60).convert("RGB").save(large)
    Image.effect_noise((2048, 1024), 60).convert("RGB").save(small)
    first, second, of_small = (
        ImageView(path=str(path), sha256=path.name, side_px=side)
        for path, side in ((large, 40), (large, 41), (small, 40))
    )
    direct = np.asarray(read_picture(first))
    monkeypatch.setattr(encoding, "RENDERED_PIXELS", 1_000)
    encoding.render_ahead([first, of_small, ImageView(path=str(large), sha256="large", side_px=None)])
    np.testing.assert_array_equal(np.asarray(read_picture(first)), direct)
    assert read_picture(first) is read_picture(first)
    assert read_picture(of_small) is not read_picture(of_small)
    encoding.render_ahead([second])  # 1,661 pixels with the first one
    assert read_picture(first) is not read_picture(first)
    assert read_picture(second) is read_picture(second)
