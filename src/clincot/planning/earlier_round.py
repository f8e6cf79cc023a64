"""What an earlier round's files say about the next one: lengths of answers, kept regions, pairs and anchors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from clincot.config import Params
from clincot.errors import InvalidInput
from clincot.geometry import Box
from clincot.jsonl import read_json, read_records
from clincot.planning.counting_models import Answer, ReplyHabits
from clincot.planning.round_counts import PairHabits
from clincot.records import Candidate, PreferencePair, Question, Region

_FILES = ("questions.jsonl", "regions.jsonl", "candidates.jsonl", "pairs.jsonl")


@dataclass(frozen=True)
class RoundHabits:
    """The habits of an earlier round, to plan another one with."""

    replies: ReplyHabits
    pairs: PairHabits
    regions: Mapping[str, Sequence[Region]] = field(default_factory=dict)  # by question; a plan of the same takes them


def read_round_habits(folder: Path, params: Params) -> RoundHabits:
    """Read a round's folder (round-01 of a run). Raises InvalidInput for one without the files of a finished round."""
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise InvalidInput(
            f"{folder}: expected the folder of a finished round, such as runs/NAME/round-01; it has no "
            f"{' and no '.join(missing)}"
        )
    kinds = {question.id: question.kind for question in read_records(folder / "questions.jsonl", Question)}
    windows: dict[tuple[str, str], dict[Box, float]] = {}  # by question and hypothesis
    written: list[Box] = []
    regions: dict[str, list[Region]] = {}
    for region in read_records(folder / "regions.jsonl", Region):
        regions.setdefault(region.question, []).append(region)
        if region.grounder == "written":
            written.append(region.box)
        elif region.grounder == "windows":
            windows.setdefault((region.question, region.hypothesis), {})[region.box] = region.confidence
    answers: dict[int, dict[tuple[str, str, int], list[Answer]]] = {}  # by limit; by question, region and step
    for candidate in read_records(folder / "candidates.jsonl", Candidate):
        limit = params.answer.get_max_tokens(kinds[candidate.question])
        key = (candidate.question, candidate.region, candidate.step)
        answer = Answer(candidate.text, max(1, len(candidate.token_logprobs)))
        answers.setdefault(limit, {}).setdefault(key, []).append(answer)
    asked = params.propose.grounders.get("written", 0) * len(kinds)
    pairs = sum(1 for _ in read_records(folder / "pairs.jsonl", PreferencePair))
    return RoundHabits(
        ReplyHabits(
            written_kept=min(1.0, len(written) / asked) if asked else 1.0,
            answers={limit: list(groups.values()) for limit, groups in answers.items()},
            windows=_group_by_finding(windows),
            written=written,
        ),
        PairHabits(pairs / len(kinds), _read_anchors(folder) / len(kinds)),
        regions,
    )


def _group_by_finding(windows: Mapping[tuple[str, str], dict[Box, float]]) -> dict[str, list[dict[Box, float]]]:
    by_finding: dict[str, list[dict[Box, float]]] = {}
    for (_, finding), boxes in windows.items():
        by_finding.setdefault(finding, []).append(boxes)
    return by_finding


def _read_anchors(folder: Path) -> float:
    """Anchors of the round's training, by the metrics of the stage; 0 without them."""
    path = folder / "policy.stage.json"
    metrics = read_json(path).get("metrics", {}) if path.is_file() else {}
    return float(metrics.get("anchors", 0))
