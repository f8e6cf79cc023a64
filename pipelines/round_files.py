"""The files that the tasks of one round hand on, and the record of them in the store.

Most artifacts are folders, whose files have the names of a run folder (runs/layout.py): fewer artifacts make a graph
that can be read, and a smaller Workflow object.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clincot.jsonl import read_json_model, read_records
from clincot.judging.combination import PanelReport
from clincot.records import Decision
from clincot.runs.layout import ROUND_FILES
from clincot.runs.round_records import RoundOutputs
from clincot.storage.digests import hash_path

# Files of the folder artifacts.
PREFERENCE_FILES = (
    "questions",
    "regions",
    "candidates",
    "judgements",
    "scores",
    "panel_report",
    "pairs",
    "pair_report",
)
RESULT_FILES = ("outcomes", "report")  # of a policy on the benchmark
EVIDENCE_FILES = ("decision", "evidence")


def name_files(folder: str, names: Sequence[str]) -> dict[str, str]:
    """Return {name: path} of files of a folder artifact. Creates the folder if it does not exist."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return {name: str(Path(folder) / ROUND_FILES[name]) for name in names}


@dataclass(frozen=True)
class RoundFiles:
    """Paths of the files of a round, without the checkpoint, which is large and has a digest already."""

    questions: str
    regions: str
    candidates: str
    judgements: str
    scores: str
    panel_report: str
    pairs: str
    pair_report: str
    outcomes: str
    report: str
    decision: str
    evidence: str

    def by_name(self) -> dict[str, Path]:
        return {name: Path(path) for name, path in asdict(self).items()}

    @classmethod
    def locate(cls, folder: str) -> RoundFiles:
        """Find the files in the folder that `decide` wrote."""
        return cls(**name_files(folder, tuple(ROUND_FILES)))


@dataclass(frozen=True)
class RoundOrder:
    """Which round it is: its number, and how many rounds the run does."""

    number: int
    rounds: int


@dataclass(frozen=True)
class DecisionFiles:
    """What the gate reads and writes. summary is a file, the others are folders; "": it does not exist.

    round_files: gets the decision, its evidence and a copy of the files of the round. base_results: of the policy of
    round 0, if the run starts from it. preferences_before: of the previous round.
    """

    champion_results: str
    challenger_results: str
    preferences: str
    round_files: str
    summary: str
    base_results: str = ""
    preferences_before: str = ""

    def name_inputs(self, datasets: Mapping[str, str]) -> dict[str, str]:
        """Return the inputs of the stage. datasets: addresses by the names of the run's parameters."""
        outcomes, panel = ("outcomes",), ("panel_report",)
        return {
            "benchmark": datasets["benchmark"],
            "data": datasets["data"],
            "blind": datasets["blind_from"],
            "calibration": datasets["calibrated_on"],
            "champion": name_files(self.champion_results, outcomes)["outcomes"],
            "challenger": name_files(self.challenger_results, outcomes)["outcomes"],
            **name_files(self.preferences, ("panel_report", "pair_report")),
            "base": name_files(self.base_results, outcomes)["outcomes"] if self.base_results else "",
            "panel_report_before": (
                name_files(self.preferences_before, panel)["panel_report"] if self.preferences_before else ""
            ),
        }

    def name_outputs(self) -> dict[str, str]:
        return {**name_files(self.round_files, EVIDENCE_FILES), "summary": self.summary}

    def copy_round_files(self) -> None:
        """Copy what the round made into the folder, so that the tasks that follow get one artifact instead of four."""
        sources = {
            **name_files(self.preferences, PREFERENCE_FILES),
            **name_files(self.challenger_results, RESULT_FILES),
        }
        for name, path in sources.items():
            shutil.copyfile(path, Path(self.round_files) / ROUND_FILES[name])


@dataclass(frozen=True)
class RoundContext:
    """What the page of a round shows besides the files of the round and the settings."""

    number: int
    policy: str  # address of the checkpoint from which the round starts
    checkpoint: str  # folder of the challenger
    champion_results: str  # folder


def summarize_round(files: RoundFiles, *, number: int, checkpoint_digest: str) -> RoundOutputs:
    """Return the record of what a round made: digests, decision, agreement of the judges."""
    digests = {name: hash_path(path) for name, path in files.by_name().items()}
    digests["checkpoint"] = checkpoint_digest
    (decision,) = read_records(Path(files.decision), Decision)
    panel = read_json_model(Path(files.panel_report), PanelReport)
    return RoundOutputs(
        number=number,
        digests=dict(sorted(digests.items())),
        decision=decision.id,
        verdict=decision.verdict,
        agreement=panel.alpha_calibrated.value,
    )
