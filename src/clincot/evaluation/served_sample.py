"""The benchmark questions that a rollout asks the deployed server, with the answers that the gate measured.

Two machines round sums differently, so the best of two nearly equal answers may differ between them. Only answers that
lead clearly are taken: on any machine, a server with the same checkpoint and settings gives them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from clincot.records import MeasuredAnswer, Outcome, ServedSample

T = TypeVar("T")

# Smallest difference in confidence, or in likelihood between two regions, that counts as clear. Between float32 and
# bfloat16, likelihoods of short answers differ by up to about 0.02.
CLEAR_LEAD = 0.05
MAX_SAMPLE = 256  # questions that a report keeps; publish.served chooses from them


def collect_served_sample(outcomes: Iterable[Outcome]) -> ServedSample | None:
    """Collect clear answers of the arm `served`, spread evenly over the benchmark; None if the arm was not run."""
    served = [outcome for outcome in outcomes if outcome.arm == "served"]
    if not served:
        return None
    clear = [outcome for outcome in served if (outcome.lead or 0.0) >= CLEAR_LEAD and not outcome.off_format]
    answers = []
    for outcome in spread_evenly(clear, MAX_SAMPLE):
        box = outcome.box if (outcome.region_lead or 0.0) >= CLEAR_LEAD else None
        answers.append(MeasuredAnswer(question=outcome.question, answer=outcome.answer, box=box))
    return ServedSample(settings=served[0].settings, answers=tuple(answers))


def spread_evenly(items: Sequence[T], count: int) -> Sequence[T]:
    """At most `count` of the items, at even distances, in order."""
    if len(items) <= count:
        return items
    return [items[position * len(items) // count] for position in range(count)]
