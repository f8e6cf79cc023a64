"""Frames of a rendered radiograph with the finding that each patch shows, for dense pre-training.

The frames are cut and resized exactly as a policy sees them (images.render_view): the whole image as a grid at low
resolution, and square crops, many of them around a lesion.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from clincot.geometry import Box, box_from_xyxy, box_to_pixels
from clincot.images import render_view
from clincot.synthetic.rendering import Radiograph

FRAME_PX = 64
PATCHES_PER_SIDE = 8  # of a frame
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
    """Return the `grid` x `grid` tiles of an image in reading order."""
    tiles = []
    for index in range(grid * grid):
        row, column = divmod(index, grid)
        tiles.append(box_from_xyxy((column / grid, row / grid, (column + 1) / grid, (row + 1) / grid)))
    return tiles


def cut_dense_frames(
    radiograph: Radiograph, rng: np.random.Generator, *, crops: int = 3
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Cut the 2 x 2 grid and `crops` random crops.

    Returns pixels (N, 64, 64) and the share of each patch that each of PATCH_CLASSES covers, (N, 8, 8, 7).
    """
    return _cut_frames(radiograph, tile_whole_image() + [_draw_crop(radiograph, rng) for _ in range(crops)])


def _cut_frames(radiograph: Radiograph, boxes: list[Box]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    image = Image.fromarray(radiograph.pixels).convert("RGB")
    frames = [np.asarray(render_view(image, box, FRAME_PX).convert("L").resize((FRAME_PX, FRAME_PX))) for box in boxes]
    size = radiograph.pixels.shape[0]
    masks = np.zeros((len(PATCH_CLASSES), size, size), np.float32)
    for lesion in radiograph.lesions:
        assert lesion.mask is not None
        class_mask = masks[PATCH_CLASSES.index(lesion.margin or lesion.finding)]
        np.maximum(class_mask, lesion.mask, out=class_mask)
    return np.stack(frames), np.stack([_compute_class_shares(masks, box) for box in boxes])


def cut_nodule_frames(
    radiograph: Radiograph, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Cut one tile of the grid, a random crop, two crops around each nodule and one around each other lesion.

    Returns as `cut_dense_frames` does. Margins are a few pixels wide and carry little weight among the larger findings,
    hence the extra crops at full resolution.
    """
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
    """Return a square around a centre, moved into the image, with its corner on a pixel.

    The centre and `side` are normalised; `size` is the image's side in pixels.
    """
    x0, y0 = (round(min(max(c - side / 2, 0.0), 1.0 - side) * size) / size for c in (cx, cy))
    return box_from_xyxy((x0, y0, x0 + side, y0 + side))


def _compute_class_shares(masks: npt.NDArray[np.float32], box: Box) -> npt.NDArray[np.float32]:
    """Return the share (8, 8, C) of each patch of a crop that the masks (C, size, size) cover."""
    size = masks.shape[1]
    x0, y0, x1, y1 = box_to_pixels(box, width=size, height=size)
    cut = masks[:, y0:y1, x0:x1]
    step = cut.shape[1] // PATCHES_PER_SIDE
    cut = cut[:, : step * PATCHES_PER_SIDE, : step * PATCHES_PER_SIDE]
    shares: npt.NDArray[np.float32] = cut.reshape(
        len(PATCH_CLASSES), PATCHES_PER_SIDE, step, PATCHES_PER_SIDE, step
    ).mean((2, 4))
    return shares.transpose(1, 2, 0)
