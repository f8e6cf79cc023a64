"""Which round a run belongs to: the next one, or an interrupted one with its first starting policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.errors import InvalidInput
from clincot.promotion.ledger import LedgerConflict, QuestionsUsed, sync_ledger
from clincot.records import StartingPolicy
from clincot.runs.history import (
    RoundOutputs,
    begin_round,
    end_round,
    failed_before_start,
    next_round_number,
    read_round_outputs,
    record_round_outputs,
)
from clincot.storage.store import Store

A, B = "a" * 64, "b" * 64
ASKED = QuestionsUsed(evidence="e", number=1, slice=1, slices=1, questions=("q",)).model_dump_json() + "\n"


def start(digest: str) -> StartingPolicy:
    return StartingPolicy(
        line="nodules", uri=f"s3://models/{digest}", sha256=digest, round=0, source="champion", published=True
    )


def made(number: int) -> RoundOutputs:
    return RoundOutputs(number=number, digests={"pairs": A}, decision="decision-1", verdict="keep")


def test_a_round_follows_the_last_one_that_succeeded(store: Store) -> None:
    assert begin_round(store, start(A), run="one").number == 1
    end_round(store, "nodules", run="one", state="FAILED", error="a judge was down")
    assert begin_round(store, start(A), run="one").number == 1
    record_round_outputs(store, "nodules", made(1))
    assert end_round(store, "nodules", run="one", state="SUCCEEDED").number == 1
    assert begin_round(store, start(B), run="two").number == 2


def test_an_interrupted_round_keeps_its_starting_policy(store: Store) -> None:
    """If its number is requested. Without a number it starts again after someone else has moved the champion."""
    begin_round(store, start(A), run="one")
    assert begin_round(store, start(B), 1, run="two").start.sha256 == A
    assert begin_round(store, start(B), run="two").start.sha256 == B
    assert begin_round(store, start(A), 1, run="one").start.sha256 == B


def test_several_rounds_of_one_run_end_together(store: Store) -> None:
    begin_round(store, start(A), run="one")
    for number in (1, 2, 3):
        record_round_outputs(store, "nodules", made(number))
    assert end_round(store, "nodules", run="one", state="SUCCEEDED").number == 3
    assert next_round_number(store, "nodules") == 4
    assert read_round_outputs(store, "nodules", 2).digests == {"pairs": A}
    with pytest.raises(InvalidInput, match="round 4 of nodules has no outputs yet"):
        read_round_outputs(store, "nodules", 4)


def test_a_run_that_failed_before_its_round_ends_no_other(store: Store) -> None:
    """Round 1 is open and its run continues, while another run fails before its round began."""
    begin_round(store, start(A), run="one")
    with pytest.raises(InvalidInput, match=r"its record runs/nodules/other\.json does not exist"):
        end_round(store, "nodules", run="other", state="SUCCEEDED")
    ended = end_round(store, "nodules", run="other", state="FAILED", error="no champion")
    assert (ended.number, ended.error) == (None, "no champion")
    assert failed_before_start(store, "nodules")
    assert [*store.keys("rounds/nodules/")] == ["rounds/nodules/0001/begun.json"]
    record_round_outputs(store, "nodules", made(1))
    assert end_round(store, "nodules", run="one", state="SUCCEEDED").number == 1
    assert begin_round(store, start(B), run="two").number == 2
    assert not failed_before_start(store, "nodules")


def test_a_run_that_ends_late_ends_its_own_round(store: Store) -> None:
    """Another run has resumed and ended its round, and the next round is open: that one has not failed."""
    begin_round(store, start(A), run="one")
    begin_round(store, start(A), run="again")
    end_round(store, "nodules", run="again", state="SUCCEEDED")
    assert begin_round(store, start(B), run="two").number == 2
    assert end_round(store, "nodules", run="one", state="FAILED").number == 1
    assert "rounds/nodules/0002/failed.json" not in [*store.keys("rounds/nodules/")]


def test_of_two_concurrent_decisions_one_must_repeat(store: Store, tmp_path: Path) -> None:
    """The store has no ledger yet. Both decisions append to their copies; the second one to finish conflicts."""
    first = sync_ledger(store, "nodules", tmp_path / "one")
    one = first.__enter__()
    with sync_ledger(store, "nodules", tmp_path / "two") as two:
        (two / "asked.jsonl").write_text(ASKED)
    (one / "asked.jsonl").write_text(ASKED)
    with pytest.raises(LedgerConflict, match="decide again"):
        first.__exit__(None, None, None)
    with sync_ledger(store, "nodules", tmp_path / "three") as three:
        assert (three / "asked.jsonl").read_text() == ASKED
