"""The lifetime budget: it never runs out, is never more than α, and passes on what a promotion did not use up."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from clincot.promotion.error_budget import challenger_share, look_share, next_level
from clincot.records import Budget


@dataclass
class Entry:
    pair: tuple[str, str]
    budget: Budget
    promoted: bool = False


def ledger(*tests: tuple[str, bool], lifetime: float = 0.05) -> list[Entry]:
    """Tests of challengers by name, with whether each was promoted."""
    spent: list[Entry] = []
    for challenger, promoted in tests:
        budget = next_level(spent, ("old", challenger), lifetime=lifetime)
        spent.append(Entry(("old", challenger), budget, promoted))
    return spent


def test_the_shares_sum_to_one_and_none_is_zero() -> None:
    # the tail of Σ k^-1.6 beyond n is about n^-.6 / .6, in units of ζ(1.6) = 2.2858
    n = 10_000
    assert sum(challenger_share(k) for k in range(1, n + 1)) == pytest.approx(1 - n**-0.6 / 0.6 / 2.2858, abs=1e-5)
    assert sum(look_share(j) for j in range(1, 60)) == pytest.approx(1.0)
    assert challenger_share(1_000_000) > 0


def test_first_second_and_third_challenger_by_hand() -> None:
    # ζ(1.6) = 2.28577: .05/2.28577 = .021875; · 2^-1.6 = .32988; · 3^-1.6 = .17242; a first look has 60 %
    levels = [entry.budget.level for entry in ledger(("a", False), ("b", False), ("c", False))]
    assert levels == pytest.approx([0.021875 * 0.6, 0.021875 * 0.32988 * 0.6, 0.021875 * 0.17242 * 0.6], rel=1e-4)


def test_another_look_has_a_share_of_its_own_challengers_level() -> None:
    first, other, second, third = ledger(("a", False), ("b", False), ("a", False), ("a", False))
    assert (second.budget.challenger_number, second.budget.look) == (1, 2)
    assert second.budget.level == pytest.approx(first.budget.challenger_level * 0.6 * 0.4)
    assert third.budget.level == pytest.approx(first.budget.challenger_level * 0.6 * 0.16)
    assert third.budget.spent_before == pytest.approx(
        first.budget.level + other.budget.level + second.budget.level, abs=1e-9
    )


def test_promotions_in_a_row_pass_their_levels_on() -> None:
    """A promotion passes its whole level on, and a row of promotions passes on all of theirs."""
    a, b, c, d = ledger(("a", True), ("b", True), ("c", False), ("d", False))
    alone = [0.05 * challenger_share(k) for k in (1, 2, 3, 4)]
    assert a.budget.challenger_level == pytest.approx(alone[0])
    assert b.budget.challenger_level == pytest.approx(alone[0] + alone[1])
    assert c.budget.challenger_level == pytest.approx(sum(alone[:3]))
    assert d.budget.challenger_level == pytest.approx(alone[3])  # c was kept: it used up what it had
    assert (c.budget.passed_on, d.budget.passed_on) == (pytest.approx(alone[0] + alone[1]), 0.0)


def test_levels_of_kept_challengers_stay_within_the_budget() -> None:
    """The proof's sum: levels of kept challengers, over every pattern of promotions of eight challengers."""
    for pattern in range(2**8):
        tests = [(f"c{k}", bool(pattern >> k & 1)) for k in range(8)]
        kept = [entry for entry in ledger(*tests) if not entry.promoted]
        assert sum(entry.budget.challenger_level for entry in kept) <= 0.05 + 1e-9
