"""Coordinates by hand: every expected number is worked out in the test."""

import math

import pytest

from clincot.geometry import WHOLE_IMAGE, Box
from clincot.records import Interval
from clincot.reporting.figures import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    BoxMark,
    annotate_film,
    build_charts,
    build_whisker,
    choose_ticks,
)


def test_a_box_stands_where_it_is_in_the_film() -> None:
    # A film of 200 x 100 px is drawn 256 x 128: one drawing unit is 1/256 of the longer side.
    drawn = annotate_film(
        "film-1", (200, 100), [BoxMark(Box(x0=0.25, y0=0.5, x1=0.75, y1=1.0), "chosen", "x")], "a film"
    )
    assert (drawn.width, drawn.height) == (256, 128)
    (mark,) = drawn.marks
    assert (mark.x, mark.y, mark.width, mark.height) == (64, 64, 128, 64)


def test_labels_of_the_same_box_do_not_cover_each_other() -> None:
    box = Box(x0=0.4, y0=0.4, x1=0.6, y1=0.6)
    marks = annotate_film("f", (256, 256), [BoxMark(box, "by-windows", f"{n} nodule 0.50") for n in range(6)], "").marks
    for i, a in enumerate(marks):
        assert 0 <= a.label_x <= 256 - a.label_width
        assert 0 <= a.label_top <= 256 - a.label_height
        for b in marks[i + 1 :]:
            across = min(a.label_x + a.label_width, b.label_x + b.label_width) - max(a.label_x, b.label_x)
            down = min(a.label_top + a.label_height, b.label_top + b.label_height) - max(a.label_top, b.label_top)
            assert min(across, down) <= 0.11  # coordinates are rounded to 0.1


def test_the_label_of_the_whole_image_stays_inside() -> None:
    (mark,) = annotate_film("f", (256, 256), [BoxMark(WHOLE_IMAGE, "by-whole", "1 whole image")], "").marks
    assert mark.label_x >= 0
    assert mark.label_top >= 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.5, 1]),  # a fourth is 0.25, the next round step 0.5
        (0.31, 0.87, [0.2, 0.4, 0.6, 0.8, 1.0]),  # 0.14 -> 0.2
        (0.0, 40.0, [0, 10, 20, 30, 40]),
        (-0.1, 0.1, [-0.1, -0.05, 0, 0.05, 0.1]),
        (2.0, 2.0, [1, 1.5, 2, 2.5, 3]),  # a constant has room above and below
        (0.0, 0.0, [-0.5, 0, 0.5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert choose_ticks(low, high, count=4) == pytest.approx(expected)


def test_a_curve_goes_through_its_points() -> None:
    log = [{"step": 5, "accuracy": 0.0}, {"step": 10, "accuracy": 1.0}]
    (panel,) = build_charts({"round 1": log})
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2  # step 5 of 0 … 10
    assert panel.title == "Reward accuracy"
    assert panel.lines[0].pieces == (f"{middle},{HEIGHT - BOTTOM} {WIDTH - RIGHT},{TOP}",)


def test_what_is_no_number_is_a_gap_and_not_a_point() -> None:
    values = [0.1, math.nan, 0.2, None, 0.3, 0.4, "0.5", True]
    (panel,) = build_charts({"round 1": [{"step": n, "nll": value} for n, value in enumerate(values, start=1)]})
    (line,) = panel.lines
    assert [len(piece.split()) for piece in line.pieces] == [2, 2, 2]  # 0.1 alone, 0.2 alone, then 0.3 and 0.4
    assert line.pieces[0].split()[0] == line.pieces[0].split()[1]  # a lone point: a line of no length


def test_only_quantities_that_a_log_has_are_drawn() -> None:
    assert build_charts({}) == []
    assert build_charts({"round 1": [{"step": 1, "learning_rate": 0.1}]}) == []
    made = build_charts({"round 1": [{"step": 1, "loss": 0.7}], "round 2": [{"step": 1, "loss": 0.6, "nll": 0.3}]})
    assert [(panel.title, [line.name for line in panel.lines]) for panel in made] == [
        ("Preference loss", ["round 1", "round 2"]),
        ("Chosen answer's NLL", ["round 2"]),
    ]


def test_the_margin_asked_for_is_dashed() -> None:
    (panel,) = build_charts({"round 1": [{"step": 1, "reward_margin": 0.1, "margin_logits": 0.4}]})
    assert [line.dashed for line in panel.lines] == [False, True]


def test_a_whisker_stays_on_its_axis() -> None:
    drawn = build_whisker(Interval(value=0.5, low=-0.1, high=0.75, n=8))
    assert drawn is not None
    assert (drawn.low, drawn.value, drawn.high) == (0, 50, 75)
    assert build_whisker(Interval(value=None, n=0, n_unscored=8)) is None
    assert build_whisker(None) is None
