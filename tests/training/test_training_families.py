"""A family whose features are not shared goes through its processor's pixels: Llava, whose parts have other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from clincot.config import TrainConfig
from clincot.models.vlm import VisionLanguageModel
from clincot.prompts import PromptFormat, save_prompt_format
from clincot.records import Study
from clincot.synthetic.tiny_model import CHAT_TEMPLATE, build_tokenizer
from clincot.training.margin_dpo import train_on_pairs
from tests.support.training_builders import CORPUS, differing_crops

pytestmark = pytest.mark.slow

VIEWS = PromptFormat(whole_px=32, crop_px=32)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = build_tokenizer(CORPUS, 700)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=8,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=tokenizer.eos_token_id,
            **special,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    ).save_pretrained(folder)
    save_prompt_format(folder, VIEWS)
    return folder


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({}, {"language_model", "multi_modal_projector"}),
        ({"train_projector": False}, {"language_model"}),
        ({"lora_r": 4}, {"language_model", "multi_modal_projector"}),
        ({"lora_r": 4, "train_projector": False}, {"language_model"}),
        ({"freeze_vision": False}, {"language_model", "vision_tower", "multi_modal_projector"}),
        ({"loss": "sft"}, {"language_model", "multi_modal_projector"}),
    ],
)
def test_llava_trains_and_what_is_frozen_stays(
    changes: dict[str, Any], trained: set[str], llava: Path, studies: list[Study], folder: Path, tmp_path: Path
) -> None:
    rows = differing_crops(studies[:4], folder, VIEWS)
    section = TrainConfig(batch_size=2, lr=1e-2, epochs=3, **changes)
    train_on_pairs(rows, llava, tmp_path / "out", section, progress=False)
    before, after = (load_file(path / "model.safetensors") for path in (llava, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])} == trained
    chosen = [row.chosen for row in rows]
    gained = [sum(VisionLanguageModel(path).compute_answer_logprobs(chosen)) for path in (tmp_path / "out", llava)]
    assert gained[0] > gained[1]
