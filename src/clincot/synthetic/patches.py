"""Frames of a rendered radiograph with the finding of every patch, for dense pre-training.

The frames are cut and resized exactly as a policy sees them (images.view): the whole image as a grid at low
resolution, and square crops, half of them around a lesion.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from clincot.geometry import Box, box_from_xyxy, box_to_pixels
from clincot.images import render_view
from clincot.synthetic.rendering import Radiograph

FRAME_PX = 64
PATCHES_PER_SIDE = 8  # a side
PATCH_CLASSES = (
    "smooth",
    "spiculated",
    "cavitating",
    "pleural effusion",
    "consolidation",
    "pneumothorax",
    "cardiomegaly",
)


def tile_whole_image(grid: int = 2) -> list[Box]:
    return [
        box_from_xyxy((c / grid, r / grid, (c + 1) / grid, (r + 1) / grid)) for r in range(grid) for c in range(grid)
    ]


def cut_dense_frames(
    radiograph: Radiograph, rng: np.random.Generator, *, crops: int = 3
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """(N, 64, 64) pixels and (N, 8, 8, 7) shares of CLASSES: the 2 x 2 grid, then `crops` crops."""
    return _cut_frames(radiograph, tile_whole_image() + [_draw_crop(radiograph, rng) for _ in range(crops)])


def _cut_frames(radiograph: Radiograph, boxes: list[Box]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    image = Image.fromarray(radiograph.pixels).convert("RGB")
    frames = [np.asarray(render_view(image, box, FRAME_PX).convert("L").resize((FRAME_PX, FRAME_PX))) for box in boxes]
    size = radiograph.pixels.shape[0]
    masks = np.zeros((len(PATCH_CLASSES), size, size), np.float32)
    for lesion in radiograph.lesions:
        assert lesion.mask is not None
        place = masks[PATCH_CLASSES.index(lesion.margin or lesion.finding)]
        np.maximum(place, lesion.mask, out=place)
    return np.stack(frames), np.stack([_compute_class_shares(masks, box) for box in boxes])


def cut_nodule_frames(
    radiograph: Radiograph, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """As dense_frames, but two full-resolution crops a nodule and one of the grid's: margins are a few pixels wide and
    hardly weigh among the larger findings."""
    size = radiograph.pixels.shape[0]
    x, y = rng.uniform(0.1, 0.9, 2)
    boxes = [tile_whole_image()[int(rng.integers(4))], _fit_square(x, y, 0.25, size)]
    for lesion in radiograph.lesions:
        for _ in range(2 if lesion.finding == "nodule" else 1):
            cx, cy = (c + rng.uniform(-0.07, 0.07) for c in lesion.box.center)
            boxes.append(_fit_square(cx, cy, 0.25, size))
    return _cut_frames(radiograph, boxes)


def _draw_crop(radiograph: Radiograph, rng: np.random.Generator) -> Box:
    size = radiograph.pixels.shape[0]
    side = rng.choice([0.25, 0.25, 0.5])
    if radiograph.lesions and rng.random() < 0.6:
        lesion = radiograph.lesions[rng.integers(len(radiograph.lesions))]
        cx, cy = (c + rng.uniform(-0.08, 0.08) for c in lesion.box.center)
    else:
        cx, cy = rng.uniform(0.1, 0.9, 2)
    return _fit_square(cx, cy, float(side), size)


def _fit_square(cx: float, cy: float, side: float, size: int) -> Box:
    """A square around a centre, inside the image, its corner on a pixel."""
    x0, y0 = (round(min(max(c - side / 2, 0.0), 1.0 - side) * size) / size for c in (cx, cy))
    return box_from_xyxy((x0, y0, x0 + side, y0 + side))


def _compute_class_shares(masks: npt.NDArray[np.float32], box: Box) -> npt.NDArray[np.float32]:
    """(8, 8, C): share of every patch of a crop that the masks (C, size, size) cover."""
    size = masks.shape[1]
    x0, y0, x1, y1 = box_to_pixels(box, width=size, height=size)
    cut = masks[:, y0:y1, x0:x1]
    step = cut.shape[1] // PATCHES_PER_SIDE
    cut = cut[:, : step * PATCHES_PER_SIDE, : step * PATCHES_PER_SIDE]
    shares: npt.NDArray[np.float32] = cut.reshape(
        len(PATCH_CLASSES), PATCHES_PER_SIDE, step, PATCHES_PER_SIDE, step
    ).mean((2, 4))
    return shares.transpose(1, 2, 0)
