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

from clincot.datasets.ingest.image_pool import SourceImages, Workers
from clincot.datasets.ingest.index import Ledger
from clincot.datasets.ingest.ingest_report import IngestReport, RowRefused, Tally, finish
from clincot.datasets.ingest.writer import FolderWriter, Picture, Row, dataset_folder, leaks_between, studies_of
from clincot.datasets.splits import check_share, side_of
from clincot.errors import BadInput
from clincot.geometry import Box
from clincot.images import DEFAULT_LIMITS, ImageLimits
from clincot.jsonl import BadRecord, explain, parse_row
from clincot.records import Study

Split = Literal["given", "by-row", "patient-disjoint"]
_BATCH = 512  # rows parsed ahead, so that their images are decoded in parallel

_MEND = {
    "image": "Name a PNG or JPEG file, relative to the JSONL file",
    "question": "Write the question as text",
    "answer": "Write the answer as text or a whole number",
    "kind": 'Write "closed", "open" or "report", or leave it out',
    "boxes": "Write a list of [x0, y0, x1, y1], each from 0 to 1: pixels divided by the image's width or height",
}


def _number_as_text(value: Any) -> Any:
    # true is an int to Python, and 2.50 would lose its last digit: those stay what they are, and are refused
    return str(value) if type(value) is int else value


def _kind(value: Any) -> Any:
    return value.strip().lower() if isinstance(value, str) else value


def _corners(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 4 and all(type(edge) in (int, float) for edge in value):
        return dict(zip(("x0", "y0", "x1", "y1"), value, strict=True))
    raise ValueError("expected a box of four numbers [x0, y0, x1, y1]")


Label = Annotated[str, StringConstraints(strip_whitespace=True)]
Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class JsonlRow(BaseModel):
    """A line of the source."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image: Words
    question: Words
    answer: Annotated[Words, BeforeValidator(_number_as_text)]
    kind: Annotated[Literal["closed", "open", "report"] | None, BeforeValidator(_kind)] = None
    boxes: Annotated[tuple[Annotated[Box, BeforeValidator(_corners)], ...], Field(strict=False)] = ()
    modality: Label = ""
    patient: Annotated[Label, BeforeValidator(_number_as_text)] = ""
    split: Label = ""
    topic: Label = ""
    finding: Label = ""
    id: Annotated[Label, BeforeValidator(_number_as_text)] = ""

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
        raise BadInput(f"split is one of {', '.join(get_args(Split))}, got {split!r}")
    check_share(test_share)
    if not source.is_file():
        raise BadRecord(f"{source}: expected a JSONL file, but there is no such file")
    tally = Tally(allow_refused)
    with Ledger() as ledger, Workers(workers) as pool:
        images = SourceImages(ledger, pool, limits)
        with contextlib.ExitStack() as stack:
            folders = dict[str, FolderWriter]()

            def add(row: Row) -> str | None:
                name = "."
                if split == "by-row":
                    name = row.picture.split
                    if not re.fullmatch(r"\w[\w-]*", name):
                        raise RowRefused(
                            f"split: expected a name such as train or test, got {name!r}. Give the row one"
                        )
                elif split == "patient-disjoint":
                    group = row.picture.patient or images.facts(row.picture.image).sha256
                    name = side_of(group, salt="jsonl", seed=seed, test_share=test_share)
                    row = replace(row, picture=replace(row.picture, split=name))
                if name not in folders:
                    folder = dataset_folder(out / name, images, ledger, link_images=link_images)
                    folders[name] = stack.enter_context(folder)
                return folders[name].add(row)

            for batch in _batches(_lines(source), _BATCH):
                parsed = [(number, _parse(line, number, source, ledger)) for number, line in batch]
                images.check(row.picture.image for _, row in parsed if isinstance(row, Row))
                for number, row in parsed:
                    if isinstance(row, RowRefused):
                        tally.refuse(str(source), number, str(row))
                    else:
                        tally.take(str(source), number, partial(add, row))
            if tally.kept == 0:
                raise tally.nothing(source)
            empty = {"train", "test"} - set(folders) if split == "patient-disjoint" else set()
            empty |= {name for name, folder in folders.items() if folder.kinds.total() == 0}
            if empty:
                raise BadRecord(
                    f"{source}: no row for {', '.join(sorted(empty))} in the {split} split; try another seed"
                )
            for folder in folders.values():
                folder.flush()
        return finish(
            out,
            tally,
            ledger,
            source=source,
            split=split,
            folders=[folders[name].counts(name) for name in sorted(folders, key=_order)],
            leaks=leaks_between(_splits(out, split, folders), ledger),
        )


def _splits(out: Path, split: Split, folders: Iterable[str]) -> dict[str, Callable[[], Iterable[Study]]]:
    if split != "given":
        return {name: partial(studies_of, out / name) for name in sorted(folders, key=_order)}
    named = {study.split for study in studies_of(out)} - {""}
    return {name: partial(studies_of, out, name) for name in sorted(named, key=_order)}


def _order(split: str) -> tuple[bool, bool, str]:
    """Splits in the order of use: train first, test last."""
    return (split.lower().startswith("test"), not split.lower().startswith("train"), split)


def _batches(lines: Iterator[tuple[int, bytes]], size: int) -> Iterator[list[tuple[int, bytes]]]:
    while batch := list(islice(lines, size)):
        yield batch


def _parse(line: bytes, number: int, source: Path, ledger: Ledger) -> Row | RowRefused:
    try:
        return _row(line, number, source, ledger)
    except RowRefused as error:
        return error


def _row(line: bytes, number: int, source: Path, ledger: Ledger) -> Row:
    place = f"row {number}"
    try:
        row = JsonlRow.model_validate(parse_row(line, where="this line"))
    except ValidationError as error:
        fields = [str(item["loc"][0]) for item in error.errors() if item["loc"]]
        mends = dict.fromkeys(_MEND.get(name, _other(name)) for name in fields)
        raise RowRefused(". ".join((explain(error), *mends))) from None
    except BadRecord as error:
        raise RowRefused(f"{error}. Write one JSON object a line") from None
    if row.id:
        first = ledger.first_with_id(hashlib.blake2b(row.id.encode(), digest_size=8).digest(), place)
        if first != place:
            raise RowRefused(f"id: duplicate id {row.id!r}, first at {first}. Give every row its own")
    return Row(
        picture=Picture(
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


def _other(field: str) -> str:
    if field in JsonlRow.model_fields:
        return f"Write {field} as text"
    return f"The fields are {', '.join(JsonlRow.model_fields)}"


def _lines(source: Path) -> Iterator[tuple[int, bytes]]:
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
                except BadRecord as error:
                    raise BadRecord(
                        f"{error}: the file ends in the middle of a line; it was cut off. Fetch it again"
                    ) from None
            yield number, line
