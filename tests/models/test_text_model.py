"""Text-only language models as judges: tiny random checkpoints of transformers' own Qwen2 and Mistral classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from clincot.config import JudgeSpec
from clincot.geometry import WHOLE_IMAGE, Box, box_from_xyxy
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.load import load_judge
from clincot.models.text_model import LanguageModelJudge
from clincot.prompts import Conversation, describe_box, text_judge_prompt
from tests.support.families import build_llama_tokenizer, build_qwen_tokenizer

# Qwen3's template in its published shape, as far as thinking is concerned.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", params=["qwen", "mistral"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template (Qwen2), and without one and with a BOS (Mistral, as BioMistral)."""
    from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model: Any
    if request.param == "qwen":
        tokenizer = build_qwen_tokenizer()
        tokenizer.chat_template = TEMPLATE
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer), **SIZES))
    else:
        tokenizer = build_llama_tokenizer(add_bos_token=True)
        model = MistralForCausalLM(MistralConfig(vocab_size=len(tokenizer), **SIZES))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts() -> list[Conversation]:
    box = box_from_xyxy((0.0, 0.0, 0.25, 0.25))
    return [
        text_judge_prompt(question="Is there a nodule?", answer="no", box=box),
        text_judge_prompt(
            question="Where is it, and how large is it?", answer="upper left lung", box=box, finding="mass"
        ),
        text_judge_prompt(question="Normal?", answer="yes", box=WHOLE_IMAGE, reference="no"),
    ]


def test_p_yes_is_the_models_own(checkpoint: Path) -> None:
    """Each prompt alone through transformers, without padding, against one batch with padding."""
    judge = LanguageModelJudge(checkpoint)
    expected = []
    for (turn,) in prompts():
        tokenizer, messages = judge.tokenizer, [{"role": "user", "content": turn.text}]
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        else:
            ids = tokenizer(turn.text + "\nAnswer:", return_tensors="pt")["input_ids"]
            assert ids[0, 0] == tokenizer.bos_token_id
        with torch.inference_mode():
            p_V = torch.softmax(judge.model(input_ids=ids).logits[0, -1].double(), -1)
        yes, no = p_V[judge._yes].sum(), p_V[judge._no].sum()
        expected.append(float(yes / (yes + no)))
    assert judge.p_yes(prompts()) == pytest.approx(expected, abs=2e-6)
    assert [judge.p_yes([prompt])[0] for prompt in prompts()] == pytest.approx(expected, abs=2e-6)


def test_thinking_off_reaches_the_template(checkpoint: Path) -> None:
    judge = load_judge(JudgeSpec(name="text", path=str(checkpoint), text_only=True, thinking="off"))
    assert isinstance(judge, LanguageModelJudge)
    text = judge.tokenizer.decode(judge._encode(prompts()[0]))
    assert text.endswith("</think>\n\n") == (judge.tokenizer.chat_template is not None)


def test_a_checkpoint_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedCheckpoint, match=r"not a causal language model that transformers can load"):
        load_judge(JudgeSpec(name="text", path=str(tmp_path), text_only=True))


@pytest.mark.parametrize(
    ("box", "words"),
    [
        (box_from_xyxy((0.0, 0.0, 0.25, 0.3)), "the upper left part, 25 % of the width and 30 % of the height"),
        (box_from_xyxy((0.4, 0.4, 0.6, 0.6)), "the centre, 20 % of the width and 20 % of the height"),
        (box_from_xyxy((0.8, 0.3, 1.0, 0.7)), "the right part, 20 % of the width and 40 % of the height"),
        (box_from_xyxy((0.3, 0.9, 0.7, 1.0)), "the lower part, 40 % of the width and 10 % of the height"),
        (WHOLE_IMAGE, "the whole image"),
    ],
)
def test_a_region_in_words(box: Box, words: str) -> None:
    assert describe_box(box) == words


def test_the_reference_is_in_the_prompt_only_if_given() -> None:
    with_reference, without = (
        text_judge_prompt(question="Q", answer="A", box=WHOLE_IMAGE, reference=reference)[0].text
        for reference in ("the key", "")
    )
    assert "Reference answer: the key\n" in with_reference
    assert "eference" not in without
