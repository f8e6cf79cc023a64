"""What an ingest has seen, where there is no room for it."""

from __future__ import annotations

import errno
import sqlite3

import pytest

from clincot.datasets.ingest.index import IngestIndex


def test_a_full_disk_is_an_oserror_that_says_where_to_make_room() -> None:
    """64 pages of 4 KiB hold a few thousand ids; SQLite says the same of a full database as of a full disk."""
    with pytest.raises(OSError, match=r"full in the folder for temporary files.*SQLITE_TMPDIR") as full:
        _fill(64, ids=100_000)
    assert full.value.errno == errno.ENOSPC


def _fill(pages: int, *, ids: int) -> None:
    with IngestIndex() as ledger:
        ledger._db.execute(f"PRAGMA max_page_count = {pages}")
        for number in range(ids):
            ledger.register_id(number.to_bytes(8), f"row {number}")


def test_any_other_fault_of_the_database_stays_what_it_is() -> None:
    with pytest.raises(sqlite3.OperationalError, match="no such table"), IngestIndex() as one:
        one._db.execute("SELECT * FROM nowhere")
