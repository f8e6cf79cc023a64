"""The size of a model from its config, without its weights.

The model is built on torch's meta device, where parameters have shapes and no memory, so a 7B model takes
milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.features import FRAME_FEATURE_FAMILIES, SHARED_FEATURE_FAMILIES
from clincot.models.inspection import TESTED_FAMILIES, first_line
from clincot.models.shared_prefixes import find_unshared_reason

_VISION_TOWERS = ("vision_model", "vision_tower", "visual")


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, by whether they are trained, and the sizes that activations and operations depend on."""

    total: int
    vision: int
    connector: int
    lora_per_rank: tuple[int, int, int]  # in + out of the linear layers of language model, connector and vision tower
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # numbers that a layer keeps of a token: keys and values of all key-value heads
    attention_width: int = 0  # query heads times head size: the width of a layer's attention products
    embeddings: int = 0  # input embeddings, which are looked up and not multiplied, unless the head is tied to them
    head: int = 0  # the projection to the vocabulary, computed for the tokens that are predicted only
    tied_head: bool = False  # whether the head's weights are those of the embeddings
    patches_per_token: float = 1.0  # patches in the vision tower for each image token of the language model
    vision_attention_width: int = 0  # sum over the tower's layers with attention to the whole picture of their width
    shares_prefixes: bool = False  # common beginnings of prompts are computed once (models.shared_prefixes)
    shares_features: bool = False  # each distinct picture is encoded once (models.features)
    has_frames: bool = False  # trained on the features of a frozen tower, both sides of a pair in one sequence

    @property
    def language(self) -> int:
        """Parameters of the language model with its embeddings and head."""
        return self.total - self.vision - self.connector

    @property
    def body(self) -> int:
        """Parameters by which every token is multiplied: the layers of the language model."""
        return self.language - self.embeddings - (0 if self.tied_head else self.head)

    @property
    def largest_unit(self) -> int:
        """Parameters of the largest part that FSDP gathers at once: a layer, or the embeddings with the head."""
        return max(self.body // self.layers, self.embeddings + (0 if self.tied_head else self.head))


def measure_model(config: Any) -> ModelSize:
    """Build the config's model on the meta device and count.

    Raises UnsupportedCheckpoint for a config whose numbers make no model.
    """
    model = _build_on_meta_device(config)
    inner = getattr(model, "model", model)
    modules = [getattr(inner, name, None) for name in _VISION_TOWERS]
    vision: dict[int, nn.Parameter] = {}
    for tower in modules:
        if isinstance(tower, nn.Module):
            vision |= {id(weight): weight for weight in tower.parameters()}
    language = {id(weight): weight for weight in model.get_decoder().parameters()}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    language |= {id(weight): weight for weight in head.parameters()}
    weights = {id(weight): weight for weight in model.parameters()}
    connector = [weight for key, weight in weights.items() if key not in vision and key not in language]
    widths = [0, 0, 0]
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            group = 2 if id(module.weight) in vision else 0 if id(module.weight) in language else 1
            widths[group] += module.in_features + module.out_features
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelSize(
        total=_count(weights.values()),
        vision=_count(vision.values()),
        connector=_count(connector),
        lora_per_rank=(widths[0], widths[1], widths[2]),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        kv_width=2 * heads * head_dim,
        attention_width=text.num_attention_heads * head_dim,
        embeddings=_count(embeddings.parameters()),
        head=_count(head.parameters()),
        tied_head=head.weight is embeddings.weight,
        patches_per_token=count_patches_per_token(config),
        vision_attention_width=_sum_vision_attention(config.vision_config),
        shares_prefixes=not find_unshared_reason(config),
        shares_features=config.model_type in SHARED_FEATURE_FAMILIES,
        has_frames=config.model_type in FRAME_FEATURE_FAMILIES,
    )


def _build_on_meta_device(config: Any) -> Any:
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    except ImportError as error:
        raise UnsupportedCheckpoint(
            f"{config.model_type!r} needs a package that is not installed here: {first_line(error)}",
            f"install it, or use a checkpoint of one of the tested families: {TESTED_FAMILIES}",
        ) from error
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedCheckpoint(
            f"config.json describes no model that can be built: {type(error).__name__}: {error}",
            "copy config.json from the published checkpoint",
        ) from error


def _count(weights: Iterable[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


def _sum_vision_attention(vision: Any) -> int:
    """Widths of the layers whose attention sees the whole picture; windowed layers (Qwen2.5-VL) are left out."""
    whole = getattr(vision, "fullatt_block_indexes", None)
    layers: int = getattr(vision, "num_hidden_layers", 0) or getattr(vision, "depth", 0)
    width: int = getattr(vision, "hidden_size", 0)
    return width * (layers if whole is None else len(whole))


def count_patches_per_token(config: Any) -> float:
    """Patches in the vision tower for each image token, by what the families call their reduction."""
    vision = config.vision_config
    if (merge := getattr(vision, "spatial_merge_size", None)) is not None:  # Qwen
        return float(merge**2)
    if (scale := getattr(config, "scale_factor", None)) is not None:  # Idefics3, SmolVLM
        return float(scale**2)
    if (tokens := getattr(config, "mm_tokens_per_image", None)) is not None:  # Gemma 3
        return float((vision.image_size // vision.patch_size) ** 2 / tokens)
    if (ratio := getattr(config, "downsample_ratio", None)) is not None:  # InternVL
        return float(math.pow(ratio, -2))
    return 1.0
