"""The margin of a preference pair and the loss that asks for it. Pure functions.

Sources: [ClinCoT] arXiv 2603.01124 and its code, [UV-CoT] arXiv 2504.18397, [ODPO] arXiv 2402.10571,
[DPO] arXiv 2305.18290, [mDPO] arXiv 2406.11839.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from clincot.config import TrainConfig

# Shape suffixes: B pairs.


def margin_logits(gap: float, spread: float, config: TrainConfig) -> float:
    """m of a pair, in logits: how far β·Δ must exceed 0 before the loss is at ln 2.

    gap = s_chosen - s_rejected > 0 and spread = the judges' standard deviation, both in score units.

    - ours   m = λ · clip(gap / (τ + spread), 0, c): disagreement shrinks it, nothing exceeds λ·c.
    - paper  m = g(s_chosen) - g(s_rejected) [UV-CoT]. The text says of g only that it rises monotonically; taken here
             is the simplest such g, linear: g(s) = λ·s, so m = λ · gap. Neither spread nor a bound.
    - code   m = gap [ClinCoT's code]: outside β, unclipped, whatever λ is.
    - odpo   m = α · log(1 + gap / τ) (`loss: odpo`, whichever recipe). [ODPO]'s α·log(gap) is negative for every gap
             below 1, so the gap is rescaled to 1 + gap/τ: 1 (m = 0) where there is none, rising with it, and like
             α·log(gap) up to a constant where the gap is well above τ.
    """
    if gap < 0 or spread < 0 or not math.isfinite(gap + spread):
        raise ValueError(f"a margin needs a finite gap >= 0 and spread >= 0, got gap {gap} and spread {spread}")
    if config.loss == "odpo":
        return config.odpo_alpha * math.log1p(gap / config.margin_tau)
    if config.recipe == "code":
        return gap
    if config.recipe == "paper":
        return config.margin_lambda * gap
    return config.margin_lambda * min(gap / (config.margin_tau + spread), config.margin_cap)


def margin_nats(margin_B: torch.Tensor, beta: float) -> torch.Tensor:
    """The log-ratios Δ, in nats, that margins in logits ask for: m / β."""
    return margin_B / beta


def margin_dpo_loss(
    policy_chosen_B: torch.Tensor,
    policy_rejected_B: torch.Tensor,
    ref_chosen_B: torch.Tensor,
    ref_rejected_B: torch.Tensor,
    margin_B: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """Margin-DPO, one loss (nats) a pair.

        Δ = (log π(y_w|x_w) - log π_ref(y_w|x_w)) - (log π(y_l|x_l) - log π_ref(y_l|x_l))
        L = -log σ(β · Δ - m)

    policy_*, ref_*: log-probabilities in nats, summed over the action tokens of the chosen (w) and the rejected (l)
    side; x_w and x_l show the same image and different crops. β: logits per nat. m: the margin in logits. With
    π = π_ref, L = log(1 + e^m); with m = 0 it is [DPO].
    Source: [UV-CoT] for m as a function of scores, [ClinCoT]'s code for its place outside β.
    """
    delta_B = (policy_chosen_B - ref_chosen_B) - (policy_rejected_B - ref_rejected_B)
    return -F.logsigmoid(beta * delta_B - margin_B)
