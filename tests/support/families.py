"""Tiny random checkpoints of the model families that medical vision-language models use.

Each is built from the family's real config, model, tokenizer and processor classes of transformers, with a chat
template in the shape of the published checkpoint's (Family.source names it). Nothing is downloaded. A forward pass
takes milliseconds; special tokens, end tokens and processing steps are those of the real checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "Is there a nodule in the left lung? Answer yes or no. Yes No yes no YES NO",
    "First name the region of the image to look at, as [x0, y0, x1, y1] in percent of its width and height.",
    "This is that region at full resolution. Answer the question in a few words: Which zone is the nodule in?",
    "The second image is the region [12, 30, 45, 78] of the first (percent of its width and height) at full "
    "resolution.",
    "Question: Proposed answer: upper lower zone Is the proposed answer right? effusion cardiomegaly consolidation",
    "Does this region of a medical image show pneumothorax? user assistant system model USER: ASSISTANT: [INST] "
    "[/INST]",
    '{"bbox_2d": [10, 20, 30, 40]} <box>[[10, 20, 30, 40]]</box> 0 1 2 3 4 5 6 7 8 9 10 100 1000',
] * 4


@dataclass(frozen=True)
class Family:
    """One model family: how a tiny checkpoint is made, and what its users know it by."""

    name: str
    build: Callable[[Path], None]
    medical_models: str  # checkpoints of medicine that are of this family
    source: str  # the published checkpoint whose tokenizer, template and end tokens are copied in shape
    end_tokens: tuple[str, ...]
    needs_torchvision: bool = False


# --- tokenizers


def _train_byte_level(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE like GPT-2's and Qwen's: (vocabulary, merges)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _read_bpe(tokenizer)


def _train_sentencepiece(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE with byte fallback and spaces as U+2581 like Llama's and Gemma's: (vocabulary, merges)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    byte_tokens = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*special, *byte_tokens], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _read_bpe(tokenizer)


def _read_bpe(tokenizer: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    import json

    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _special(*words: str) -> list[AddedToken]:
    return [AddedToken(word, special=True, normalized=False) for word in words]


def build_llama_tokenizer(*extra: str, **options: Any) -> Any:
    """Llama and Mistral (LLaVA-1.5, LLaVA-Next): <s> in front, </s> at the end of a turn."""
    from transformers import LlamaTokenizer

    vocabulary, merges = _train_sentencepiece(["<unk>", "<s>", "</s>"])
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token="<unk>", **options)
    tokenizer.add_tokens(_special(*extra))
    # tokenizer_config.json of llava-hf/llava-1.5-7b-hf; its chat template does not write <s>
    return _reload(tokenizer, **{"add_bos_token": True, **options})


def build_gemma_tokenizer(*extra: str, **options: Any) -> Any:
    from transformers import GemmaTokenizer

    vocabulary, merges = _train_sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, **options)
    tokenizer.add_tokens(_special(*extra))
    return tokenizer


def build_qwen_tokenizer(*extra: str, eos: str = "<|im_end|>", pad: str = "<|endoftext|>", **options: Any) -> Any:
    from transformers import Qwen2Tokenizer

    vocabulary, merges = _train_byte_level(["<|endoftext|>"])
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, eos_token=eos, pad_token=pad, **options)
    tokenizer.add_tokens(_special("<|im_start|>", "<|im_end|>", *extra))
    return tokenizer


def build_byte_tokenizer(*extra: str, **options: Any) -> Any:
    """SmolLM's and Llama-3's kind, which Idefics3 and SmolVLM use."""
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _train_byte_level(["<|endoftext|>", "<|im_start|>", "<end_of_utterance>"])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.add_tokens(_special("<|endoftext|>", "<|im_start|>", "<end_of_utterance>", *extra))
    return fast


# --- chat templates, in the published shape

VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% "
    "endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ ' ' + content['text'] "
    "}}{% endfor %}"
    "{{ '</s> ' }}{% endif %}{% endfor %}"
)
LLAVA_QWEN = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] "
    "}}{% endfor %}"
    "{{'<|im_end|>'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' "
    "%}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_VL = QWEN_VL.replace(
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful "
    "assistant.<|im_end|>\n{% endif %}",
    "",
)
INTERN_VL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ "
    "content['text'] }}{% endif %}"
    "{% endfor %}{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else "
    "message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' }}{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ "
    "'<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{{ '<end_of_turn>\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
IDEFICS3 = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if "
    "message['content'][0]['type'] == 'image' %}"
    "{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' "
    "%}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


# --- parts of models


def get_text_config(tokenizer: Any, kind: str = "llama", **changes: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "vocab_size": len(tokenizer) + 8,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **changes,
    }


def get_clip_config(image_size: int = 32, patch_size: int = 8) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": patch_size,
    }


def _siglip_config(image_size: int = 32, patch_size: int = 8, **changes: Any) -> dict[str, Any]:
    return {**get_clip_config(image_size, patch_size), "model_type": "siglip_vision_model", **changes}


def _save(folder: Path, model_class: Any, config: Any, processor: Any, end_ids: list[int]) -> None:
    torch.manual_seed(0)
    model = model_class(config)
    with (
        torch.no_grad()
    ):  # as drawn (deviation .02) the picture would hardly matter, and a test that compares could not fail
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "vis" not in name:
                weight.mul_(4)
            if name.endswith("mm_input_projection_weight"):  # Gemma3's projector is drawn as zeros: no picture at all
                weight.normal_(std=0.1)
    model.generation_config.eos_token_id = end_ids if len(end_ids) > 1 else end_ids[0]
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.bos_token_id = processor.tokenizer.bos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _ids(tokenizer: Any, *tokens: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


# --- families


def _build_llava(folder: Path, *, backbone: str, template: str) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = build_qwen_tokenizer("<image>") if backbone == "qwen2" else build_llama_tokenizer("<image>")
    config = LlavaConfig(
        vision_config=get_clip_config(),
        text_config=get_text_config(tokenizer, backbone),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
    )
    size = {"shortest_edge": 32}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
        image_token="<image>",
    )
    _save(folder, LlavaForConditionalGeneration, config, processor, [tokenizer.eos_token_id])


def build_llava_vicuna(folder: Path) -> None:
    _build_llava(folder, backbone="llama", template=VICUNA)


def build_llava_mistral(folder: Path) -> None:
    _build_llava(folder, backbone="mistral", template=MISTRAL)


def build_llava_qwen2(folder: Path) -> None:
    _build_llava(folder, backbone="qwen2", template=LLAVA_QWEN)


def build_llava_next(folder: Path) -> None:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = build_llama_tokenizer("<image>")
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    config = LlavaNextConfig(
        vision_config=get_clip_config(),
        text_config=get_text_config(tokenizer, "mistral"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
    )
    processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=MISTRAL,
        image_token="<image>",
    )
    _save(folder, LlavaNextForConditionalGeneration, config, processor, [tokenizer.eos_token_id])


def build_llava_onevision(folder: Path) -> None:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = build_qwen_tokenizer("<image>", "<video>")
    pinpoints = [[32, 32], [32, 64], [64, 32], [64, 64]]
    config = LlavaOnevisionConfig(
        vision_config=_siglip_config(vision_use_head=False),
        text_config=get_text_config(tokenizer, "qwen2"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints),
        tokenizer,
        LlavaOnevisionVideoProcessor(size={"height": 32, "width": 32}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_QWEN,
    )
    _save(folder, LlavaOnevisionForConditionalGeneration, config, processor, [tokenizer.eos_token_id])


QWEN_WORDS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def get_qwen_ids(tokenizer: Any) -> dict[str, int]:
    start, end, image, video = _ids(tokenizer, *QWEN_WORDS)
    return {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
    }


def _qwen_text(tokenizer: Any, kind: str, **changes: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0, **changes}
    return get_text_config(tokenizer, kind, rope_parameters=rope)


def build_qwen_processors(patch_size: int, *, most_patches: int = 12 * 4) -> tuple[Any, Any]:
    """Image and video processor. most_patches: of an image, of which four become one token."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    side = patch_size * 2
    size = {"shortest_edge": side * side * 2, "longest_edge": patch_size * patch_size * most_patches}
    options = {"patch_size": patch_size, "temporal_patch_size": 2, "merge_size": 2, "size": size}
    return Qwen2VLImageProcessor(**options), Qwen2VLVideoProcessor(**options)


def build_qwen2_vl(folder: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

    tokenizer = build_qwen_tokenizer(*QWEN_WORDS, "<|box_start|>", "<|box_end|>")
    config = Qwen2VLConfig(
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2},
        text_config=_qwen_text(tokenizer, "qwen2_vl_text"),
        **get_qwen_ids(tokenizer),
    )
    image, video = build_qwen_processors(8)
    processor = Qwen2VLProcessor(image, tokenizer, video, chat_template=QWEN_VL)
    _save(folder, Qwen2VLForConditionalGeneration, config, processor, _ids(tokenizer, "<|im_end|>", "<|endoftext|>"))


def build_qwen2_5_vl(folder: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    tokenizer = build_qwen_tokenizer(*QWEN_WORDS)
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "window_size": 32,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=_qwen_text(tokenizer, "qwen2_5_vl_text"), **get_qwen_ids(tokenizer)
    )
    image, video = build_qwen_processors(8)
    processor = Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=QWEN_VL)
    _save(folder, Qwen2_5_VLForConditionalGeneration, config, processor, _ids(tokenizer, "<|im_end|>", "<|endoftext|>"))


def build_qwen3_vl(folder: Path) -> None:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = build_qwen_tokenizer(*QWEN_WORDS)
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 8,
        "out_hidden_size": 32,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(
        vision_config=vision,
        text_config=_qwen_text(tokenizer, "qwen3_vl_text", mrope_interleaved=True),
        **get_qwen_ids(tokenizer),
    )
    image, _ = build_qwen_processors(8)
    video = Qwen3VLVideoProcessor(patch_size=8, temporal_patch_size=2, merge_size=2)
    processor = Qwen3VLProcessor(image, tokenizer, video, chat_template=QWEN3_VL)
    _save(folder, Qwen3VLForConditionalGeneration, config, processor, _ids(tokenizer, "<|im_end|>", "<|endoftext|>"))


def build_internvl(folder: Path) -> None:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    tokenizer = build_qwen_tokenizer("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<box>", "</box>")
    for name, word in (
        ("start_image_token", "<img>"),
        ("end_image_token", "</img>"),
        ("context_image_token", "<IMG_CONTEXT>"),
        ("video_token", "<video>"),
    ):
        tokenizer.init_kwargs.setdefault("extra_special_tokens", {})[name] = word
    tokenizer = _reload(
        tokenizer,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [32, 32],
        "patch_size": [8, 8],
    }
    config = InternVLConfig(
        vision_config=vision,
        text_config=get_text_config(tokenizer, "qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size={"height": 32, "width": 32}),
        image_seq_length=4,
        chat_template=INTERN_VL,
    )
    _save(folder, InternVLForConditionalGeneration, config, processor, [tokenizer.eos_token_id])


def _reload(tokenizer: Any, **options: Any) -> Any:
    """The tokenizer saved and loaded with further options, as a checkpoint's own files would give them."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return type(tokenizer).from_pretrained(folder, **options)


def build_gemma3(folder: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    words = ("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = _reload(
        build_gemma_tokenizer(*words),
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    start, end, soft = _ids(tokenizer, "<start_of_image>", "<end_of_image>", "<image_soft_token>")
    config = Gemma3Config(
        vision_config=_siglip_config(vision_use_head=False),
        # The last token sees a picture only in a layer without a window; published checkpoints have one in six.
        text_config=get_text_config(
            tokenizer,
            "gemma3_text",
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
        ),
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=soft,
        mm_tokens_per_image=4,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, chat_template=GEMMA3, image_seq_length=4
    )
    _save(folder, Gemma3ForConditionalGeneration, config, processor, _ids(tokenizer, "<eos>", "<end_of_turn>"))


def build_paligemma(folder: Path) -> None:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = build_gemma_tokenizer("<image>")
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = PaliGemmaProcessor(images, tokenizer)
    config = PaliGemmaConfig(
        vision_config=_siglip_config(vision_use_head=False, projection_dim=32),
        text_config=get_text_config(tokenizer, "gemma", vocab_size=len(tokenizer) + 8),
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    _save(folder, PaliGemmaForConditionalGeneration, config, processor, _ids(tokenizer, "<eos>"))


IDEFICS_WORDS = ("<fake_token_around_image>", "<image>", "<global-img>")
ROWS = tuple(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4))


def build_idefics3(folder: Path) -> None:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = build_byte_tokenizer(
        *IDEFICS_WORDS, *ROWS, bos_token="<|im_start|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    config = Idefics3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config=get_text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=IDEFICS3)
    _save(
        folder,
        Idefics3ForConditionalGeneration,
        config,
        processor,
        _ids(tokenizer, "<|endoftext|>", "<end_of_utterance>"),
    )


def build_smolvlm(folder: Path) -> None:
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    tokenizer = build_byte_tokenizer(
        *IDEFICS_WORDS,
        *ROWS,
        "<video>",
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|endoftext|>",
    )
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 8,
        },
        text_config=get_text_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = SmolVLMImageProcessor(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
    )
    video = SmolVLMVideoProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 32})
    processor = SmolVLMProcessor(images, tokenizer, video, image_seq_len=4, chat_template=IDEFICS3)
    _save(folder, SmolVLMForConditionalGeneration, config, processor, _ids(tokenizer, "<end_of_utterance>"))


FAMILIES: tuple[Family, ...] = (
    Family(
        "llava-vicuna", build_llava_vicuna, "LLaVA-1.5 and its medical finetunes", "llava-hf/llava-1.5-7b-hf", ("</s>",)
    ),
    Family(
        "llava-mistral",
        build_llava_mistral,
        "LLaVA-Med 1.5 (converted)",
        "chaoyinshe/llava-med-v1.5-mistral-7b-hf",
        ("</s>",),
    ),
    Family(
        "llava-qwen2",
        build_llava_qwen2,
        "HuatuoGPT-Vision-7B (converted)",
        "FreedomIntelligence/HuatuoGPT-Vision-7B-hf",
        ("<|im_end|>",),
    ),
    Family("llava-next", build_llava_next, "LLaVA-NeXT finetunes", "llava-hf/llava-v1.6-mistral-7b-hf", ("</s>",)),
    Family(
        "llava-onevision",
        build_llava_onevision,
        "LLaVA-OneVision finetunes",
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        ("<|im_end|>",),
        needs_torchvision=True,
    ),
    Family(
        "qwen2-vl",
        build_qwen2_vl,
        "MedVLM-R1, Med-R1",
        "Qwen/Qwen2-VL-7B-Instruct",
        ("<|im_end|>", "<|endoftext|>"),
        needs_torchvision=True,
    ),
    Family(
        "qwen2.5-vl",
        build_qwen2_5_vl,
        "Lingshu, HuatuoGPT-Vision-7B-Qwen2.5VL",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        ("<|im_end|>", "<|endoftext|>"),
        needs_torchvision=True,
    ),
    Family(
        "qwen3-vl",
        build_qwen3_vl,
        "RadVLM-GRPO",
        "Qwen/Qwen3-VL-8B-Instruct",
        ("<|im_end|>", "<|endoftext|>"),
        needs_torchvision=True,
    ),
    Family(
        "internvl",
        build_internvl,
        "InternVL3 finetunes",
        "OpenGVLab/InternVL3-8B-hf",
        ("<|im_end|>",),
        needs_torchvision=True,
    ),
    Family("gemma3", build_gemma3, "MedGemma", "google/medgemma-4b-it", ("<eos>", "<end_of_turn>")),
    Family("paligemma", build_paligemma, "PaliGemma finetunes", "google/paligemma2-3b-mix-448", ("<eos>",)),
    Family(
        "idefics3",
        build_idefics3,
        "the shipped small models",
        "HuggingFaceM4/Idefics3-8B-Llama3",
        ("<|endoftext|>", "<end_of_utterance>"),
    ),
    Family(
        "smolvlm",
        build_smolvlm,
        "SmolVLM finetunes",
        "HuggingFaceTB/SmolVLM-Instruct",
        ("<end_of_utterance>",),
        needs_torchvision=True,
    ),
)


def has_torchvision() -> bool:
    from importlib.util import find_spec

    return find_spec("torchvision") is not None
