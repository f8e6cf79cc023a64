import pytest

from clincot.evaluation.grounding import best_iou, hits_reference
from clincot.geometry import WHOLE_IMAGE, Box


def box(x0: float, y0: float, x1: float, y1: float) -> Box:
    return Box(x0=x0, y0=y0, x1=x1, y1=y1)


CROP = box(0.2, 0.2, 0.6, 0.6)


def test_a_reference_inside_the_crop_is_a_hit() -> None:
    """The whole image therefore always hits."""
    inside = box(0.3, 0.3, 0.4, 0.4)
    assert hits_reference(CROP, [inside]) is True
    assert hits_reference(WHOLE_IMAGE, [inside]) is True


def test_no_reference_is_not_a_miss() -> None:
    assert hits_reference(CROP, []) is None
    assert best_iou(CROP, []) is None


def test_touching_a_corner_is_no_hit() -> None:
    # centre (.65, .65) is outside; a quarter of the reference is covered
    assert hits_reference(CROP, [box(0.55, 0.55, 0.75, 0.75)]) is False


def test_half_of_a_small_reference_must_be_covered() -> None:
    # The crop is 0.4 wide. Both references are .2 x .2 and have their centre in the crop.
    # centre x = .58: .12 of .2 wide is covered (60 %)
    assert hits_reference(CROP, [box(0.48, 0.3, 0.68, 0.5)]) is True
    # centre (.58, .58): .12 * .12 / .04 = 36 %
    assert hits_reference(CROP, [box(0.48, 0.48, 0.68, 0.68)]) is False


def test_a_reference_larger_than_the_crop_is_hit_by_iou() -> None:
    # inside the reference altogether: IoU = .16 / area. It could never cover half of either.
    assert hits_reference(CROP, [box(0.1, 0.1, 0.8, 0.8)]) is True  # .16 / .49 = .327
    assert (
        hits_reference(CROP, [box(0.0, 0.0, 0.8, 0.8)]) is False
    )  # .16 / .64 = .25, though the centre (.4, .4) is shown


def test_a_large_reference_whose_centre_is_not_shown_is_no_hit() -> None:
    # .4 x .4 of the .4 x 1 reference is covered: IoU = .16 / .4 = .4, but the centre (.4, .7) is below the crop
    tall = box(0.2, 0.4, 0.6, 1.0)
    assert tall.center == pytest.approx((0.4, 0.7))
    assert hits_reference(CROP, [tall]) is False


def test_one_of_several_references_is_enough() -> None:
    assert hits_reference(CROP, [box(0.8, 0.8, 0.9, 0.9), box(0.3, 0.3, 0.4, 0.4)]) is True


def test_iou_is_that_of_the_best_reference() -> None:
    # CROP has area .16. Half of it: .08 / .16. Disjoint: 0.
    assert best_iou(CROP, [box(0.8, 0.8, 0.9, 0.9)]) == 0.0
    assert best_iou(CROP, [box(0.8, 0.8, 0.9, 0.9), box(0.2, 0.2, 0.4, 0.6)]) == pytest.approx(0.5)
    assert best_iou(CROP, [CROP]) == pytest.approx(1.0)
