"""What became of every row of an ingest: kept, dropped as a duplicate, or refused with its reason."""

from __future__ import annotations

from collections import Counter
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

from clincot.datasets.folder import LeakReport
from clincot.errors import BadInput

REPORT = "ingest_report.json"
SHOWN = 20  # how many refusals and duplicates are listed one by one


class RefusedRow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    row: int  # line of a JSONL, position in the list of a JSON; both from 1
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.reason}"


class TooManyRefused(BadInput):
    """More rows are bad than allowed: names each, and what mends it. No record was written."""

    def __init__(self, refused: list[RefusedRow], allowed: int) -> None:
        listed = "\n  ".join(map(str, refused))
        rows = "row was" if len(refused) == 1 else "rows were"
        super().__init__(
            f"{len(refused)} {rows} refused, {allowed} allowed; no record was written. Mend them, or pass"
            f" --allow-refused N to leave out up to N:\n  {listed}"
        )
        self.refused = tuple(refused)


class Refusals:
    """Counts bad rows; raises when there are so many more than allowed that reading on is idle."""

    def __init__(self, allowed: int) -> None:
        if allowed < 0:
            raise BadInput(f"at least 0 rows may be refused, got {allowed}")
        self.allowed = allowed
        self.rows: list[RefusedRow] = []

    def add(self, file: str, row: int, reason: str) -> None:
        self.rows.append(RefusedRow(file=file, row=row, reason=reason))
        if len(self.rows) >= self.allowed + SHOWN:
            self.settle()

    def settle(self) -> tuple[RefusedRow, ...]:
        """Call after the last row: more refusals than allowed raise TooManyRefused."""
        self.rows.sort(key=lambda refused: refused.row)
        if len(self.rows) > self.allowed:
            raise TooManyRefused(self.rows, self.allowed)
        return tuple(self.rows)


class FolderCounts(BaseModel):
    """One dataset folder that was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: str  # relative to the output: ".", "train", "test"
    studies: int
    questions: int
    questions_by_kind: dict[str, int]
    images_by_modality: dict[str, int]  # "" where the source does not say


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
    leak: LeakReport | None = None
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
        lines += [
            f"{counts.folder}/: {counts.questions} questions ({counted(counts.questions_by_kind)})"
            f" on {counts.studies} images"
            for counts in self.folders
        ]
        if self.leak is not None:
            lines.append(f"leak ({self.split} split): {self.leak.summary()}")
        lines += [f"refused: {row}" for row in self.refused[:SHOWN]]
        lines += [f"note: {note}" for note in self.notes]
        if self.licence:
            lines.append(f"licence: {self.licence}; cite: {self.citation}")
        return "\n".join(lines)


def counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name or 'of unnamed modality'}" for name, number in counts.items())


def in_order(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))
