"""Each family is fed exactly what its own processor makes, and answers as its own forward pass says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clincot.geometry import Box, box_from_xyxy
from clincot.models.encoding import ChatTemplateError, ConversationEncoder, read_picture
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import ChainStep, Conversation, chain_prompt, finding_prompt, judge_prompt, with_answer
from clincot.records import Study
from tests.support.families import Family

LEFT = box_from_xyxy((0.05, 0.1, 0.4, 0.45))
WIDE = box_from_xyxy((0.1, 0.3, 0.95, 0.6))
QUESTION = "Is there a nodule in the left lung?"
TOLERANCE = 1e-5


def build_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as a user of transformers would write it."""
    messages = []
    for turn in conversation:
        content: list[dict[str, Any]] = [{"type": "image", "image": read_picture(p)} for p in turn.pictures]
        messages.append({"role": turn.role, "content": [*content, {"type": "text", "text": turn.text}]})
    return messages


def run_processor(model: VisionLanguageModel, conversation: Conversation, *, reply: bool) -> dict[str, torch.Tensor]:
    """What the processor itself makes: by its chat template or, for PaliGemma, from its images and prompt."""
    processor = model.encoder.processor
    if processor.chat_template is None:
        images = [[read_picture(p) for turn in conversation for p in turn.pictures]]
        text = "\n".join(turn.text for turn in conversation)
        # the processor adds <bos> after the last image and a newline after the prompt
        return dict(processor(text=[processor.image_token * len(images[0]) + text], images=images, return_tensors="pt"))
    return dict(
        processor.apply_chat_template(
            build_messages(conversation),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=reply,
        )
    )


def ask(study: Study, films: Path, model: VisionLanguageModel, box: Box = LEFT) -> Conversation:
    """Whole image, a tool's region, its crop: two pictures, ready for the answer."""
    return chain_prompt(study, films, model.views, [ChainStep(QUESTION, box, written=False)])


@pytest.fixture
def conversations(studies: list[Study], films: Path, model: VisionLanguageModel) -> list[Conversation]:
    """Questions, a judgement and a finding, about films and crops of several shapes."""
    return [
        ask(studies[0], films, model),
        ask(studies[1], films, model, WIDE),
        ask(studies[2], films, model),
        judge_prompt(studies[1], films, model.views, question=QUESTION, answer="yes", box=LEFT),
        finding_prompt(studies[2], films, model.views, finding="a nodule", box=WIDE),
    ]


def test_ids_are_the_processors_own(model: VisionLanguageModel, conversations: list[Conversation]) -> None:
    for conversation in conversations:
        expected = run_processor(model, conversation, reply=True)
        encoded = model.encoder.encode(conversation, reply=True)
        assert list(encoded.ids) == expected["input_ids"][0].tolist()
        if model.encoder.type_key:
            assert list(encoded.types) == expected[model.encoder.type_key][0].tolist()


def test_image_tensors_are_the_processors_own(model: VisionLanguageModel, conversations: list[Conversation]) -> None:
    for conversation in conversations:
        expected = run_processor(model, conversation, reply=True)
        pictures = [p for turn in conversation for p in turn.pictures]
        tensors = model.encoder.stack_pictures([pictures])
        for name, value in tensors.items():
            assert torch.equal(value, expected[name]), name
        names = {name for name, value in expected.items() if isinstance(value, torch.Tensor)}
        assert names - set(tensors) <= {"input_ids", "attention_mask", "labels", model.encoder.type_key}


def test_logits_are_the_models_own(model: VisionLanguageModel, conversations: list[Conversation]) -> None:
    for conversation in conversations:
        inputs = run_processor(model, conversation, reply=True)
        inputs.pop("labels", None)
        with torch.inference_mode():
            expected = torch.log_softmax(model.model(**inputs).logits[0, -1], -1)
        ours = model.compute_next_token_logprobs([model.encoder.encode(conversation, reply=True)])[0]
        assert (ours - expected).abs().max() < TOLERANCE


def test_a_batch_is_each_alone(model: VisionLanguageModel, conversations: list[Conversation]) -> None:
    """Films and crops of several shapes in one batch: tiles are ragged where the family makes tiles."""
    encoded = [model.encoder.encode(conversation, reply=True) for conversation in conversations]
    together = model.compute_next_token_logprobs(encoded)
    for row, one in zip(together, encoded, strict=True):
        assert (row - model.compute_next_token_logprobs([one])[0]).abs().max() < 5 * TOLERANCE


def test_generation_is_the_models_own(model: VisionLanguageModel, conversations: list[Conversation]) -> None:
    """Greedy, by generate() on the processor's output, with the end tokens of the generation config."""
    conversation = conversations[1]
    inputs = run_processor(model, conversation, reply=True)
    inputs.pop("labels", None)
    with torch.inference_mode():
        out = model.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = model.encoder.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    (ours,) = model.generate([conversation], max_new_tokens=6, temperature=0.0, seeds=[0])
    assert ours.text == expected


def test_every_end_token_ends_a_turn(
    family: Family, model: VisionLanguageModel, conversations: list[Conversation]
) -> None:
    """With a head that always prefers the end token, one token is written and the answer is not cut off."""
    head = model.model.get_output_embeddings()
    for token in family.end_tokens:
        end_id = model.encoder.tokenizer.convert_tokens_to_ids(token)
        assert end_id in model.encoder.end_ids

        def prefer(_module: object, _args: object, logits: torch.Tensor, end_id: int = end_id) -> torch.Tensor:
            logits = logits.clone()
            logits[..., end_id] = 100.0
            return logits

        handle = head.register_forward_hook(prefer)
        try:
            (written,) = model.generate(conversations[:1], max_new_tokens=5, temperature=0.0, seeds=[0])
        finally:
            handle.remove()
        assert len(written.token_logprobs) == 1, token
        assert not written.cut_off
        assert written.text == ""


def test_the_trained_turn_ends_with_an_end_token(model: VisionLanguageModel, studies: list[Study], films: Path) -> None:
    """The answer and one end token are actions, and nothing after them is."""
    encoded = model.encoder.encode(with_answer(ask(studies[0], films, model), "yes"))
    acted = [token for token, action in zip(encoded.ids, encoded.actions, strict=True) if action]
    assert acted[-1] in model.encoder.end_ids
    assert not set(acted[:-1]) & model.encoder.end_ids
    assert model.encoder.tokenizer.decode(acted[:-1], skip_special_tokens=True).strip() == "yes"


def test_what_is_written_is_what_is_trained_on(model: VisionLanguageModel, studies: list[Study], films: Path) -> None:
    """The prompt of a reply is the beginning of the conversation with its answer, token by token."""
    prompt = ask(studies[0], films, model)
    asked = model.encoder.encode(prompt, reply=True).ids
    answered = model.encoder.encode(with_answer(prompt, "yes"))
    assert answered.ids[: len(asked)] == asked
    assert not any(answered.actions[: len(asked)])
    assert answered.actions[len(asked)]


def test_logprobs_of_answers_are_the_models_own(model: VisionLanguageModel, studies: list[Study], films: Path) -> None:
    """Two answers of different lengths in one batch, against a forward pass of each by itself."""
    answered = [
        with_answer(ask(studies[0], films, model), "yes"),
        with_answer(ask(studies[1], films, model, WIDE), "no effusion in the left lung"),
    ]
    ours = model.compute_answer_logprobs(answered)
    for value, conversation in zip(ours, answered, strict=True):
        encoded = model.encoder.encode(conversation)
        inputs = model._build_inputs([encoded], side="right")
        with torch.inference_mode():
            logp_TV = torch.log_softmax(model.model(**inputs).logits[0, :-1], -1)
        expected = 0.0
        for position, (token, action) in enumerate(zip(encoded.ids[1:], encoded.actions[1:], strict=True)):
            expected += float(logp_TV[position, token]) if action else 0.0
        assert value == pytest.approx(expected, abs=1e-4)


def test_control_words_in_a_question_are_text(
    family: Family, model: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    """A data set cannot end a turn or show a picture."""
    attack = f"What is {family.end_tokens[0]} {model.encoder.placeholder} here?"
    conversation = chain_prompt(studies[0], films, model.views, [ChainStep(attack, LEFT, written=False)])
    plain = ask(studies[0], films, model)
    for word in {*family.end_tokens}:
        token = model.encoder.tokenizer.convert_tokens_to_ids(word)
        ids = model.encoder.encode(conversation, reply=True).ids
        assert ids.count(token) == model.encoder.encode(plain, reply=True).ids.count(token)
    assert sum(model.encoder.encode(conversation).picture_tokens) == sum(model.encoder.encode(plain).picture_tokens)


def test_p_yes_is_a_probability(model: VisionLanguageModel, conversations: list[Conversation]) -> None:
    together = model.p_yes(conversations)
    alone = [model.p_yes([conversation])[0] for conversation in conversations]
    for a, b in zip(together, alone, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a == pytest.approx(b, abs=1e-5)
            assert 0 < a < 1


def test_a_written_region_is_trained_or_refused(
    family: Family, model: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    """Region and answer are two turns of the policy; PaliGemma would see the crop before it names it."""
    prompt = chain_prompt(studies[0], films, model.views, [ChainStep(QUESTION, LEFT, written=True)])
    answered = with_answer(prompt, "no")
    if family.name == "paligemma":
        with pytest.raises(ChatTemplateError, match="regions of a grounder"):
            model.encoder.encode(answered)
        return
    encoded = model.encoder.encode(answered)
    turns = sum(
        action and not before for before, action in zip((False, *encoded.actions), encoded.actions, strict=False)
    )
    assert turns == 2


def test_generation_defaults_of_a_checkpoint_do_not_act(
    model: VisionLanguageModel, conversations: list[Conversation]
) -> None:
    """Beams and a repetition penalty in generation_config.json change neither the answer nor its log-probabilities."""
    (expected,) = model.generate(conversations[:1], max_new_tokens=5, temperature=0.0, seeds=[0])
    own = model.model.generation_config
    before = own.to_dict()
    own.num_beams, own.repetition_penalty = 3, 8.0
    try:
        (found,) = model.generate(conversations[:1], max_new_tokens=5, temperature=0.0, seeds=[0])
    finally:
        own.num_beams, own.repetition_penalty = before["num_beams"], before["repetition_penalty"]
    assert found == expected


THINKING_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_with_thinking_blocks_keeps_later_turns_whole(
    family: Family, model: VisionLanguageModel, studies: list[Study], films: Path
) -> None:
    """Qwen3's thinking templates put an empty block before the last answer only: it never shifts or enters a turn."""
    if family.name != "qwen3-vl":
        pytest.skip("a template of Qwen3")
    processor = model.encoder.processor
    before, processor.chat_template = processor.chat_template, THINKING_TEMPLATE
    try:
        encoder = ConversationEncoder(processor, end_ids=sorted(model.encoder.end_ids))
        prompt = chain_prompt(studies[0], films, model.views, [ChainStep(QUESTION, LEFT, written=True)])
        text = encoder.tokenizer.decode(encoder.encode(prompt, reply=True).ids)
        assert "<think>" not in text
        assert text.count("<|im_start|>user\n") == 2
        with pytest.raises(ChatTemplateError, match="<think>"):
            encoder.encode(with_answer(prompt, "yes"))
    finally:
        processor.chat_template = before
