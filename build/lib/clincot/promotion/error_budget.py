"""The lifetime error budget: the test level of each decision of a recurring pipeline.

A recurring pipeline tests challengers without end. Let α (`decide.lifetime_error`) be the allowed probability that it
*ever* promotes a challenger that is no better than its champion or below a floor. Alpha spending divides α:

    challenger k (a new pair of champion and challenger, from 1)   α_k = α·γ_k + R_k,   γ_k = k^-1.6 / ζ(1.6)
    its look j (from 1)                                           level  α_k·w_j,      w_j = 0.6 · 0.4^(j-1)

- Σ γ_k = 1 (ζ is Riemann's zeta function), so the budget never runs out. The exponent 1.6 is the one that Tian and
  Ramdas (arXiv 1910.04900) recommend.
- Σ w_j = 1. A later look asks questions that the earlier looks at the same challenger did not ask, and pools them with
  the earlier answers.
- R_k = α_{k-1} if challenger k-1 was promoted at any of its looks, else 0: a promotion passes its whole level on to
  the next challenger, and so on through a row of promotions (the online fallback procedure of the same paper; Bretz et
  al., Statistics in Medicine 28, 2009). This costs nothing: if the promotion was right, no null hypothesis used that
  level; if it was wrong, the error has already been counted. A challenger that is kept, or dropped after one look,
  passes nothing on, and rolling a promotion back changes nothing.

Without promotions the union bound gives a probability of at most Σ_k Σ_j α·γ_k·w_j = α for any false promotion. It
holds for any dependence between looks, and for any choice of the next challenger from earlier verdicts.

An e-process for each challenger would be as valid and would need no w_j. It is not used, because the usual single look
would need z = 2.9 instead of 2.2.

All this assumes questions that did not influence the challenger. The second ledger (clincot.promotion.ledger) counts
how often each question has been used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scipy.special import zeta

from clincot.records import Budget

SPENDING_EXPONENT = 1.6
FIRST_LOOK_SHARE, NEXT_LOOK_SHARE = 0.6, 0.4  # w_1, and w_{j+1} / w_j
_DECIMALS = 12


class PastTest(Protocol):
    """What the budget needs to know about an earlier decision."""

    @property
    def pair(self) -> tuple[str, str]:
        """Digests of champion and challenger."""

    @property
    def budget(self) -> Budget:
        """The budget that the test was given."""

    @property
    def promoted(self) -> bool:
        """Whether the challenger was promoted."""


def challenger_share(number: int) -> float:
    """Return γ_k = k^-1.6 / ζ(1.6), the share of the budget of challenger k = `number`, from 1."""
    return float(number**-SPENDING_EXPONENT / zeta(SPENDING_EXPONENT))


def look_share(look: int) -> float:
    """Return w_j = 0.6 · 0.4^(j-1), the share of a challenger's level for its look j, from 1."""
    return float(FIRST_LOOK_SHARE * NEXT_LOOK_SHARE ** (look - 1))


def next_level(spent: Sequence[PastTest], pair: tuple[str, str], *, lifetime: float) -> Budget:
    """Compute the budget of the next test of `pair`.

    spent: all entries of the ledger, in order. pair: digests of champion and challenger. lifetime: α.
    """
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
    """Return R_k: the level of the challenger introduced last if it was promoted, else 0."""
    if not spent:
        return 0.0
    last = max(spent, key=lambda entry: entry.budget.challenger_number).pair
    looks = [entry for entry in spent if entry.pair == last]
    return looks[0].budget.challenger_level if any(entry.promoted for entry in looks) else 0.0
