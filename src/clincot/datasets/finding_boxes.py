"""Ingest of boxes of findings: VinDr-CXR and MS-CXR as released, as questions whether a finding is there.

    VinDr-CXR (PhysioNet 1.0.0): annotations/annotations_train.csv, annotations_test.csv, train/ID.dicom, test/ID.dicom
        image_id, [rad_id,] class_name, x_min, y_min, x_max, y_max; "No finding" without a box
    MS-CXR (PhysioNet 0.1 and 1.1.0): MS_CXR_Local_Alignment_v….csv; the images are those of MIMIC-CXR(-JPG)
        dicom_id, category_name, label_text, path, x, y, w, h, image_width, image_height [, split]

Boxes are in pixels of the original image: of `image_width` and `image_height`, of `width` and `height`, or of the image
file. Images are PNG, JPEG or DICOM files named in the table or after the image's id; DICOM files are rendered as ingest
of DICOM does. Every finding of an image is one question with all of its boxes, whose answer is yes. VinDr-CXR's images
were read for every class, so for each image `absent` further classes, chosen by a hash, are asked about with the answer
no; MS-CXR does not say what is absent.

If a table names readers (rad_id), a finding counts if more than half of the image's readers marked it. One that fewer
marked is neither yes nor no, and is left out.
"""

from __future__ import annotations

import hashlib
import math
import sqlite3
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from clincot.datasets.dicom_image import UnusableDicom, measure_dicom, render_dicom
from clincot.datasets.ingest.archives import SourceTree
from clincot.datasets.ingest.image_pool import WorkerPool
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import IngestReport, IngestTally, InvalidRow
from clincot.datasets.ingest.output_folder import check_output_folder
from clincot.datasets.ingest.row_pipeline import ParsedRow, RowPlan, RowSplit, ingest_rows, iter_batches
from clincot.datasets.ingest.writer import SourceImage, SourceQuestion
from clincot.datasets.splits import check_test_share
from clincot.datasets.tables import Row, iter_table_rows
from clincot.geometry import Box, clip_pixel_box
from clincot.images import InvalidImage, measure_image
from clincot.jsonl import InvalidRecord

_NO_FINDING = "No finding"
_SUFFIXES, _DICOM_SUFFIXES = (".png", ".jpg", ".jpeg"), (".dicom", ".dcm")
_BATCH = 128  # images that are rendered together
_VINDR, _MS_CXR = (
    {"image_id", "class_name", "x_min", "y_min", "x_max", "y_max"},
    {"dicom_id", "category_name", "x", "w"},
)


@dataclass(frozen=True)
class _Mark:
    """One row with a box: who marked it, and its edges in pixels."""

    finding: str
    reader: str
    edges: tuple[float, float, float, float]


@dataclass(frozen=True)
class _MarkedImage:
    """What the tables say about one image."""

    id: str
    table: str  # name of the first table that names it
    number: int  # of its first row there
    path: str  # "" if the table does not name the file
    size: tuple[int, int] | None
    split: str
    readers: int
    marks: tuple[_Mark, ...]

    @property
    def patient(self) -> str:
        """The patient's folder in MIMIC-CXR's layout, files/p10/p10012261/…; "" in any other."""
        return next((part for part in Path(self.path).parts if part[:1] == "p" and len(part) == 9), "")


class _MarkStore:
    """The rows of the tables, grouped by image in a temporary database, so that memory does not grow with them."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -4000;"
            "CREATE TABLE images (id TEXT PRIMARY KEY, source TEXT, number INT, path TEXT, width INT, height INT,"
            " split TEXT);"
            "CREATE TABLE marks (image TEXT, finding TEXT, reader TEXT, x0 REAL, y0 REAL, x1 REAL, y1 REAL);"
            "CREATE TABLE readers (image TEXT, reader TEXT, PRIMARY KEY (image, reader)) WITHOUT ROWID;"
        )

    def add_image(self, image: tuple[str, str, int, str, int | None, int | None, str], reader: str) -> None:
        """Note an image, unless an earlier row did, and a reader of it."""
        self._db.execute("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?, ?, ?, ?)", image)
        self._db.execute("INSERT OR IGNORE INTO readers VALUES (?, ?)", (image[0], reader))

    def add_mark(self, image_id: str, mark: _Mark) -> None:
        self._db.execute(
            "INSERT INTO marks VALUES (?, ?, ?, ?, ?, ?, ?)", (image_id, mark.finding, mark.reader, *mark.edges)
        )

    def list_findings(self) -> list[str]:
        """All findings that a row marks, sorted."""
        return sorted(row[0] for row in self._db.execute("SELECT DISTINCT finding FROM marks"))

    def iter_images(self) -> Iterator[_MarkedImage]:
        """Yield the images in the order of their first rows."""
        self._db.execute("CREATE INDEX IF NOT EXISTS by_image ON marks (image)")
        images = self._db.execute("SELECT * FROM images ORDER BY rowid")
        for image_id, table, number, path, width, height, split in images:
            rows = self._db.execute("SELECT * FROM marks WHERE image = ? ORDER BY rowid", (image_id,))
            marks = tuple(_Mark(finding, reader, tuple(edges)) for _, finding, reader, *edges in rows)
            (readers,) = self._db.execute("SELECT count(*) FROM readers WHERE image = ?", (image_id,)).fetchone()
            size = (width, height) if width and height else None
            yield _MarkedImage(image_id, table, number, path, size, split, readers, marks)


@dataclass(frozen=True)
class _BoxTable:
    """A table, and the split of its rows if its name says so."""

    path: Path
    split: str = ""


def ingest_boxes(  # noqa: PLR0913 (one keyword per command-line option)
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    absent: int = 1,
    split: RowSplit = "given",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    workers: int | None = None,
) -> IngestReport:
    """Read a table, or the folder of a release, into the dataset folder `out`.

    `images`: folder of the images; None: that of the release or of the table. `absent`: questions about absent findings
    for each image of VinDr-CXR. `split`, `test_share` and `seed` as in RowPlan. Raises InvalidRecord if the table is
    another one; TooManyRefused if more images are refused than `allow_refused`; the others have been written by then.
    """
    check_test_share(test_share)
    tables, folder = _find_tables(source)
    folder = images or folder
    check_output_folder(out, source, *([images] if images is not None else []))
    if not folder.is_dir():
        raise InvalidRecord(f"{folder}: expected a folder of images, but it does not exist")
    out.mkdir(parents=True, exist_ok=True)
    notes = Counter[str]()
    with (
        tempfile.TemporaryDirectory(prefix=".boxes-", suffix=".partial", dir=out) as scratch,
        WorkerPool(workers) as pool,
    ):
        store = _MarkStore()
        all_read = True
        for table in tables:
            all_read = _read_marks(table, store)  # the tables of a release are alike
        finder = _ImageFinder(folder, Path(scratch), pool)
        classes = store.list_findings() if all_read else []

        def read_rows(index: IngestIndex) -> Iterator[ParsedRow]:
            for batch in iter_batches(store.iter_images(), _BATCH):
                for image, found in zip(batch, finder.find_all(batch), strict=True):
                    for content in _build_questions(image, found, notes, classes, absent):
                        yield ParsedRow(image.table, image.number, content)

        return ingest_rows(
            read_rows,
            source=source,
            out=out,
            tally=IngestTally(allow_refused),
            plan=RowPlan(split, test_share, seed, salt="boxes", link_images=True, workers=workers),
            list_notes=lambda: [f"{note}: {count}" for note, count in sorted(notes.items())],
        )


def _find_tables(source: Path) -> tuple[list[_BoxTable], Path]:
    """The tables of a source, and the folder in which its images are; raises InvalidRecord."""
    if source.is_file():
        in_release = source.parent.name == "annotations"
        return [_BoxTable(source)], source.parent.parent if in_release else source.parent
    parts = [_BoxTable(source / "annotations" / f"annotations_{part}.csv", part) for part in ("train", "test")]
    tables = [table for table in parts if table.path.is_file()]
    if not tables:
        versions = sorted(source.glob("MS_CXR_Local_Alignment_v*.csv"))
        tables = [_BoxTable(path) for path in versions[-1:]]
    if not tables:
        raise InvalidRecord(
            f"{source}: expected a table, or a folder with annotations/annotations_train.csv (VinDr-CXR) or"
            " MS_CXR_Local_Alignment_v….csv (MS-CXR) in it"
        )
    return tables, source


def _read_marks(table: _BoxTable, store: _MarkStore) -> bool:
    """Store the rows of a table, and return whether unmarked classes are absent; raises InvalidRecord for a bad row."""
    all_read = True
    for number, row in iter_table_rows(table.path):
        where = f"{table.path}: row {number}"
        if isinstance(row, InvalidRecord):
            raise InvalidRecord(f"{where}: {row}")
        if not (row.keys() >= _VINDR or row.keys() >= _MS_CXR):
            raise InvalidRecord(
                f"{where}: expected the columns of VinDr-CXR ({', '.join(sorted(_VINDR))}) or MS-CXR"
                f" ({', '.join(sorted(_MS_CXR))}, …), got {', '.join(row)}"
            )
        all_read = "image_id" in row
        image_id = str(row["image_id"] if all_read else row["dicom_id"])
        width, height = (row.get(f"image_{name}") or row.get(name) for name in ("width", "height"))
        size = (int(width), int(height)) if width and height else (None, None)
        split, reader = str(row.get("split") or table.split), str(row.get("rad_id") or "")
        path = str(row.get("path") or "")
        store.add_image((image_id, table.path.name, number, path, *size, split), reader)
        finding = str(row["class_name"] if all_read else row["category_name"])
        if finding != _NO_FINDING:
            store.add_mark(image_id, _Mark(finding, reader, _read_edges(row, where)))
    return all_read


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


@dataclass(frozen=True)
class _FoundImage:
    """An image file in a format that a data set stores, and the size in pixels that boxes may refer to."""

    path: Path
    size: tuple[int, int]


class _ImageFinder:
    """Finds the files of images, and renders those that are DICOM, in parallel."""

    def __init__(self, folder: Path, scratch: Path, pool: WorkerPool) -> None:
        self._folder, self._scratch, self._pool = folder, scratch, pool
        self._tree: SourceTree | None = None

    def find_all(self, images: Sequence[_MarkedImage]) -> list[_FoundImage | InvalidRow]:
        """The file of each image, or why there is none."""
        found = [self._find(image) for image in images]
        rendered = self._scratch / "rendered"
        rendered.mkdir(exist_ok=True)
        jobs = [
            (path, rendered / f"{hashlib.sha256(image.id.encode()).hexdigest()[:32]}.png")
            for image, path in zip(images, found, strict=True)
            if isinstance(path, Path)
        ]
        to_render = sum(path.suffix.lower() in _DICOM_SUFFIXES for path, _ in jobs)
        results = self._pool.run_jobs(_open_image, jobs, heavy=to_render)
        return [path if isinstance(path, InvalidRow) else next(results) for path in found]

    def _find(self, image: _MarkedImage) -> Path | InvalidRow:
        stem = str(PurePosixPath(image.path).with_suffix("")) if image.path else image.id
        names = [image.path] if image.path else []
        names += [stem + suffix for suffix in (*_SUFFIXES, *_DICOM_SUFFIXES)]
        # Listing a tree of hundreds of thousands of files takes minutes, so the places of the releases come first.
        for name in names:
            parts = PurePosixPath(name).parts
            for place in (self._folder, self._folder / image.split) if image.split else (self._folder,):
                if ".." not in parts and not PurePosixPath(name).is_absolute() and (place / name).is_file():
                    return place / name
        if self._tree is None:
            self._tree = SourceTree.open_source(self._folder, self._scratch)
        name = next((name for name in names if self._tree.find_file(name)), names[0])
        try:
            return self._tree.read_image_path(name)
        except InvalidRow as error:
            return error


def _open_image(job: tuple[Path, Path]) -> _FoundImage | InvalidRow:
    """Measure an image, after rendering it to a PNG file if it is DICOM."""
    path, png = job
    try:
        if path.suffix.lower() not in _DICOM_SUFFIXES:
            return _FoundImage(path, measure_image(path))
        # Its size before pixels are made square: boxes are in the pixels of the file. The salt is of no account, as
        # the hashes are not used: patients of these sets are those that their tables name.
        size = measure_dicom(path)
        render_dicom(path, b"boxes").image.save(png, format="PNG", compress_level=2)
        return _FoundImage(png, size)
    except (InvalidImage, UnusableDicom) as error:
        return InvalidRow(f"image: {error}")


def _build_questions(
    image: _MarkedImage,
    found: _FoundImage | InvalidRow,
    notes: Counter[str],
    classes: Sequence[str],
    absent: int,
) -> Iterator[SourceQuestion | InvalidRow]:
    marks: defaultdict[str, list[_Mark]] = defaultdict(list)
    for mark in image.marks:
        marks[mark.finding].append(mark)
    try:
        if isinstance(found, InvalidRow):
            raise found
        size = image.size or found.size
        boxes = {finding: _convert_boxes(one, size) for finding, one in marks.items()}
    except InvalidRow as error:
        yield InvalidRow(str(error))
        return
    picture = SourceImage(
        location=f"image {image.id}",
        image=found.path,
        image_name=image.id,
        modality="chest x-ray",
        patient=image.patient,
        split=image.split,
    )
    for finding, marked in marks.items():
        if 2 * len({mark.reader for mark in marked}) <= image.readers:
            notes["findings that at most half of an image's readers marked, left out"] += 1
            continue
        yield _ask(picture, finding, "yes", boxes[finding])
    missing = [name for name in classes if name not in marks]
    for finding in sorted(missing, key=lambda name: hashlib.sha256(f"{image.id}:{name}".encode()).digest())[:absent]:
        yield _ask(picture, finding, "no", ())


def _convert_boxes(marks: Sequence[_Mark], size: tuple[int, int]) -> tuple[Box, ...]:
    """Normalise boxes, cut at the image's edges; raises InvalidRow for a box outside it."""
    width, height = size
    boxes = []
    for mark in marks:
        box = clip_pixel_box(*mark.edges, width=width, height=height)
        if box is None:
            raise InvalidRow(f"boxes: {mark.edges} is outside the image of {width} x {height} pixels")
        boxes.append(box)
    return tuple(dict.fromkeys(boxes))


def _ask(picture: SourceImage, finding: str, answer: str, boxes: tuple[Box, ...]) -> SourceQuestion:
    text = f"Is there {finding.lower() if not finding.isupper() else finding}?"
    name = f"{picture.image_name}:{finding}"
    return SourceQuestion(
        picture, text, answer, "closed", boxes, topic="presence", finding=finding.lower(), source_id=name
    )
