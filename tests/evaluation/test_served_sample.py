"""The benchmark questions that a rollout asks: clear answers only, spread over the benchmark."""

from __future__ import annotations

from clincot.evaluation.served_sample import CLEAR_LEAD, collect_served_sample, spread_evenly
from clincot.geometry import Box
from clincot.records import Outcome

BOX = Box(x0=0.0, y0=0.0, x1=0.5, y1=0.5)


def outcome(question: str, lead: float, region_lead: float, *, arm: str = "served", off: bool = False) -> Outcome:
    served = {"settings": "s" * 20, "lead": lead, "region_lead": region_lead} if arm == "served" else {}
    content = {"question": question, "policy": "p", "arm": arm, "box": BOX, "answer": "yes", "reference": "r"}
    return Outcome.model_validate(content | {"correct": True, "off_format": off} | served)


def test_only_clear_answers_and_regions_are_taken() -> None:
    """A near tie could be decided differently by the rounding of another machine."""
    sample = collect_served_sample(
        [
            outcome("clear", 0.4, 0.3),
            outcome("tied answers", CLEAR_LEAD - 0.01, 0.3),
            outcome("tied regions", 0.4, CLEAR_LEAD - 0.01),
            outcome("off format", 0.4, 0.3, off=True),
            outcome("clear", 0.4, 0.3, arm="written"),
        ]
    )
    assert sample is not None
    assert [(one.question, one.box) for one in sample.answers] == [("clear", BOX), ("tied regions", None)]
    assert sample.settings == "s" * 20


def test_there_is_no_sample_without_the_arm() -> None:
    assert collect_served_sample([outcome("clear", 0.4, 0.3, arm="written")]) is None


def test_a_sample_is_spread_over_the_benchmark() -> None:
    """10 of 100: positions 0, 10, 20, …; 3 of 2: both."""
    assert list(spread_evenly(list(range(100)), 10)) == list(range(0, 100, 10))
    assert list(spread_evenly([1, 2], 3)) == [1, 2]
