"""Margins and the loss against numbers worked out by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from clincot.config import TrainConfig
from clincot.training.margin import margin_dpo_loss, margin_logits, margin_nats


def test_ours_is_the_gap_over_tau_plus_spread_times_lambda() -> None:
    config = TrainConfig(margin_lambda=0.5, margin_tau=0.5, margin_cap=2.0)
    # 0.6 / (0.5 + 0.1) = 1.0; times 0.5
    assert margin_logits(0.6, 0.1, config) == pytest.approx(0.5)


def test_ours_is_clipped_at_the_cap_before_lambda() -> None:
    config = TrainConfig(margin_lambda=0.25, margin_tau=0.1, margin_cap=2.0)
    # 0.9 / (0.1 + 0) = 9 -> 2; times 0.25
    assert margin_logits(0.9, 0.0, config) == pytest.approx(0.5)


def test_ours_shrinks_where_the_judges_disagree() -> None:
    config = TrainConfig(margin_lambda=1.0, margin_tau=0.5, margin_cap=2.0)
    # 0.5 / 0.5 = 1 against 0.5 / (0.5 + 0.5) = 0.5
    assert margin_logits(0.5, 0.0, config) == pytest.approx(1.0)
    assert margin_logits(0.5, 0.5, config) == pytest.approx(0.5)


def test_lambda_zero_is_no_margin() -> None:
    assert margin_logits(0.9, 0.2, TrainConfig(margin_lambda=0.0)) == 0.0


def test_code_is_the_gap_itself_whatever_lambda_and_spread() -> None:
    config = TrainConfig(recipe="code", margin_lambda=0.0, margin_cap=0.1)
    assert margin_logits(0.8, 0.7, config) == 0.8


def test_codes_gap_of_0_8_asks_for_8_nats_at_beta_0_1() -> None:
    margin = margin_logits(0.8, 0.0, TrainConfig(recipe="code"))
    assert margin_nats(torch.tensor([margin]), 0.1).item() == pytest.approx(8.0)


def test_paper_is_a_difference_of_a_monotone_function() -> None:
    """The paper's margin is a difference of one increasing function of the scores."""
    config = TrainConfig(recipe="paper", margin_lambda=0.5)
    # g(s) = 0.5 s: g(0.9) - g(0.3) = 0.45 - 0.15; differences of g add up along a chain of scores
    assert margin_logits(0.9 - 0.3, 0.4, config) == pytest.approx(0.30)
    assert margin_logits(0.9 - 0.5, 0, config) + margin_logits(0.5 - 0.3, 0, config) == pytest.approx(0.30)


def test_odpo_is_alpha_times_the_log_of_the_rescaled_gap() -> None:
    config = TrainConfig(loss="odpo", odpo_alpha=2.0, margin_tau=0.5)
    # 1 + 0.5 / 0.5 = 2: 2 · ln 2; and no gap is no margin: 2 · ln 1
    assert margin_logits(0.5, 0.9, config) == pytest.approx(2 * math.log(2))
    assert margin_logits(0.0, 0.0, config) == 0.0


def test_odpo_rises_with_the_gap_and_is_never_negative() -> None:
    margins = [margin_logits(gap / 10, 0.0, TrainConfig(loss="odpo")) for gap in range(11)]
    assert margins[0] >= 0
    assert all(a < b for a, b in pairwise(margins))


@pytest.mark.parametrize(("gap", "spread"), [(-0.1, 0.0), (0.1, -0.1), (math.nan, 0.0), (math.inf, 0.0)])
def test_impossible_scores_are_refused(gap: float, spread: float) -> None:
    with pytest.raises(ValueError, match="needs a finite gap"):
        margin_logits(gap, spread, TrainConfig())


def _loss(policy: tuple[float, float], ref: tuple[float, float], margin: float, beta: float) -> float:
    values = [torch.tensor([v], dtype=torch.float64) for v in (*policy, *ref, margin)]
    return float(margin_dpo_loss(*values, beta))  # type: ignore[call-arg, arg-type]


def test_loss_by_hand() -> None:
    # Δ = (-3 - -4) - (-6 - -5) = 1 + 1 = 2; β Δ - m = 0.5 · 2 - 0.25 = 0.75; -log σ(0.75) = log(1 + e^-0.75)
    assert _loss((-3, -6), (-4, -5), 0.25, 0.5) == pytest.approx(math.log1p(math.exp(-0.75)), abs=1e-12)


def test_loss_of_an_unchanged_policy_is_log1p_exp_margin() -> None:
    """If the policy equals the reference, the loss is log(1 + e^m)."""
    assert _loss((-3, -7), (-3, -7), 0.8, 0.1) == pytest.approx(math.log(1 + math.exp(0.8)), abs=1e-12)
    assert _loss((-3, -7), (-3, -7), 0.0, 0.1) == pytest.approx(math.log(2), abs=1e-12)


def test_gradient_of_the_loss() -> None:
    # dL/d log π(y_w) = -β (1 - σ(β Δ - m)); at Δ = 0, m = 0, β = 0.1: -0.05, and +0.05 for the rejected side
    chosen, rejected = (torch.tensor([v], requires_grad=True) for v in (-3.0, -7.0))
    margin_dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), torch.zeros(1), 0.1).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.05)
    assert rejected.grad.item() == pytest.approx(0.05)
