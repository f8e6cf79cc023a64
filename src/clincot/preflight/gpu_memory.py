"""Estimates the GPU memory that serving and training a checkpoint need, from its config and without its weights.

The model is built on torch's meta device, where parameters have shapes and no memory, so a 7B model takes
milliseconds. These are estimates for one GPU without sharding; what they leave out is said where they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from clincot.config import TrainConfig
from clincot.models.checkpoint import UnsupportedCheckpoint
from clincot.models.inspection import TESTED_FAMILIES, first_line
from clincot.training.resolved_settings import choose_lora_rank

GIB = 1 << 30
SHARE_USED = 0.9  # of a GPU's memory; the rest is for the CUDA context and for fragments between allocations
_VISION_TOWERS = ("vision_model", "vision_tower", "visual")
_NF4_BYTES = (4 + 0.127) / 8  # a weight with double quantisation (QLoRA, arXiv 2305.14314, section 3)
_LAYER_BYTES = 34  # activations of a layer per token and hidden unit at 16 bits (arXiv 2205.05198, equation 1)


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters, by whether they are trained, and the sizes that activations depend on."""

    total: int
    vision: int
    connector: int
    lora_per_rank: tuple[int, int, int]  # in + out of the linear layers of language model, connector and vision tower
    layers: int
    hidden: int
    intermediate: int
    kv_width: int  # numbers that a layer keeps of a token: keys and values of all key-value heads

    @property
    def language(self) -> int:
        """Parameters of the language model with its embeddings and head."""
        return self.total - self.vision - self.connector


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by what they are for, in the order in which they are shown."""

    parts: tuple[tuple[str, float], ...]

    @property
    def gib(self) -> float:
        return sum(size for _, size in self.parts) / GIB

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_gib(size / GIB)}" for name, size in self.parts if size)
        return f"{format_gib(self.gib)} GiB ({parts})"


@dataclass(frozen=True)
class TrainingMethod:
    """How a model of a certain size is trained by a recipe."""

    rank: int  # of LoRA; 0: all weights
    bfloat16: bool
    four_bit: bool

    def __str__(self) -> str:
        kind = f"LoRA of rank {self.rank}" if self.rank else "full fine-tuning"
        numbers = "4-bit weights" if self.four_bit else "bfloat16" if self.bfloat16 else "float32"
        return f"{kind}, {numbers}"


def measure_model(config: Any) -> ModelSize:
    """Build the config's model on the meta device and count.

    Raises UnsupportedCheckpoint for a config whose numbers make no model.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
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
    inner = getattr(model, "model", model)
    modules = [getattr(inner, name, None) for name in _VISION_TOWERS]
    towers = [module for module in modules if isinstance(module, nn.Module)]
    vision: dict[int, nn.Parameter] = {}
    for tower in towers:
        vision |= {id(weight): weight for weight in tower.parameters()}
    language = {id(weight): weight for weight in model.get_decoder().parameters()}
    head = model.get_output_embeddings()
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
    )


def _count(weights: Any) -> int:
    return sum(weight.numel() for weight in weights)


def estimate_serving(size: ModelSize, *, tokens: int, batch: int, number_bytes: int = 2) -> MemoryEstimate:
    """Memory of answering `batch` conversations of `tokens` tokens at once.

    Weights; keys and values of every token and layer (2 · heads · head_dim numbers each); and the working set of one
    layer of the prefill, of which the widest part is the MLP's two products beside the residual stream and its input,
    queries and output. The vision tower's activations are left out: pictures go through it a few at a time.
    """
    return MemoryEstimate(
        (
            ("weights", size.total * number_bytes),
            ("keys and values", batch * tokens * size.layers * size.kv_width * number_bytes),
            ("activations", batch * tokens * (2 * size.intermediate + 4 * size.hidden) * number_bytes),
        )
    )


def choose_method(size: ModelSize, train: TrainConfig) -> TrainingMethod:
    """How a recipe trains a model of this size on a GPU."""
    rank = choose_lora_rank(train, size.total)
    return TrainingMethod(rank, bfloat16=train.dtype != "float32", four_bit=train.quantization == "4bit")


def estimate_training(
    size: ModelSize, train: TrainConfig, *, tokens: int, method: TrainingMethod | None = None
) -> MemoryEstimate:
    """Memory of one step of the recipe on conversations of `tokens` tokens; method: instead of the recipe's own.

    Weights: full fine-tuning keeps them in float32 and, under bfloat16 autocast, a cast copy of those that are trained;
    under a LoRA the frozen ones are 2 bytes (bfloat16), 4 or about half a byte (4-bit). Every trained weight has a
    gradient (4 bytes) and two moments of Adam (8 bytes), as in ZeRO's count (arXiv 1910.02054, section 3.1). A LoRA of
    rank r has r · (in + out) weights for every linear layer (arXiv 2106.09685, section 4.1), in float32.
    Activations with gradient checkpointing: the input of every layer, and all of one layer while it is computed again
    (34 bytes per token and hidden unit at 16 bits, arXiv 2205.05198, equation 1 without the attention scores, which
    fused attention does not store). A pair is two conversations. Logits are computed in chunks (TRL's fused head), the
    reference in advance: both are left out, and so are the activations of a vision tower that is trained.
    """
    method = method or choose_method(size, train)
    wide = not method.bfloat16
    connector = not train.freeze_vision or train.train_projector
    trained_parts = (True, connector, not train.freeze_vision)
    counts = (size.language, size.connector, size.vision)
    trained = sum(count for count, is_trained in zip(counts, trained_parts, strict=True) if is_trained)
    adapters = 0
    if method.rank:
        widths = zip(size.lora_per_rank, trained_parts, strict=True)
        adapters = method.rank * sum(width for width, is_trained in widths if is_trained)
        base = size.total * (_NF4_BYTES if method.four_bit else 4 if wide else 2)
        trained = adapters
    else:
        base = size.total * 4 + (0 if wide else trained * 2)
    sides = 1 if train.loss == "sft" else 3 if train.image_pair_weight else 2
    rows = sides * count_pairs_in_pass(train) * tokens * size.hidden
    activations = rows * (2 if method.bfloat16 else 4) * (size.layers + _LAYER_BYTES / 2)
    return MemoryEstimate(
        (
            ("weights", base),
            ("adapters", adapters * 4),
            ("gradients", trained * 4),
            ("Adam", trained * 8),
            ("activations", activations),
        )
    )


def count_pairs_in_pass(train: TrainConfig) -> int:
    """Pairs that are in memory at once: a step's batch is split into `grad_accumulation` parts."""
    return -(-train.batch_size // train.grad_accumulation)


def format_gib(gib: float) -> str:
    """Three digits, whatever the size of the model."""
    return f"{gib:.3g}" if gib < 100 else f"{gib:.0f}"


def format_count(number: int) -> str:
    """A number of parameters in words, such as 7.06 billion."""
    billions = number >= 1e9
    return f"{number / (1e9 if billions else 1e6):.3g} {'billion' if billions else 'million'}"
