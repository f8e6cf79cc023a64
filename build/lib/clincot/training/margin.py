"""The margin of a preference pair and the margin-DPO loss, as pure functions.

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
    """The margin m of a pair, in logits: the value of β·Δ (see margin_dpo_loss) at which the loss is ln 2.

    gap = s_chosen - s_rejected >= 0, and spread is the standard deviation between the judges, both in score units.
    λ is config.margin_lambda, τ config.margin_tau, c config.margin_cap and α config.odpo_alpha.

    - ours   m = λ · clip(gap / (τ + spread), 0, c): disagreement shrinks the margin, and it never exceeds λ·c.
    - paper  m = g(s_chosen) - g(s_rejected) [UV-CoT]. The paper says only that g increases monotonically; the simplest
             such g is used, g(s) = λ·s, so m = λ · gap, without spread or bound.
    - code   m = gap [ClinCoT's code]: outside β, unclipped, independent of λ.
    - odpo   m = α · log(1 + gap / τ) (`loss: odpo`, with any recipe). [ODPO]'s α·log(gap) is negative for every gap
             below 1, so the gap is rescaled to 1 + gap/τ: m is 0 without a gap, increases with it, and approaches
             α·log(gap) plus a constant for gaps well above τ.

    Raises ValueError for a negative or non-finite gap or spread.
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
    """The margin in nats, m / β: the log-ratio difference Δ that a margin in logits requires."""
    return margin_B / beta


def margin_dpo_loss(
    policy_chosen_B: torch.Tensor,
    policy_rejected_B: torch.Tensor,
    ref_chosen_B: torch.Tensor,
    ref_rejected_B: torch.Tensor,
    margin_B: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """The margin-DPO loss L of each pair, in nats.

        Δ = (log π(y_w|x_w) - log π_ref(y_w|x_w)) - (log π(y_l|x_l) - log π_ref(y_l|x_l))
        L = -log σ(β · Δ - m)

    π        the policy that is trained; policy_*: log π(y|x), in nats
    π_ref    the reference, which is the policy before training; ref_*: log π_ref(y|x), in nats
    y_w, y_l the action tokens of the chosen (w, winner) and the rejected (l, loser) side; log-probabilities are summed
             over them
    x_w, x_l their contexts, which show the same image and different crops
    Δ        by how much the policy's preference for the chosen side exceeds the reference's, in nats
    β        inverse temperature, in logits per nat
    m        the margin, in logits (margin_logits); with m = 0 the loss is that of [DPO]
    σ        the logistic function

    At the start of training π = π_ref, so L = log(1 + e^m). Sources: [UV-CoT] for m as a function of the scores,
    [ClinCoT]'s code for adding it outside β.
    """
    delta_B = (policy_chosen_B - ref_chosen_B) - (policy_rejected_B - ref_rejected_B)
    return -F.logsigmoid(beta * delta_B - margin_B)
