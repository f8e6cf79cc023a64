"""The decisions' ledger (promotion/ledger.py) of a model line, kept in the store for pipelines whose runs share no disk.

    ledgers/<line>/asked.jsonl   ledgers/<line>/budget.jsonl

Read into a folder before a decision, written back after it by compare-and-swap, questions first: a decision that was
entered meanwhile makes this one an error, and it is decided again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clincot.errors import InvalidInput
from clincot.promotion.ledger import ASKED_FILE, BUDGET_FILE, read_ledger
from clincot.storage.store import KeyExists, KeyNotFound, Store, VersionConflict


class LedgerConflict(InvalidInput):
    """Another decision of the line was entered first."""


@contextmanager
def sync_ledger(store: Store, line: str, folder: Path) -> Iterator[Path]:
    """The line's ledger in `folder`, to be appended to; what was appended is stored when the block ends well."""
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
    read_ledger(folder)  # what is stored can be read again
    for name in (
        ASKED_FILE,
        BUDGET_FILE,
    ):  # in promotion/ledger.py's order: questions without a spending are a decision broken off
        after = _read_bytes(folder / name)
        if after == before[name]:
            continue
        try:
            if name in tags:
                store.replace(_ledger_key(line, name), after, tags[name])
            else:
                store.write_new(_ledger_key(line, name), after)
        except (VersionConflict, KeyExists):
            raise LedgerConflict(
                f"{store.url}/{_ledger_key(line, name)}: another decision was entered meanwhile; decide again"
            ) from None


def _ledger_key(line: str, name: str) -> str:
    return f"ledgers/{line}/{name}"


def _read_bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
