"""What became of every row of an ingest: kept, dropped as a duplicate, or refused with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from clincot.datasets.folder import LeakReport
from clincot.datasets.ingest.index import Ledger
from clincot.errors import BadInput
from clincot.jsonl import BadRecord, written_aside

REPORT = "ingest_report.json"
SHOWN = 20  # how many refusals and duplicates are listed one by one


class RefusedRow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    row: int  # line of a JSONL, position in the list of a JSON; both from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


class RowRefused(BadInput):
    """Why a row cannot be taken, and what mends it."""


class TooManyRefused(BadInput):
    """More rows were bad than allowed. The others were kept: `report` says what is where."""

    def __init__(self, report: IngestReport, allowed: int) -> None:
        listed = "\n  ".join(map(str, report.refused[:SHOWN]))
        rows = "row was" if len(report.refused) == 1 else "rows were"
        self.verdict = (
            f"{len(report.refused)} {rows} refused, {allowed} allowed; the {report.rows_kept} others were kept. Mend"
            f" the refused rows and run the same command again, or pass --allow-refused {len(report.refused)} to do"
            " without them"
        )
        super().__init__(f"{self.verdict}:\n  {listed}")
        self.report = report


class FolderCounts(BaseModel):
    """One dataset folder that was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str  # relative to the output: ".", "train", "test"
    studies: int
    questions: int
    questions_by_kind: dict[str, int]
    images_by_modality: dict[str, int]  # "" where the source does not say
    reports: int = 0

    def summary(self) -> str:
        has = [f"{self.questions} questions ({counted(self.questions_by_kind)})"] if self.questions else []
        has += [f"{self.reports} reports"] if self.reports else []
        return f"{' and '.join(has) or 'no questions'} on {self.studies} images"


class IngestReport(BaseModel):
    """Written as ingest_report.json beside the data; every row read is in exactly one of the three counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    split: str = ""
    licence: str = ""
    citation: str = ""
    rows_read: int
    rows_kept: int
    rows_duplicate: int  # the same image, question and answer again: dropped
    rows_refused: int
    refused: tuple[RefusedRow, ...] = ()
    duplicates: tuple[str, ...] = ()  # the first of them, "file:row repeats row N"
    images: int  # distinct, over all folders
    images_by_modality: dict[str, int]
    folders: tuple[FolderCounts, ...]
    leaks: tuple[LeakReport, ...] = ()  # of every two splits
    notes: tuple[str, ...] = ()  # what was put right on the way in, and how often

    @model_validator(mode="after")
    def _every_row_once(self) -> Self:
        if self.rows_read != self.rows_kept + self.rows_duplicate + self.rows_refused:
            raise ValueError(
                f"{self.rows_read} rows read, but {self.rows_kept} kept + {self.rows_duplicate} duplicate"
                f" + {self.rows_refused} refused"
            )
        return self

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.source}: {self.rows_read} rows read, {self.rows_kept} kept,"
            f" {self.rows_duplicate} duplicates dropped, {self.rows_refused} refused",
            f"{self.images} images: {counted(self.images_by_modality)}",
        ]
        lines += [f"{counts.folder}/: {counts.summary()}" for counts in self.folders]
        lines += [f"leak ({self.split or 'given'} split): {leak.summary()}" for leak in self.leaks]
        lines += [f"refused: {row}" for row in self.refused[:SHOWN]]
        if len(self.refused) > SHOWN:
            lines.append(f"refused: {len(self.refused) - SHOWN} more, all of them in {REPORT}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"licence: {self.licence or 'the source does not say'}")
        if self.citation:
            lines.append(f"cite: {self.citation}")
        return "\n".join(lines)


class Tally:
    """Counts what becomes of every row while an ingest runs."""

    def __init__(self, allow_refused: int) -> None:
        if allow_refused < 0:
            raise BadInput(f"at least 0 rows may be refused, got {allow_refused}")
        self.allow_refused = allow_refused
        self.kept = self.duplicate = 0
        self.refused: list[RefusedRow] = []
        self.repeats: list[str] = []  # the first of them

    @property
    def read(self) -> int:
        return self.kept + self.duplicate + len(self.refused)

    def take(self, file: str, row: int, add: Callable[[], str | None]) -> None:
        """`add` takes the row in, returns the place of the row that it repeats, or raises RowRefused."""
        try:
            first = add()
        except RowRefused as error:
            self.refuse(file, row, str(error))
            return
        if first is None:
            self.kept += 1
            return
        self.duplicate += 1
        if len(self.repeats) < SHOWN:
            self.repeats.append(f"{file}:{row} repeats {first}")

    def refuse(self, file: str, row: int, reason: str) -> None:
        self.refused.append(RefusedRow(file=file, row=row, reason=reason))

    def nothing(self, source: Path, what: str = "rows") -> BadRecord:
        """The error for a source of which no row can be kept, with the first reasons."""
        why = "".join(f"\n  {row}" for row in self.in_order()[:SHOWN])
        return BadRecord(f"{source}: expected {what}, but none was kept of {self.read} read{why}")

    def in_order(self) -> tuple[RefusedRow, ...]:
        """By file, in the order in which the files were first refused a row, then by row."""
        files = {name: place for place, name in enumerate(dict.fromkeys(row.file for row in self.refused))}
        return tuple(sorted(self.refused, key=lambda row: (files[row.file], row.row)))


@dataclass(frozen=True)
class Published:
    """What a data set says of itself."""

    licence: str = ""
    citation: str = ""


UNPUBLISHED = Published()


def finish(
    out: Path,
    tally: Tally,
    ledger: Ledger,
    *,
    source: Path,
    folders: Sequence[FolderCounts],
    split: str = "",
    published: Published = UNPUBLISHED,
    leaks: Sequence[LeakReport] = (),
    notes: Sequence[str] = (),
) -> IngestReport:
    """Write the report beside the data, and return it; raises TooManyRefused where more rows were bad than allowed."""
    report = IngestReport(
        source=str(source),
        split=split,
        licence=published.licence,
        citation=published.citation,
        rows_read=tally.read,
        rows_kept=tally.kept,
        rows_duplicate=tally.duplicate,
        rows_refused=len(tally.refused),
        refused=tally.in_order(),
        duplicates=tuple(tally.repeats),
        images=ledger.images(),
        images_by_modality=ledger.modalities(),
        folders=tuple(folders),
        leaks=tuple(leaks),
        notes=tuple(notes),
    )
    with written_aside(out / REPORT) as file:
        file.write(report.model_dump_json(indent=2) + "\n")
    if report.rows_refused > tally.allow_refused:
        raise TooManyRefused(report, tally.allow_refused)
    return report


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name or 'of unnamed modality'}" for name, number in counts.items())


def in_order(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
