"""The files that the tasks of one round hand on, and the record of them in the store."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from clincot.jsonl import read_json_model, read_records
from clincot.judging.combination import PanelReport
from clincot.records import Decision
from clincot.runs.round_records import RoundOutputs
from clincot.storage.digests import hash_path


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


@dataclass(frozen=True)
class RoundContext:
    """What the page of a round shows besides the files of the round."""

    number: int
    data: str  # address of the training data set
    benchmark: str  # address
    blind_from: str  # address; empty: no blind baseline
    policy: str  # address of the checkpoint from which the round starts
    checkpoint: str  # path of the challenger
    champion_outcomes: str  # path
    champion_report: str  # path
    recipe: str = ""  # name of the recipe that the settings come from; empty: neutral defaults


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
