"""Grounders find the bright square of a black film, with a policy that really looks at the crops it is shown."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from clincot.generation.grounders import (
    RandomGrounder,
    RelevanceGrounder,
    WindowGrounder,
    WrittenGrounder,
    derive_seed,
    draw_random_square,
    stitch_tiles,
)
from clincot.geometry import WHOLE_IMAGE, SmartResize, box_from_xyxy, compute_coverage, compute_iou
from clincot.models.protocols import GroundedRegion, Grounder, GroundingQuery
from clincot.prompts import PromptFormat
from clincot.records import Question, Study
from tests.support.bright import BrightPolicy, ask, film


def ground(
    grounder: Grounder, study: Study, folder: Path, questions: list[Question], hypotheses: list[list[str]]
) -> list[list[GroundedRegion]]:
    """All questions about one image."""
    pairs = zip(questions, hypotheses, strict=True)
    return grounder.ground([GroundingQuery(study, question, tuple(listed)) for question, listed in pairs], folder)


def test_windows_lie_a_stride_apart_and_touch_every_border() -> None:
    """Side .5, stride .5: corners at 0, .25 and .5 in both directions, in reading order."""
    boxes = WindowGrounder(BrightPolicy(), sides=[0.5], stride=0.5).boxes
    corners = [(x, y) for y in (0.0, 0.25, 0.5) for x in (0.0, 0.25, 0.5)]
    assert [(b.x0, b.y0) for b in boxes] == corners
    assert all((b.x1 - b.x0, b.y1 - b.y0) == (0.5, 0.5) for b in boxes)


@pytest.mark.parametrize(("side", "stride"), [(0.25, 0.75), (0.3, 1.0), (0.33, 0.6), (0.9, 0.1)])
def test_windows_leave_no_place_out(side: float, stride: float) -> None:
    boxes = WindowGrounder(BrightPolicy(), sides=[side], stride=stride).boxes
    grid = (np.arange(40) + 0.5) / 40
    seen = [any(b.x0 <= x <= b.x1 and b.y0 <= y <= b.y1 for b in boxes) for x in grid for y in grid]
    assert all(seen)
    assert WindowGrounder(BrightPolicy(), sides=[1.0], stride=stride).boxes == [WHOLE_IMAGE]


def test_windows_find_the_bright_square(tmp_path: Path) -> None:
    """The square is 32 px = .25 of the film, on the corner (64, 32) px: window (.5, .25) of the grid of side .25 and
    stride 1 is exactly it, P(yes) = 1. Every other window is black."""
    study, square = film(tmp_path, "a.png", 64, 32)
    grounder = WindowGrounder(BrightPolicy(), sides=[0.25], stride=1.0)
    ((best, *others),) = ground(grounder, study, tmp_path, [ask(study)], [["nodule", "normal"]])
    assert best.box == square
    assert best.confidence == 1.0
    assert best.hypothesis == "nodule"
    assert len(others) == 15
    assert {g.confidence for g in others} == {0.0}


def test_a_few_looks_go_from_coarse_to_fine(tmp_path: Path) -> None:
    """Sides .5 and .25 at stride 1: four tiles and the window between them, then the smaller windows in the likeliest.

    The square is 32 px = .25 of the film, on the corner (96, 0) px, in the upper right tile only. Its four quarters are
    among the seven that come next, so 12 of 21 windows find it as all of them do.
    """
    study, square = film(tmp_path, "a.png", 96, 0)
    policy = BrightPolicy()
    grounder = WindowGrounder(policy, sides=[0.25, 0.5], stride=1.0, looks=12)
    ((best, *others),) = ground(grounder, study, tmp_path, [ask(study)], [["nodule", "normal"]])
    assert best.box == square
    assert 1 + len(others) == 12
    corners = [(box.x0, box.y0) for box in grounder.levels[0]]
    assert corners == [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5), (0.25, 0.25)]
    assert len(WindowGrounder(policy, sides=[0.25, 0.5], stride=1.0).boxes) == 16 + 4


def test_fewer_looks_than_coarse_windows_are_coarse_windows(tmp_path: Path) -> None:
    study, _ = film(tmp_path, "a.png", 96, 0)
    grounder = WindowGrounder(BrightPolicy(), sides=[0.25, 0.5], stride=1.0, looks=3)
    (found,) = ground(grounder, study, tmp_path, [ask(study)], [["nodule"]])
    assert len(found) == 3
    assert {box.x1 - box.x0 for box in (region.box for region in found)} == {0.5}


def test_a_finding_that_two_questions_share_is_asked_once(tmp_path: Path) -> None:
    study, _ = film(tmp_path, "a.png", 0, 0)
    policy = BrightPolicy()
    questions = [ask(study), ask(study, "Where is the nodule?"), ask(study, "Is all well?")]
    lists = ground(
        WindowGrounder(policy, sides=[0.5], stride=1.0),
        study,
        tmp_path,
        questions,
        [["nodule", "normal"], ["nodule", "mass"], ["normal"]],
    )
    assert len(policy.asked) == 2 * 4  # nodule and mass, 4 windows each; normal is nowhere
    assert [len(found) for found in lists] == [4, 8, 0]


def test_windows_of_several_images_are_asked_together(tmp_path: Path) -> None:
    """Each image gets its own square; the policy is called once for both."""
    (one, first), (other, second) = film(tmp_path, "a.png", 64, 32), film(tmp_path, "b.png", 0, 96)
    sought = [GroundingQuery(study, ask(study), ("nodule",)) for study in (one, other)]
    found = WindowGrounder(BrightPolicy(), sides=[0.25], stride=1.0).ground(sought, tmp_path)
    assert [lists[0].box for lists in found] == [first, second]


def test_a_window_without_a_probability_is_left_out(tmp_path: Path) -> None:
    class Silent(BrightPolicy):
        def p_yes(self, conversations):  # type: ignore[no-untyped-def]
            return [None if n == 0 else p for n, p in enumerate(super().p_yes(conversations))]

    study, square = film(tmp_path, "a.png", 0, 0, side=64)
    (found,) = ground(WindowGrounder(Silent(), sides=[0.5], stride=1.0), study, tmp_path, [ask(study)], [["nodule"]])
    assert len(found) == 3
    assert square not in [g.box for g in found]


def test_relevance_finds_the_bright_square(tmp_path: Path) -> None:
    """32 px at (64, 32) px of 128 are exactly one of the 4 x 4 tiles: P(yes) 1 there and 0 elsewhere. The map has 1/16
    of its cells at 1, so the quantile .9 keeps just these."""
    study, square = film(tmp_path, "a.png", 64, 32)
    policy = BrightPolicy()
    ((one,), ()) = ground(
        RelevanceGrounder(policy, quantile=0.9),
        study,
        tmp_path,
        [ask(study), ask(study, "All well?")],
        [["nodule"], ["normal"]],
    )
    assert one.box == square
    assert one.confidence == 1.0
    assert len(policy.asked) == 2 * 16  # P(yes) and the map of every tile


def test_relevance_is_finer_than_its_tiles(tmp_path: Path) -> None:
    """A square of 16 px in the corner of the tile at (64, 32): 4 x 4 of its 8 x 8 patches are bright. P(yes) of the
    tile is 1/4, and so is the confidence; a square across two tiles is found as one region."""
    study, square = film(tmp_path, "a.png", 64, 32, side=16)
    ((one,),) = ground(RelevanceGrounder(BrightPolicy(), quantile=0.9), study, tmp_path, [ask(study)], [["nodule"]])
    assert one.box == square
    assert one.confidence == pytest.approx(0.25, abs=0.01)
    study, square = film(tmp_path, "b.png", 56, 40, side=16)
    ((one,),) = ground(RelevanceGrounder(BrightPolicy(), quantile=0.9), study, tmp_path, [ask(study)], [["nodule"]])
    assert one.box == square


def test_relevance_ranks_hypotheses_by_p_yes(tmp_path: Path) -> None:
    """The best place of each hypothesis counted as 1, and the leftmost of them came first."""

    class Doubtful(BrightPolicy):
        def p_yes(self, conversations):  # type: ignore[no-untyped-def]
            doubt = [0.2 if "mass" in c[-1].text else 1.0 for c in conversations]
            return [d * (p or 0.0) for d, p in zip(doubt, super().p_yes(conversations), strict=True)]

    study, square = film(tmp_path, "a.png", 64, 32)
    (found,) = ground(RelevanceGrounder(Doubtful(), quantile=0.9), study, tmp_path, [ask(study)], [["mass", "nodule"]])
    assert [(g.hypothesis, g.box) for g in found] == [("nodule", square), ("mass", square)]
    assert [g.confidence for g in found] == pytest.approx([1.0, 0.2])


def test_a_uniform_film_has_no_relevant_region(tmp_path: Path) -> None:
    study, _ = film(tmp_path, "a.png", 0, 0, side=128)
    assert ground(RelevanceGrounder(BrightPolicy(), quantile=0.9), study, tmp_path, [ask(study)], [["nodule"]]) == [[]]


def test_stitching_places_tiles_and_averages_overlaps() -> None:
    """Left half 2, right half from 1/4 on 4: in columns 16 to 31 of 64 their mean, 3; below 1/2 nothing is known: 0."""
    made = stitch_tiles(
        [
            (box_from_xyxy((0, 0, 0.5, 0.5)), np.full((2, 2), 2.0)),
            (box_from_xyxy((0.25, 0, 1, 0.5)), np.full((4, 4), 4.0)),
        ]
    )
    assert made.shape == (64, 64)
    assert made[0].tolist() == [2.0] * 16 + [3.0] * 16 + [4.0] * 32
    assert made[31].tolist() == made[0].tolist()
    assert made[32].tolist() == [0.0] * 64


def test_written_regions_are_read_and_what_is_no_box_is_counted(tmp_path: Path) -> None:
    """Confidence: the tokens' probability, exp(-.5 - .25)."""
    study, _ = film(tmp_path, "a.png", 0, 0)
    policy = BrightPolicy(["[10, 20, 30, 40]", "nowhere", "[50, 50, 20, 60]"])
    grounder = WrittenGrounder(policy, samples=12, temperature=1.0, seed=0)
    questions = [ask(study), ask(study, "Where?")]
    lists = ground(grounder, study, tmp_path, questions, [["nodule"], []])
    seeds = [[derive_seed(0, q.id, n) % 3 for n in range(12)] for q in questions]
    assert [len(found) for found in lists] == [s.count(0) for s in seeds]
    assert grounder.off_format == sum(s.count(1) + s.count(2) for s in seeds) > 0
    one = lists[0][0]
    assert one.box.xyxy == (0.1, 0.2, 0.3, 0.4)
    assert one.confidence == pytest.approx(math.exp(-0.75), abs=1e-6)
    assert {g.hypothesis for g in lists[0]} == {"nodule"}
    assert {g.hypothesis for g in lists[1]} == {"normal"}


@pytest.mark.parametrize(
    ("views", "words", "prompt"),
    [
        # 128 x 128 px become 140 x 140, 4.57 patches of 28 rounded to 5
        (
            PromptFormat(region_form="pixels", resize=SmartResize(factor=28, min_pixels=56 * 56, max_pixels=10**6)),
            ["[14, 28, 70, 140]", '[{"bbox_2d": [14, 28, 70, 140], "label": "nodule"}]', "[14, 28, 70, 141]"],
            "in pixels.",
        ),
        (
            PromptFormat(region_form="qwen2_box"),
            ["<|box_start|>(100,200),(500,1000)<|box_end|>", "(100,200),(500,1000)", "(500,200),(100,1000)"],
            "with coordinates from 0 to 1000.",
        ),
    ],
)
def test_written_regions_are_read_in_the_policys_form(
    views: PromptFormat, words: list[str], prompt: str, tmp_path: Path
) -> None:
    """Two ways to write one box, and one that is outside the image or reversed."""
    study, _ = film(tmp_path, "a.png", 0, 0)
    policy = BrightPolicy(words)
    policy.views = views
    grounder = WrittenGrounder(policy, samples=12, temperature=1.0, seed=0)
    (regions,) = ground(grounder, study, tmp_path, [ask(study)], [["nodule"]])
    assert {region.box.xyxy for region in regions} == {(0.1, 0.2, 0.5, 1.0)}
    assert len(regions) + grounder.off_format == 12
    assert grounder.off_format > 0
    assert policy.asked[0][-1].text.endswith(prompt)


def test_a_question_draws_the_same_whatever_stands_beside_it(tmp_path: Path) -> None:
    study, _ = film(tmp_path, "a.png", 0, 0)
    words = [f"[{n}, 0, {n + 20}, 20]" for n in range(70)]
    one, other = ask(study), ask(study, "Where?")
    alone, beside, again = (
        ground(grounder, study, tmp_path, asked, [["nodule"]] * len(asked))[-1]
        for grounder, asked in (
            (WrittenGrounder(BrightPolicy(words), samples=3, temperature=1.0, seed=0), [one]),
            (WrittenGrounder(BrightPolicy(words), samples=3, temperature=1.0, seed=0), [other, one]),
            (WrittenGrounder(BrightPolicy(words), samples=3, temperature=1.0, seed=1), [one]),
        )
    )
    assert alone == beside
    assert alone != again
    assert len({g.box for g in alone}) > 1  # samples of a question differ


def test_random_squares_are_inside_and_cover_the_image(tmp_path: Path) -> None:
    """Random squares have the requested side, lie inside the image and occur everywhere."""
    study, square = film(tmp_path, "a.png", 64, 32)
    (found,) = ground(RandomGrounder(count=200, side=0.25, seed=0), study, tmp_path, [ask(study)], [["nodule"]])
    for g in found:
        assert (g.box.x1 - g.box.x0, g.box.y1 - g.box.y0) == pytest.approx((0.25, 0.25), abs=2e-4)
    centres = np.array([g.box.center for g in found])
    # uniform in [.125, .875]: mean .5, standard deviation .75 / sqrt(12) = .2165, of the mean of 200: .0153
    assert centres.mean(0) == pytest.approx((0.5, 0.5), abs=4 * 0.0153)
    assert min(compute_iou(square, g.box) for g in found) == 0
    assert max(compute_coverage(square, by=g.box) for g in found) > 0.5
    assert draw_random_square(3, 1.0) == WHOLE_IMAGE
