"""The decide stage over files: gathers the evidence and asks the gate. It always ends with a decision.

What cannot be read (a missing champion, a file that was cut off, a report that is none) is a reason to block, not an
error: a pipeline branches on the verdict. Only a ledger that another decision was entered into meanwhile is an error,
since then this decision's level is spent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from clincot.config import DecideConfig
from clincot.datasets.folder import StudyIndex, load_questions, load_references
from clincot.evaluation.benchmark import BadBenchmark, Benchmark
from clincot.evaluation.blind_baseline import BlindBaseline
from clincot.images import InvalidImage
from clincot.jsonl import InvalidRecord, read_records
from clincot.promotion import gate
from clincot.promotion.judge_health import check_judge_health
from clincot.promotion.leakage import find_calibration_leakage, find_leakage
from clincot.promotion.ledger import Ledger, read_ledger
from clincot.records import GateFinding, Outcome, hash_json

T = TypeVar("T")
_EMPTY_BENCHMARK = Benchmark(questions={}, references={}, clusters={}, digest=hash_json([]))


class _ProblemCollector:
    """Collects what could not be read, so that one decision names all of it."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def read_or_note(self, what: str, read: Callable[[], T], otherwise: T) -> T:
        try:
            return read()
        except (
            InvalidRecord,
            BadBenchmark,
            InvalidImage,
            ValueError,
            KeyError,
            OSError,
        ) as error:  # all name file and cause
            self.found.append(f"The {what} cannot be used: {error}")
            return otherwise


def decide_from_files(config: DecideConfig, inputs: Mapping[str, Path], digests: Mapping[str, str]) -> gate.GateResult:
    """inputs: the stage's, by name; digests: what each of them was, for the record."""
    problems = _ProblemCollector()
    outcomes: dict[str, list[Outcome]] = {}
    for name in ("champion", "challenger", "base"):
        if name in inputs:
            outcomes[name] = problems.read_or_note(
                f"{name}'s file of outcomes", partial(_read_outcomes, inputs[name]), []
            )
    asked = {outcome.question for outcome in outcomes["challenger"]}
    benchmark = problems.read_or_note(
        "benchmark", lambda: _read_asked_benchmark(inputs["benchmark"], asked), _EMPTY_BENCHMARK
    )
    blind: list[Outcome] = []
    if benchmark.questions:
        key = inputs.get("blind", inputs["benchmark"])  # whose answers the baseline knows by heart
        blind = problems.read_or_note("blind baseline", lambda: _answer_blind(key, benchmark), [])
    ledger = Ledger()
    if "ledger" in inputs:
        ledger = problems.read_or_note("ledger", lambda: read_ledger(inputs["ledger"]), ledger)
    case = gate.Comparison(
        champion=_first_policy(outcomes["champion"], "champion"),
        challenger=_first_policy(outcomes["challenger"], "challenger"),
        champion_outcomes=outcomes["champion"],
        challenger_outcomes=outcomes["challenger"],
        blind_outcomes=blind,
        base=_first_policy(outcomes["base"], "base") if "base" in outcomes else "",
        base_outcomes=outcomes.get("base", []),
        ledger=ledger,
        findings=_collect_findings(config, inputs, benchmark, problems),
        problems=problems.found,
        inputs={name: digest for name, digest in digests.items() if name != "ledger"},
    )
    return gate.run_gate(case, benchmark, config)


def _collect_findings(
    config: DecideConfig, inputs: Mapping[str, Path], benchmark: Benchmark, problems: _ProblemCollector
) -> Sequence[GateFinding]:
    found: list[GateFinding] = []
    reports = {name: inputs.get(name) for name in ("panel_report", "panel_report_before", "pair_report")}
    found += problems.read_or_note(
        "judges' and pairs' reports",
        lambda: check_judge_health(
            config, panel=reports["panel_report"], before=reports["panel_report_before"], pairs=reports["pair_report"]
        ),
        [],
    )
    if benchmark.questions and "data" in inputs:
        found += problems.read_or_note(
            "comparison with the training data",
            lambda: find_leakage(benchmark, inputs["benchmark"], inputs["data"], config),
            [],
        )
    if benchmark.questions and "calibration" in inputs:
        found += problems.read_or_note(
            "comparison with the judges' calibration data",
            lambda: [find_calibration_leakage(benchmark, inputs["benchmark"], inputs["calibration"])],
            [],
        )
    return found


def _read_outcomes(path: Path) -> list[Outcome]:
    if not path.is_file():
        raise InvalidRecord(f"{path} does not exist; expected the outcomes that `clincot evaluate` writes")
    return list(read_records(path, Outcome))


def _read_asked_benchmark(folder: Path, asked: set[str]) -> Benchmark:
    """The questions that the challenger was asked (evaluate.limit may have cut the benchmark); all, if it was none."""
    questions = [question for question in load_questions(folder) if not asked or question.id in asked]
    return Benchmark.from_records(questions, load_references(folder), StudyIndex(folder).values())


def _answer_blind(key: Path, benchmark: Benchmark) -> list[Outcome]:
    return list(BlindBaseline.fit(load_questions(key), load_references(key)).iter_outcomes(benchmark))


def _first_policy(outcomes: Sequence[Outcome], side: str) -> str:
    return outcomes[0].policy if outcomes else f"unknown ({side})"
