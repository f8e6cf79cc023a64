"""The lifetime budget: how small a p-value the next challenger needs, so that ever promoting wrongly stays rare.

A recurring pipeline tests again and again, without end. Let α be the probability with which it may *ever* promote a
challenger that is no better than its champion, or below a floor. Challenger k (a new pair of champion and challenger)
is given α γ_k with γ_k = k^-1.6 / ζ(1.6), which sums to 1 and never runs out: alpha spending, with the exponent that
Tian and Ramdas (arXiv 1910.04900) found good. Its j-th look, on questions that its earlier looks did not have and
pooled with them, is given the share w_j = 0.6 · 0.4^(j-1) of that. By the union bound the false promotions of all
challengers and looks together have probability at most Σ_k Σ_j α γ_k w_j = α, however the looks depend on each other,
and however it is chosen from earlier verdicts who is tested next. An e-process per challenger would be as valid and
need no shares; it was not chosen since for the usual single look it needs z = 2.9 where this needs 2.2.
**A promotion gives its budget back**: challenger k's whole level passes on to challenger k + 1, and on from there as
long as promotions follow each other (the online fallback of the same paper; Bretz et al. 2009). That is free: if the
promotion was right, no null hypothesis used that level; if it was wrong, the error has already been counted. A
challenger that is kept, or dropped after one look, gives nothing back, and neither does rolling a promotion back.
All this holds for questions that did not help to breed the challenger; those that did are counted in the other ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scipy.special import zeta

from clincot.records import Budget

SPENDING_EXPONENT = 1.6
FIRST_LOOK_SHARE, NEXT_LOOK_SHARE = 0.6, 0.4
_DECIMALS = 12


class PastTest(Protocol):
    """What the budget needs to know of an earlier decision."""

    @property
    def pair(self) -> tuple[str, str]:
        """(champion, challenger)"""

    @property
    def budget(self) -> Budget: ...

    @property
    def promoted(self) -> bool: ...


def challenger_share(number: int) -> float:
    """γ_k of the k-th challenger, from 1: k^-1.6 / ζ(1.6)."""
    return float(number**-SPENDING_EXPONENT / zeta(SPENDING_EXPONENT))


def look_share(look: int) -> float:
    """w_j of the j-th look at a challenger, from 1."""
    return float(FIRST_LOOK_SHARE * NEXT_LOOK_SHARE ** (look - 1))


def next_level(spent: Sequence[PastTest], pair: tuple[str, str], *, lifetime: float) -> Budget:
    """The level of the next test of `pair`, given all earlier entries of the ledger in their order."""
    looks = [entry for entry in spent if entry.pair == pair]
    before = round(sum(entry.budget.level for entry in spent), _DECIMALS)
    if looks:
        first, look = looks[0].budget, len(looks) + 1
        return first.model_copy(
            update={
                "number": len(spent) + 1,
                "look": look,
                "level": round(first.challenger_level * look_share(look), _DECIMALS),
                "spent_before": before,
            }
        )
    number = len({entry.pair for entry in spent}) + 1
    passed_on = _carry_over_level(spent)
    level = round(lifetime * challenger_share(number) + passed_on, _DECIMALS)
    return Budget(
        lifetime=lifetime,
        number=len(spent) + 1,
        challenger_number=number,
        look=1,
        challenger_level=level,
        passed_on=passed_on,
        level=round(level * look_share(1), _DECIMALS),
        spent_before=before,
    )


def _carry_over_level(spent: Sequence[PastTest]) -> float:
    """The level of the challenger introduced last, if it was promoted."""
    if not spent:
        return 0.0
    last = max(spent, key=lambda entry: entry.budget.challenger_number).pair
    looks = [entry for entry in spent if entry.pair == last]
    return looks[0].budget.challenger_level if any(entry.promoted for entry in looks) else 0.0
