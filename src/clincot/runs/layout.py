"""What lies where in a run folder, for those who read one: the page and `clincot show`.

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
EVIDENCE_FILE, VERSION_FILE = "evidence.jsonl", "version.json"
PANEL_REPORT_FILE, PAIRS_REPORT_FILE = "panel.report.json", "pairs.report.json"
# The records that stand alone in a JSON file, by the file's name.
SINGLE_RECORD_FILES: dict[str, type[Record]] = {
    CHECKPOINT_FILE: Checkpoint,
    DECISION_FILE: Decision,
    BENCHMARK_REPORT_FILE: BenchmarkReport,
    VERSION_FILE: DataVersion,
}


class JudgeLocation(BaseModel):
    """A judge as configured: a checkpoint's path or an endpoint's URL. Its digest stands in the panel's report."""

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
    """run.json. Paths are as they were given when the run was started; `locate` finds them."""

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
    """A policy's line of the results table."""

    model_config = ConfigDict(frozen=True)

    row: str
    policy: str
    arms: ArmMetrics


class BlindRow(BaseModel):
    """The blind baseline, and whose answers it knows."""

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

    def find_gain(self, row: str, arm: str, metric: str) -> Interval | None:
        of_arm = next((gain.get(arm) for gain in self.gains if gain.get("row") == row), None)
        return of_arm.get(metric) if isinstance(of_arm, dict) else None


def read_run(run: Path) -> RunFile:
    return read_json_model(run / RUN_FILE, RunFile)


def read_results(run: Path) -> RunResults:
    return read_json_model(run / RESULTS_FILE, RunResults)


def resolve_run_path(run: Path, path: str) -> Path:
    """A path of run.json. A relative one is looked for from here, then from the run folder and the folders above it.

    Where it is nowhere, it is returned as it stands, for the reader's error message.
    """
    given = resolve_path(path)
    places = [given, *(above / given for above in [run.absolute(), *run.absolute().parents])]
    return next((place for place in places if place.exists()), given)


def find_run_policies(run: Path) -> dict[str, Path]:
    """{digest: checkpoint folder} of the base policy (once it was measured) and of every policy the run trained."""
    found = {}
    report = run / "base" / BENCHMARK_REPORT_FILE
    if report.is_file():
        found[read_json_model(report, BenchmarkReport).policy] = resolve_run_path(run, read_run(run).policy)
    return found | {checkpoint.sha256: folder for folder, checkpoint in iter_checkpoints(run)}


def read_judge_names(folder: Path) -> dict[str, str]:
    """{digest: name} of the judges that scored a round, in the panel's order; empty before they did. An endpoint that
    was never reached has no digest and no judgements, so it is not among them."""
    path = folder / PANEL_REPORT_FILE
    judges = read_json_model(path, _ReportedPanel).judges if path.is_file() else ()
    return {judge.digest: judge.name for judge in judges if judge.digest}


class _ReportedJudge(BaseModel):
    name: str
    digest: str


class _ReportedPanel(BaseModel):
    judges: tuple[_ReportedJudge, ...]


def list_round_folders(run: Path) -> list[Path]:
    """round-01, round-02, … in their order; those of an unfinished run too."""
    found = {parse_round_number(path): path for path in run.glob("round-*") if path.is_dir()}
    return [found[number] for number in sorted(found)]


def parse_round_number(path: Path) -> int:
    number = path.name.removeprefix("round-")
    if not number.isdigit():
        raise InvalidRecord(f"{path}: expected a round's folder to be called round-01, round-02, …")
    return int(number)


def iter_checkpoints(run: Path) -> Iterator[tuple[Path, Checkpoint]]:
    """The policies that the run trained, with their folders, in a fixed order."""
    for path in sorted(run.glob(f"round-*/**/{CHECKPOINT_FILE}")):
        yield path.parent, read_json_model(path, Checkpoint)
