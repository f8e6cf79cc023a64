"""Sampling with a seed for each conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor


class SeededSampler(LogitsProcessor):  # type: ignore[misc]
    """Gumbel-max sampling: argmax(logits / temperature + noise) samples from the softmax.

    The noise of each row comes from its own seed, so a row does not depend on the rest of the batch.
    """

    def __init__(self, seeds: Sequence[int], temperature: float) -> None:
        self.generators = [np.random.default_rng(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        """Add noise to the scores (B, V) of the next token; greedy decoding then picks the sample."""
        noise = np.stack([rng.gumbel(size=scores.shape[-1]) for rng in self.generators]).astype(np.float32)
        return scores.float() / self.temperature + torch.from_numpy(noise).to(scores.device)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with some rows of the batch only."""
        self.generators = [self.generators[row] for row in rows]
