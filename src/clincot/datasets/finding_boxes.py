"""Ingest of boxes of findings: VinDr-CXR's and MS-CXR's tables, as questions whether a finding is there.

    VinDr-CXR (PhysioNet 1.0.0): image_id, [rad_id,] class_name, x_min, y_min, x_max, y_max; "No finding" without a box
    MS-CXR (PhysioNet 0.1): dicom_id, category_name, label_text, path, x, y, w, h, image_width, image_height [, split]

Boxes are in pixels of the original image: of `image_width` and `image_height`, of `width` and `height`, or of the image
file. Images are PNG or JPEG files named in the table or after the image's id. Every finding of an image is one question
with all of its boxes, whose answer is yes. VinDr-CXR's images were read for every class, so for each image `absent`
further classes, chosen by a hash, are asked about with the answer no; MS-CXR does not say what is absent.

If a table names readers (rad_id), a finding counts if more than half of the image's readers marked it. One that fewer
marked is neither yes nor no, and is left out.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from clincot.datasets.ingest.archives import SourceTree
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import IngestReport, IngestTally, InvalidRow
from clincot.datasets.ingest.output_folder import check_output_folder
from clincot.datasets.ingest.row_pipeline import ParsedRow, RowPlan, RowSplit, ingest_rows
from clincot.datasets.ingest.writer import SourceImage, SourceQuestion
from clincot.datasets.splits import check_test_share
from clincot.datasets.tables import Row, iter_table_rows
from clincot.geometry import Box, clip_pixel_box
from clincot.images import InvalidImage, measure_image
from clincot.jsonl import InvalidRecord

_NO_FINDING = "No finding"
_SUFFIXES = (".png", ".jpg", ".jpeg")
_VINDR, _MS_CXR = (
    {"image_id", "class_name", "x_min", "y_min", "x_max", "y_max"},
    {"dicom_id", "category_name", "x", "w"},
)


@dataclass
class _MarkedImage:
    """What a table says about one image."""

    number: int  # of its first row
    path: str  # "" if the table does not name the file
    size: tuple[int, int] | None
    split: str
    patient: str
    readers: set[str] = field(default_factory=set)
    marks: defaultdict[str, list[tuple[str, tuple[float, float, float, float]]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # {finding: [(reader, pixel edges)]}


def ingest_boxes(  # noqa: PLR0913 (one keyword per command-line option)
    source: Path,
    out: Path,
    *,
    absent: int = 1,
    split: RowSplit = "given",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
) -> IngestReport:
    """Read the table `source`, next to its images, into the dataset folder `out`.

    `absent`: questions about absent findings for each image of VinDr-CXR. `split`, `test_share` and `seed` as in
    RowPlan. Raises InvalidRecord if the table is another one; TooManyRefused if more images are refused than
    `allow_refused`; the others have been written by then.
    """
    check_test_share(test_share)
    check_output_folder(out, source)
    out.mkdir(parents=True, exist_ok=True)
    notes = Counter[str]()
    with tempfile.TemporaryDirectory(prefix=".boxes-", suffix=".partial", dir=out) as scratch:
        tree = SourceTree.open_source(source, Path(scratch))
        images, all_read = _read_marks(source)
        classes = sorted(set().union(*(image.marks for image in images.values()))) if all_read else []

        def read_rows(index: IngestIndex) -> Iterator[ParsedRow]:
            for image_id, image in images.items():
                for content in _build_questions(image_id, image, tree, notes, classes, absent):
                    yield ParsedRow(source.name, image.number, content)

        return ingest_rows(
            read_rows,
            source=source,
            out=out,
            tally=IngestTally(allow_refused),
            plan=RowPlan(split, test_share, seed, salt="boxes", link_images=True, workers=workers),
            list_notes=lambda: [f"{note}: {count}" for note, count in sorted(notes.items())],
        )


def _read_marks(source: Path) -> tuple[dict[str, _MarkedImage], bool]:
    """Return {image id: what is marked} and whether unmarked classes are absent; raises InvalidRecord for a bad row."""
    images: dict[str, _MarkedImage] = {}
    all_read = True
    for number, row in iter_table_rows(source):
        where = f"{source}: row {number}"
        if isinstance(row, InvalidRecord):
            raise InvalidRecord(f"{where}: {row}")
        if not (row.keys() >= _VINDR or row.keys() >= _MS_CXR):
            raise InvalidRecord(
                f"{where}: expected the columns of VinDr-CXR ({', '.join(sorted(_VINDR))}) or MS-CXR"
                f" ({', '.join(sorted(_MS_CXR))}, …), got {', '.join(row)}"
            )
        all_read = "image_id" in row
        image_id = str(row["image_id"] if all_read else row["dicom_id"])
        image = images.setdefault(image_id, _start_image(row, number))
        reader = str(row.get("rad_id") or "")
        image.readers.add(reader)
        finding = str(row["class_name"] if all_read else row["category_name"])
        if finding != _NO_FINDING:
            image.marks[finding].append((reader, _read_edges(row, where)))
    return images, all_read


def _start_image(row: Row, number: int) -> _MarkedImage:
    path = str(row.get("path") or "")
    patient = next((part for part in Path(path).parts if part[:1] == "p" and len(part) == 9), "")  # MIMIC-CXR's
    width, height = (row.get(f"image_{name}") or row.get(name) for name in ("width", "height"))
    size = (int(width), int(height)) if width and height else None
    return _MarkedImage(number, path, size, str(row.get("split") or ""), patient)


def _read_edges(row: Row, where: str) -> tuple[float, float, float, float]:
    """The pixel edges x0, y0, x1, y1 of a row; raises InvalidRecord."""
    names = ("x_min", "y_min", "x_max", "y_max") if "x_min" in row else ("x", "y", "w", "h")
    try:
        x0, y0, x1, y1 = (float(row[name]) for name in names)
    except (KeyError, TypeError, ValueError):
        raise InvalidRecord(
            f"{where}: expected numbers in {', '.join(names)}, got {[row.get(n) for n in names]}"
        ) from None
    if "x_min" not in row:
        x1, y1 = x0 + x1, y0 + y1
    if not all(map(math.isfinite, (x0, y0, x1, y1))) or x1 <= x0 or y1 <= y0:
        raise InvalidRecord(f"{where}: expected a box with an area, got {(x0, y0, x1, y1)}")
    return x0, y0, x1, y1


def _build_questions(
    image_id: str,
    image: _MarkedImage,
    tree: SourceTree,
    notes: Counter[str],
    classes: list[str],
    absent: int,
) -> Iterator[SourceQuestion | InvalidRow]:
    try:
        path = _find_image(image_id, image, tree)
        size = image.size or measure_image(path)
        found = {finding: _convert_boxes(marks, size) for finding, marks in image.marks.items()}
    except (InvalidRow, InvalidImage) as error:
        yield InvalidRow(str(error))
        return
    picture = SourceImage(
        location=f"image {image_id}",
        image=path,
        image_name=image_id,
        modality="chest x-ray",
        patient=image.patient,
        split=image.split,
    )
    for finding, boxes in found.items():
        readers = {reader for reader, _ in image.marks[finding]}
        if 2 * len(readers) <= len(image.readers):
            notes["findings that at most half of an image's readers marked, left out"] += 1
            continue
        yield _ask(picture, finding, "yes", boxes)
    missing = [name for name in classes if name not in image.marks]
    for finding in sorted(missing, key=lambda name: hashlib.sha256(f"{image_id}:{name}".encode()).digest())[:absent]:
        yield _ask(picture, finding, "no", ())


def _find_image(image_id: str, image: _MarkedImage, tree: SourceTree) -> Path:
    names = [image.path] if image.path else [image_id + suffix for suffix in _SUFFIXES]
    name = next((name for name in names if tree.find_file(name)), names[0])
    return tree.read_image_path(name)


def _convert_boxes(
    marks: list[tuple[str, tuple[float, float, float, float]]], size: tuple[int, int]
) -> tuple[Box, ...]:
    """Normalise boxes, cut at the image's edges; raises InvalidRow for a box outside it."""
    width, height = size
    boxes = []
    for _, edges in marks:
        box = clip_pixel_box(*edges, width=width, height=height)
        if box is None:
            raise InvalidRow(f"boxes: {edges} is outside the image of {width} x {height} pixels")
        boxes.append(box)
    return tuple(dict.fromkeys(boxes))


def _ask(picture: SourceImage, finding: str, answer: str, boxes: tuple[Box, ...]) -> SourceQuestion:
    text = f"Is there {finding.lower() if not finding.isupper() else finding}?"
    name = f"{picture.image_name}:{finding}"
    return SourceQuestion(
        picture, text, answer, "closed", boxes, topic="presence", finding=finding.lower(), source_id=name
    )
