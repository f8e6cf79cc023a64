"""The report of an ingest: which rows were kept, dropped as duplicates, or refused and why."""

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
from clincot.text import format_count

REPORT_FILE = "ingest_report.json"
MAX_LISTED = 20  # how many refusals and duplicates are listed one by one


class RefusedRow(FrozenModel):
    """A row that was refused, and why."""

    file: str
    row: int  # line of a JSONL, position in the list of a JSON; both from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


class InvalidRow(InvalidInput):
    """A row that cannot be used; the message states the reason and the remedy."""


class TooManyRefused(InvalidInput):
    """More rows were refused than allowed. The other rows are on disk; `report` describes them."""

    def __init__(self, report: IngestReport, allowed: int) -> None:
        listed = "\n  ".join(map(str, report.refused[:MAX_LISTED]))
        rows = "row was" if len(report.refused) == 1 else "rows were"
        self.verdict = (
            f"{len(report.refused)} {rows} refused, {allowed} allowed; the {report.rows_kept} others were kept. Fix"
            f" the refused rows and run the same command again, or pass --allow-refused {len(report.refused)} to"
            " continue without them"
        )
        super().__init__(f"{self.verdict}:\n  {listed}")
        self.report = report


class FolderCounts(FrozenModel):
    """Counts of one dataset folder that was written."""

    folder: str  # relative to the output: ".", "train", "test"
    studies: int
    questions: int
    questions_by_kind: dict[str, int]
    images_by_modality: dict[str, int]  # the key is "" for images whose modality the source does not state
    reports: int = 0

    def format_summary(self) -> str:
        contents = []
        if self.questions:
            contents.append(f"{format_count(self.questions, 'question')} ({format_counts(self.questions_by_kind)})")
        if self.reports:
            contents.append(format_count(self.reports, "report"))
        return f"{' and '.join(contents) or 'no questions'} on {format_count(self.studies, 'image')}"


class IngestReport(FrozenModel):
    """The report that is written to ingest_report.json next to the data.

    Every row read is in exactly one of the three counts: kept, duplicate or refused.
    """

    source: str
    split: str = ""
    licence: str = ""
    citation: str = ""
    rows_read: int
    rows_kept: int
    rows_duplicate: int  # repeats of an image, question and answer; dropped
    rows_refused: int
    refused: tuple[RefusedRow, ...] = ()
    duplicates: tuple[str, ...] = ()  # the first MAX_LISTED, as "file:row repeats row N"
    images: int  # distinct, over all folders
    images_by_modality: dict[str, int]
    folders: tuple[FolderCounts, ...]
    leaks: tuple[LeakReport, ...] = ()  # one for every pair of splits
    notes: tuple[str, ...] = ()  # corrections and omissions, with counts

    @model_validator(mode="after")
    def _check_row_counts(self) -> Self:
        if self.rows_read != self.rows_kept + self.rows_duplicate + self.rows_refused:
            raise ValueError(
                f"{self.rows_read} rows read, but {self.rows_kept} kept + {self.rows_duplicate} duplicate"
                f" + {self.rows_refused} refused"
            )
        return self

    def format_summary(self) -> str:
        """Format the report as a few lines for a terminal."""
        lines = [
            f"{self.source}: {format_count(self.rows_read, 'row')} read, {self.rows_kept} kept,"
            f" {format_count(self.rows_duplicate, 'duplicate')} dropped, {self.rows_refused} refused",
            f"{format_count(self.images, 'image')}: {format_counts(self.images_by_modality)}",
        ]
        lines += [f"{counts.folder}/: {counts.format_summary()}" for counts in self.folders]
        lines += [f"leak ({self.split or 'given'} split): {leak.format_summary()}" for leak in self.leaks]
        lines += [f"refused: {row}" for row in self.refused[:MAX_LISTED]]
        if len(self.refused) > MAX_LISTED:
            lines.append(f"refused: {len(self.refused) - MAX_LISTED} more, listed in {REPORT_FILE}")
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"licence: {self.licence or 'not stated by the source'}")
        if self.citation:
            lines.append(f"cite: {self.citation}")
        return "\n".join(lines)


class IngestTally:
    """Running counts of an ingest: rows kept, duplicate and refused."""

    def __init__(self, allow_refused: int) -> None:
        if allow_refused < 0:
            raise InvalidInput(f"at least 0 rows may be refused, got {allow_refused}")
        self.allow_refused = allow_refused
        self.kept = self.duplicate = 0
        self.refused: list[RefusedRow] = []
        self.repeats: list[str] = []  # the first MAX_LISTED

    @property
    def read(self) -> int:
        return self.kept + self.duplicate + len(self.refused)

    def take_row(self, file: str, row: int, add: Callable[[], str | None]) -> None:
        """Add a row and count the result.

        `add` stores the row and returns None, returns the location of the row that this one repeats, or raises
        InvalidRow.
        """
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
        """Build the error for a source, or a part of it, without a usable row; it lists the first refusals."""
        verdict = "belongs there" if self.kept else "could be kept"
        return InvalidRecord(
            f"{source}: expected {what}, but none of the {self.read} read {verdict}{self.format_refusals()}"
        )

    def format_refusals(self) -> str:
        """Format the first refusals, one indented line each, to append to a message."""
        return "".join(f"\n  {row}" for row in self.sort_refused()[:MAX_LISTED])

    def sort_refused(self) -> tuple[RefusedRow, ...]:
        """Sort refused rows by file, in the order of each file's first refusal, then by row."""
        order: dict[str, int] = {}
        for refused in self.refused:
            order.setdefault(refused.file, len(order))
        return tuple(sorted(self.refused, key=lambda refused: (order[refused.file], refused.row)))


@dataclass(frozen=True)
class DatasetAttribution:
    """Licence and citation of a published data set."""

    licence: str = ""
    citation: str = ""


NO_ATTRIBUTION = DatasetAttribution()


def write_report(  # noqa: PLR0913 (one argument per part of the report; all but three have defaults or are keywords)
    out: Path,
    tally: IngestTally,
    index: IngestIndex,
    *,
    source: Path,
    folders: Sequence[FolderCounts],
    split: str = "",
    published: DatasetAttribution = NO_ATTRIBUTION,
    leaks: Sequence[LeakReport] = (),
    notes: Sequence[str] = (),
) -> IngestReport:
    """Write the report next to the data and return it; raises TooManyRefused if too many rows were refused."""
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
        images=index.count_images(),
        images_by_modality=index.count_modalities(),
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
    """Format counts by name, as in "12 open, 3 closed"."""
    return ", ".join(f"{number} {name or 'of unnamed modality'}" for name, number in counts.items())


def sort_counts(counts: Counter[str]) -> dict[str, int]:
    """Return the counts ordered by name, so that a report's bytes do not depend on the order of rows."""
    return dict(sorted(counts.items()))
