"""What a probe says of the terms of a loss, on gradients that are known by hand."""

from __future__ import annotations

import pytest
import torch

from clincot.training import gradient_probe
from clincot.training.gradient_probe import can_probe, list_probe_steps, measure_terms

WEIGHT = torch.nn.Parameter(torch.tensor([0.0, 0.0]))


def along(*direction: float) -> torch.Tensor:
    """A term whose gradient is `direction`."""
    return (WEIGHT * torch.tensor(direction)).sum()


def test_the_share_of_the_preference_is_its_gradient_among_all() -> None:
    """|(3, 4)| = 5 beside |(0, 15)| = 15: 5 / (5 + 15)."""
    shares = measure_terms(along(3, 4), along(3, 4), [along(0, 15)], [WEIGHT])
    assert shares["preference_share"] == pytest.approx(0.25)


def test_terms_that_cancel_each_other_still_count() -> None:
    """The sum of both gradients is 0, and yet half of what moves the weights is the preference."""
    assert measure_terms(along(1, 0), along(1, 0), [along(-1, 0)], [WEIGHT])["preference_share"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("without", "share"),
    [((6, 8), 0.0), ((4, -3), 1.0), ((3, 0), 0.8)],  # the same direction; a right angle; cos = 9 / 15, sin = 4 / 5
)
def test_a_margin_that_only_scales_the_gradient_has_no_share(without: tuple[float, float], share: float) -> None:
    assert measure_terms(along(3, 4), along(*without), [], [WEIGHT])["margin_share"] == pytest.approx(share, abs=1e-7)


def test_a_term_without_a_gradient_counts_nothing() -> None:
    """nll_weight 0, or weights that only another term uses."""
    constant = torch.tensor(7.0)
    assert measure_terms(along(1, 0), along(1, 0), [constant], [WEIGHT])["preference_share"] == 1.0
    assert measure_terms(constant, constant, [along(1, 0)], [WEIGHT]) == {"preference_share": 0.0, "margin_share": 0.0}


def test_a_probe_leaves_the_gradients_of_the_step_alone() -> None:
    measure_terms(along(3, 4), along(3, 4), [along(0, 1)], [WEIGHT])
    assert WEIGHT.grad is None


@pytest.mark.parametrize(
    ("steps", "probed"), [(1, [0]), (10, [0]), (11, [0, 10]), (80, [*range(0, 80, 10)]), (81, [*range(0, 81, 11)])]
)
def test_probes_are_few_and_begin_with_the_first_step(steps: int, probed: list[int]) -> None:
    assert sorted(list_probe_steps(steps)) == probed
    assert len(probed) <= gradient_probe.PROBES


def test_sharded_and_huge_models_are_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_probe([WEIGHT], sharded=False)
    assert not can_probe([WEIGHT], sharded=True)
    monkeypatch.setattr(gradient_probe, "MAX_PROBED_WEIGHTS", 1)
    assert not can_probe([WEIGHT], sharded=False)
