"""Ingest of plain JSONL, the format for your own data: one question per line, images in files next to it.

    {"image": "scans/17.png", "question": "Is there an effusion?", "answer": "yes",
     "kind": "closed", "boxes": [[0.1, 0.5, 0.4, 0.9]], "modality": "chest x-ray", "patient": "p17",
     "split": "train", "topic": "presence", "finding": "effusion", "id": "17-1"}

Only the first three fields are required. `image` is relative to the JSONL file. `boxes` are normalised xyxy corners in
the image as it is displayed (after its EXIF rotation). Without `kind`, a question with the answer yes or no is closed
and any other question is open; kind "report" asks for a whole report.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from tqdm import tqdm

from clincot.datasets.closed_answers import read_polarity
from clincot.datasets.ingest.image_pool import ImageInspector, WorkerPool
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import IngestReport, IngestTally, InvalidRow, write_report
from clincot.datasets.ingest.output_folder import check_output_folder
from clincot.datasets.ingest.writer import (
    FolderWriter,
    SourceImage,
    SourceQuestion,
    find_pairwise_leakage,
    open_dataset_folder,
    read_studies,
)
from clincot.datasets.splits import assign_split, check_test_share
from clincot.errors import InvalidInput
from clincot.geometry import Box
from clincot.images import DEFAULT_LIMITS, ImageLimits
from clincot.jsonl import InvalidRecord, format_validation_error, parse_row
from clincot.records import Study

Split = Literal["given", "by-row", "patient-disjoint"]
_BATCH_SIZE = 512  # rows parsed at a time, so that their images can be decoded in parallel

_REMEDIES = {
    "image": "Name a PNG or JPEG file, relative to the JSONL file",
    "question": "Write the question as text",
    "answer": "Write the answer as text or a whole number",
    "kind": 'Write "closed", "open" or "report", or leave it out',
    "boxes": "Write a list of [x0, y0, x1, y1], each from 0 to 1: pixels divided by the image's width or height",
}


def _convert_number_to_text(value: Any) -> Any:
    # Only integers: a Boolean is an int in Python, and 2.50 would lose its last digit. Both are refused later.
    return str(value) if type(value) is int else value


def _normalize_kind(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _parse_corners(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 4 and all(type(edge) in (int, float) for edge in value):
        return dict(zip(("x0", "y0", "x1", "y1"), value, strict=True))
    raise ValueError("expected a box of four numbers [x0, y0, x1, y1]")


OptionalText = Annotated[str, StringConstraints(strip_whitespace=True)]
RequiredText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class JsonlRow(BaseModel):
    """A line of the source; the module's docstring describes the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image: RequiredText
    question: RequiredText
    answer: Annotated[RequiredText, BeforeValidator(_convert_number_to_text)]
    kind: Annotated[Literal["closed", "open", "report"] | None, BeforeValidator(_normalize_kind)] = None
    boxes: Annotated[tuple[Annotated[Box, BeforeValidator(_parse_corners)], ...], Field(strict=False)] = ()
    modality: OptionalText = ""
    patient: Annotated[OptionalText, BeforeValidator(_convert_number_to_text)] = ""
    split: OptionalText = ""
    topic: OptionalText = ""
    finding: OptionalText = ""
    id: Annotated[OptionalText, BeforeValidator(_convert_number_to_text)] = ""

    @property
    def question_kind(self) -> Literal["closed", "open", "report"]:
        """`kind`, or if it is missing the kind that the answer suggests."""
        if self.kind is not None:
            return self.kind
        return "closed" if read_polarity(self.answer) is not None else "open"


def ingest_jsonl(  # noqa: PLR0913 (one keyword per command-line option)
    source: Path,
    out: Path,
    *,
    split: Split = "given",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    link_images: bool = False,
    limits: ImageLimits = DEFAULT_LIMITS,
    workers: int | None = None,
) -> IngestReport:
    """Read the JSONL file `source` into the dataset folder `out`. Rows are streamed, so memory stays constant.

    `split`: "given" writes one folder and keeps the rows' own `split`. "by-row" writes a folder per split that the
    rows name, such as out/train. "patient-disjoint" writes out/train and out/test and ignores the rows' own `split`:
    all images of a patient are in one of them, and an image without a patient counts as a patient of its own.
    `test_share` (expected share of patients in test) and `seed` apply to this split only.

    `link_images`: hard-link images where the file system can, otherwise copy them.

    Refused rows are listed in the report. Raises TooManyRefused if there are more of them than `allow_refused`; the
    other rows have been written by then. Raises InvalidRecord if the file is missing, cut off or without a usable row,
    or if a split stays empty; `out` is then unchanged.
    """
    if split not in get_args(Split):
        raise InvalidInput(f"split: expected one of {', '.join(get_args(Split))}, got {split!r}")
    check_test_share(test_share)
    if not source.is_file():
        raise InvalidRecord(f"{source}: expected a JSONL file, but the file does not exist")
    check_output_folder(out, source)
    tally = IngestTally(allow_refused)
    with IngestIndex() as index, WorkerPool(workers) as pool:
        images = ImageInspector(index, pool, limits)
        with contextlib.ExitStack() as stack:

            def open_folder(name: str) -> FolderWriter:
                return stack.enter_context(open_dataset_folder(out / name, images, index, link_images=link_images))

            router = _FolderRouter(split, test_share, seed, images, open_folder)
            for batch in _iter_batches(_read_lines(source), _BATCH_SIZE):
                parsed = [(number, _try_parse_row(line, number, source, index)) for number, line in batch]
                images.inspect_all(row.picture.image for _, row in parsed if isinstance(row, SourceQuestion))
                for number, row in parsed:
                    if isinstance(row, InvalidRow):
                        tally.refuse_row(str(source), number, str(row))
                    else:
                        tally.take_row(str(source), number, partial(router.add_question, row))
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
            split=split,
            folders=[router.folders[name].count_records(name) for name in names],
            leaks=find_pairwise_leakage(_list_splits(out, split, names), index),
        )


@dataclass(frozen=True)
class _FolderRouter:
    """Adds each question to the folder of its split; a folder is opened when its first question arrives."""

    split: Split
    test_share: float
    seed: int
    images: ImageInspector
    open_folder: Callable[[str], FolderWriter]
    folders: dict[str, FolderWriter] = field(default_factory=dict)  # by name, relative to the output

    def add_question(self, row: SourceQuestion) -> str | None:
        """Add a question as `FolderWriter.add_question` does; raises InvalidRow if it names no valid split."""
        name = "."
        if self.split == "by-row":
            name = row.picture.split
            if not re.fullmatch(r"\w[\w-]*", name):  # it becomes the name of a folder
                raise InvalidRow(f"split: expected a name such as train or test, got {name!r}. Give the row one")
        elif self.split == "patient-disjoint":
            group = row.picture.patient or self.images.read_facts(row.picture.image).sha256
            name = assign_split(group, salt="jsonl", seed=self.seed, test_share=self.test_share)
            row = replace(row, picture=replace(row.picture, split=name))
        if name not in self.folders:
            self.folders[name] = self.open_folder(name)
        return self.folders[name].add_question(row)

    def check_no_split_is_empty(self, source: Path) -> None:
        """Raise InvalidRecord if a folder got no question, or a side of the patient-disjoint split has no folder."""
        empty = {"train", "test"} - set(self.folders) if self.split == "patient-disjoint" else set()
        empty |= {name for name, folder in self.folders.items() if folder.kinds.total() == 0}
        if empty:
            raise InvalidRecord(
                f"{source}: no row for {', '.join(sorted(empty))} in the {self.split} split; try another seed"
            )


def _list_splits(out: Path, split: Split, folders: Iterable[str]) -> dict[str, Callable[[], Iterable[Study]]]:
    """Map every split that was written to a function that reads its studies."""
    if split != "given":
        return {name: partial(read_studies, out / name) for name in folders}
    named = {study.split for study in read_studies(out)} - {""}
    return {name: partial(read_studies, out, name) for name in sorted(named, key=_rank_split)}


def _rank_split(split: str) -> tuple[bool, bool, str]:
    """Sort key of a split's name: train first, test last."""
    return (split.lower().startswith("test"), not split.lower().startswith("train"), split)


def _iter_batches(lines: Iterator[tuple[int, bytes]], size: int) -> Iterator[list[tuple[int, bytes]]]:
    while batch := list(islice(lines, size)):
        yield batch


def _try_parse_row(line: bytes, number: int, source: Path, index: IngestIndex) -> SourceQuestion | InvalidRow:
    try:
        return _parse_row(line, number, source, index)
    except InvalidRow as error:
        return error


def _parse_row(line: bytes, number: int, source: Path, index: IngestIndex) -> SourceQuestion:
    location = f"row {number}"
    try:
        row = JsonlRow.model_validate(parse_row(line, where="this line"))
    except ValidationError as error:
        fields = [str(item["loc"][0]) for item in error.errors() if item["loc"]]
        remedies = dict.fromkeys(_REMEDIES.get(name, _suggest_remedy(name)) for name in fields)
        raise InvalidRow(". ".join((format_validation_error(error), *remedies))) from None
    except InvalidRecord as error:
        raise InvalidRow(f"{error}. Write one JSON object per line") from None
    if row.id:
        first = index.register_id(hashlib.blake2b(row.id.encode(), digest_size=8).digest(), location)
        if first != location:
            raise InvalidRow(f"id: duplicate id {row.id!r}, first at {first}. Give every row its own id")
    return SourceQuestion(
        picture=SourceImage(
            location=location,
            image=source.parent / row.image,
            image_name=row.image,
            modality=row.modality,
            patient=row.patient,
            split=row.split,
        ),
        question=row.question,
        answer=row.answer,
        kind=row.question_kind,
        boxes=row.boxes,
        topic=row.topic,
        finding=row.finding,
        source_id=row.id or f"{source.name}:{number}",
    )


def _suggest_remedy(field: str) -> str:
    if field in JsonlRow.model_fields:
        return f"Write {field} as text"
    return f"The fields are {', '.join(JsonlRow.model_fields)}"


def _read_lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) of lines that are not blank.

    The last line may lack its newline only if it is valid JSON. If it is not, the file was cut off, other lines may be
    missing as well, and InvalidRecord is raised.
    """
    size = source.stat().st_size
    with (
        source.open("rb") as file,
        tqdm(total=size, unit="B", unit_scale=True, desc=f"ingest {source.name}", disable=None) as progress,
    ):
        for number, line in enumerate(file, start=1):
            progress.update(len(line))
            if not line.strip():
                continue
            if not line.endswith(b"\n"):
                try:
                    parse_row(line, where=f"{source}:{number}")
                except InvalidRecord as error:
                    raise InvalidRecord(
                        f"{error}: the file ends in the middle of a line; it was cut off. Export or download it again"
                    ) from None
            yield number, line
