"""The layout of a run folder, for its readers: the page and `clincot show`.

run.json                 the data, the benchmark, the base policy and the judges
params.yaml              the configuration
results.json             the results table
base/                    outcomes of the base policy
round-01/, round-02/ …   a round: its records, its policy, its outcomes and its decision
ledger/                  what the decisions spent of the lifetime budget, and the benchmark questions they used
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from clincot.config import resolve_path
from clincot.jsonl import InvalidRecord, read_json_model
from clincot.records import BenchmarkReport, Checkpoint, DataVersion, Decision, Interval, Record

RUN_FILE, PARAMS_FILE, RESULTS_FILE = "run.json", "params.yaml", "results.json"
CHECKPOINT_FILE, TRAIN_LOG_FILE, DECISION_FILE, BENCHMARK_REPORT_FILE = (
    "record.json",
    "train_log.json",
    "decision.json",
    "report.json",
)
EVIDENCE_FILE, VERSION_FILE, ORIGIN_FILE = "evidence.jsonl", "version.json", "origin.json"
PANEL_REPORT_FILE, PAIRS_REPORT_FILE = "panel.report.json", "pairs.report.json"
# {output of a task: name of its file in the folder of a round}; the checkpoint is the folder policy/.
ROUND_FILES = {
    "questions": "questions.jsonl",
    "regions": "regions.jsonl",
    "candidates": "candidates.jsonl",
    "judgements": "judgements.jsonl",
    "scores": "scores.jsonl",
    "panel_report": PANEL_REPORT_FILE,
    "pairs": "pairs.jsonl",
    "pair_report": PAIRS_REPORT_FILE,
    "outcomes": "outcomes.jsonl",
    "report": BENCHMARK_REPORT_FILE,
    "decision": DECISION_FILE,
    "evidence": EVIDENCE_FILE,
}
# Files that hold a single record: {file name: record}.
SINGLE_RECORD_FILES: dict[str, type[Record]] = {
    CHECKPOINT_FILE: Checkpoint,
    DECISION_FILE: Decision,
    BENCHMARK_REPORT_FILE: BenchmarkReport,
    VERSION_FILE: DataVersion,
}


class JudgeLocation(BaseModel):
    """A judge as configured: the path of a checkpoint or the URL of an endpoint. The panel report has its digest."""

    model_config = ConfigDict(frozen=True)

    name: str
    path: str = ""
    url: str = ""


class RecipeUsed(BaseModel):
    """The recipe of a run: its name, the hash of its values, and the fields (section.field) that the run changed."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    changed: tuple[str, ...] = ()

    def describe(self) -> str:
        return f"{self.name}, changed: {', '.join(self.changed)}" if self.changed else self.name


class RunFile(BaseModel):
    """run.json. Its paths are those of the command that started the run; resolve_run_path() finds them."""

    model_config = ConfigDict(frozen=True)

    data: str
    benchmark: str
    policy: str
    judges: tuple[JudgeLocation, ...]
    start_from: str = "challenger"
    comparisons: tuple[str, ...] = ()
    recipe: RecipeUsed | None = None  # None: a run of an earlier version


ArmMetrics = dict[str, dict[str, Interval]]  # {arm: {metric: interval}}


class ResultRow(BaseModel):
    """A policy's row of the results table."""

    model_config = ConfigDict(frozen=True)

    row: str
    policy: str
    arms: ArmMetrics


class BlindRow(BaseModel):
    """The row of the blind baseline. fitted_on: the data whose answers it knows."""

    model_config = ConfigDict(frozen=True)

    fitted_on: str
    arms: ArmMetrics


class RunResults(BaseModel):
    """results.json. `gains` are paired differences to the base policy: {"row": name, arm: {metric: interval}}."""

    model_config = ConfigDict(frozen=True)

    rows: tuple[ResultRow, ...]
    blind: BlindRow
    gains: tuple[dict[str, str | dict[str, Interval]], ...] = ()
    recipe: RecipeUsed | None = None  # None: a run of an earlier version
    protocol: Literal["strict", "llava-med", "parsed"] = "strict"  # by which the gate grades answers

    def find_gain(self, row: str, arm: str, metric: str) -> Interval | None:
        """Return a row's difference to the base policy in one metric; None if it was not measured."""
        metrics = next((gain.get(arm) for gain in self.gains if gain.get("row") == row), None)
        return metrics.get(metric) if isinstance(metrics, dict) else None


def read_run(run: Path) -> RunFile:
    """Read run.json of a run folder. Raises InvalidRecord."""
    return read_json_model(run / RUN_FILE, RunFile)


def read_results(run: Path) -> RunResults:
    """Read results.json of a run folder. Raises InvalidRecord, also if the run has not finished."""
    return read_json_model(run / RESULTS_FILE, RunResults)


def resolve_run_path(run: Path, path: str) -> Path:
    """Resolve a path of run.json: relative to the working directory, the run folder, or a folder above it.

    A path that exists nowhere is returned unchanged, so that the reader's error names it.
    """
    relative = resolve_path(path)
    folders = [run.absolute(), *run.absolute().parents]
    candidates = [relative, *(folder / relative for folder in folders)]
    return next((candidate for candidate in candidates if candidate.exists()), relative)


def find_run_policies(run: Path) -> dict[str, Path]:
    """Map digests to checkpoint folders: the base policy (once evaluated) and every policy that the run trained."""
    policies = {}
    report = run / "base" / BENCHMARK_REPORT_FILE
    if report.is_file():
        policies[read_json_model(report, BenchmarkReport).policy] = resolve_run_path(run, read_run(run).policy)
    return policies | {checkpoint.sha256: folder for folder, checkpoint in iter_checkpoints(run)}


def read_judge_names(folder: Path) -> dict[str, str]:
    """Map digests to names of the judges that scored a round, in the panel's order; empty before the judge stage.

    An endpoint that was never reached has no digest and no judgements, so it is left out.
    """
    path = folder / PANEL_REPORT_FILE
    judges = read_json_model(path, _ReportedPanel).judges if path.is_file() else ()
    return {judge.digest: judge.name for judge in judges if judge.digest}


class _ReportedJudge(BaseModel):
    name: str
    digest: str


class _ReportedPanel(BaseModel):
    judges: tuple[_ReportedJudge, ...]


def list_round_folders(run: Path) -> list[Path]:
    """List the folders round-01, round-02, … by number, including that of an unfinished round."""
    folders = {parse_round_number(path): path for path in run.glob("round-*") if path.is_dir()}
    return [folders[number] for number in sorted(folders)]


def parse_round_number(path: Path) -> int:
    """Parse the number of a round folder. Raises InvalidRecord for another name."""
    number = path.name.removeprefix("round-")
    if not number.isdigit():
        raise InvalidRecord(f"{path}: expected a round folder named round-01, round-02, …")
    return int(number)


def iter_checkpoints(run: Path) -> Iterator[tuple[Path, Checkpoint]]:
    """Yield the policies that the run trained as (folder, record), sorted by path."""
    for path in sorted(run.glob(f"round-*/**/{CHECKPOINT_FILE}")):
        yield path.parent, read_json_model(path, Checkpoint)
