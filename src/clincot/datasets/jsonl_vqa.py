"""Ingest of plain JSONL, the format for your own data: one question per line, images in files next to it.

    {"image": "scans/17.png", "question": "Is there an effusion?", "answer": "yes",
     "kind": "closed", "boxes": [[0.1, 0.5, 0.4, 0.9]], "modality": "chest x-ray", "patient": "p17",
     "split": "train", "topic": "presence", "finding": "effusion", "id": "17-1"}

Only the first three fields are required. `image` is relative to the JSONL file. `boxes` are normalised xyxy corners in
the image as it is displayed (after its EXIF rotation). Without `kind`, a question with the answer yes or no is closed
and any other question is open; kind "report" asks for a whole report. A row with `options` is a multiple-choice
question, whose `answer` is the letter or the text of one of them. `masks` are the pixels of the boxes, in order, as
COCO writes them (region_masks.py); without `boxes` their own are taken. `others` are further images, in order, as
{"image": "scans/16.png", "role": "prior"}.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from tqdm import tqdm

from clincot.datasets.closed_answers import find_choice_fault, guess_kind, read_choice
from clincot.datasets.ingest.file_formats import check_json_lines
from clincot.datasets.ingest.index import IngestIndex
from clincot.datasets.ingest.ingest_report import IngestReport, IngestTally, InvalidRow
from clincot.datasets.ingest.output_folder import check_output_folder
from clincot.datasets.ingest.row_pipeline import (
    FurtherImages,
    ParsedRow,
    RowPlan,
    RowSplit,
    ingest_rows,
    make_other_images,
    register_row_id,
)
from clincot.datasets.ingest.writer import SourceImage, SourceQuestion
from clincot.datasets.region_masks import MASKS_REMEDY, derive_boxes, parse_mask
from clincot.datasets.splits import check_test_share
from clincot.errors import InvalidInput
from clincot.geometry import Box, RegionMask
from clincot.images import DEFAULT_LIMITS, ImageLimits
from clincot.jsonl import InvalidRecord, format_validation_error, parse_row

_REMEDIES = {
    "image": "Name a PNG or JPEG file, relative to the JSONL file",
    "others": 'Write a list of {"image": PATH, "role": TEXT}, for instance with the role "prior" or "lateral"',
    "options": "Write a list of texts, in their order",
    "question": "Write the question as text",
    "answer": "Write the answer as text or a whole number",
    "kind": 'Write "closed", "open", "choice" or "report", or leave it out',
    "boxes": "Write a list of [x0, y0, x1, y1], each from 0 to 1: pixels divided by the image's width or height",
    "masks": MASKS_REMEDY,
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


_AS_LIST = Field(strict=False)  # JSON has lists, the model tuples
OptionalText = Annotated[str, StringConstraints(strip_whitespace=True)]
RequiredText = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class JsonlOtherImage(BaseModel):
    """A further image of a question, in `others`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image: RequiredText
    role: RequiredText


class JsonlRow(BaseModel):
    """A line of the source; the module's docstring describes the fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image: RequiredText
    question: RequiredText
    answer: Annotated[RequiredText, BeforeValidator(_convert_number_to_text)]
    kind: Annotated[Literal["closed", "open", "report", "choice"] | None, BeforeValidator(_normalize_kind)] = None
    boxes: Annotated[tuple[Annotated[Box, BeforeValidator(_parse_corners)], ...], Field(strict=False)] = ()
    masks: Annotated[tuple[Annotated[RegionMask, BeforeValidator(parse_mask)], ...], Field(strict=False)] = ()
    modality: OptionalText = ""
    patient: Annotated[OptionalText, BeforeValidator(_convert_number_to_text)] = ""
    split: OptionalText = ""
    topic: OptionalText = ""
    finding: OptionalText = ""
    id: Annotated[OptionalText, BeforeValidator(_convert_number_to_text)] = ""
    options: Annotated[tuple[Annotated[RequiredText, BeforeValidator(_convert_number_to_text)], ...], _AS_LIST] = ()
    others: Annotated[tuple[JsonlOtherImage, ...], _AS_LIST] = ()

    @model_validator(mode="after")
    def _check_masks(self) -> Self:
        derive_boxes(self.masks, self.boxes)
        return self

    @model_validator(mode="after")
    def _check_choice(self) -> Self:
        if self.options and self.kind not in (None, "choice"):
            raise ValueError(f"a question with options is a choice, got the kind {self.kind!r}")
        if (self.options or self.kind == "choice") and (fault := find_choice_fault(self.options, self.answer)):
            raise ValueError(f"options: {fault}")
        return self

    @property
    def answer_text(self) -> str:
        """The answer; that of a multiple-choice question as the option's text, whether it was a letter or the text."""
        at = read_choice(self.answer, self.options) if self.options else None
        return self.answer if at is None else self.options[at]

    @property
    def question_kind(self) -> Literal["closed", "open", "report", "choice"]:
        """`kind`, or if it is missing the kind that the options or the answer suggest."""
        if self.kind is not None:
            return self.kind
        if self.options:
            return "choice"
        return guess_kind(self.answer)


def ingest_jsonl(  # noqa: PLR0913 (one keyword per command-line option)
    source: Path,
    out: Path,
    *,
    split: RowSplit = "given",
    further_images: FurtherImages = "keep",
    allow_refused: int = 0,
    test_share: float = 0.2,
    seed: int = 0,
    link_images: bool = False,
    limits: ImageLimits = DEFAULT_LIMITS,
    workers: int | None = None,
) -> IngestReport:
    """Read the JSONL file `source` into the dataset folder `out`. Rows are streamed, so memory stays constant.

    The keyword arguments are those of `RowPlan`.

    Refused rows are listed in the report. Raises TooManyRefused if there are more of them than `allow_refused`; the
    other rows have been written by then. Raises InvalidRecord if the file is missing, cut off or without a usable row,
    or if a split stays empty; `out` is then unchanged.
    """
    if split not in get_args(RowSplit):
        raise InvalidInput(f"split: expected one of {', '.join(get_args(RowSplit))}, got {split!r}")
    check_test_share(test_share)
    if not source.is_file():
        raise InvalidRecord(f"{source}: expected a JSONL file, but the file does not exist")
    check_json_lines(source)
    check_output_folder(out, source)
    plan = RowPlan(
        split,
        test_share,
        seed,
        link_images=link_images,
        further_images=further_images,
        limits=limits,
        workers=workers,
    )
    return ingest_rows(partial(_read_rows, source), source=source, out=out, tally=IngestTally(allow_refused), plan=plan)


def _read_rows(source: Path, index: IngestIndex) -> Iterator[ParsedRow]:
    for number, line in _read_lines(source):
        yield ParsedRow(str(source), number, _try_parse_row(line, number, source, index))


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
    register_row_id(index, row.id, location)
    picture = SourceImage(
        location=location,
        image=source.parent / row.image,
        image_name=row.image,
        modality=row.modality,
        patient=row.patient,
        split=row.split,
    )
    others = ((source.parent / other.image, other.image, other.role) for other in row.others)
    return SourceQuestion(
        picture=picture,
        question=row.question,
        answer=row.answer_text,
        kind=row.question_kind,
        boxes=derive_boxes(row.masks, row.boxes),
        masks=row.masks,
        topic=row.topic,
        finding=row.finding,
        source_id=row.id or f"{source.name}:{number}",
        options=row.options,
        others=make_other_images(picture, others),
    )


def _suggest_remedy(field: str) -> str:
    if field in JsonlRow.model_fields:
        return f"Write {field} as text"
    return f"The fields are {', '.join(JsonlRow.model_fields)}"


def _read_lines(source: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number, line) of lines that are not blank.

    The last line may lack its newline. If it begins an object and does not end it, the file was cut off, other lines
    may be missing as well, and InvalidRecord is raised.
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
            if not line.endswith(b"\n") and line.lstrip(codecs.BOM_UTF8 + b" \t").startswith(b"{"):
                try:
                    parse_row(line, where=f"{source}:{number}")
                except InvalidRecord as error:
                    raise InvalidRecord(
                        f"{error}: the file ends in the middle of a line; it was cut off. Export or download it again"
                    ) from None
            yield number, line
