"""The ledger of decisions: spent error budget and used questions, in two append-only files.

    LEDGER/budget.jsonl   BudgetEntry: one line for each tested decision, with its level and the sums it is based on
    LEDGER/asked.jsonl    QuestionsUsed: the benchmark questions that the decision is based on

No line is ever removed, neither by a promotion nor by a rollback; clincot.promotion.error_budget describes how a
promotion affects later levels. A second decision on the same evidence finds its own line, reaches the same verdict and
appends nothing. A blocked decision tests nothing and is not entered. Once questions are used up, only new questions
help.

Pipelines whose runs share no disk keep the ledger of a model line in the store:

    ledgers/<line>/budget.jsonl   ledgers/<line>/asked.jsonl

`sync_ledger` downloads it before a decision and uploads it afterwards by compare-and-swap. If another decision was
entered in the meantime, that is an error, and the decision has to be made again.
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

from clincot.errors import InvalidInput
from clincot.fields import NonEmptyStr
from clincot.jsonl import InvalidRecord, R, read_records
from clincot.promotion.cluster_tests import ClusterRow
from clincot.promotion.verdict import EvidenceSums
from clincot.records import Budget, Record, Totals
from clincot.storage.store import KeyExists, KeyNotFound, Store, VersionConflict

BUDGET_FILE, ASKED_FILE = "budget.jsonl", "asked.jsonl"


class BudgetEntry(Record):
    """One test of a challenger against a champion, and the budget that it spent."""

    prefix: ClassVar[str] = "spent"

    evidence: NonEmptyStr  # digest of the comparison
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
        """Digests of champion and challenger."""
        return (self.champion, self.challenger)

    @property
    def promoted(self) -> bool:
        """Whether the challenger was promoted."""
        return self.verdict == "promote"

    @property
    def sums(self) -> EvidenceSums:
        """The sums that the test is based on, of this look only."""
        return EvidenceSums(self.gain, self.gain_rows, self.guards, self.blind)


class QuestionsUsed(Record):
    """The benchmark questions that one decision is based on."""

    prefix: ClassVar[str] = "asked"

    evidence: NonEmptyStr
    number: int = Field(ge=1)  # the decision's number in the ledger
    slice: int = Field(ge=1)
    slices: int = Field(ge=1)
    questions: tuple[NonEmptyStr, ...]


@dataclass(frozen=True)
class Ledger:
    """The content of both files; `folder` is None for a pipeline that keeps no ledger."""

    folder: Path | None = None
    spent: tuple[BudgetEntry, ...] = ()
    asked: tuple[QuestionsUsed, ...] = ()

    def rewind_ledger(self, evidence: str) -> Ledger:
        """Return the ledger as it was before the first decision on this evidence; itself if there was none."""
        at = next((i for i, entry in enumerate(self.spent) if entry.evidence == evidence), len(self.spent))
        return replace(self, spent=self.spent[:at], asked=tuple(a for a in self.asked if a.number <= at))

    def find_looks(self, pair: tuple[str, str]) -> tuple[BudgetEntry, ...]:
        """Return all tests of a (champion, challenger) pair, in order."""
        return tuple(entry for entry in self.spent if entry.pair == pair)

    def find_used_questions(self, pair: tuple[str, str]) -> set[str]:
        """Return the questions that earlier looks at this pair used."""
        evidence = {entry.evidence for entry in self.find_looks(pair)}
        used: set[str] = set()
        for entry in self.asked:
            if entry.evidence in evidence:
                used.update(entry.questions)
        return used

    def count_uses(self) -> Counter[str]:
        """Return {question: number of decisions that used it}."""
        uses: Counter[str] = Counter()
        for entry in self.asked:
            uses.update(entry.questions)
        return uses


def read_ledger(folder: Path) -> Ledger:
    """Read a ledger folder; raises InvalidRecord on a malformed line and on missing or inserted lines."""
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
                f"{folder / BUDGET_FILE}:{number}: expected entry {number}, got {entry.budget.number}: a line was "
                "taken out or put in; the ledger is only ever appended to, restore it"
            )
    known = {entry.evidence for entry in asked}
    for number, entry in enumerate(spent, start=1):
        if entry.evidence not in known:
            raise InvalidRecord(
                f"{folder / ASKED_FILE}: expected the questions of entry {number} of {BUDGET_FILE}; restore it"
            )
    return Ledger(folder, spent, asked)


def append_decision(folder: Path, spending: BudgetEntry, asked: QuestionsUsed) -> None:
    """Append a decision to both files, unless it is there already.

    Raises InvalidRecord if another decision was entered after this one read the ledger, because that one has spent the
    level.
    """
    with _lock_ledger(folder):
        ledger = read_ledger(folder)
        if any(entry.evidence == spending.evidence for entry in ledger.spent):
            return
        if spending.budget.number != len(ledger.spent) + 1:
            raise InvalidRecord(
                f"{folder / BUDGET_FILE}: expected {spending.budget.number - 1} entries, found {len(ledger.spent)}: "
                "another decision was entered meanwhile; decide again"
            )
        # Questions first: if a run breaks off between the writes, a later attempt appends only the budget entry.
        if not any(entry.evidence == asked.evidence for entry in ledger.asked):
            _append_line(folder / ASKED_FILE, asked)
        _append_line(folder / BUDGET_FILE, spending)


class LedgerConflict(InvalidInput):
    """Another decision of the model line was entered first."""


@contextmanager
def sync_ledger(store: Store, line: str, folder: Path) -> Iterator[Path]:
    """Download a model line's ledger into `folder`, yield it, and upload what was appended if the block succeeds.

    Raises LedgerConflict if another decision was stored in the meantime, InvalidRecord if the result cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tags: dict[str, str] = {}
    for name in (ASKED_FILE, BUDGET_FILE):
        try:
            content, tags[name] = store.read(_ledger_key(line, name))
        except KeyNotFound:
            continue
        (folder / name).write_bytes(content)
    before = {name: _read_bytes(folder / name) for name in (ASKED_FILE, BUDGET_FILE)}
    yield folder
    read_ledger(folder)  # never store what cannot be read again
    for name in (ASKED_FILE, BUDGET_FILE):  # questions first, as in append_decision
        after = _read_bytes(folder / name)
        if after == before[name]:
            continue
        key = _ledger_key(line, name)
        try:
            if name in tags:
                store.replace(key, after, tags[name])
            else:
                store.write_new(key, after)
        except (VersionConflict, KeyExists):
            raise LedgerConflict(f"{store.url}/{key}: another decision was entered meanwhile; decide again") from None


def _ledger_key(line: str, name: str) -> str:
    return f"ledgers/{line}/{name}"


def _read_bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _read_if_present(path: Path, kind: type[R]) -> tuple[R, ...]:
    return tuple(read_records(path, kind)) if path.exists() else ()


def _append_line(path: Path, record: Record) -> None:
    """Append one line in one write and flush it to disk; a truncated line is rejected when it is read."""
    with path.open("ab") as file:
        file.write(record.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _lock_ledger(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
