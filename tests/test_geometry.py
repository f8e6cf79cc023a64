import pytest
from pydantic import ValidationError

from clincot.geometry import (
    WHOLE_IMAGE,
    Box,
    box_from_pixels,
    box_from_text,
    box_from_xyxy,
    box_to_pixels,
    box_to_text,
    compute_coverage,
    compute_iou,
    crop_square,
)


@pytest.mark.parametrize(
    ("xyxy", "message"),
    [
        ((0.5, 0.1, 0.4, 0.2), "x0 < x1 and y0 < y1"),  # negative width
        ((0.1, 0.2, 0.4, 0.2), "x0 < x1 and y0 < y1"),  # no height
        ((0.1, 0.2, 1.2, 0.4), "less than or equal to 1"),  # outside, on the right
        ((-0.1, 0.2, 0.3, 0.4), "greater than or equal to 0"),
        ((float("nan"), 0.2, 0.3, 0.4), "finite"),
        ((12.0, 30.0, 37.0, 55.0), "less than or equal to 1"),  # pixels or percent: never guessed
    ],
)
def test_impossible_boxes_are_rejected(xyxy: tuple[float, float, float, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        box_from_xyxy(xyxy)


def test_area_and_centre() -> None:
    box = box_from_xyxy((0.1, 0.2, 0.5, 0.7))
    assert box.area == pytest.approx(0.4 * 0.5)
    assert box.center == pytest.approx((0.3, 0.45))
    assert WHOLE_IMAGE.area == 1


def test_pixels_to_box_and_back() -> None:
    assert box_from_pixels(50, 25, 100, 75, width=200, height=100).xyxy == (0.25, 0.25, 0.5, 0.75)
    for x0 in range(
        0, 300, 7
    ):  # thirds and the like do not fit into 4 decimals; the pixels must come back all the same
        box = box_from_pixels(x0, 1, x0 + 5, 299, width=307, height=300)
        assert box_to_pixels(box, width=307, height=300) == (x0, 1, x0 + 5, 299)


def test_a_box_is_never_less_than_a_pixel() -> None:
    assert box_to_pixels(box_from_xyxy((0.5, 0.999, 0.5001, 1.0)), width=10, height=10) == (5, 9, 6, 10)


def test_intersection_over_union() -> None:
    left, right = box_from_xyxy((0.0, 0.0, 0.4, 0.5)), box_from_xyxy((0.2, 0.0, 0.6, 0.5))
    # shared 0.2 * 0.5 = 0.1, each 0.2: 0.1 / (0.2 + 0.2 - 0.1)
    assert compute_iou(left, right) == pytest.approx(1 / 3)
    assert compute_iou(left, left) == pytest.approx(1)
    assert compute_iou(left, box_from_xyxy((0.4, 0.0, 0.6, 0.5))) == 0  # they touch
    assert compute_iou(left, box_from_xyxy((0.5, 0.6, 0.6, 0.7))) == 0


def test_coverage_is_a_share_of_the_target() -> None:
    target = box_from_xyxy((0.0, 0.0, 0.4, 0.5))
    assert compute_coverage(target, by=box_from_xyxy((0.2, 0.0, 1.0, 0.25))) == pytest.approx(
        0.25
    )  # half its width, half its height
    assert compute_coverage(target, by=WHOLE_IMAGE) == pytest.approx(1)
    assert compute_coverage(WHOLE_IMAGE, by=target) == pytest.approx(0.2)
    assert compute_coverage(target, by=box_from_xyxy((0.5, 0.5, 0.6, 0.6))) == 0


@pytest.mark.parametrize(
    ("box", "min_side", "aspect", "expected"),
    [
        # around its centre, at least min_side: 0.5 +- 0.25
        ((0.4, 0.4, 0.6, 0.6), 0.5, 1.0, (0.25, 0.25, 0.75, 0.75)),
        # the longer side decides: 0.6 wide, centre (0.5, 0.5)
        ((0.2, 0.4, 0.8, 0.6), 0.1, 1.0, (0.2, 0.2, 0.8, 0.8)),
        # shifted inward at two borders, not cut
        ((0.0, 0.9, 0.1, 1.0), 0.5, 1.0, (0.0, 0.5, 0.5, 1.0)),
        # 200 x 100 px: a square of 0.5 * 100 px is 50 px = 0.25 of the width and 0.5 of the height
        ((0.45, 0.45, 0.55, 0.55), 0.5, 2.0, (0.375, 0.25, 0.625, 0.75)),
        # 200 x 100 px, 160 px wide: no square that size fits, so all of the height
        ((0.1, 0.4, 0.9, 0.6), 0.1, 2.0, (0.1, 0.0, 0.9, 1.0)),
    ],
)
def test_crop_square(
    box: tuple[float, float, float, float], min_side: float, aspect: float, expected: tuple[float, ...]
) -> None:
    assert crop_square(box_from_xyxy(box), min_side=min_side, aspect=aspect).xyxy == expected


def test_crop_square_contains_its_region() -> None:
    for x0 in (0.0, 0.3, 0.85):
        for y0 in (0.0, 0.5, 0.9):
            region = box_from_xyxy((x0, y0, x0 + 0.15, y0 + 0.1))
            assert compute_coverage(region, by=crop_square(region, min_side=0.33, aspect=0.8)) == pytest.approx(
                1, abs=1e-3
            )


@pytest.mark.parametrize("min_side", [0.0, 1.5])
def test_crop_square_takes_a_fraction(min_side: float) -> None:
    with pytest.raises(ValueError, match=r"a fraction of the image in \(0, 1\]"):
        crop_square(WHOLE_IMAGE, min_side=min_side)


def test_box_text_both_ways() -> None:
    box = box_from_xyxy((0.12, 0.3, 0.37, 0.55))
    assert box_to_text(box) == "[12, 30, 37, 55]"
    assert box_from_text("The region is [12, 30, 37, 55], at the [1, 2, 3, 4].") == box


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box here",
        "[12, 30, 37]",
        "[0.12, 0.30, 0.37, 0.55]",  # other units are never guessed
        "[37, 30, 12, 55]",  # negative width
        "[12, 30, 12, 55]",
        "[12, 30, 37, 155]",
        "[12, 30, 37, 55",
    ],
)
def test_text_that_is_no_box_is_none(text: str) -> None:
    assert box_from_text(text) is None


def test_boxes_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        WHOLE_IMAGE.x0 = 0.5  # type: ignore[misc]


def test_an_unknown_field_is_rejected() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Box.model_validate({"x0": 0, "y0": 0, "x1": 1, "y1": 1, "label": "lung"})
