"""From counts to seconds: a roofline of one GPU.

Prefill, the vision tower and training are bound by operations: a token of N weights is 2 N operations forward
(arXiv 2001.08361, section 2.1), plus 2 · width · tokens for each layer's causal attention. Writing a token is bound by
bytes: every step reads the weights and the keys and values of its batch. The time that Python takes to launch a pass,
to render a request and to read a picture is added, because transformers does these one after the other; vLLM captures
its passes as graphs and prepares requests meanwhile, so only the larger of GPU and CPU counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from clincot.config import TrainConfig
from clincot.planning.assumptions import Assumptions
from clincot.planning.counting_models import ModelCalls
from clincot.planning.gpu_table import Gpu
from clincot.planning.model_sizes import ModelSize
from clincot.planning.round_counts import TrainingCount
from clincot.training.resolved_settings import LARGE_MODEL_PARAMETERS, choose_lora_rank

_ADAM_BYTES = 28  # a step reads weight, gradient and both moments, and writes all but the gradient: 7 times 4 bytes


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage by what they are spent on."""

    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    train_s: float = 0.0
    host_s: float = 0.0  # requests, pictures and launches
    overlapped: bool = False  # the host works while the GPU does

    @property
    def seconds(self) -> float:
        gpu = self.vision_s + self.prefill_s + self.decode_s + self.train_s
        return max(gpu, self.host_s) if self.overlapped else gpu + self.host_s


@dataclass(frozen=True)
class Engine:
    """How a stage runs its models."""

    kind: Literal["transformers", "vllm", "url"] = "transformers"
    concurrency: int = 32  # requests that a server computes at once
    number_bytes: int = 2  # of a weight


@dataclass(frozen=True)
class TimeModel:
    """Seconds on one GPU."""

    gpu: Gpu
    assumptions: Assumptions

    def time_calls(self, calls: ModelCalls, size: ModelSize, engine: Engine) -> StageTime:
        """Seconds of inference."""
        assumed, served = self.assumptions, engine.kind != "transformers"
        tokens, pairs = calls.padded_tokens, calls.attention_pairs
        if served:  # a server does not pad, and its cache holds the beginnings of prompts
            share = 1 - assumed.cache_hits
            tokens, pairs = calls.prompt_tokens * share, calls.prompt_pairs * share
        operations = count_forward_operations(size, tokens, pairs, predicted=calls.requests)
        backward = 2 * count_forward_operations(size, calls.backward_tokens, 0.0, predicted=0.0)
        prefill_s = (operations + backward) / (self.gpu.operations * assumed.prefill_utilization)
        launches_s = draws_s = 0.0
        if not served:
            launches_s = calls.forwards * size.layers * assumed.layer_s
            draws_s = calls.sampled_tokens * (size.head // size.hidden) * assumed.draw_s  # models.sampling
        return StageTime(
            vision_s=self.time_vision(calls, size),
            prefill_s=prefill_s,
            decode_s=self._time_decoding(calls, size, engine),
            host_s=calls.requests * assumed.request_s + calls.encodes * assumed.picture_s + launches_s + draws_s,
            overlapped=served,
        )

    def time_vision(self, calls: ModelCalls, size: ModelSize, *, passes: float = 1.0) -> float:
        """Seconds of the vision tower and the connector. passes: forward passes, with those of the backward pass."""
        operations = count_vision_operations(calls, size)
        return passes * operations / (self.gpu.operations * self.assumptions.vision_utilization)

    def _time_decoding(self, calls: ModelCalls, size: ModelSize, engine: Engine) -> float:
        """Seconds of all tokens after the first: bytes or operations, whichever take longer."""
        steps, rows = calls.decode_steps, calls.decode_tokens
        if engine.kind != "transformers":
            rows = max(0.0, calls.new_tokens - calls.requests)
            steps = rows / engine.concurrency
        weights = (size.body + size.head) * engine.number_bytes
        keys_and_values = calls.decode_context * size.layers * size.kv_width * engine.number_bytes
        bytes_s = (steps * weights + keys_and_values) / (self.gpu.bandwidth * self.assumptions.decode_bandwidth)
        operations = 2 * rows * (size.body + size.head) + 4 * calls.decode_context * size.layers * size.attention_width
        return max(bytes_s, operations / (self.gpu.operations * self.assumptions.prefill_utilization))

    def time_training(self, count: TrainingCount, size: ModelSize, train: TrainConfig) -> StageTime:
        """Seconds of all epochs and of the reference's pass; judged on one GPU that holds everything."""
        assumed, epoch = self.assumptions, count.epoch
        lora = choose_lora_rank(train, size.total)
        recomputed = size.total > LARGE_MODEL_PARAMETERS
        passes = 1 + (1 if lora else 2) + (1 if recomputed else 0)  # forward; activations, weights; forward again
        reference = 0 if train.loss == "sft" else 1
        forward = count_forward_operations(size, epoch.padded_tokens, epoch.attention_pairs, predicted=0.0)
        text_s = forward * (passes * train.epochs + reference) / (self.gpu.operations * assumed.train_utilization)
        if train.freeze_vision and size.has_frames:
            tower = 1.0  # once for each picture, whatever the number of epochs
        elif train.freeze_vision:
            tower = train.epochs + reference
        else:
            tower = passes * train.epochs + reference
        steps = count.rows * train.epochs / train.batch_size
        forwards = epoch.forwards * (passes * train.epochs + reference)
        trained = lora * sum(size.lora_per_rank) if lora else size.total
        adam_s = steps * trained * _ADAM_BYTES / (self.gpu.bandwidth * assumed.decode_bandwidth)
        return StageTime(
            vision_s=self.time_vision(epoch, size, passes=tower),
            train_s=text_s + adam_s,
            host_s=forwards * size.layers * assumed.layer_s
            + epoch.encodes * min(tower, train.epochs + reference) * assumed.picture_s
            + steps * assumed.step_s,
        )


def count_forward_operations(size: ModelSize, tokens: float, pairs: float, *, predicted: float) -> float:
    """Operations of the language model. pairs: sum of tokens^2; predicted: positions that the head projects."""
    return 2 * tokens * size.body + 2 * pairs * size.layers * size.attention_width + 2 * predicted * size.head


def count_vision_operations(calls: ModelCalls, size: ModelSize) -> float:
    """Operations of the vision tower and the connector for the encoded pictures."""
    patches, pairs = calls.image_tokens * size.patches_per_token, calls.image_pairs * size.patches_per_token**2
    return 2 * patches * size.vision + 4 * pairs * size.vision_attention_width + 2 * calls.image_tokens * size.connector
