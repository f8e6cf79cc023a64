"""Ingest of plain JSONL: one question a line, images beside it. The way in for data of one's own.

    {"image": "scans/17.png", "question": "Is there an effusion?", "answer": "yes",
     "kind": "closed", "boxes": [[0.1, 0.5, 0.4, 0.9]], "modality": "chest x-ray", "patient": "p17",
     "split": "train", "topic": "presence", "finding": "effusion", "id": "17-1"}

Only the first three are needed. `image` is relative to the JSONL file. `boxes` are normalised xyxy of the
upright image. Without `kind`, a question whose answer is yes or no is closed and any other open;
kind "report" asks for a whole report.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError
from tqdm import tqdm

from clincot.datasets.report import REPORT, SHOWN, IngestReport, Refusals, in_order
from clincot.datasets.writing import Row, RowRefused, Seen, SourceImages, dataset_folder
from clincot.geometry import Box
from clincot.images import DEFAULT_LIMITS, ImageLimits
from clincot.jsonl import BadRecord, explain, parse_row, written_aside

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
    allow_refused: int = 0,
    link_images: bool = False,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> IngestReport:
    """Read `source` (JSONL) into the dataset folder `out`; streams, so its size is bounded by the disk only.

    Up to `allow_refused` bad rows are left out and listed in the report. More raise TooManyRefused, and a file
    that was cut off raises BadRecord; then `out` keeps what it had. `link_images` hard-links images where the
    file system can, and copies otherwise.
    """
    if not source.is_file():
        raise BadRecord(f"{source}: expected a JSONL file, but there is no such file")
    refusals, ids = Refusals(allow_refused), dict[bytes, int]()
    read = duplicate = 0
    repeats: list[str] = []
    with dataset_folder(out, SourceImages(limits), Seen(), link_images=link_images) as folder:
        for number, line in _lines(source):
            read += 1
            try:
                first = folder.add(_parse(line, number, source, ids))
            except RowRefused as error:
                refusals.add(str(source), number, str(error))
                continue
            if first is not None:
                duplicate += 1
                repeats.append(f"{source}:{number} repeats row {first}")
                del repeats[SHOWN:]
        refused = refusals.settle()
        if folder.kinds.total() == 0:
            raise BadRecord(f"{source}: expected rows, but none was kept of {read} read")
    report = IngestReport(
        source=str(source),
        rows_read=read,
        rows_kept=folder.kinds.total(),
        rows_duplicate=duplicate,
        rows_refused=len(refused),
        refused=refused,
        duplicates=tuple(repeats),
        images=len(folder.modality_of),
        images_by_modality=in_order(Counter(folder.modality_of.values())),
        folders=(folder.counts("."),),
    )
    with written_aside(out / REPORT) as file:
        file.write(report.model_dump_json(indent=2) + "\n")
    return report


def _parse(line: bytes, number: int, source: Path, ids: dict[bytes, int]) -> Row:
    try:
        row = JsonlRow.model_validate(parse_row(line, where="this line"))
    except ValidationError as error:
        fields = [str(item["loc"][0]) for item in error.errors() if item["loc"]]
        mends = dict.fromkeys(_MEND.get(name, _other(name)) for name in fields)
        raise RowRefused(". ".join((explain(error), *mends))) from None
    except BadRecord as error:
        raise RowRefused(f"{error}. Write one JSON object a line") from None
    if row.id:
        first = ids.setdefault(hashlib.blake2b(row.id.encode(), digest_size=8).digest(), number)
        if first != number:
            raise RowRefused(f"id: duplicate id {row.id!r}, first at row {first}. Give every row its own")
    return Row(
        number=number,
        image=source.parent / row.image,
        image_name=row.image,
        question=row.question,
        answer=row.answer,
        kind=row.question_kind,
        boxes=row.boxes,
        modality=row.modality,
        patient=row.patient,
        split=row.split,
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
