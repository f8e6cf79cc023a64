"""Maps and masks to boxes, with the arithmetic of the boxes and confidences shown."""

from __future__ import annotations

import numpy as np
import pytest

from clincot.generation.masks import deduplicate_regions, extract_map_regions, extract_mask_regions, sort_by_confidence
from clincot.geometry import Box, box_from_xyxy
from clincot.models.protocols import GroundedRegion


def test_a_map_with_two_places() -> None:
    """10 x 10. Place a: rows 2-3, columns 4-7, relevance 4 4 4 4 / 2 2 2 2, mean 3 of the peak 4: 0.75. Place b: row 8,
    columns 0-1, relevance 1 and 3, mean 2: 0.5. Ten of a hundred values are positive, so the 0.9-quantile lies
    between 0 and 1 (position 89.1 of 0 … 99 in order: 0 + 0.1 * 0 = 0) and all ten are kept."""
    relevance = np.zeros((10, 10), dtype=np.float32)
    relevance[2, 4:8], relevance[3, 4:8] = 4, 2
    relevance[8, 0:2] = (1, 3)
    assert extract_map_regions(relevance, quantile=0.9) == [
        (box_from_xyxy((0.4, 0.2, 0.8, 0.4)), 0.75),
        (box_from_xyxy((0.0, 0.8, 0.2, 0.9)), 0.5),
    ]


def test_a_higher_quantile_keeps_less() -> None:
    """Of the map above the highest four of a hundred are 4; the 0.96-quantile lies at position 95.04, between 3 and 4
    (3.04), so only row 2 is left."""
    relevance = np.zeros((10, 10), dtype=np.float32)
    relevance[2, 4:8], relevance[3, 4:8] = 4, 2
    relevance[8, 0:2] = (1, 3)
    assert extract_map_regions(relevance, quantile=0.96) == [(box_from_xyxy((0.4, 0.2, 0.8, 0.3)), 1.0)]


def test_what_speaks_against_is_no_region() -> None:
    """Negative values are below 0 whatever the quantile; one positive value is left: row 1, column 2 of 4 x 4."""
    relevance = np.full((4, 4), -1.0)
    relevance[1, 2] = 0.5
    assert extract_map_regions(relevance, quantile=0.0) == [(box_from_xyxy((0.5, 0.25, 0.75, 0.5)), 1.0)]
    assert extract_map_regions(np.linspace(-2, -1, 16).reshape(4, 4), quantile=0.5) == []


def test_a_map_that_is_the_same_everywhere_says_nothing() -> None:
    assert extract_map_regions(np.ones((5, 5)), quantile=0.9) == []
    assert extract_map_regions(np.zeros((5, 5)), quantile=0.9) == []


def test_the_scale_of_a_map_does_not_matter() -> None:
    relevance = np.random.default_rng(0).normal(size=(12, 12))
    assert extract_map_regions(relevance * 1e-6, quantile=0.8) == extract_map_regions(relevance, quantile=0.8)


def test_confidences_are_in_the_unit_interval_and_best_first() -> None:
    for seed in range(20):
        found = extract_map_regions(np.random.default_rng(seed).normal(size=(16, 12)).astype(np.float32), quantile=0.7)
        confidences = [confidence for _, confidence in found]
        assert len(found) > 1
        assert confidences == sorted(confidences, reverse=True)
        assert all(0 < confidence <= 1 for confidence in confidences)


def test_rows_and_columns_of_a_map_that_is_not_square() -> None:
    """2 rows, 5 columns; row 1, columns 3-4: x from 3/5 to 1, y from 1/2 to 1."""
    relevance = np.zeros((2, 5))
    relevance[1, 3:5] = 1
    assert extract_map_regions(relevance, quantile=0.5) == [(box_from_xyxy((0.6, 0.5, 1.0, 1.0)), 1.0)]


@pytest.mark.parametrize(
    ("relevance", "quantile", "message"),
    [
        (np.zeros(4), 0.5, r"got the shape \(4,\)"),
        (np.zeros((0, 4)), 0.5, r"got the shape \(0, 4\)"),
        (np.array([[1.0, np.nan], [np.inf, 0.0]]), 0.5, "expected a relevance map of finite numbers, 2 are not"),
        (np.eye(2), 1.5, r"expected a quantile in \[0, 1\], got 1.5"),
    ],
)
def test_malformed_relevance_map_is_refused(relevance: np.ndarray, quantile: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        extract_map_regions(relevance, quantile=quantile)


def test_pixels_that_touch_at_a_corner_are_one_component() -> None:
    """Pixels (0, 0) and (1, 1) of 4 x 4 are one, (3, 3) is another; relevance 1, 0.5 and 0.25: means 0.75 and 0.25."""
    mask = np.zeros((4, 4), dtype=bool)
    mask[0, 0] = mask[1, 1] = mask[3, 3] = True
    relevance = np.zeros((4, 4))
    relevance[0, 0], relevance[1, 1], relevance[3, 3] = 1.0, 0.5, 0.25
    assert extract_mask_regions(mask, relevance) == [
        (box_from_xyxy((0.0, 0.0, 0.5, 0.5)), 0.75),
        (box_from_xyxy((0.75, 0.75, 1.0, 1.0)), 0.25),
    ]


def test_a_component_in_the_box_of_another_keeps_its_mean() -> None:
    """A ring of relevance 0.5 around a point of 1.0: the point lies in the ring's box and is not of its mean."""
    mask = np.zeros((5, 5), dtype=bool)
    mask[0], mask[4], mask[:, 0], mask[:, 4], mask[2, 2] = True, True, True, True, True
    relevance = np.where(mask, 0.5, 0.0)
    relevance[2, 2] = 1.0
    assert extract_mask_regions(mask, relevance) == [
        (box_from_xyxy((0.4, 0.4, 0.6, 0.6)), 1.0),
        (box_from_xyxy((0.0, 0.0, 1.0, 1.0)), 0.5),
    ]


def test_small_components_are_dropped() -> None:
    """Areas of 4, 3 and 1 of 100 pixels; at least 3 % leaves the first two."""
    mask = np.zeros((10, 10), dtype=bool)
    mask[0, 0:4] = mask[3, 0:3] = mask[6, 0] = True
    found = extract_mask_regions(mask, mask.astype(float), min_area=0.03)
    assert [box for box, _ in found] == [box_from_xyxy((0.0, 0.0, 0.4, 0.1)), box_from_xyxy((0.0, 0.3, 0.3, 0.4))]


def test_mask_and_relevance_of_two_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 2\) and \(2, 3\)"):
        extract_mask_regions(np.ones((2, 2), dtype=bool), np.ones((2, 3)))


A = box_from_xyxy((0.0, 0.0, 0.4, 0.4))
NEAR_A = box_from_xyxy((0.1, 0.0, 0.4, 0.4))  # inside A: 0.12 / 0.16 = 0.75
FAR = box_from_xyxy((0.6, 0.6, 0.9, 0.9))


def found(box: Box, confidence: float = 0.5, hypothesis: str = "nodule") -> GroundedRegion:
    return GroundedRegion(hypothesis, box, confidence)


def test_near_duplicates_are_merged_into_the_earlier_one() -> None:
    """IoU 0.75: one region at 0.7, two at 0.8. The order is kept: the caller puts the best first."""
    assert deduplicate_regions([found(NEAR_A, 0.2), found(FAR), found(A, 0.9)], 0.7) == [found(NEAR_A, 0.2), found(FAR)]
    assert deduplicate_regions([found(A), found(NEAR_A)], 0.8) == [found(A), found(NEAR_A)]


def test_equal_boxes_are_one_region_whatever_the_overlap_allowed() -> None:
    assert deduplicate_regions([found(A, 0.9, "mass"), found(A, 0.8)], 1.0) == [found(A, 0.9, "mass")]


def test_at_zero_only_regions_that_share_nothing_are_kept() -> None:
    assert deduplicate_regions([found(A), found(NEAR_A), found(FAR)], 0.0) == [found(A), found(FAR)]


def test_duplicates_are_compared_with_kept_regions_only() -> None:
    """a-b and b-c overlap, a-c do not: b goes, c stays. Each 0.4 wide, 0.1 apart: IoU 0.3 / 0.5 = 0.6, and a-c
    0.2 / 0.6 = 0.33."""
    a, b, c = (found(box_from_xyxy((x, 0.0, x + 0.4, 1.0))) for x in (0.0, 0.1, 0.2))
    assert deduplicate_regions([a, b, c], 0.5) == [a, c]


def test_no_regions_and_a_wrong_overlap() -> None:
    assert deduplicate_regions([], 0.5) == []
    with pytest.raises(ValueError, match=r"got 1\.5"):
        deduplicate_regions([], 1.5)


def test_no_more_regions_are_kept_than_the_limit() -> None:
    """The second region duplicates the first, so the third is the second one kept."""
    corner = found(box_from_xyxy((0.8, 0.0, 1.0, 0.2)))
    assert deduplicate_regions([found(A), found(NEAR_A), found(FAR), corner], 0.7, limit=2) == [found(A), found(FAR)]


def test_best_first_does_not_depend_on_the_order_given() -> None:
    """By confidence, then the leftmost, then by name."""
    ranked = [found(FAR, 0.9), found(A, 0.5, "mass"), found(A, 0.5, "nodule"), found(NEAR_A, 0.5), found(A, 0.1)]
    assert sort_by_confidence(ranked) == ranked
    assert sort_by_confidence(reversed(ranked)) == ranked
