from itertools import combinations, product
from typing import get_args

import pytest
from pydantic import ValidationError

from clincot.geometry import (
    WHOLE_IMAGE,
    Box,
    RegionForm,
    RegionMask,
    SmartResize,
    box_from_pixels,
    box_from_text,
    box_from_xyxy,
    box_to_pixels,
    box_to_text,
    compute_coverage,
    compute_iou,
    crop_square,
    decode_runs,
    encode_runs,
    fit_view_square,
    parse_region,
    region_to_text,
)

FORMS: tuple[RegionForm, ...] = get_args(RegionForm)
SIZE = (700, 364)  # pixels of the image as a processor resized it


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


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("percent", "[12, 30, 37, 55]"),
        ("pixels", "[84, 109, 259, 200]"),  # .12 * 700, .3 * 364 = 109.2, .37 * 700, .55 * 364 = 200.2
        ("thousand", "[120, 300, 370, 550]"),
        ("qwen2_box", "<|box_start|>(120,300),(370,550)<|box_end|>"),
        ("internvl_box", "<box>[[120, 300, 370, 550]]</box>"),
        ("loc", "<loc0307><loc0123><loc0563><loc0379>"),  # * 1023 = 306.9, 122.8, 562.7, 378.5
    ],
)
def test_a_region_in_each_form(form: RegionForm, text: str) -> None:
    box = box_from_xyxy((0.12, 0.3, 0.37, 0.55))
    assert region_to_text(box, form, SIZE) == text
    parsed = parse_region(f"It is at {text}.", form, SIZE)
    assert parsed is not None
    assert parsed.xyxy == pytest.approx(box.xyxy, abs=0.0015)


@pytest.mark.parametrize("size", [SIZE, (28, 28), (56, 4984), (3360, 2520)])
@pytest.mark.parametrize("form", FORMS)
def test_regions_come_back_within_the_forms_resolution(form: RegionForm, size: tuple[int, int]) -> None:
    """Every box of a grid, with edges on the borders and inside: half a unit, or 1.5 at the last pixel, where a box of
    one pixel is shifted inward."""
    edges = [0.0, 0.0371, 0.25, 1 / 3, 0.5, 0.7143, 0.9649, 1.0]
    units = {"percent": (100, 100), "pixels": size, "loc": (1023, 1023)}.get(form, (1000, 1000))
    most = 1.5 if form == "pixels" else 0.5
    for (x0, x1), (y0, y1) in product(combinations(edges, 2), repeat=2):
        box = box_from_xyxy((x0, y0, x1, y1))
        text = region_to_text(box, form, size)
        parsed = parse_region(text, form, size)
        assert parsed is not None
        assert abs(parsed.x0 - x0) <= most / units[0] + 2e-4
        assert abs(parsed.x1 - x1) <= most / units[0] + 2e-4
        assert abs(parsed.y0 - y0) <= most / units[1] + 2e-4
        assert abs(parsed.y1 - y1) <= most / units[1] + 2e-4
        assert region_to_text(parsed, form, size) == text  # what the policy wrote is what it is shown


@pytest.mark.parametrize("form", FORMS)
def test_the_thinnest_region_is_one_unit(form: RegionForm) -> None:
    for corner in (0.0, 0.5, 0.9999):
        thin = box_from_xyxy((corner, corner, corner + 0.0001, corner + 0.0001))
        assert parse_region(region_to_text(thin, form, SIZE), form, SIZE) is not None


def test_whole_image_in_each_form() -> None:
    texts = [region_to_text(WHOLE_IMAGE, form, SIZE) for form in FORMS]
    assert texts == [
        "[0, 0, 100, 100]",
        "[0, 0, 699, 363]",
        "[0, 0, 1000, 1000]",
        "<|box_start|>(0,0),(1000,1000)<|box_end|>",
        "<box>[[0, 0, 1000, 1000]]</box>",
        "<loc0000><loc0000><loc1023><loc1023>",
    ]
    assert parse_region("[0, 0, 700, 364]", "pixels", SIZE) == WHOLE_IMAGE  # the edge itself


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("pixels", '```json\n[\n\t{"bbox_2d": [70, 91, 350, 182], "label": "nodule"},\n\t{"bbox_2d": [1, 2, 3, 4]'),
        ("pixels", "[70,91,350,182]"),
        ("thousand", '[{"bbox_2d": [100, 250, 500, 500], "label": "nodule"}]'),
        ("qwen2_box", "nodule(100,250),(500,500)"),  # as a decoder without special tokens shows it
        ("qwen2_box", "<|object_ref_start|>a nodule<|object_ref_end|><|box_start|>(100, 250), (500, 500)<|box_end|>"),
        ("internvl_box", "<ref>nodule</ref><box>[[100, 250, 500, 500]]</box>"),
        ("internvl_box", "nodule[[100, 250, 500, 500], [1, 2, 3, 4]]"),
        ("loc", "<loc0256><loc0102><loc0512><loc0512> nodule ; <loc0001><loc0002><loc0003><loc0004> nodule"),
    ],
)
def test_what_families_write_around_a_region(form: RegionForm, text: str) -> None:
    box = parse_region(text, form, SIZE)
    assert box is not None
    assert box.xyxy == pytest.approx((0.1, 0.25, 0.5, 0.5), abs=0.001)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        *product(FORMS, ["", "no box here", "[12, 30, 37]", "(1,2),(3", "<loc0001><loc0002>", "[0.1, 0.2, 0.3, 0.4]"]),
        ("pixels", "[350, 91, 70, 182]"),  # reversed
        ("pixels", "[70, 91, 70, 182]"),  # no width
        ("pixels", "[70, 91, 701, 182]"),  # outside
        ("pixels", "[70, -1, 350, 182]"),
        ("pixels", "[70, 91, 350, 182000000000]"),
        ("thousand", "[100, 250, 500, 1001]"),
        ("thousand", "[500, 250, 100, 500]"),
        ("qwen2_box", "(100,500),(500,250)"),
        ("qwen2_box", "(100,250),(1001,500)"),
        ("qwen2_box", "[100, 250, 500, 500]"),  # another family's form is not guessed
        ("internvl_box", "<box>[[500, 500, 500, 600]]</box>"),
        ("loc", "<loc0512><loc0102><loc0256><loc0512>"),
        ("loc", "<loc0256><loc0102><loc1024><loc0512>"),
        ("loc", "[100, 250, 500, 500]"),
    ],
)
def test_what_is_no_region_in_a_form_is_none(form: RegionForm, text: str) -> None:
    assert parse_region(text, form, SIZE) is None


def test_a_pixel_that_vanishes_in_rounding_is_no_region() -> None:
    """Boxes have 4 decimals: one pixel of 90,000 is less than that."""
    assert parse_region("[10, 0, 11, 100]", "pixels", (90000, 364)) is None


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (300, 200, (308, 196)),  # 10.7 and 7.1 patches of 28
        (2000, 1000, (1400, 700)),  # 2 megapixels to at most 1003520: by 1.4117, floor(50.6), floor(25.3)
        (30, 20, (84, 56)),  # 600 to at least 3136: by 2.286, ceil(2.45), ceil(1.63)
        (10000, 10, (1792, 28)),  # 10000 wide: 357 patches, no height; sqrt(3136 / 100000) shrinks, the ceiling holds
    ],
)
def test_qwens_resize(width: int, height: int, expected: tuple[int, int]) -> None:
    resize = SmartResize(factor=28, min_pixels=56 * 56, max_pixels=28 * 28 * 1280)
    assert resize.compute_size(width, height) == expected


def test_boxes_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        WHOLE_IMAGE.x0 = 0.5  # type: ignore[misc]


def test_an_unknown_field_is_rejected() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Box.model_validate({"x0": 0, "y0": 0, "x1": 1, "y1": 1, "label": "lung"})


# Masks: the texts are those of pycocotools 2.0.11 (pycocotools.mask.encode) for the same pixels


def test_run_lengths_are_written_as_coco_writes_them() -> None:
    """6 x 8 pixels, rows 1 to 3 and columns 2 to 6 without (2, 4).

    Column by column: 2 * 6 + 1 = 13 background, then 3 region and 3 background twice, and so on.
    """
    runs = [13, 3, 3, 3, 3, 1, 1, 1, 3, 3, 3, 3, 8]
    assert sum(runs) == 6 * 8
    assert encode_runs(runs) == "=3300NN022005"
    assert decode_runs("=3300NN022005") == runs


def test_long_runs_take_several_characters() -> None:
    """1000 = 0b11111_01000: the low group 8 with "more follows" is 48 + 8 + 32, "X"; the rest is 31.

    31 has its highest bit set, which would mean a negative number, so a third group of 0 follows: 48 + 31 + 32, "o",
    and "0".
    """
    assert encode_runs([1000]) == "Xo0"
    assert decode_runs("Xo0") == [1000]


@pytest.mark.parametrize(
    ("size", "counts", "message"),
    [
        ((6, 8), "=3300NN02200", "add up to 40"),
        ((6, 8), encode_runs([48]), "at least one pixel of its region"),
        ((6, 8), "=330X", "ends within a number"),
        ((6, 8), "=33 0", "the character ' '"),
    ],
)
def test_a_mask_that_does_not_cover_its_image_is_refused(size: tuple[int, int], counts: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RegionMask(size=size, counts=counts)


# The ideal view of a box, which the oracle sees and IoU compares with


@pytest.mark.parametrize(
    ("box", "aspect", "expected"),
    [
        ((0.4, 0.4, 0.5, 0.5), 1.0, (0.325, 0.325, 0.575, 0.575)),  # a quarter around (.45, .45)
        ((0.3, 0.3, 0.7, 0.7), 1.0, (0.25, 0.25, 0.75, 0.75)),  # .4 needs a half
        ((0.1, 0.2, 0.9, 0.8), 1.0, (0.1, 0.1, 0.9, 0.9)),  # an organ: its longer side, .8
        ((0.0, 0.0, 1.0, 1.0), 1.0, (0.0, 0.0, 1.0, 1.0)),
        # 2:1: a quarter of the height is an eighth of the width
        ((0.45, 0.45, 0.5, 0.55), 2.0, (0.4125, 0.375, 0.5375, 0.625)),
        # 2:1: .4 of the width is .8 of the height, so the square is .4 wide and .8 high
        ((0.1, 0.3, 0.5, 0.7), 2.0, (0.1, 0.1, 0.5, 0.9)),
        # longer than the shorter side: to its ends, and the whole height
        ((0.1, 0.3, 0.9, 0.7), 2.0, (0.1, 0.0, 0.9, 1.0)),
    ],
)
def test_the_view_of_a_box_shows_it_at_any_size(
    box: tuple[float, float, float, float], aspect: float, expected: tuple[float, float, float, float]
) -> None:
    assert fit_view_square(box_from_xyxy(box), aspect=aspect) == box_from_xyxy(expected)
