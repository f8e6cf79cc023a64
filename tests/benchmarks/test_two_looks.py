"""The simulation of two looks: with γ the first look serves the second, without it the most convincing one wins."""

from __future__ import annotations

from benchmarks.two_looks import REGIONS, RIGHT_OTHERWISE, simulate_rounds


def test_gamma_teaches_the_look_that_the_next_step_needs() -> None:
    """Untrained, the key is looked at in 1 of 4 cases: .25·.9 + .75·.5 = .6. One look is right in .5."""
    with_gamma, without = (simulate_rounds(gamma, questions=80, seed=3) for gamma in (1.0, 0.0))
    untrained = 1 / REGIONS
    assert without.key_share < untrained < with_gamma.key_share
    assert without.right < 0.6 < with_gamma.right
    assert with_gamma.right > RIGHT_OTHERWISE
