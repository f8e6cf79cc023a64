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
    find_open_round,
    find_round_end,
    next_round_number,
    read_round_outputs,
    record_round_outputs,
    record_run_failure,
)
from clincot.storage.store import Store

A, B = "a" * 64, "b" * 64
# What the exit handler of Kubeflow Pipelines 2.17.0 receives, whether the run succeeded or failed: the last known state
# of the execution in ML Metadata (third_party/ml-metadata, metadata_store.proto, Execution.State, read by
# backend/src/v2/driver/resolve.go). kfp.local says SUCCEEDED or FAILED.
STATES = ("COMPLETE", "RUNNING", "CACHED", "SUCCEEDED", "FAILED", "CANCELED")
ASKED = QuestionsUsed(evidence="e", number=1, slice=1, slices=1, questions=("q",)).model_dump_json() + "\n"


def start(digest: str) -> StartingPolicy:
    return StartingPolicy(
        line="nodules", uri=f"s3://models/{digest}", sha256=digest, round=0, source="champion", published=True
    )


def made(number: int) -> RoundOutputs:
    return RoundOutputs(number=number, digests={"pairs": A}, decision="decision-1", verdict="keep")


def test_a_round_follows_the_last_one_that_succeeded(store: Store) -> None:
    assert begin_round(store, start(A), run="one").number == 1
    record_run_failure(store, "nodules", run="one", reported="FAILED", error="a judge was down")
    assert begin_round(store, start(A), run="one").number == 1
    record_round_outputs(store, "nodules", made(1))
    assert end_round(store, "nodules", run="one").number == 1
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
    assert end_round(store, "nodules", run="one", rounds=3).number == 3
    assert next_round_number(store, "nodules") == 4
    assert read_round_outputs(store, "nodules", 2).digests == {"pairs": A}
    with pytest.raises(InvalidInput, match="round 4 of nodules has no outputs yet"):
        read_round_outputs(store, "nodules", 4)


def test_a_run_that_failed_before_its_round_ends_no_other(store: Store) -> None:
    """Round 1 is open and its run continues, while another run fails before its round began."""
    begin_round(store, start(A), run="one")
    with pytest.raises(InvalidInput, match=r"its record runs/nodules/other\.json does not exist"):
        end_round(store, "nodules", run="other")
    failed = record_run_failure(store, "nodules", run="other", reported="FAILED", error="no champion")
    assert (failed.number, failed.error) == (None, "no champion")
    assert failed_before_start(store, "nodules")
    assert [*store.keys("rounds/nodules/")] == ["rounds/nodules/0001/begun.json"]
    record_round_outputs(store, "nodules", made(1))
    assert end_round(store, "nodules", run="one").number == 1
    assert begin_round(store, start(B), run="two").number == 2
    assert not failed_before_start(store, "nodules")


def test_a_run_that_ends_late_ends_its_own_round(store: Store) -> None:
    """Another run has resumed and ended its round, and the next round is open: that one has not failed."""
    begin_round(store, start(A), run="one")
    begin_round(store, start(A), run="again")
    record_round_outputs(store, "nodules", made(1))
    end_round(store, "nodules", run="again")
    assert begin_round(store, start(B), run="two").number == 2
    late = record_run_failure(store, "nodules", run="one", reported="FAILED")
    assert (late.number, late.run, late.state) == (1, "again", "SUCCEEDED")
    assert not [key for key in store.keys("rounds/nodules/") if key.endswith("/failed.json")]
    record_round_outputs(store, "nodules", made(2))
    assert end_round(store, "nodules", run="one").number == 1
    assert find_round_end(store, "nodules", 2) is None


@pytest.mark.parametrize("reported", STATES)
def test_a_run_that_ended_its_round_has_not_failed(store: Store, reported: str) -> None:
    """Three nightly runs are three rounds, whatever Kubeflow Pipelines reports of them."""
    for night in (1, 2, 3):
        run = f"night-{night}"
        assert begin_round(store, start(A), run=run).number == night
        record_round_outputs(store, "nodules", made(night))
        end_round(store, "nodules", run=run)
        assert record_run_failure(store, "nodules", run=run, reported=reported).state == "SUCCEEDED"
    names = sorted(key.removeprefix("rounds/nodules/") for key in store.keys("rounds/nodules/"))
    assert names == [f"000{night}/{name}.json" for night in (1, 2, 3) for name in ("begun", "ended", "made")]


@pytest.mark.parametrize("reported", STATES)
def test_a_run_without_an_end_has_failed(store: Store, reported: str) -> None:
    begin_round(store, start(A), run="one")
    record_round_outputs(store, "nodules", made(1))
    failed = record_run_failure(store, "nodules", run="one", reported=reported)
    assert (failed.number, failed.state, failed.reported) == (1, "FAILED", reported)
    assert "rounds/nodules/0001/failed.json" in [*store.keys("rounds/nodules/")]
    assert begin_round(store, start(A), run="two").number == 1


def test_a_round_without_outputs_cannot_end(store: Store) -> None:
    begin_round(store, start(A), run="one")
    record_round_outputs(store, "nodules", made(1))
    with pytest.raises(InvalidInput, match="round 2 of nodules has no outputs yet"):
        end_round(store, "nodules", run="one", rounds=2)
    assert next_round_number(store, "nodules") == 1


def test_an_open_round_is_found(store: Store) -> None:
    assert find_open_round(store, "nodules") is None
    begun = begin_round(store, start(A), run="one")
    assert find_open_round(store, "nodules") == find_open_round(store, "nodules", 1) == begun
    record_round_outputs(store, "nodules", made(1))
    end_round(store, "nodules", run="one")
    assert find_open_round(store, "nodules") is find_open_round(store, "nodules", 1) is None


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
