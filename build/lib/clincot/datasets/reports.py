"""Reading and writing reports.jsonl: one {"study": id, "text": report} per line.

A report on several images lists all of them as "studies". A generated report may state the number of views it is
based on as "views".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from clincot.fields import FrozenModel
from clincot.jsonl import InvalidRecord, format_validation_error, parse_row

REPORTS_FILE = "reports.jsonl"


class ReportRow(FrozenModel):
    """The report of one study. `views`: how many of its images a model was shown; 0 if unknown."""

    study: Annotated[str, Field(min_length=1)]
    text: str
    views: Annotated[int, Field(ge=0)] = 0
    studies: tuple[str, ...] = ()  # all images of a report on several, `study` first; else empty

    @model_validator(mode="after")
    def _check_first_study(self) -> Self:
        if self.studies and self.studies[0] != self.study:
            raise ValueError(f"studies: expected the report's study {self.study!r} first, got {self.studies[0]!r}")
        return self


def format_report_line(studies: Sequence[str], text: str) -> str:
    """Format a line of reports.jsonl for a report on these studies."""
    line: dict[str, object] = {"study": studies[0], "text": text}
    if len(studies) > 1:
        line["studies"] = list(studies)
    return json.dumps(line, ensure_ascii=False) + "\n"


def read_reports(path: Path) -> Iterator[ReportRow]:
    """Stream reports.

    Raises InvalidRecord, naming file and line, for a bad line, a cut-off last line or a second report on a study.
    """
    return (row for _, row in read_numbered_reports(path))


def read_numbered_reports(path: Path) -> Iterator[tuple[int, ReportRow]]:
    """Stream reports as `read_reports` does, as (line number, report)."""
    if not path.is_file():
        raise InvalidRecord(f'{path}: file not found; expected reports, one {{"study": …, "text": …}} per line')
    seen: set[bytes] = set()
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            if not line.endswith(b"\n"):
                raise InvalidRecord(f"{where}: the file ends in the middle of a line; it was cut off: {line[:80]!r}")
            try:
                row = ReportRow.model_validate(parse_row(line, where=where))
            except ValidationError as error:
                raise InvalidRecord(
                    f'{where}: not a report: {format_validation_error(error)}. Write {{"study": …, "text": …}}'
                ) from None
            key = hashlib.blake2b(row.study.encode(), digest_size=8).digest()
            if key in seen:
                raise InvalidRecord(f"{where}: a second report on study {row.study!r}; expected at most one per study")
            seen.add(key)
            yield number, row
