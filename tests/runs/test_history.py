"""The states of a round and its transitions: docs/kubeflow/recurring.md has the same table.

Every test plays the records of real calls: `begin` is what start_round does, `make` record_round, `end` end_round, and
`fail` the exit task. A terminated run, or one whose pods were lost with its exit task, calls nothing more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from clincot.config import PrepareConfig
from clincot.errors import InvalidInput
from clincot.pipelines.params import build_prepare_config
from clincot.promotion.ledger import LedgerConflict, QuestionsUsed, sync_ledger
from clincot.records import StartingPolicy
from clincot.registry.champion import create_champion_pointer, promote_champion, read_champion, roll_back_champion
from clincot.registry.manifest import Manifest
from clincot.runs import history, round_records
from clincot.runs.history import RoundTaken, begin_round, end_round, record_round_outputs, record_run_failure
from clincot.runs.round_records import (
    RoundOutputs,
    RunEnd,
    failed_before_start,
    find_round_end,
    find_round_failure,
    find_round_start,
    next_round_number,
    read_round_outputs,
)
from clincot.storage.folder_store import FolderStore
from clincot.storage.store import Store
from tests.support.deployment_builders import LINE, published

A, B = "a" * 64, "b" * 64
# What the exit handler of Kubeflow Pipelines 2.17.0 receives, whether the run succeeded or failed: the last known state
# of the execution in ML Metadata (third_party/ml-metadata, metadata_store.proto, Execution.State, read by
# backend/src/v2/driver/resolve.go). kfp.local says SUCCEEDED or FAILED.
STATES = ("COMPLETE", "RUNNING", "CACHED", "SUCCEEDED", "FAILED", "CANCELED")
ASKED = QuestionsUsed(evidence="e", number=1, slice=1, slices=1, questions=("q",)).model_dump_json() + "\n"


@dataclass
class ModelLine:
    """A model line: its store, and the checkpoints that can be its champion."""

    store: Store
    base: Manifest
    better: Manifest
    other: Manifest

    def begin(self, run: str, *, number: int = 0, rounds: int = 1) -> tuple[int, str, str]:
        """Begin a round as preflight and start_round do; return its number, its start, and what was said."""
        champion = read_champion(self.store, LINE).now
        start = StartingPolicy(
            line=LINE,
            uri=champion.uri,
            sha256=champion.sha256,
            round=champion.round,
            source="champion",
            published=True,
        )
        begun, notes = begin_round(self.store, start, number, run=run, rounds=rounds)
        return begun.number, begun.start.sha256, " ".join(notes)

    def make(self, run: str, number: int = 1, verdict: str = "keep", what: str = A) -> str:
        outputs = RoundOutputs(
            number=number,
            digests={"pairs": what, "checkpoint": self.better.sha256},
            decision=f"decision-{number}-{what[:4]}",
            verdict=verdict,
        )
        return record_round_outputs(self.store, LINE, outputs, run=run)

    def promote(self, number: int = 1, what: str = A, to: Manifest | None = None) -> None:
        """As a rollout does in the end."""
        promote_champion(
            self.store,
            to or self.better,
            over=read_champion(self.store, LINE).now.sha256,
            by="pipeline",
            reason="rolled out",
            decision=f"decision-{number}-{what[:4]}",
        )

    def move_by_hand(self) -> None:
        """Another run, or an operator, moves the champion."""
        now = read_champion(self.store, LINE).now.sha256
        promote_champion(self.store, self.other, over=now, by="ann", reason="by hand", decision="decision-of-others")

    def end(self, run: str, rounds: int = 1) -> RunEnd:
        return end_round(self.store, LINE, run=run, rounds=rounds)

    def fail(self, run: str, reported: str = "RUNNING", error: str = "") -> RunEnd:
        return record_run_failure(self.store, LINE, run=run, reported=reported, error=error)

    def records(self) -> list[str]:
        """The records of rounds, such as 0001/begun."""
        keys = self.store.keys(f"rounds/{LINE}/")
        return sorted(key.removeprefix(f"rounds/{LINE}/").removesuffix(".json") for key in keys)


@pytest.fixture
def line(tmp_path: Path) -> ModelLine:
    store = FolderStore(tmp_path / "store")
    base, better, other = (published(store, tmp_path, value) for value in (1.0, 2.0, 3.0))
    create_champion_pointer(store, base, by="ann")
    return ModelLine(store, base, better, other)


# --- new → open → ended


def test_a_round_begins_makes_something_and_ends(line: ModelLine) -> None:
    assert line.begin("one") == (1, line.base.sha256, "")
    assert line.records() == ["0001/begun"]
    assert line.make("one") == f"round 1 of {LINE}: keep"
    assert line.records() == ["0001/begun", "0001/made"]
    assert (line.end("one").number, line.end("one").state, line.end("one").run) == (1, "SUCCEEDED", "one")
    assert line.records() == ["0001/begun", "0001/ended", "0001/made"]
    assert line.begin("two") == (2, line.base.sha256, "")


@pytest.mark.parametrize("reported", STATES)
def test_three_nightly_runs_are_three_rounds_whatever_is_reported(line: ModelLine, reported: str) -> None:
    """A successful run, and one whose tail came from the cache: what Kubeflow Pipelines reports plays no part."""
    for night in (1, 2, 3):
        assert line.begin(f"night-{night}")[0] == night
        line.make(f"night-{night}", night)
        line.end(f"night-{night}")
        assert line.fail(f"night-{night}", reported).state == "SUCCEEDED"
    assert line.records() == [f"000{night}/{name}" for night in (1, 2, 3) for name in ("begun", "ended", "made")]


def test_a_round_without_outputs_cannot_end(line: ModelLine) -> None:
    line.begin("one", rounds=2)
    line.make("one")
    with pytest.raises(InvalidInput, match=f"round 2 of {LINE} has no outputs yet"):
        line.end("one", rounds=2)
    assert next_round_number(line.store, LINE) == 1


def test_a_run_without_a_round_can_neither_make_nor_end_one(line: ModelLine) -> None:
    line.begin("one")
    with pytest.raises(InvalidInput, match=rf"the run other of {LINE} ends a round, .* runs/{LINE}/other\.json"):
        line.end("other")
    with pytest.raises(InvalidInput, match=rf"the run other of {LINE} records the outputs of a round"):
        line.make("other")
    assert line.records() == ["0001/begun"]


def test_several_rounds_of_one_run_end_together(line: ModelLine) -> None:
    line.begin("one", rounds=3)
    for number in (1, 2, 3):
        line.make("one", number)
    assert line.end("one", rounds=3).number == 3
    assert next_round_number(line.store, LINE) == 4
    assert read_round_outputs(line.store, LINE, 2).run == "one"


# --- open → failed, and what the exit task knows


@pytest.mark.parametrize("reported", STATES)
def test_a_run_without_an_end_has_failed_whatever_is_reported(line: ModelLine, reported: str) -> None:
    """A run that failed in decide is reported as RUNNING."""
    line.begin("one")
    failed = line.fail("one", reported)
    assert (failed.number, failed.state, failed.reported, failed.last_record) == (1, "FAILED", reported, "start_round")
    assert find_round_failure(line.store, LINE, 1) == failed
    number, start, notes = line.begin("two")
    assert (number, start) == (1, line.base.sha256)
    assert f"round 1 of {LINE} was begun by the run one and has not ended, because that run failed" in notes


def test_an_empty_error_says_what_is_known(line: ModelLine) -> None:
    """Kubeflow Pipelines 2.17.0 passes no error to the exit task. The store tells how far the round came."""
    line.begin("one")
    assert "the last record of the run is that of start_round" in line.fail("one").error
    assert "`clincot pipeline status one` names the task" in line.fail("one").error
    line.make("one", verdict="promote")
    assert line.fail("one").last_record == "record_round"
    line.promote()
    assert line.fail("one").last_record == "deploy"
    assert line.fail("one", error="page: disk full").error == "page: disk full"
    before = line.fail("never-begun")
    assert before.number is None
    assert "preflight or start_round failed" in before.error


def test_a_failure_after_the_publication_says_so(line: ModelLine, tmp_path: Path) -> None:
    """The rollout failed: the challenger is in the registry with its decision, and the champion was not moved."""
    challenger = published(line.store, tmp_path / "more", 4.0, over=line.base)
    assert challenger.decision is not None
    line.begin("one")
    outputs = RoundOutputs(
        number=1, digests={"checkpoint": challenger.sha256}, decision=challenger.decision.id, verdict="promote"
    )
    record_round_outputs(line.store, LINE, outputs, run="one")
    assert line.fail("one").last_record == "publish"


def test_a_run_that_failed_before_its_round_changes_no_round(line: ModelLine) -> None:
    """Round 1 is open and its run continues, while another run fails in preflight."""
    line.begin("one")
    failed = line.fail("other", "FAILED", "no champion")
    assert (failed.number, failed.error) == (None, "no champion")
    assert failed_before_start(line.store, LINE)
    assert line.records() == ["0001/begun"]
    line.make("one")
    assert line.end("one").number == 1
    assert line.begin("two")[0] == 2
    assert not failed_before_start(line.store, LINE)


# --- open → open: the next run resumes


def test_a_terminated_run_is_recorded_as_lost_and_resumed(line: ModelLine) -> None:
    """It never reaches its exit task, so the next run records it. The records of run two then say it failed itself."""
    line.begin("one")
    number, start, notes = line.begin("two")
    assert (number, start) == (1, line.base.sha256)
    assert "was begun by the run one and has not ended, nor recorded a failure" in notes
    assert f"this run resumes it from {line.base.uri}" in notes
    lost = find_round_failure(line.store, LINE, 1)
    assert lost is not None
    assert (lost.state, lost.run, lost.recorded_by, lost.last_record) == ("LOST", "one", "two", "start_round")
    line.fail("two", error="judge: HTTP 401")
    assert "the run two and has not ended, because that run failed (judge: HTTP 401)" in line.begin("three")[2]


def test_a_start_task_that_is_tried_again_returns_the_same(line: ModelLine) -> None:
    """Its pod was lost after its records were written, or between the two of them."""
    first = line.begin("one")
    assert line.begin("one") == first
    line.store.delete(round_records.build_run_key(LINE, "one"))
    line.move_by_hand()  # while the pod was away
    assert line.begin("one") == first
    assert line.records() == ["0001/begun"]


def test_a_retry_in_the_ui_ends_the_round_beside_its_failure(line: ModelLine) -> None:
    """Retry continues the same run after the failed task, and its exit task does not run a second time."""
    line.begin("one")
    line.fail("one")
    line.make("one")
    assert line.end("one").state == "SUCCEEDED"
    assert line.records() == ["0001/begun", "0001/ended", "0001/failed", "0001/made"]
    assert line.begin("two")[0] == 2


def test_a_clone_is_a_run_of_its_own(line: ModelLine) -> None:
    """Clone copies the parameters, number 0 among them: after an end it does the next round, before it resumes."""
    line.begin("one")
    line.fail("one")
    assert line.begin("clone")[0] == 1
    line.make("clone")
    line.end("clone")
    assert line.begin("second-clone")[0] == 2


def test_a_clone_with_a_number_repeats_the_round_and_says_so(line: ModelLine) -> None:
    line.begin("one", number=1)
    line.make("one")
    line.end("one")
    line.move_by_hand()
    number, start, notes = line.begin("clone", number=1)
    assert (number, start) == (1, line.base.sha256)  # from where the round first started
    assert notes == f"round 1 of {LINE} was ended by the run one; this run was asked for it and repeats it"
    line.make("clone", what=B)
    assert read_round_outputs(line.store, LINE, 1).digests["pairs"] == B
    assert line.end("clone").run == "clone"
    assert next_round_number(line.store, LINE) == 2


def test_a_requested_round_is_resumed_from_its_first_start(line: ModelLine) -> None:
    """So does a run folder of `run-local`, which always names its round."""
    line.begin("one", number=1)
    line.move_by_hand()
    number, start, notes = line.begin("two", number=1)
    assert (number, start) == (1, line.base.sha256)
    assert "this run resumes it from" in notes


# --- open → begun again: somebody else moved the champion


def test_after_a_promotion_by_others_the_round_begins_again_under_its_number(line: ModelLine) -> None:
    """With the questions of its number, which no finished round has asked, from the champion of now."""
    line.begin("one")
    line.fail("one")
    line.move_by_hand()
    number, start, notes = line.begin("two")
    assert (number, start) == (1, line.other.sha256)
    assert f"the champion has changed since, so this run begins it again from {line.other.uri}" in notes


def test_a_run_whose_round_was_begun_again_cannot_decide_it(line: ModelLine) -> None:
    """The run goes on while the champion is moved by hand and the next night begins the round again from there."""
    line.begin("one")
    line.move_by_hand()
    line.begin("two")
    with pytest.raises(RoundTaken, match=r"the run two has begun round 1 of chest again from \w{12}; this run started"):
        line.make("one", verdict="promote")
    assert line.records() == ["0001/begun", "0001/failed"]
    line.make("two")
    assert line.end("two").run == "two"


def test_a_late_failure_of_an_earlier_run_does_not_hide_the_latest(line: ModelLine) -> None:
    line.begin("one")
    line.begin("two")
    line.fail("two", error="train: out of memory")
    assert line.fail("one").error.endswith("the run two has the round now")
    assert "the run two and has not ended, because that run failed (train: out of memory)" in line.begin("three")[2]


def test_promotions_that_were_not_rolled_out_are_no_end(line: ModelLine) -> None:
    """The rollout failed, and then somebody else moved the champion: the decision was against the old one."""
    line.begin("one")
    line.make("one", verdict="promote")
    line.fail("one")
    line.move_by_hand()
    assert line.begin("two")[:2] == (1, line.other.sha256)
    line.fail("two")  # before it made anything: the outputs that are there belong to the other start
    assert line.begin("three")[:2] == (1, line.other.sha256)


# --- complete → ended by the next run


@pytest.mark.parametrize("exits", [True, False], ids=["page failed", "terminated"])
def test_a_round_that_was_kept_needs_nothing_more(line: ModelLine, exits: bool) -> None:
    """The page failed, or the run was terminated after its decision: the next run ends the round and does the next."""
    line.begin("one")
    line.make("one", verdict="keep")
    if exits:
        line.fail("one")
    number, start, notes = line.begin("two")
    assert (number, start) == (2, line.base.sha256)
    assert f"round 1 of {LINE} is complete (keep; nothing was to be promoted)" in notes
    assert ("the run one failed afterwards" if exits else "the run one did not record its end") in notes
    ended = find_round_end(line.store, LINE, 1)
    assert ended is not None
    assert (ended.state, ended.run, ended.recorded_by) == ("SUCCEEDED", "one", "two")


def test_a_round_whose_promotion_took_effect_needs_nothing_more(line: ModelLine) -> None:
    """The champion is that of the round itself, so the next round starts from it."""
    line.begin("one")
    line.make("one", verdict="promote")
    line.promote()
    line.fail("one")
    number, start, notes = line.begin("two")
    assert (number, start) == (2, line.better.sha256)
    assert "(promote; the champion was moved)" in notes


def test_a_rollback_after_the_promotion_does_not_open_the_round_again(line: ModelLine) -> None:
    line.begin("one")
    line.make("one", verdict="promote")
    line.promote()
    roll_back_champion(line.store, line.base, over=line.better.sha256, by="ann", reason="complaints")
    assert line.begin("two")[:2] == (2, line.base.sha256)


def test_a_promotion_without_effect_is_resumed(line: ModelLine) -> None:
    """The rollout failed. Everything before it comes from the cache, and the rollout is tried again."""
    line.begin("one")
    line.make("one", verdict="promote")
    line.fail("one")
    number, start, notes = line.begin("two")
    assert (number, start) == (1, line.base.sha256)
    assert "this run resumes it" in notes
    assert line.make("two", verdict="promote") == f"round 1 of {LINE}: promote"
    line.promote()
    assert line.end("two").run == "two"


def test_a_retry_after_the_next_run_ended_the_round_changes_nothing(line: ModelLine) -> None:
    line.begin("one")
    line.make("one")
    line.fail("one")
    line.begin("two")
    ended = line.end("one")
    assert (ended.run, ended.recorded_by) == ("one", "two")


def test_a_run_of_several_rounds_is_resumed_at_its_first(line: ModelLine) -> None:
    """Its own promotion in round 1 has moved the champion; round 2 continued from the challenger, and failed."""
    line.begin("one", rounds=3)
    line.make("one", 1, "promote")
    line.promote()
    line.fail("one")
    number, start, _ = line.begin("two", rounds=3)
    assert (number, start) == (1, line.base.sha256)


def test_a_run_of_several_rounds_that_others_overtook_keeps_what_is_complete(line: ModelLine) -> None:
    line.begin("one", rounds=3)
    line.make("one", 1)
    line.move_by_hand()
    number, start, notes = line.begin("two", rounds=3)
    assert (number, start) == (2, line.other.sha256)
    assert f"round 1 of {LINE} is complete (keep;" in notes


# --- overlapping runs


def test_of_two_runs_the_first_to_complete_the_round_decides_it(line: ModelLine) -> None:
    """The schedule was changed while a run went on: the new one has other settings and another result."""
    line.begin("one")
    line.begin("two")  # from the same champion: it resumes the round of the run that still goes on
    line.make("one", what=A)
    with pytest.raises(RoundTaken, match=r"round 1 of chest was decided by the run one \(keep, decision-1-aaaa\)"):
        line.make("two", verdict="promote", what=B)
    assert line.end("one").run == "one"
    with pytest.raises(RoundTaken, match="nothing acts on this run's decision"):
        line.make("two", verdict="promote", what=B)
    assert read_round_outputs(line.store, LINE, 1).digests["pairs"] == A
    assert line.fail("two").run == "one"
    assert line.begin("three")[0] == 2


def test_a_rollout_that_goes_on_is_not_overtaken(line: ModelLine) -> None:
    """The first run has recorded a promotion, which takes effect half an hour later."""
    line.begin("one")
    line.begin("two")
    line.make("one", verdict="promote", what=A)
    with pytest.raises(RoundTaken, match=r"was decided by the run one \(promote, decision-1-aaaa\)"):
        line.make("two", verdict="promote", what=B)
    line.promote(what=A)
    assert line.end("one").run == "one"


def test_a_run_replaces_what_a_lost_run_made_without_effect(line: ModelLine) -> None:
    """It was there when the run began, so no run that goes on made it."""
    line.begin("one")
    line.make("one", verdict="promote", what=A)
    line.begin("two")
    assert line.make("two", verdict="keep", what=B) == f"round 1 of {LINE}: keep"
    assert read_round_outputs(line.store, LINE, 1).run == "two"


def test_two_runs_that_make_the_same_both_succeed(line: ModelLine) -> None:
    line.begin("one")
    line.begin("two")
    line.make("one")
    assert line.make("two") == f"round 1 of {LINE}: the run one has recorded the same outputs already"
    line.end("one")
    assert line.end("two").run == "one"
    assert [line.fail(run).state for run in ("one", "two")] == ["SUCCEEDED", "SUCCEEDED"]


def test_a_run_that_ends_late_ends_its_own_round(line: ModelLine) -> None:
    """Another run has resumed and ended its round, and the next round is open: that one has not failed."""
    line.begin("one")
    line.begin("again")
    line.make("again")
    line.end("again")
    assert line.begin("two")[0] == 2
    late = line.fail("one")
    assert (late.number, late.run, late.state) == (1, "again", "SUCCEEDED")
    line.make("two", 2)
    assert line.end("one").number == 1
    assert find_round_end(line.store, LINE, 2) is None


class Contended(FolderStore):
    """A store in which, before each of this client's first writes of a start, another run writes one."""

    def __init__(self, folder: Path, meanwhile: list[Callable[[], None]]) -> None:
        super().__init__(folder)
        self.meanwhile = meanwhile

    def write_new(self, key: str, content: bytes) -> str:
        self._interfere(key)
        return super().write_new(key, content)

    def replace(self, key: str, content: bytes, tag: str) -> str:
        self._interfere(key)
        return super().replace(key, content, tag)

    def _interfere(self, key: str) -> None:
        if key.endswith("/begun.json") and self.meanwhile:
            self.meanwhile.pop(0)()


@pytest.mark.parametrize("number", [0, 1])
def test_two_runs_that_begin_at_once_begin_one_round(line: ModelLine, tmp_path: Path, number: int) -> None:
    meanwhile = [lambda: print(line.begin("one", number=number)), lambda: print(line.begin("three", number=number))]
    contended = ModelLine(Contended(tmp_path / "store", meanwhile), line.base, line.better, line.other)
    assert contended.begin("two", number=number)[:2] == (1, line.base.sha256)
    begun = find_round_start(line.store, LINE, 1)
    assert begun is not None
    assert begun.run == "two"
    assert meanwhile == []


# --- months


def test_clocks_decide_nothing(line: ModelLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of daylight saving time, or a node whose clock is years behind: the numbers alone are counted."""
    years = itertools.count(2031, -1)
    clock = lambda: f"{next(years)}-10-25T02:59:59+00:00"  # noqa: E731
    monkeypatch.setattr(history, "format_time_now", clock)
    line.begin("one")
    line.fail("one")
    line.begin("again")
    line.make("again")
    line.end("again")
    line.begin("two")
    line.make("two", 2)
    line.fail("two")
    assert line.begin("three")[0] == 3
    ends = [find_round_end(line.store, LINE, number) for number in (1, 2)]
    assert [end.at[:4] for end in ends if end is not None] == ["2030", "2028"]


def test_questions_belong_to_the_number_of_a_round(line: ModelLine) -> None:
    """Three subsets: round 4 asks the first again in lap 1. A failed night asks the same again, and skips none."""
    prepare = PrepareConfig(rounds=3).model_dump(mode="json")
    asked = []
    for night, fails in enumerate((False, True, False, True, False, False)):
        number = line.begin(f"night-{night}")[0]
        config, lap = build_prepare_config(prepare, number, 1)
        asked.append((number, config.round, lap))
        if not fails:
            line.make(f"night-{night}", number)
            line.end(f"night-{night}")
    assert asked == [(1, 0, 0), (2, 1, 0), (2, 1, 0), (3, 2, 0), (3, 2, 0), (4, 0, 1)]


def test_a_hundred_nights_are_a_hundred_rounds(line: ModelLine) -> None:
    """Every fourth night fails before its decision, every fifth after it; runs are lost, retried and resumed.

    Nights 1 to 100: 25 fail early (4, 8, …, 100) and add no round. Of the 75 others every one ends its own round, or
    leaves it complete to the next night. So 75 rounds, and night 101 is round 76.
    """
    for night in range(1, 101):
        run = f"night-{night}"
        number = line.begin(run)[0]
        if night % 4 == 0:
            line.fail(run)
        elif night % 5 == 0:
            line.make(run, number)
        else:
            line.make(run, number)
            line.end(run)
    assert line.begin("night-101")[0] == 76


# --- the ledger


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
