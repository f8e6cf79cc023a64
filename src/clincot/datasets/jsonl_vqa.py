"""Ingest of plain JSONL: one question a line, images beside it. The way in for data of one's own.

    {"image": "scans/17.png", "question": "Is there an effusion?", "answer": "yes",
     "kind": "closed", "boxes": [[0.1, 0.5, 0.4, 0.9]], "modality": "chest x-ray", "patient": "p17",
     "split": "train", "topic": "presence", "finding": "effusion", "id": "17-1"}

Only the first three are needed. `image` is relative to the JSONL file. `boxes` are normalised xyxy of the
upright image. Without `kind`, a question whose answer is yes or no is closed and any other open;
kind "report" asks for a whole report.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from tqdm import tqdm

from clincot.datasets.ingest.image_pool import ImageInspector, WorkerPool
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import IngestReport, IngestTally, InvalidRow, write_report
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
_BATCH_SIZE = 512  # rows parsed ahead, so that their images are decoded in parallel

_REMEDIES = {
    "image": "Name a PNG or JPEG file, relative to the JSONL file",
    "question": "Write the question as text",
    "answer": "Write the answer as text or a whole number",
    "kind": 'Write "closed", "open" or "report", or leave it out',
    "boxes": "Write a list of [x0, y0, x1, y1], each from 0 to 1: pixels divided by the image's width or height",
}


def _convert_number_to_text(value: Any) -> Any:
    # true is an int to Python, and 2.50 would lose its last digit: those stay what they are, and are refused
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
    """A line of the source."""

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
        if self.kind is not None:
            return self.kind
        return "closed" if self.answer.lower().rstrip(".") in ("yes", "no") else "open"


def ingest_jsonl(
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
    """Read `source` (JSONL) into the dataset folder `out`; streams, so its size is bounded by the disk only.

    With split "by-row" into a folder for each split that the rows name, out/train for "train". With
    "patient-disjoint" into out/train and out/test: a patient's images are all on one side, and an
    image whose row names no patient is a patient of its own; the rows' own `split` is then not used.

    Bad rows are left out and listed in the report; more of them than `allow_refused` raise TooManyRefused when
    the others are in place. A file that was cut off raises BadRecord; then `out` keeps what it had. `link_images`
    hard-links images where the file system can, and copies otherwise.
    """
    if split not in get_args(Split):
        raise InvalidInput(f"split is one of {', '.join(get_args(Split))}, got {split!r}")
    check_test_share(test_share)
    if not source.is_file():
        raise InvalidRecord(f"{source}: expected a JSONL file, but there is no such file")
    tally = IngestTally(allow_refused)
    with IngestIndex() as ledger, WorkerPool(workers) as pool:
        images = ImageInspector(ledger, pool, limits)
        with contextlib.ExitStack() as stack:
            folders = dict[str, FolderWriter]()

            def add(row: SourceQuestion) -> str | None:
                name = "."
                if split == "by-row":
                    name = row.picture.split
                    if not re.fullmatch(r"\w[\w-]*", name):
                        raise InvalidRow(
                            f"split: expected a name such as train or test, got {name!r}. Give the row one"
                        )
                elif split == "patient-disjoint":
                    group = row.picture.patient or images.read_facts(row.picture.image).sha256
                    name = assign_split(group, salt="jsonl", seed=seed, test_share=test_share)
                    row = replace(row, picture=replace(row.picture, split=name))
                if name not in folders:
                    folder = open_dataset_folder(out / name, images, ledger, link_images=link_images)
                    folders[name] = stack.enter_context(folder)
                return folders[name].add_question(row)

            for batch in _iter_batches(_read_lines(source), _BATCH_SIZE):
                parsed = [(number, _try_parse_row(line, number, source, ledger)) for number, line in batch]
                images.inspect_all(row.picture.image for _, row in parsed if isinstance(row, SourceQuestion))
                for number, row in parsed:
                    if isinstance(row, InvalidRow):
                        tally.refuse_row(str(source), number, str(row))
                    else:
                        tally.take_row(str(source), number, partial(add, row))
            if tally.kept == 0:
                raise tally.build_no_rows_error(source)
            empty = {"train", "test"} - set(folders) if split == "patient-disjoint" else set()
            empty |= {name for name, folder in folders.items() if folder.kinds.total() == 0}
            if empty:
                raise InvalidRecord(
                    f"{source}: no row for {', '.join(sorted(empty))} in the {split} split; try another seed"
                )
            for folder in folders.values():
                folder.flush()
        return write_report(
            out,
            tally,
            ledger,
            source=source,
            split=split,
            folders=[folders[name].count_records(name) for name in sorted(folders, key=_rank_split)],
            leaks=find_pairwise_leakage(_list_splits(out, split, folders), ledger),
        )


def _list_splits(out: Path, split: Split, folders: Iterable[str]) -> dict[str, Callable[[], Iterable[Study]]]:
    if split != "given":
        return {name: partial(read_studies, out / name) for name in sorted(folders, key=_rank_split)}
    named = {study.split for study in read_studies(out)} - {""}
    return {name: partial(read_studies, out, name) for name in sorted(named, key=_rank_split)}


def _rank_split(split: str) -> tuple[bool, bool, str]:
    """Splits in the order of use: train first, test last."""
    return (split.lower().startswith("test"), not split.lower().startswith("train"), split)


def _iter_batches(lines: Iterator[tuple[int, bytes]], size: int) -> Iterator[list[tuple[int, bytes]]]:
    while batch := list(islice(lines, size)):
        yield batch


def _try_parse_row(line: bytes, number: int, source: Path, ledger: IngestIndex) -> SourceQuestion | InvalidRow:
    try:
        return _parse_row(line, number, source, ledger)
    except InvalidRow as error:
        return error


def _parse_row(line: bytes, number: int, source: Path, ledger: IngestIndex) -> SourceQuestion:
    place = f"row {number}"
    try:
        row = JsonlRow.model_validate(parse_row(line, where="this line"))
    except ValidationError as error:
        fields = [str(item["loc"][0]) for item in error.errors() if item["loc"]]
        mends = dict.fromkeys(_REMEDIES.get(name, _suggest_remedy(name)) for name in fields)
        raise InvalidRow(". ".join((format_validation_error(error), *mends))) from None
    except InvalidRecord as error:
        raise InvalidRow(f"{error}. Write one JSON object a line") from None
    if row.id:
        first = ledger.register_id(hashlib.blake2b(row.id.encode(), digest_size=8).digest(), place)
        if first != place:
            raise InvalidRow(f"id: duplicate id {row.id!r}, first at {first}. Give every row its own")
    return SourceQuestion(
        picture=SourceImage(
            place=place,
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
    """Lines that are not blank. The last may lack its newline, unless it was cut off: then all is in doubt."""
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
                        f"{error}: the file ends in the middle of a line; it was cut off. Fetch it again"
                    ) from None
            yield number, line
