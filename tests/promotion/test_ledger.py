"""The ledgers on disk: append-only, idempotent, and refused when a line is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from clincot.jsonl import InvalidRecord
from clincot.promotion.error_budget import next_level
from clincot.promotion.ledger import BudgetEntry, QuestionsUsed, append_decision, read_ledger
from clincot.records import Totals

NOTHING = Totals()


def decided(
    folder: Path, challenger: str, *, verdict: str = "keep", questions: tuple[str, ...] = ("q1",)
) -> BudgetEntry:
    """Enter a decision as the gate does."""
    ledger = read_ledger(folder)
    budget = next_level(ledger.spent, ("old", challenger), lifetime=0.05)
    spending = BudgetEntry.model_validate(
        {
            "evidence": f"of {challenger} {budget.look}",
            "champion": "old",
            "challenger": challenger,
            "benchmark": "b",
            "verdict": verdict,
            "budget": budget,
            "gain": NOTHING,
            "gain_rows": (),
            "guards": {},
            "blind": NOTHING,
        }
    )
    asked = QuestionsUsed(evidence=spending.evidence, number=budget.number, slice=1, slices=1, questions=questions)
    append_decision(folder, spending, asked)
    return spending


def test_what_is_entered_is_read_back_and_counted(tmp_path: Path) -> None:
    first = decided(tmp_path, "a", questions=("q1", "q2"))
    decided(tmp_path, "b", questions=("q2", "q3"))
    ledger = read_ledger(tmp_path)
    assert ledger.spent[0] == first
    assert ledger.count_uses() == {"q1": 1, "q2": 2, "q3": 1}
    assert ledger.find_used_questions(("old", "b")) == {"q2", "q3"}


def test_equal_evidence_is_entered_once(tmp_path: Path) -> None:
    """A second decision on the same evidence sees the ledger as the first one did."""
    first = decided(tmp_path, "a")
    decided(tmp_path, "b")
    before = (tmp_path / "budget.jsonl").read_bytes()
    ledger = read_ledger(tmp_path)
    append_decision(tmp_path, first, ledger.asked[0])
    assert (tmp_path / "budget.jsonl").read_bytes() == before
    assert ledger.rewind_ledger(first.evidence).spent == ()
    assert ledger.rewind_ledger("new evidence").spent == ledger.spent


def test_concurrent_decisions_do_not_spend_one_level_twice(tmp_path: Path) -> None:
    first = decided(tmp_path, "a")
    late = BudgetEntry.model_validate({**first.model_dump(exclude={"id"}), "evidence": "other", "challenger": "b"})
    asked = QuestionsUsed(evidence="other", number=1, slice=1, slices=1, questions=("q1",))
    with pytest.raises(InvalidRecord, match="expected 0 entries, found 1: another decision was entered meanwhile"):
        append_decision(tmp_path, late, asked)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda lines: lines[1:], "budget.jsonl:1: expected entry 1, got 2"),
        (lambda lines: [lines[0], lines[1][:-20]], "ends in the middle of a line"),
        (lambda lines: [lines[0], lines[1].replace('"keep"', '"promote"')], "does not match the record's content"),
    ],
)
def test_a_ledger_that_was_tampered_with_is_refused(harm, says: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    decided(tmp_path, "a")
    decided(tmp_path, "b")
    path = tmp_path / "budget.jsonl"
    path.write_text("".join(harm(path.read_text().splitlines(keepends=True))))
    with pytest.raises(InvalidRecord, match=says):
        read_ledger(tmp_path)


def test_missing_questions_or_a_missing_folder_are_refused(tmp_path: Path) -> None:
    decided(tmp_path, "a")
    (tmp_path / "asked.jsonl").unlink()
    with pytest.raises(InvalidRecord, match="expected the questions of entry 1"):
        read_ledger(tmp_path)
    with pytest.raises(InvalidRecord, match="make an empty one for a pipeline's first decision"):
        read_ledger(tmp_path / "nowhere")
