"""What became of every row of an ingest: kept, dropped as a duplicate, or refused with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import model_validator

from clincot.datasets.folder import LeakReport
from clincot.datasets.ingest.index import IngestIndex
from clincot.errors import InvalidInput
from clincot.fields import FrozenModel
from clincot.jsonl import InvalidRecord, atomic_write

REPORT_FILE = "ingest_report.json"
MAX_LISTED = 20  # how many refusals and duplicates are listed one by one


class RefusedRow(FrozenModel):
    file: str
    row: int  # line of a JSONL, position in the list of a JSON; both from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


class InvalidRow(InvalidInput):
    """Why a row cannot be taken, and what mends it."""


class TooManyRefused(InvalidInput):
    """More rows were bad than allowed. The others were kept: `report` says what is where."""

    def __init__(self, report: IngestReport, allowed: int) -> None:
        listed = "\n  ".join(map(str, report.refused[:MAX_LISTED]))
        rows = "row was" if len(report.refused) == 1 else "rows were"
        self.verdict = (
            f"{len(report.refused)} {rows} refused, {allowed} allowed; the {report.rows_kept} others were kept. Mend"
            f" the refused rows and run the same command again, or pass --allow-refused {len(report.refused)} to do"
            " without them"
        )
        super().__init__(f"{self.verdict}:\n  {listed}")
        self.report = report


class FolderCounts(FrozenModel):
    """One dataset folder that was written."""

    folder: str  # relative to the output: ".", "train", "test"
    studies: int
    questions: int
    questions_by_kind: dict[str, int]
    images_by_modality: dict[str, int]  # "" where the source does not say
    reports: int = 0

    def format_summary(self) -> str:
        has = [f"{self.questions} questions ({format_counts(self.questions_by_kind)})"] if self.questions else []
        has += [f"{self.reports} reports"] if self.reports else []
        return f"{' and '.join(has) or 'no questions'} on {self.studies} images"


class IngestReport(FrozenModel):
    """Written as ingest_report.json beside the data; every row read is in exactly one of the three counts."""

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
    def _check_row_counts(self) -> Self:
        if self.rows_read != self.rows_kept + self.rows_duplicate + self.rows_refused:
            raise ValueError(
                f"{self.rows_read} rows read, but {self.rows_kept} kept + {self.rows_duplicate} duplicate"
                f" + {self.rows_refused} refused"
            )
        return self

    def format_summary(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.source}: {self.rows_read} rows read, {self.rows_kept} kept,"
            f" {self.rows_duplicate} duplicates dropped, {self.rows_refused} refused",
            f"{self.images} images: {format_counts(self.images_by_modality)}",
        ]
        lines += [f"{counts.folder}/: {counts.format_summary()}" for counts in self.folders]
        lines += [f"leak ({self.split or 'given'} split): {leak.format_summary()}" for leak in self.leaks]
        lines += [f"refused: {row}" for row in self.refused[:MAX_LISTED]]
        if len(self.refused) > MAX_LISTED:
            lines.append(f"refused: {len(self.refused) - MAX_LISTED} more, all of them in {REPORT_FILE}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"licence: {self.licence or 'the source does not say'}")
        if self.citation:
            lines.append(f"cite: {self.citation}")
        return "\n".join(lines)


class IngestTally:
    """Counts what becomes of every row while an ingest runs."""

    def __init__(self, allow_refused: int) -> None:
        if allow_refused < 0:
            raise InvalidInput(f"at least 0 rows may be refused, got {allow_refused}")
        self.allow_refused = allow_refused
        self.kept = self.duplicate = 0
        self.refused: list[RefusedRow] = []
        self.repeats: list[str] = []  # the first of them

    @property
    def read(self) -> int:
        return self.kept + self.duplicate + len(self.refused)

    def take_row(self, file: str, row: int, add: Callable[[], str | None]) -> None:
        """`add` takes the row in, returns the place of the row that it repeats, or raises RowRefused."""
        try:
            first = add()
        except InvalidRow as error:
            self.refuse_row(file, row, str(error))
            return
        if first is None:
            self.kept += 1
            return
        self.duplicate += 1
        if len(self.repeats) < MAX_LISTED:
            self.repeats.append(f"{file}:{row} repeats {first}")

    def refuse_row(self, file: str, row: int, reason: str) -> None:
        self.refused.append(RefusedRow(file=file, row=row, reason=reason))

    def build_no_rows_error(self, source: Path, what: str = "rows") -> InvalidRecord:
        """The error for a source of which no row can be kept, with the first reasons."""
        why = "".join(f"\n  {row}" for row in self.sort_refused()[:MAX_LISTED])
        return InvalidRecord(f"{source}: expected {what}, but none was kept of {self.read} read{why}")

    def sort_refused(self) -> tuple[RefusedRow, ...]:
        """By file, in the order in which the files were first refused a row, then by row."""
        files = {name: place for place, name in enumerate(dict.fromkeys(row.file for row in self.refused))}
        return tuple(sorted(self.refused, key=lambda row: (files[row.file], row.row)))


@dataclass(frozen=True)
class DatasetAttribution:
    """What a data set says of itself."""

    licence: str = ""
    citation: str = ""


NO_ATTRIBUTION = DatasetAttribution()


def write_report(
    out: Path,
    tally: IngestTally,
    ledger: IngestIndex,
    *,
    source: Path,
    folders: Sequence[FolderCounts],
    split: str = "",
    published: DatasetAttribution = NO_ATTRIBUTION,
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
        refused=tally.sort_refused(),
        duplicates=tuple(tally.repeats),
        images=ledger.count_images(),
        images_by_modality=ledger.count_modalities(),
        folders=tuple(folders),
        leaks=tuple(leaks),
        notes=tuple(notes),
    )
    with atomic_write(out / REPORT_FILE) as file:
        file.write(report.model_dump_json(indent=2) + "\n")
    if report.rows_refused > tally.allow_refused:
        raise TooManyRefused(report, tally.allow_refused)
    return report


def format_counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name or 'of unnamed modality'}" for name, number in counts.items())


def sort_counts(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
