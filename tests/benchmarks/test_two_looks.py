"""The simulation of two looks: with γ the first look serves the second, without it the most convincing one wins."""

from __future__ import annotations

from benchmarks.two_looks import REGIONS, RIGHT_OTHERWISE, simulate_credit, simulate_rounds


def test_gamma_teaches_the_look_that_the_next_step_needs() -> None:
    """Untrained, the key is looked at in 1 of 4 cases: .25·.9 + .75·.5 = .6. One look is right in .5."""
    with_gamma, without = (simulate_rounds(gamma, questions=80, seed=3) for gamma in (1.0, 0.0))
    untrained = 1 / REGIONS
    assert without.key_share < untrained < with_gamma.key_share
    assert without.right < 0.6 < with_gamma.right
    assert with_gamma.right > RIGHT_OTHERWISE


def test_a_look_at_one_of_two_places_is_credited_only_if_it_is_continued_elsewhere() -> None:
    """A first look at one of the pair is right in (3 · .5 + .95) / 4 = .61 of its four continuations, another in .5.

    Continued from its own region alone it never sees the other place: with γ it is preferred as often as chance says.
    """
    everywhere, own = (simulate_credit(1.0, where, questions=150, seed=3) for where in ("all", "own"))
    without = simulate_credit(0.0, "all", questions=150, seed=3)
    assert everywhere.preferred > 0.55
    assert abs(own.preferred - 0.5) < 0.05
    assert abs(without.preferred - 0.5) < 0.05
