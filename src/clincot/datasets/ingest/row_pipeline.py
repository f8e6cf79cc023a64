"""The way from a source's parsed rows to dataset folders: images, splits, refusals and the report.

Rows are streamed in batches, so memory does not grow with the source. A reader supplies the parsed rows; everything
that is the same for all readers of rows is here.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from clincot.datasets.ingest.image_pool import ImageInspector, WorkerPool
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import (
    NO_ATTRIBUTION,
    DatasetAttribution,
    IngestReport,
    IngestTally,
    InvalidRow,
    write_report,
)
from clincot.datasets.ingest.writer import (
    FolderWriter,
    SourceImage,
    SourceQuestion,
    find_pairwise_leakage,
    open_dataset_folder,
    read_studies,
)
from clincot.datasets.joined_views import join_question
from clincot.datasets.splits import assign_split
from clincot.images import DEFAULT_LIMITS, ImageLimits
from clincot.jsonl import InvalidRecord
from clincot.records import Study

T = TypeVar("T")
FurtherImages = Literal["keep", "drop", "join"]
RowSplit = Literal["given", "by-row", "patient-disjoint"]
BATCH_SIZE = 512  # rows parsed at a time, so that their images can be decoded in parallel


@dataclass(frozen=True)
class ParsedRow:
    """A row of a source: its position, and a question or the reason why there is none."""

    file: str
    number: int  # line or position in the file, from 1
    content: SourceQuestion | InvalidRow


@dataclass(frozen=True)
class RowPlan:
    """How rows are split and stored.

    `split`: "given" writes one folder and keeps the rows' own split. "by-row" writes a folder per split that the rows
    name, such as out/train. "patient-disjoint" writes out/train and out/test and ignores the rows' own split: all
    images of a patient are in one of them, and an image without a patient counts as a patient of its own. `test_share`
    (expected share of patients in test), `seed` and `salt` (of the hash that assigns them) apply to this split only.
    `link_images`: hard-link images where the file system can, otherwise copy them. `further_images`: what becomes of
    the second and later images of a question: "join" shows all side by side in one picture, which rounds can use.
    """

    split: RowSplit = "given"
    test_share: float = 0.2
    seed: int = 0
    salt: str = "jsonl"
    link_images: bool = False
    further_images: FurtherImages = "keep"
    limits: ImageLimits = DEFAULT_LIMITS
    workers: int | None = None


def ingest_rows(
    read_rows: Callable[[IngestIndex], Iterator[ParsedRow]],
    *,
    source: Path,
    out: Path,
    tally: IngestTally,
    plan: RowPlan,
    published: DatasetAttribution = NO_ATTRIBUTION,
    list_notes: Callable[[], Iterable[str]] = tuple,
) -> IngestReport:
    """Write the rows of a source into dataset folders below `out`, with the report.

    `list_notes` is called after the last row was read. Raises TooManyRefused if more rows are refused than the tally
    allows; the other rows have been written by then. Raises InvalidRecord if no row is usable or a split stays empty;
    `out` is then unchanged.
    """
    with IngestIndex() as index, WorkerPool(plan.workers) as pool:
        images = ImageInspector(index, pool, plan.limits)
        with contextlib.ExitStack() as stack:

            def open_folder(name: str) -> FolderWriter:
                return stack.enter_context(open_dataset_folder(out / name, images, index, link_images=plan.link_images))

            router = _FolderRouter(plan, images, open_folder)
            adapt = stack.enter_context(_open_image_adapter(plan.further_images, out))
            for batch in iter_batches(map(adapt, read_rows(index)), BATCH_SIZE):
                images.inspect_all(_list_images(batch))
                for row in batch:
                    if isinstance(row.content, InvalidRow):
                        tally.refuse_row(row.file, row.number, str(row.content))
                    else:
                        tally.take_row(row.file, row.number, partial(router.add_question, row.content))
            if tally.kept == 0:
                raise tally.build_no_rows_error(source)
            router.check_no_split_is_empty(source)
            for folder in router.folders.values():
                folder.flush()
        names = sorted(router.folders, key=_rank_split)
        return write_report(
            out,
            tally,
            index,
            source=source,
            split=plan.split,
            published=published,
            folders=[router.folders[name].count_records(name) for name in names],
            leaks=find_pairwise_leakage(_list_splits(out, plan.split, names), index),
            notes=tuple(list_notes()),
        )


@contextlib.contextmanager
def _open_image_adapter(further: FurtherImages, out: Path) -> Iterator[Callable[[ParsedRow], ParsedRow]]:
    """Yield what turns a row about several images into one about the images that are wanted.

    Joined pictures are in a folder below `out` until the block ends; the dataset folder has links or copies by then.
    """
    if further != "join":
        yield lambda row: _drop_others(row) if further == "drop" else row
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".joined-", suffix=".partial", dir=out) as folder:
        yield partial(_join_others, folder=Path(folder))


def _drop_others(row: ParsedRow) -> ParsedRow:
    if isinstance(row.content, InvalidRow):
        return row
    return replace(row, content=replace(row.content, others=()))


def _join_others(row: ParsedRow, folder: Path) -> ParsedRow:
    if isinstance(row.content, InvalidRow):
        return row
    try:
        return replace(row, content=join_question(row.content, folder))
    except InvalidRow as error:
        return replace(row, content=error)


def _list_images(rows: Iterable[ParsedRow]) -> Iterator[Path]:
    for row in rows:
        if isinstance(row.content, SourceQuestion):
            yield from (picture.image for picture in row.content.pictures)


@dataclass(frozen=True)
class _FolderRouter:
    """Adds each question to the folder of its split; a folder is opened when its first question arrives."""

    plan: RowPlan
    images: ImageInspector
    open_folder: Callable[[str], FolderWriter]
    folders: dict[str, FolderWriter] = field(default_factory=dict)  # by name, relative to the output

    def add_question(self, row: SourceQuestion) -> str | None:
        """Add a question as `FolderWriter.add_question` does; raises InvalidRow if it names no valid split."""
        name = "."
        if self.plan.split == "by-row":
            name = row.picture.split
            if not re.fullmatch(r"\w[\w-]*", name):  # it becomes the name of a folder
                raise InvalidRow(f"split: expected a name such as train or test, got {name!r}. Give the row one")
        elif self.plan.split == "patient-disjoint":
            group = row.picture.patient or self.images.read_facts(row.picture.image).sha256
            name = assign_split(group, salt=self.plan.salt, seed=self.plan.seed, test_share=self.plan.test_share)
            row = _move_to_split(row, name)
        if name not in self.folders:
            self.folders[name] = self.open_folder(name)
        return self.folders[name].add_question(row)

    def check_no_split_is_empty(self, source: Path) -> None:
        """Raise InvalidRecord if a folder got no question, or a side of the patient-disjoint split has no folder."""
        split = self.plan.split
        empty = {"train", "test"} - set(self.folders) if split == "patient-disjoint" else set()
        empty |= {name for name, folder in self.folders.items() if folder.kinds.total() == 0}
        if empty:
            raise InvalidRecord(
                f"{source}: no row for {', '.join(sorted(empty))} in the {split} split; try another seed"
            )


def _move_to_split(row: SourceQuestion, name: str) -> SourceQuestion:
    others = tuple((replace(image, split=name), role) for image, role in row.others)
    return replace(row, picture=replace(row.picture, split=name), others=others)


def _list_splits(out: Path, split: RowSplit, folders: Iterable[str]) -> dict[str, Callable[[], Iterable[Study]]]:
    """Map every split that was written to a function that reads its studies."""
    if split != "given":
        return {name: partial(read_studies, out / name) for name in folders}
    named = {study.split for study in read_studies(out)} - {""}
    return {name: partial(read_studies, out, name) for name in sorted(named, key=_rank_split)}


def _rank_split(split: str) -> tuple[bool, bool, str]:
    """Sort key of a split's name: train first, test last."""
    return (split.lower().startswith("test"), not split.lower().startswith("train"), split)


def iter_batches(rows: Iterator[T], size: int) -> Iterator[list[T]]:
    """Yield the rows in lists of at most `size`."""
    while batch := list(islice(rows, size)):
        yield batch


def make_other_images(row: SourceImage, images: Iterable[tuple[Path, str, str]]) -> tuple[tuple[SourceImage, str], ...]:
    """Build the further images of a row from (path, name, role); they share its location, patient and split."""
    return tuple((replace(row, image=path, image_name=name), role) for path, name, role in images)


def register_row_id(index: IngestIndex, row_id: str, location: str, *, table: str = "") -> None:
    """Raise InvalidRow if another row of the table has this id; "" is none. table: its name, if there are several."""
    if not row_id:
        return
    digest = hashlib.blake2b(f"{table}\0{row_id}".encode(), digest_size=8).digest()
    first = index.register_id(digest, location)
    if first != location:
        raise InvalidRow(f"id: duplicate id {row_id!r}, first at {first}. Give every row its own id")
