"""Frames for the dense pre-training: cut as a policy sees them, with the share of every patch that shows a finding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from clincot.geometry import box_from_pixels, box_from_xyxy
from clincot.images import render_view
from clincot.synthetic.patches import (
    FRAME_PX,
    PATCH_CLASSES,
    _compute_class_shares,
    _cut_frames,
    cut_dense_frames,
    cut_nodule_frames,
    tile_whole_image,
)
from clincot.synthetic.rendering import Lesion, Radiograph

SIZE = 256


def lesion(finding: str, x0: int, y0: int, x1: int, y1: int, margin: str | None = None) -> Lesion:
    """A finding that fills a rectangle of pixels."""
    mask: npt.NDArray[np.bool_] = np.zeros((SIZE, SIZE), dtype=bool)
    mask[y0:y1, x0:x1] = True
    return Lesion(
        finding=finding,
        side="left",
        zone="upper",
        lobe=None,
        margin=margin,
        size_mm=20.0,
        cnr=5.0,
        mask=mask,
        box=box_from_pixels(x0, y0, x1, y1, width=SIZE, height=SIZE),
    )


def radiograph(*lesions: Lesion) -> Radiograph:
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE)).astype(np.uint8)
    return Radiograph(pixels=pixels, lesions=lesions, warp_seed=0, seed=0)


NODULE = lesion("nodule", 160, 96, 176, 112, margin="spiculated")


def test_the_whole_image_is_a_grid_in_reading_order() -> None:
    assert [box.xyxy for box in tile_whole_image()] == [
        (0.0, 0.0, 0.5, 0.5),
        (0.5, 0.0, 1.0, 0.5),
        (0.0, 0.5, 0.5, 1.0),
        (0.5, 0.5, 1.0, 1.0),
    ]


def test_frames_are_what_a_policy_sees() -> None:
    film = radiograph(NODULE)
    pixels, shares = cut_dense_frames(film, np.random.default_rng(1))
    assert pixels.shape == (7, FRAME_PX, FRAME_PX)
    assert shares.shape == (7, 8, 8, len(PATCH_CLASSES))
    image = Image.fromarray(film.pixels).convert("RGB")
    for frame, box in zip(pixels, tile_whole_image(), strict=False):
        assert np.array_equal(frame, np.asarray(render_view(image, box, FRAME_PX).convert("L")))


def test_shares_by_hand() -> None:
    """The nodule fills columns 160-175, rows 96-111. In the upper right quarter (128 px, patches of 16 px) that is
    column 32-47, so patch 2, and row patch 6: wholly filled. No other patch of any frame of the grid shows it."""
    _, shares = _cut_frames(radiograph(NODULE), tile_whole_image())
    expected = np.zeros((4, 8, 8, len(PATCH_CLASSES)), np.float32)
    expected[1, 6, 2, PATCH_CLASSES.index("spiculated")] = 1.0
    assert np.array_equal(shares, expected)


def test_a_patch_that_shows_half_of_it_has_a_half() -> None:
    """A crop of 64 px, patches of 8 px, begun 4 px to the left of a finding 16 px wide and high: columns .5, 1, .5."""
    effusion = lesion("pleural effusion", 100, 120, 116, 136)
    box = box_from_pixels(96, 120, 160, 184, width=SIZE, height=SIZE)
    _, shares = _cut_frames(radiograph(effusion), [box])
    shown = shares[0, :, :, PATCH_CLASSES.index("pleural effusion")]
    assert shown[:2, :3].tolist() == [[0.5, 1.0, 0.5]] * 2
    assert shown.sum() == pytest.approx(4.0)  # 256 px in patches of 64 px
    assert shares.sum() == shown.sum()


def test_overlapping_findings_keep_a_class_each() -> None:
    """Two findings of a kind share their class."""
    film = radiograph(
        lesion("consolidation", 0, 0, 16, 16),
        lesion("pneumothorax", 0, 0, 16, 16),
        lesion("consolidation", 0, 0, 32, 16),
    )
    _, shares = _cut_frames(film, tile_whole_image()[:1])
    assert shares[0, 0, 0, PATCH_CLASSES.index("consolidation")] == 1.0
    assert shares[0, 0, 0, PATCH_CLASSES.index("pneumothorax")] == 1.0
    assert shares[0, 0, 1, PATCH_CLASSES.index("consolidation")] == 1.0
    assert shares[0, 0, 1, PATCH_CLASSES.index("pneumothorax")] == 0.0


def test_a_healthy_film_shows_nothing() -> None:
    for make in (cut_dense_frames, cut_nodule_frames):
        pixels, shares = make(radiograph(), np.random.default_rng(0))
        assert len(pixels) == len(shares) > 0
        assert shares.sum() == 0


def test_nodules_get_two_near_crops_each_and_others_one() -> None:
    """One frame of the grid, one crop anywhere, then 2 a nodule and 1 another finding. The near crops lie within .07
    of the centre and are .25 wide, so the nodule (1/16 wide) is whole in each: 256 px of 64 x 64, in 64 patches."""
    film = radiograph(NODULE, lesion("consolidation", 40, 40, 60, 60))
    for seed in range(10):
        pixels, shares = cut_nodule_frames(film, np.random.default_rng(seed))
        assert len(pixels) == 2 + 2 + 1
        seen = shares[2:, :, :, PATCH_CLASSES.index("spiculated")].sum((1, 2)) / 64
        assert seen == pytest.approx([256 / 64**2, 256 / 64**2, 0.0])


def test_crops_favour_findings_and_reach_everywhere() -> None:
    film = radiograph(NODULE)
    shown = [bool(cut_dense_frames(film, np.random.default_rng(seed), crops=1)[1][4].any()) for seed in range(200)]
    # .6 of the crops are near the finding and show it; of the others fewer than half can: between .6 and .8
    assert 0.5 < np.mean(shown) < 0.85


def test_the_same_seed_gives_the_same_frames() -> None:
    film = radiograph(NODULE)
    one, two, other = (cut_dense_frames(film, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one[0], other[0])


def test_every_rendered_finding_has_a_class() -> None:
    from clincot.synthetic.lesions import FINDINGS, MARGINS

    assert {*MARGINS, *(finding for finding in FINDINGS if finding != "nodule")} == set(PATCH_CLASSES)


def test_shares_ignore_what_lies_outside_the_crop() -> None:
    masks = np.ones((1, SIZE, SIZE), np.float32)
    masks[0, :128] = 0
    assert (
        _compute_class_shares(np.repeat(masks, len(PATCH_CLASSES), 0), box_from_xyxy((0.0, 0.0, 1.0, 0.5))).sum() == 0
    )
