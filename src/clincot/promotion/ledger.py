"""Two append-only ledgers beside the champion pointer: what was spent, and which questions were asked.

    LEDGER/budget.jsonl   Spending: one line a tested decision, with the level it used and the sums it rested on
    LEDGER/asked.jsonl    Asked: the questions that it rested on

Nothing is ever taken back: neither a promotion nor a rollback removes a line (what a promotion does to later levels
is in promotion/error_budget.py). Deciding on the same evidence again finds its own line, comes to the same decision and adds
nothing. A blocked decision tests nothing, so it is not entered. Only new questions refill the second ledger.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from clincot.fields import NonEmptyStr
from clincot.jsonl import InvalidRecord, R, read_records
from clincot.promotion.cluster_tests import ClusterRow
from clincot.promotion.verdict import EvidenceSums
from clincot.records import Budget, Record, Totals

BUDGET_FILE, ASKED_FILE = "budget.jsonl", "asked.jsonl"


class BudgetEntry(Record):
    """One test of a challenger against a champion, and what it cost."""

    prefix: ClassVar[str] = "spent"

    evidence: NonEmptyStr  # digest of what was compared
    champion: NonEmptyStr
    challenger: NonEmptyStr
    benchmark: NonEmptyStr
    verdict: Literal["promote", "keep"]
    budget: Budget
    gain: Totals
    gain_rows: tuple[ClusterRow, ...]
    guards: dict[str, Totals]
    blind: Totals

    @property
    def pair(self) -> tuple[str, str]:
        return (self.champion, self.challenger)

    @property
    def promoted(self) -> bool:
        return self.verdict == "promote"

    @property
    def sums(self) -> EvidenceSums:
        return EvidenceSums(self.gain, self.gain_rows, self.guards, self.blind)


class QuestionsUsed(Record):
    """The benchmark questions that one decision rested on."""

    prefix: ClassVar[str] = "asked"

    evidence: NonEmptyStr
    number: int = Field(ge=1)  # the decision's in the ledger
    slice: int = Field(ge=1)
    slices: int = Field(ge=1)
    questions: tuple[NonEmptyStr, ...]


@dataclass(frozen=True)
class Ledger:
    """Both ledgers as read; `folder` None is a pipeline that keeps none."""

    folder: Path | None = None
    spent: tuple[BudgetEntry, ...] = ()
    asked: tuple[QuestionsUsed, ...] = ()

    def rewind_ledger(self, evidence: str) -> Ledger:
        """The ledger as it was when this evidence was decided on for the first time."""
        at = next((i for i, entry in enumerate(self.spent) if entry.evidence == evidence), len(self.spent))
        return replace(self, spent=self.spent[:at], asked=tuple(a for a in self.asked if a.number <= at))

    def find_looks(self, pair: tuple[str, str]) -> tuple[BudgetEntry, ...]:
        return tuple(entry for entry in self.spent if entry.pair == pair)

    def find_used_questions(self, pair: tuple[str, str]) -> set[str]:
        """Questions that earlier looks at this pair rested on."""
        evidence = {entry.evidence for entry in self.find_looks(pair)}
        return {question for entry in self.asked if entry.evidence in evidence for question in entry.questions}

    def count_uses(self) -> Counter[str]:
        """{question: decisions that rested on it}"""
        return Counter(question for entry in self.asked for question in entry.questions)


def read_ledger(folder: Path) -> Ledger:
    """Raises BadRecord on a line that is none, or a ledger whose lines do not follow each other."""
    if not folder.is_dir():
        raise InvalidRecord(
            f"{folder}: expected the ledger's folder; make an empty one for a pipeline's first decision"
        )
    spent, asked = (
        _read_if_present(folder / BUDGET_FILE, BudgetEntry),
        _read_if_present(folder / ASKED_FILE, QuestionsUsed),
    )
    for number, entry in enumerate(spent, start=1):
        if entry.budget.number != number:
            raise InvalidRecord(
                f"{folder / BUDGET_FILE}:{number}: expected entry {number}, got {entry.budget.number}: a line was taken out "
                "or put in; the ledger is only ever appended to, restore it"
            )
    known = {entry.evidence for entry in asked}
    for number, entry in enumerate(spent, start=1):
        if entry.evidence not in known:
            raise InvalidRecord(
                f"{folder / ASKED_FILE}: expected the questions of entry {number} of {BUDGET_FILE}; restore it"
            )
    return Ledger(folder, spent, asked)


def append_decision(folder: Path, spending: BudgetEntry, asked: QuestionsUsed) -> None:
    """Append a decision to both ledgers, unless it is there already.

    Raises BadRecord when another decision was entered since the ledger was read: its level is spent, decide again.
    """
    with _lock_ledger(folder):
        ledger = read_ledger(folder)
        if any(entry.evidence == spending.evidence for entry in ledger.spent):
            return
        if spending.budget.number != len(ledger.spent) + 1:
            raise InvalidRecord(
                f"{folder / BUDGET_FILE}: expected {spending.budget.number - 1} entries, found {len(ledger.spent)}: another "
                "decision was entered meanwhile; decide again"
            )
        if not any(entry.evidence == asked.evidence for entry in ledger.asked):  # it is when the last run broke off
            _append_line(folder / ASKED_FILE, asked)
        _append_line(folder / BUDGET_FILE, spending)


def _read_if_present(path: Path, kind: type[R]) -> tuple[R, ...]:
    return tuple(read_records(path, kind)) if path.exists() else ()


def _append_line(path: Path, record: Record) -> None:
    """One line in one write, on disk before it returns. A line that was cut off is refused by the next reading."""
    with path.open("ab") as file:
        file.write(record.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _lock_ledger(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
