"""The decide stage: reads the evidence from files and runs the gate.

It always ends with a decision, because a pipeline branches on the verdict. An unreadable input (a missing champion, a
truncated file, a malformed report) is therefore a reason to block and not an error. The only error is a ledger to which
another decision was appended in the meantime, because that decision has spent the level.
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
from clincot.promotion.judge_health import check_graders, check_judge_health
from clincot.promotion.leakage import find_calibration_leakage, find_leakage
from clincot.promotion.ledger import Ledger, read_ledger
from clincot.records import GateFinding, Outcome, hash_json

T = TypeVar("T")
_INPUT_ERRORS = (InvalidRecord, BadBenchmark, InvalidImage, ValueError, KeyError, OSError)  # all name file and cause
_EMPTY_BENCHMARK = Benchmark(questions={}, references={}, clusters={}, digest=hash_json([]))


class _ProblemCollector:
    """Collects the problems of all inputs, so that one decision names every one of them."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def read_or_note(self, what: str, read: Callable[[], T], default: T) -> T:
        """Return what `read` returns; if it fails, note the problem and return `default`."""
        try:
            return read()
        except _INPUT_ERRORS as error:
            self.problems.append(f"The {what} cannot be used: {error}")
            return default


def decide_from_files(config: DecideConfig, inputs: Mapping[str, Path], digests: Mapping[str, str]) -> gate.GateResult:
    """Decide on a challenger from the stage's inputs.

    inputs: paths by the stage's names, of which only champion, challenger and benchmark are required. digests: the
    sha256 of each input, for the record.
    """
    problems = _ProblemCollector()
    outcomes: dict[str, list[Outcome]] = {}
    for name in ("champion", "challenger", "base"):
        if name in inputs:
            outcomes[name] = problems.read_or_note(
                f"{name}'s file of outcomes", partial(_read_outcomes, inputs[name]), []
            )
    answered = {outcome.question for outcome in outcomes["challenger"]}
    benchmark = problems.read_or_note(
        "benchmark", lambda: _read_answered_benchmark(inputs["benchmark"], answered), _EMPTY_BENCHMARK
    )
    blind: list[Outcome] = []
    if benchmark.questions:
        key = inputs.get("blind", inputs["benchmark"])  # the folder whose answers the baseline learns
        blind = problems.read_or_note("blind baseline", lambda: _answer_blind(key, benchmark), [])
    ledger = Ledger()
    if "ledger" in inputs:
        ledger = problems.read_or_note("ledger", lambda: read_ledger(inputs["ledger"]), ledger)
    no_findings: list[GateFinding] = []
    case = gate.Comparison(
        champion=_first_policy(outcomes["champion"], "champion"),
        challenger=_first_policy(outcomes["challenger"], "challenger"),
        champion_outcomes=outcomes["champion"],
        challenger_outcomes=outcomes["challenger"],
        blind_outcomes=blind,
        base=_first_policy(outcomes["base"], "base") if "base" in outcomes else "",
        base_outcomes=outcomes.get("base", []),
        ledger=ledger,
        findings=[
            *_collect_findings(config, inputs, benchmark, problems),
            *problems.read_or_note("judges' reports", partial(_check_graders, inputs, outcomes), no_findings),
        ],
        problems=problems.problems,
        inputs={name: digest for name, digest in digests.items() if name != "ledger"},
    )
    return gate.run_gate(case, benchmark, config)


def _collect_findings(
    config: DecideConfig, inputs: Mapping[str, Path], benchmark: Benchmark, problems: _ProblemCollector
) -> Sequence[GateFinding]:
    findings: list[GateFinding] = []
    reports = {name: inputs.get(name) for name in ("panel_report", "panel_report_before", "pair_report")}
    findings += problems.read_or_note(
        "judges' and pairs' reports",
        lambda: check_judge_health(
            config, panel=reports["panel_report"], before=reports["panel_report_before"], pairs=reports["pair_report"]
        ),
        [],
    )
    if benchmark.questions and "data" in inputs:
        findings += problems.read_or_note(
            "comparison with the training data",
            lambda: find_leakage(benchmark, inputs["benchmark"], inputs["data"], config),
            [],
        )
    if benchmark.questions and "calibration" in inputs:
        findings += problems.read_or_note(
            "comparison with the judges' calibration data",
            lambda: [find_calibration_leakage(benchmark, inputs["benchmark"], inputs["calibration"])],
            [],
        )
    return findings


def _check_graders(inputs: Mapping[str, Path], outcomes: Mapping[str, Sequence[Outcome]]) -> list[GateFinding]:
    compared = [*outcomes["champion"], *outcomes["challenger"]]
    return check_graders(compared, [inputs.get("panel_report"), inputs.get("panel_report_before")])


def _read_outcomes(path: Path) -> list[Outcome]:
    if not path.is_file():
        raise InvalidRecord(f"{path} does not exist; expected the outcomes that `clincot evaluate` writes")
    return list(read_records(path, Outcome))


def _read_answered_benchmark(folder: Path, answered: set[str]) -> Benchmark:
    """Read the questions that the challenger answered, since evaluate.limit may cut the benchmark; all if none."""
    questions = [question for question in load_questions(folder) if not answered or question.id in answered]
    return Benchmark.from_records(questions, load_references(folder), StudyIndex(folder).values())


def _answer_blind(key: Path, benchmark: Benchmark) -> list[Outcome]:
    return list(BlindBaseline.fit(load_questions(key), load_references(key)).iter_outcomes(benchmark))


def _first_policy(outcomes: Sequence[Outcome], side: str) -> str:
    return outcomes[0].policy if outcomes else f"unknown ({side})"
