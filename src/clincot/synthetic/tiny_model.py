"""The tiny model: an Idefics3 of about a million parameters, built from scratch.

With it, the code that runs on a cluster can also run and learn on two cores. It has the real architecture and the real
files (safetensors, tokenizer, processor, chat template), so the folder loads in transformers and in vLLM. Images are
64-px frames: the whole image as a 2 x 2 grid at half resolution, and a crop at full resolution. It is not a clinical
model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as token_models
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from clincot.fields import FrozenModel
from clincot.models.checkpoint import save_processor
from clincot.prompts import PromptFormat, save_prompt_format

FRAME_PX = 64
IMAGE_STD = 1 / 6  # pixels range from -3 to 3: a tower trained from scratch starts faster than with -1 to 1
SPECIAL_TOKENS = ("<|pad|>", "<end_of_utterance>", "<|user|>", "<|assistant|>", "<image>", "<fake_token_around_image>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|user|>' if message['role'] == 'user' else '<|assistant|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<image>{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class TinyModelSpec(FrozenModel):
    """Sizes of a tiny model. Attention heads have 32 dimensions, the minimum of vLLM's CPU attention."""

    vision_hidden: int = 128
    vision_layers: int = 3
    text_hidden: int = 128
    text_layers: int = 3
    patch_px: int = 8
    tokens_per_side: int = 4  # a frame becomes tokens_per_side ** 2 tokens
    vocabulary: int = 1024
    seed: int = 0

    @property
    def scale_factor(self) -> int:
        """Patches along the side of a token (the factor of the pixel shuffle)."""
        return FRAME_PX // self.patch_px // self.tokens_per_side


def build_tiny_model(out_dir: Path, spec: TinyModelSpec, corpus: Iterable[str]) -> None:
    """Write an untrained checkpoint to `out_dir`; the same spec and corpus give the same bytes.

    `corpus`: texts that the tokenizer learns its vocabulary from.
    """
    tokenizer = build_tokenizer(corpus, spec.vocabulary)
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(
            do_resize=False,
            do_image_splitting=False,
            size={"longest_edge": FRAME_PX},
            max_image_size={"longest_edge": FRAME_PX},
            image_mean=[0.5] * 3,
            image_std=[IMAGE_STD] * 3,
        ),
        tokenizer,
        image_seq_len=spec.tokens_per_side**2,
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(spec.seed)
    model = Idefics3ForConditionalGeneration(build_tiny_config(spec, tokenizer))
    _init_xavier(model.model.vision_model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    out_dir.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out_dir, safe_serialization=True)
    save_processor(processor, out_dir)
    save_prompt_format(
        out_dir, PromptFormat(wording="brief", whole_grid=2, whole_px=FRAME_PX, crop_px=FRAME_PX, min_crop=0.25)
    )


def _init_xavier(tower: torch.nn.Module) -> None:
    """Initialise the vision tower with Xavier weights.

    With the default of transformers (standard deviation 0.02) so small a tower hardly starts to learn.
    """
    for module in tower.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)


def build_tiny_config(spec: TinyModelSpec, tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    """Build the model's configuration from its sizes and the tokenizer's special tokens."""
    return Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=spec.scale_factor,
        tie_word_embeddings=True,
        vision_config={
            "hidden_size": spec.vision_hidden,
            "intermediate_size": 4 * spec.vision_hidden,
            "num_hidden_layers": spec.vision_layers,
            "num_attention_heads": spec.vision_hidden // 32,
            "image_size": FRAME_PX,
            "patch_size": spec.patch_px,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": spec.text_hidden,
            "intermediate_size": 3 * spec.text_hidden,
            "num_hidden_layers": spec.text_layers,
            "num_attention_heads": spec.text_hidden // 32,
            "num_key_value_heads": spec.text_hidden // 32,
            "max_position_embeddings": 2048,
            "bos_token_id": tokenizer.eos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
        },
    )


def build_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer.

    Words of the corpus become single tokens; any other text falls back to bytes, so no token is unknown.
    """
    core = Tokenizer(token_models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in (*SPECIAL_TOKENS, "<global-img>")
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([*corpus, *_list_number_texts()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<end_of_utterance>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<image>", "<fake_token_around_image>"],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


def _list_number_texts() -> list[str]:
    """Return texts of boxes, so that a percentage is one token at every position of "[12, 30, 37, 55]"."""
    texts: list[str] = []
    for n in range(101):
        texts += [f"[{n}, {n}, {n}, {n}]"] * 20
    return texts + ["yes", "no", "Yes", "No"] * 20
