"""Several views of one examination as one picture, side by side, so that a report question shows all of them.

A frontal and a lateral film answer one report together (R2Gen feeds both), and a question may be about a film and an
earlier one. Rounds show one image, so the views are joined without scaling, aligned at the top, on black. Boxes move
with their view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from clincot.datasets.ingest.ingest_report import InvalidRow
from clincot.datasets.ingest.writer import SourceQuestion
from clincot.geometry import Box, box_from_xyxy
from clincot.images import InvalidImage, open_image


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


def join_question(row: SourceQuestion, folder: Path) -> SourceQuestion:
    """The question about one picture that shows all of its images, with a sentence that says which is where.

    The picture is written below `folder`. Raises InvalidRow for a file that is no picture.
    """
    if not row.others:
        return row
    paths = [picture.image for picture in row.pictures]
    names = "\0".join(map(str, paths))
    joined = folder / f"{hashlib.sha256(names.encode()).hexdigest()[:32]}.png"
    try:
        boxes = join_views(paths, [row.boxes, *([()] * len(row.others))], joined)
    except InvalidImage as error:
        raise InvalidRow(f"image: {error}. Repair or replace the file, or remove the row") from None
    roles = ", ".join(role for _, role in row.others)
    name = " + ".join(picture.image_name for picture in row.pictures)
    return replace(
        row,
        picture=replace(row.picture, image=joined, image_name=name),
        question=f"{row.question}\nThe picture shows, from left to right: the image in question, {roles}.",
        boxes=boxes,
        others=(),
    )
