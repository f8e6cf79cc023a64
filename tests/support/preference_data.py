"""Preference data of any size, as a round would write it, without a model: streaming, and the same every time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from clincot.config import PairConfig
from clincot.geometry import box_from_xyxy
from clincot.jsonl import read_records, write_json, write_records
from clincot.judging.calibration import make_identity_calibration
from clincot.judging.combination import PanelMember, ScoreCombiner
from clincot.preferences.versions.describe import FILE_NAMES
from clincot.records import Candidate, Judgement, Question, Region
from clincot.stages.runner import run_stage

PER_QUESTION = 4  # candidates: two right ones, two wrong ones
PAIRING = PairConfig(per_question=2)


def write_round(
    folder: Path, questions: int, *, seed: int = 0, judges: Sequence[str] = ("judge-a", "judge-b"), doubt: float = 0.0
) -> dict[str, Path]:
    """The version stage's inputs: two pairs a question. `doubt` takes that much from every score of a right answer."""
    write_judged(folder, questions, seed=seed, judges=judges, doubt=doubt)
    make_pairs_of(folder)
    return paths_in(folder)


def paths_in(folder: Path) -> dict[str, Path]:
    return {name: folder / file for name, file in FILE_NAMES.items() if name != "steps"}


def write_judged(
    folder: Path, questions: int, *, seed: int = 0, judges: Sequence[str] = ("judge-a", "judge-b"), doubt: float = 0.0
) -> None:
    """Everything before the pairs."""
    at = paths_in(folder)
    write_records(at["questions"], (_question(seed, number) for number in range(questions)))
    write_records(at["regions"], (region for region, _ in _answered(at["questions"], seed)))
    write_records(at["candidates"], (candidate for _, candidate in _answered(at["questions"], seed)))
    write_records(at["judgements"], _judgements(at["candidates"], judges, doubt))
    panel = ScoreCombiner(
        [PanelMember(name, 1.0, make_identity_calibration(_digest(name))) for name in judges], quorum=1
    )
    write_records(at["scores"], panel.score_candidates(read_records(at["judgements"], Judgement)))
    write_json(at["panel_report"], panel.build_report().model_dump(mode="json"))


def make_pairs_of(folder: Path) -> None:
    at = paths_in(folder)
    run_stage(
        "pair",
        PAIRING,
        {name: at[name] for name in ("candidates", "scores")},
        {name: at[name] for name in ("pairs", "pair_report")},
    )


def _question(seed: int, number: int) -> Question:
    return Question(study=f"study-{seed}-{number // 4}", text=f"Is finding {seed}/{number} to be seen?", kind="closed")


def _answered(questions: Path, seed: int) -> Iterator[tuple[Region, Candidate]]:
    """Four regions a question that the policy wrote itself, and its answer from each; both answers are as long."""
    for question in read_records(questions, Question):
        for number in range(PER_QUESTION):
            x0 = 0.2 * number
            region = Region(
                question=question.id,
                hypothesis="nodule",
                box=box_from_xyxy((x0, 0.1, x0 + 0.2, 0.3)),
                confidence=1.0,
                grounder="written",
            )
            yield (
                region,
                Candidate(
                    question=question.id,
                    region=region.id,
                    text="yes" if number % 2 else "nay",
                    token_logprobs=(-0.25, -0.5, -0.125),
                    region_written=True,
                    policy=_digest(f"policy-{seed}"),
                    prompt="prompt",
                    seed=number,
                    temperature=0.7,
                ),
            )


def _judgements(candidates: Path, judges: Sequence[str], doubt: float) -> Iterator[Judgement]:
    """ "yes" is right: 0.7 to 0.95, less the doubt; the other 0.05 to 0.3."""
    for candidate in read_records(candidates, Candidate):
        for judge in judges:
            chance = int(hashlib.sha256(f"{judge} {candidate.id}".encode()).hexdigest()[:4], 16) / 0xFFFF
            score = 0.7 - doubt + 0.25 * chance if candidate.text == "yes" else 0.05 + 0.25 * chance
            yield Judgement(candidate=candidate.id, judge=_digest(judge), prompt="prompt", score=score)


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
