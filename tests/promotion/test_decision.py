"""The decide stage over files: it always ends with a decision, its exit codes, and the ledgers it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clincot.cli.app import main
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.evaluation.benchmark import Benchmark
from clincot.jsonl import read_records, write_records
from clincot.promotion.ledger import read_ledger
from clincot.records import Decision
from tests.support import tiny
from tests.support.benchmark_builders import outcome_of


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark of 60 patients; the champion is right on every third question, the challenger on almost all."""
    folder = tmp_path_factory.mktemp("deciding")
    benchmark = tiny.write_set(folder / "benchmark", seed=1, studies=60)
    board = Benchmark.from_records(
        load_questions(benchmark), load_references(benchmark), StudyIndex(benchmark).values()
    )
    for policy, right in (("old", 3), ("new", 1), ("same", 3)):
        outcomes = []
        for number, question in enumerate(board.questions):
            key = board.references[question].answer
            answer = key if number % right == 0 and number != 10 else ("no" if key == "yes" else "elsewhere")
            outcomes.append(outcome_of(board, question, answer, policy=policy, hit=True))
        write_records(folder / f"{policy}.jsonl", outcomes)
    (folder / "cut.jsonl").write_bytes((folder / "new.jsonl").read_bytes()[:-30])
    # whose answers the blind baseline knows: that of another set, all zones "elsewhere"
    blind = tiny.write_set(folder / "blind", seed=5, studies=2)
    key = [r.model_copy(update={"answer": "nowhere", "id": ""}) for r in load_references(blind)]
    write_records(blind / "references.jsonl", [type(r).model_validate(r.model_dump()) for r in key])
    return folder


def decide(made: Path, out: Path, *more: str, challenger: str = "new", champion: str = "old") -> int:
    return main(
        [
            "decide",
            "--benchmark",
            f"{made}/benchmark",
            "--champion",
            f"{made}/{champion}.jsonl",
            "--challenger",
            f"{made}/{challenger}.jsonl",
            "--blind",
            f"{made}/blind",
            "--decision",
            f"{out}/decision.json",
            "--evidence",
            f"{out}/evidence.jsonl",
            "--summary",
            f"{out}/decision.md",
            "--set",
            "decide.resamples=50",
            "--set",
            "decide.arm=written",
            *more,
        ]
    )


def decision_in(out: Path) -> Decision:
    return next(read_records(out / "decision.json", Decision))


def test_exit_codes_are_promote_keep_and_blocked(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decide(made, tmp_path / "a", "--exit-code") == 0
    assert capsys.readouterr().out.startswith("# promote\n")
    assert decide(made, tmp_path / "b", "--exit-code", "--explain", challenger="same") == 3
    assert capsys.readouterr().out.startswith("For a promotion:\n")
    assert decide(made, tmp_path / "c", "--exit-code", challenger="missing") == 4
    capsys.readouterr()
    assert decide(made, tmp_path / "d") == 0  # without --exit-code: it ended well
    assert json.loads(capsys.readouterr().out) == {"promote": 1.0, "keep": 0.0, "blocked": 0.0}


@pytest.mark.parametrize(
    ("champion", "challenger", "says"),
    [
        ("missing", "new", "missing.jsonl does not exist; expected the outcomes"),
        ("old", "missing", "missing.jsonl does not exist"),
        ("old", "cut", "the file ends in the middle of a line"),
    ],
)
def test_what_cannot_be_read_blocks_and_says_why(
    champion: str, challenger: str, says: str, made: Path, tmp_path: Path
) -> None:
    assert decide(made, tmp_path, champion=champion, challenger=challenger) == 0
    decision = decision_in(tmp_path)
    assert decision.verdict == "blocked"
    assert any(says in reason for reason in decision.reasons)
    assert (tmp_path / "evidence.jsonl").read_bytes() == b""


def test_a_leak_and_a_broken_report_block(made: Path, tmp_path: Path) -> None:
    decide(made, tmp_path, "--data", f"{made}/benchmark")
    assert [f.name for f in decision_in(tmp_path).findings if f.severity == "block"] == [
        "images in training",
        "patients in training",
    ]
    (tmp_path / "panel.json").write_text("{}")
    decide(made, tmp_path, "--panel-report", f"{tmp_path}/panel.json")
    assert "panel.json: not a PanelReport" in decision_in(tmp_path).reasons[0]


def test_equal_evidence_is_entered_once_a_lost_line_blocks(made: Path, tmp_path: Path) -> None:
    """The ledger gets one entry for equal evidence, and a lost line blocks the next decision."""
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    for _ in range(2):
        decide(made, tmp_path, "--ledger", str(ledger))
    assert len(read_ledger(ledger).spent) == 1
    first = decision_in(tmp_path)
    assert (first.verdict, first.budget and first.budget.number) == ("promote", 1)
    decide(made, tmp_path / "second", "--ledger", str(ledger), challenger="same")
    second = decision_in(tmp_path / "second")
    assert second.budget is not None
    assert second.budget.passed_on > 0  # the promotion gave its level back
    lines = (ledger / "budget.jsonl").read_text().splitlines(keepends=True)
    (ledger / "budget.jsonl").write_text(lines[1])
    decide(made, tmp_path / "third", "--ledger", str(ledger), challenger="same")
    assert "a line was taken out" in decision_in(tmp_path / "third").reasons[0]


def test_power_reads_a_decision(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decide(made, tmp_path, challenger="same")
    capsys.readouterr()
    assert main(["power", f"{tmp_path}/decision.json", "--questions", "500"]) == 0
    assert "500 questions show" in capsys.readouterr().out
    assert main(["power", f"{tmp_path}/decision.json", "--power", "1"]) == 1
