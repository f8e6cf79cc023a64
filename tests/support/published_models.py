"""The sizes of published policies, as configurations of transformers. Models are counted without weights.

The figures are those of each checkpoint's config.json. Two are checked against the bytes of the published safetensors
at 2 bytes a weight: google/medgemma-4b-it (8,600,277,880) and Qwen/Qwen2.5-VL-7B-Instruct, which Lingshu has too
(16,584,414,544 with the headers of its files).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

CLIP_LARGE_336 = {  # openai/clip-vit-large-patch14-336
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
QWEN2_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
MISTRAL_7B = {**LLAMA_7B, "intermediate_size": 14336, "num_key_value_heads": 8}


def _build_llava(text: dict[str, Any]) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(vision_config=CLIP_LARGE_336, text_config=text)


def build_llava_med() -> Any:
    """microsoft/llava-med-v1.5-mistral-7b, converted to transformers' layout."""
    return _build_llava({"model_type": "mistral", **MISTRAL_7B, "vocab_size": 32064})


def build_llava_vicuna() -> Any:
    """llava-hf/llava-1.5-7b-hf."""
    return _build_llava({"model_type": "llama", **LLAMA_7B, "vocab_size": 32064})


def build_huatuogpt() -> Any:
    """FreedomIntelligence/HuatuoGPT-Vision-7B, converted to transformers' layout."""
    return _build_llava({"model_type": "qwen2", **QWEN2_7B})


def build_qwen2_5_vl() -> Any:
    """Qwen/Qwen2.5-VL-7B-Instruct, and lingshu-medical-mllm/Lingshu-7B, which was trained from it."""
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
    }
    text = {**QWEN2_7B, "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}
    return Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


def build_medgemma() -> Any:
    """google/medgemma-4b-it."""
    from transformers import Gemma3Config

    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "vocab_size": 262208,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=256)


PUBLISHED: dict[str, Callable[[], Any]] = {  # by the title that recipes give their policy
    "LLaVA-Med 1.5 7B": build_llava_med,
    "LLaVA 1.5 7B": build_llava_vicuna,
    "HuatuoGPT-Vision 7B": build_huatuogpt,
    "MedGemma 4B": build_medgemma,
    "Qwen2.5-VL 7B": build_qwen2_5_vl,
    "Lingshu 7B": build_qwen2_5_vl,
}
