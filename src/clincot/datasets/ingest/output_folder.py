"""Protection of the user's files from an ingest that would write over them."""

from __future__ import annotations

import re
from pathlib import Path

from clincot.datasets.folder import IMAGES, QUESTIONS, REFERENCES, STUDIES
from clincot.datasets.ingest.ingest_report import REPORT_FILE
from clincot.datasets.near_duplicates import IMAGE_HASHES
from clincot.datasets.reports import REPORTS_FILE
from clincot.errors import InvalidInput

IMAGE_NAME = re.compile(r"([0-9a-f]{32})\.(png|jpg)(\.partial)?")  # an image that an ingest stored, or began to store


def check_output_folder(out: Path, *sources: Path) -> None:
    """Check that an ingest may write to `out`. Raises InvalidInput naming the file that would be lost.

    An ingest may write to a folder that is missing or empty, to a data set that an ingest wrote, and to what an
    interrupted ingest left behind. `out` must not contain any of the `sources`.
    """
    for source in sources:
        if source.resolve().is_relative_to(out.resolve()):
            raise InvalidInput(
                f"--out {out} contains the source {source}, which would be overwritten; choose a folder of its own"
            )
    if (out / REPORT_FILE).is_file():
        return
    for folder in (out, *_list_folders(out)):
        foreign = _find_foreign_file(folder)
        if foreign is not None:
            raise InvalidInput(
                f"--out {out} is not empty and was not written by `clincot ingest` (it contains {foreign}); remove it "
                "or choose another folder"
            )


def _list_folders(out: Path) -> list[Path]:
    """Folders of splits, such as out/train."""
    if not out.is_dir():
        return []
    return sorted(path for path in out.iterdir() if path.is_dir() and path.name != IMAGES and not _is_partial(path))


def _is_partial(path: Path) -> bool:
    return path.name.endswith(".partial")


def _find_foreign_file(folder: Path) -> Path | None:
    """The first file that an interrupted ingest cannot have left in this folder."""
    images = folder / IMAGES
    stored = sorted(images.iterdir()) if images.is_dir() else []
    for path in stored:
        if IMAGE_NAME.fullmatch(path.name) is None:
            return path
    # Records get their names after the images are stored, so records without stored images are someone else's.
    records = {STUDIES, QUESTIONS, REFERENCES, REPORTS_FILE, IMAGE_HASHES} if stored else set()
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if not (path.is_dir() or _is_partial(path) or path.name in records):
            return path
    return None
