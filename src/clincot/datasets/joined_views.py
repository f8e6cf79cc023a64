"""Several views of one examination as one picture, side by side, so that a report question shows all of them.

A frontal and a lateral film answer one report together (R2Gen feeds both). Models and records here know one image a
study, so the views are joined without scaling, aligned at the top, on black. Boxes move with their view.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from clincot.geometry import Box, box_from_xyxy
from clincot.images import open_image


def join_views(paths: Sequence[Path], boxes: Sequence[Sequence[Box]], out: Path) -> tuple[Box, ...]:
    """Write the views side by side as a PNG file; return the boxes of all views in it.

    boxes: of each view, normalised. Raises InvalidImage for a file that is no picture.
    """
    views = [open_image(path) for path in paths]
    width, height = sum(view.width for view in views), max(view.height for view in views)
    joined = Image.new("RGB", (width, height))
    moved: list[Box] = []
    left = 0
    for view, view_boxes in zip(views, boxes, strict=True):
        joined.paste(view, (left, 0))
        across, down = view.width / width, view.height / height
        for box in view_boxes:
            x0, x1 = (left / width + edge * across for edge in (box.x0, box.x1))
            moved.append(box_from_xyxy((x0, box.y0 * down, x1, box.y1 * down)))
        left += view.width
    joined.save(out)
    return tuple(dict.fromkeys(moved))
