"""Estimates the GPU memory that serving and training a checkpoint need, from the size of its model (model_sizes.py).

What the estimates leave out is said where they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from clincot.config import TrainConfig
from clincot.planning.model_sizes import ModelSize
from clincot.training.resolved_settings import choose_lora_rank, count_step_parts

GIB = 1 << 30
SHARE_USED = 0.9  # of a GPU's memory; the rest is for the CUDA context and for fragments between allocations
_NF4_BYTES = (4 + 0.127) / 8  # a weight with double quantisation (QLoRA, arXiv 2305.14314, section 3)
_LAYER_BYTES = 34  # activations of a layer per token and hidden unit at 16 bits (arXiv 2205.05198, equation 1)


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
    size: ModelSize, train: TrainConfig, *, tokens: int, method: TrainingMethod | None = None, gpus: int = 1
) -> MemoryEstimate:
    """Memory of one GPU in a step of the recipe on conversations of `tokens` tokens; method: instead of the recipe's.

    Weights: full fine-tuning keeps them in float32 and, under bfloat16 autocast, a cast copy of those that are trained;
    under a LoRA the frozen ones are 2 bytes (bfloat16), 4 or about half a byte (4-bit). Every trained weight has a
    gradient (4 bytes) and two moments of Adam (8 bytes), as in ZeRO's count (arXiv 1910.02054, section 3.1). A LoRA of
    rank r has r · (in + out) weights for every linear layer (arXiv 2106.09685, section 4.1), in float32.
    Activations with gradient checkpointing: the input of every layer, and all of one layer while it is computed again
    (34 bytes per token and hidden unit at 16 bits, arXiv 2205.05198, equation 1 without the attention scores, which
    fused attention does not store). A pair is two conversations. Logits are computed in chunks (TRL's fused head), the
    reference in advance: both are left out, and so are the activations of a vision tower that is trained.
    gpus: over how many FSDP shards weights, gradients and moments (`sharding: full` in launch.yaml). A GPU then has its
    share of them and of the pairs, and the weights of two units at once: the one that is computed and the next one,
    which is fetched meanwhile (PyTorch FSDP, arXiv 2304.11277, section 3.3).
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
    rows = sides * -(-count_pairs_in_pass(train) // gpus) * tokens * size.hidden
    activations = rows * (2 if method.bfloat16 else 4) * (size.layers + _LAYER_BYTES / 2)
    gathered = 0 if gpus == 1 else 2 * size.largest_unit * (2 if method.bfloat16 else 4)
    return MemoryEstimate(
        (
            ("weights", base / gpus),
            ("adapters", adapters * 4 / gpus),
            ("gradients", trained * 4 / gpus),
            ("Adam", trained * 8 / gpus),
            ("gathered weights", gathered),
            ("activations", activations),
        )
    )


def count_pairs_in_pass(train: TrainConfig) -> int:
    """Pairs that are in memory at once: a part of a step's batch."""
    return train.batch_size // count_step_parts(train)


def format_gib(gib: float) -> str:
    """Three digits, whatever the size of the model."""
    return f"{gib:.3g}" if gib < 100 else f"{gib:.0f}"


def format_count(number: int) -> str:
    """A number of parameters in words, such as 7.06 billion."""
    billions = number >= 1e9
    return f"{number / (1e9 if billions else 1e6):.3g} {'billion' if billions else 'million'}"
