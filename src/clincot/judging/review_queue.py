"""Which preference pairs people should judge, and in which order, so that nothing tells them what the panel thinks.

A budget is spent in turn on four kinds of pairs: those about which the panel is uncertain (a score close to 0.5), those
on which its judges disagree (the largest spread), those that training trusts most (the largest gap), and random ones.
The random ones are a fair sample, on which agreement can be measured; the others are chosen because they are hard or
matter, so agreement on them says nothing about the rest.

Readers see two answers as A and B in random order, in tasks of random order, without scores. The key that says which
candidate is which stays in a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, get_args

from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, NonEmptyStr
from clincot.records import PreferencePair, hash_json

ReviewReason = Literal["uncertain", "contested", "high_gap", "random"]
REVIEW_REASONS: tuple[ReviewReason, ...] = get_args(ReviewReason)


class ReviewItem(FrozenModel):
    """One task of the queue: a pair, and which of its candidates is shown as answer A. Not for readers."""

    task: NonEmptyStr
    pair: NonEmptyStr
    question: NonEmptyStr
    answer_a: NonEmptyStr  # ids of candidates
    answer_b: NonEmptyStr
    reason: ReviewReason


def select_review_items(
    pairs: Sequence[PreferencePair], scores: Mapping[str, float], *, budget: int, seed: int
) -> list[ReviewItem]:
    """Choose at most `budget` pairs, one for each question, in the order in which readers get them.

    scores: the panel's score of each candidate. Pairs of later steps of a chain are left out, because they answer
    another question. The same arguments give the same queue. Raises InvalidInput without pairs.
    """
    answers = [pair for pair in pairs if pair.step == 0]
    if not answers:
        raise InvalidInput("no pairs to review: the round has none, or none of a chain's first step")
    orders = [
        iter(sorted(answers, key=lambda pair: _rank_pair(pair, reason, scores, seed))) for reason in REVIEW_REASONS
    ]
    chosen: dict[str, ReviewItem] = {}  # by question
    exhausted = 0
    while len(chosen) < budget and exhausted < len(orders):
        exhausted = 0
        for reason, order in zip(REVIEW_REASONS, orders, strict=True):
            pair = _take_next(order, chosen)
            if pair is None or len(chosen) == budget:
                exhausted += pair is None
                continue
            chosen[pair.question] = _build_item(pair, reason, seed)
    return sorted(chosen.values(), key=lambda item: item.task)  # a task's name is a hash


def _rank_pair(pair: PreferencePair, reason: ReviewReason, scores: Mapping[str, float], seed: int) -> tuple[float, str]:
    """Sort key: the pair to review first has the smallest."""
    drawn = hash_json(["review order", seed, pair.id])
    if reason == "uncertain":
        return min(abs(scores.get(candidate, 0.0) - 0.5) for candidate in (pair.chosen, pair.rejected)), drawn
    if reason == "contested":
        return -pair.spread, drawn
    return (-pair.gap if reason == "high_gap" else 0.0), drawn


def _take_next(order: Iterator[PreferencePair], chosen: Mapping[str, ReviewItem]) -> PreferencePair | None:
    return next((pair for pair in order if pair.question not in chosen), None)


def _build_item(pair: PreferencePair, reason: ReviewReason, seed: int) -> ReviewItem:
    digest = hash_json(["review task", seed, pair.id])
    swapped = int(hash_json(["which answer is A", seed, pair.id])[0], 16) % 2 == 1
    answer_a, answer_b = (pair.rejected, pair.chosen) if swapped else (pair.chosen, pair.rejected)
    return ReviewItem(
        task=f"review-{digest[:16]}",
        pair=pair.id,
        question=pair.question,
        answer_a=answer_a,
        answer_b=answer_b,
        reason=reason,
    )
