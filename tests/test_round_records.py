"""Which round a run is: the next one, or the one that was interrupted, from where that began."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.bench.ledger import Asked
from clincot.errors import BadInput
from clincot.ledger_store import LedgerMoved, ledger_of
from clincot.preflight.report import StartingPolicy
from clincot.round_records import Made, begin_round, end_round, next_round, read_made, record_made
from clincot.store import Store

A, B = "a" * 64, "b" * 64
ASKED = Asked(evidence="e", number=1, slice=1, slices=1, questions=("q",)).model_dump_json() + "\n"


def start(digest: str) -> StartingPolicy:
    return StartingPolicy(line="nodules", uri=f"s3://models/{digest}", sha256=digest, round=0, source="champion",
                          published=True)  # fmt: skip


def made(number: int) -> Made:
    return Made(number=number, digests={"pairs": A}, decision="decision-1", verdict="keep")


def test_a_round_is_the_one_after_the_last_that_ended_well(store: Store) -> None:
    assert begin_round(store, start(A)).number == 1
    end_round(store, "nodules", state="FAILED", error="a judge was down")
    assert begin_round(store, start(A)).number == 1
    record_made(store, "nodules", made(1))
    assert end_round(store, "nodules", state="SUCCEEDED").number == 1
    assert begin_round(store, start(B)).number == 2


def test_an_interrupted_round_goes_on_from_where_it_began(store: Store) -> None:
    """Asked for by its number. Without one it begins anew where someone else has moved the champion."""
    begin_round(store, start(A))
    assert begin_round(store, start(B), 1).start.sha256 == A
    assert begin_round(store, start(B)).start.sha256 == B
    assert begin_round(store, start(A), 1).start.sha256 == B


def test_several_rounds_of_one_run_end_together(store: Store) -> None:
    begin_round(store, start(A))
    for number in (1, 2, 3):
        record_made(store, "nodules", made(number))
    assert end_round(store, "nodules", state="SUCCEEDED").number == 3
    assert next_round(store, "nodules") == 4
    assert read_made(store, "nodules", 2).digests == {"pairs": A}
    with pytest.raises(BadInput, match="round 4 of nodules has not made anything yet"):
        read_made(store, "nodules", 4)


def test_a_run_that_failed_before_its_round_began_leaves_no_record(store: Store) -> None:
    end_round(store, "nodules", state="FAILED", error="no champion")
    assert list(store.keys("rounds/nodules/")) == []


def test_of_two_decisions_at_once_one_is_told(store: Store, tmp_path: Path) -> None:
    """Empty ledgers here: what is appended is bench/ledger.py's, and read again before it is stored."""
    first = ledger_of(store, "nodules", tmp_path / "one")
    one = first.__enter__()
    with ledger_of(store, "nodules", tmp_path / "two") as two:
        (two / "asked.jsonl").write_text(ASKED)
    (one / "asked.jsonl").write_text(ASKED)
    with pytest.raises(LedgerMoved, match="decide again"):
        first.__exit__(None, None, None)
    with ledger_of(store, "nodules", tmp_path / "three") as three:
        assert (three / "asked.jsonl").read_text() == ASKED
