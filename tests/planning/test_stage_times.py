"""Seconds from counts, by hand, on a GPU of 100 TFLOP/s and 1,000 GB/s that reaches all of its peaks."""

from __future__ import annotations

import pytest

from clincot.config import TrainConfig
from clincot.planning.assumptions import Assumptions
from clincot.planning.counting_models import ModelCalls
from clincot.planning.gpu_memory import estimate_training
from clincot.planning.gpu_table import Gpu
from clincot.planning.model_sizes import ModelSize
from clincot.planning.round_counts import TrainingCount
from clincot.planning.stage_times import Engine, TimeModel

GPU = Gpu(name="round", bf16_tflops=100, bandwidth_gbs=1000, memory_gb=80)
# 2 billion weights: a tower of 400 million, layers of 1 billion, embeddings and head of 300 million each
SIZE = ModelSize(
    total=2_000_000_000,
    vision=400_000_000,
    connector=0,
    lora_per_rank=(1_000_000, 0, 0),
    layers=10,
    hidden=1000,
    intermediate=4000,
    kv_width=2000,
    attention_width=1000,
    embeddings=300_000_000,
    head=300_000_000,
)
PERFECT = Assumptions(
    prefill_utilization=1,
    vision_utilization=1,
    decode_bandwidth=1,
    train_utilization=1,
    layer_s=0,
    request_s=0,
    picture_s=0,
    draw_s=0,
)


def test_prefill_is_bound_by_operations() -> None:
    """100,000 tokens in 100 prompts of 1,000: 2 · 1e9 · 1e5 in the layers, 2 · 100 · 1,000² · 10 · 1,000 in the
    attention, 2 · 100 · 3e8 in the head: 2e14 + 2e12 + 6e10 operations at 1e14 a second."""
    calls = ModelCalls(requests=100, prompt_tokens=1e5, padded_tokens=1e5, attention_pairs=100 * 1000**2)
    time = TimeModel(GPU, PERFECT).time_calls(calls, SIZE, Engine())
    assert time.prefill_s == pytest.approx(2 + 0.02 + 0.0006)
    assert time.seconds == time.prefill_s


def test_a_picture_is_its_patches_through_the_tower() -> None:
    """1,000 pictures of 500 patches and 4e8 weights: 2 · 5e5 · 4e8 operations."""
    calls = ModelCalls(encodes=1000, image_tokens=5e5)
    assert TimeModel(GPU, PERFECT).time_vision(calls, SIZE) == pytest.approx(4.0)


def test_writing_is_bound_by_bytes_for_small_batches() -> None:
    """100 steps read 1.3e9 weights of 2 bytes, and 8 rows at 1,000 tokens read 10 · 2,000 numbers of 2 bytes each."""
    calls = ModelCalls(requests=8, decode_steps=100, decode_tokens=800, decode_context=8e5)
    time = TimeModel(GPU, PERFECT).time_calls(calls, SIZE, Engine())
    assert time.decode_s == pytest.approx((100 * 2.6e9 + 8e5 * 10 * 2000 * 2) / 1e12)


def test_writing_is_bound_by_operations_for_large_batches() -> None:
    """10 steps of 10,000 rows: 2 · 1e5 · 1.3e9 operations are 2.6 s, 10 times 2.6e9 bytes only .026 s."""
    calls = ModelCalls(decode_steps=10, decode_tokens=1e5)
    assert TimeModel(GPU, PERFECT).time_calls(calls, SIZE, Engine()).decode_s == pytest.approx(2.6)


def test_transformers_adds_the_host_and_vllm_overlaps_it() -> None:
    """100 passes through 10 layers of 1 ms, 10 requests of 10 ms, 5 pictures of 20 ms, 2 · 300,000 drawn numbers."""
    assumed = Assumptions(layer_s=1e-3, request_s=1e-2, picture_s=2e-2, draw_s=1e-6, cache_hits=0)
    calls = ModelCalls(requests=10, forwards=100, encodes=5, sampled_tokens=2)
    alone = TimeModel(GPU, assumed).time_calls(calls, SIZE, Engine())
    assert alone.host_s == pytest.approx(1.0 + 0.1 + 0.1 + 0.6)
    assert alone.seconds == pytest.approx(alone.prefill_s + alone.host_s)
    served = TimeModel(GPU, assumed).time_calls(calls, SIZE, Engine("vllm"))
    assert served.host_s == pytest.approx(0.2)
    assert served.seconds == max(served.prefill_s, served.host_s)


def test_a_prefix_cache_saves_its_share_of_the_prefill() -> None:
    calls = ModelCalls(prompt_tokens=1e5, padded_tokens=2e5)
    plain, cached = (
        TimeModel(GPU, Assumptions(prefill_utilization=1, cache_hits=hits)).time_calls(calls, SIZE, Engine("vllm"))
        for hits in (0.0, 0.75)
    )
    assert plain.prefill_s == pytest.approx(2.0)  # and not the padding, which a server does not have
    assert cached.prefill_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        # above 1e9 weights activations are computed again: forward, forward, gradients of activations (and weights)
        ({"lora_r": 8}, 3),
        ({"full_finetuning": True}, 4),
    ],
)
def test_training_passes(settings: dict[str, int], passes: int) -> None:
    """2 epochs of 1e5 tokens at 2 · 1e9 operations a pass, and the reference's pass."""
    train = TrainConfig.model_validate({"epochs": 2, "batch_size": 10, **settings})
    count = TrainingCount(rows=0, epoch=ModelCalls(padded_tokens=1e5), sides=2)
    time = TimeModel(GPU, PERFECT).time_training(count, SIZE, train)
    assert time.train_s == pytest.approx(2 * (2 * passes + 1))


def test_sft_has_no_reference() -> None:
    train = TrainConfig.model_validate({"lora_r": 8, "loss": "sft"})
    count = TrainingCount(rows=0, epoch=ModelCalls(padded_tokens=1e5), sides=1)
    assert TimeModel(GPU, PERFECT).time_training(count, SIZE, train).train_s == pytest.approx(2 * 3)


def test_a_shard_holds_its_share_and_two_gathered_units() -> None:
    """4 GPUs, bfloat16, all weights: 4 + 2 bytes for a weight, 4 + 8 for gradient and Adam, a quarter each.

    The largest unit is embeddings with head, 6e8 weights of 2 bytes; a GPU has one of the four pairs.
    """
    train = TrainConfig.model_validate(
        {"full_finetuning": True, "dtype": "bfloat16", "batch_size": 4, "freeze_vision": False}
    )
    parts = dict(estimate_training(SIZE, train, tokens=100, gpus=4).parts)
    assert parts["weights"] == 2e9 * 6 / 4
    assert parts["gradients"] + parts["Adam"] == 2e9 * 12 / 4
    assert parts["gathered weights"] == 2 * 6e8 * 2
    assert parts["activations"] == dict(estimate_training(SIZE, train, tokens=100).parts)["activations"] / 4
