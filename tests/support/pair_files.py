"""The files of a round up to its pairs, written without asking a model: what training reads."""

from __future__ import annotations

from pathlib import Path

from clincot.config import TrainConfig
from clincot.geometry import box_from_xyxy
from clincot.jsonl import read_records, write_records
from clincot.prompts import hash_prompt, load_prompt_format
from clincot.records import Candidate, PreferencePair, Question, Region
from clincot.training.job import TrainingJob
from tests.support import tiny

ANSWERS = [("yes", "no effusion"), ("upper", "no"), ("lower", "yes")]


def write_work(folder: Path, config: TrainConfig, *, studies: int = 5, extra: int = 1) -> TrainingJob:
    """Two pairs a question (chosen and rejected look at different places) but for the last `extra`: an odd number."""
    policy = tiny.write_model(folder / "policy", 0)
    data = tiny.write_set(folder / "data", key=False, studies=studies)
    prompt = hash_prompt(load_prompt_format(policy))
    regions, candidates, pairs = [], [], []
    for number, question in enumerate(read_records(data / "questions.jsonl", Question)):
        for part in range(2):
            sides = []
            for side in range(2):
                at = 0.05 + 0.1 * part + 0.4 * side
                region = Region(
                    question=question.id,
                    hypothesis="nodule",
                    box=box_from_xyxy((at, at, at + 0.4, at + 0.4)),
                    confidence=0.5,
                    grounder="written",
                )
                candidate = Candidate(
                    question=question.id,
                    region=region.id,
                    text=ANSWERS[(number + part) % 3][side],
                    prompt=prompt,
                    token_logprobs=(-1.0,),
                    region_written=side == 0,
                    policy="p" * 64,
                    seed=part,
                    temperature=0.7,
                )
                regions.append(region)
                candidates.append(candidate)
                sides.append(candidate)
            chosen, rejected = sides
            pairs.append(
                PreferencePair(
                    question=question.id,
                    chosen=chosen.id,
                    rejected=rejected.id,
                    chosen_region=chosen.region,
                    rejected_region=rejected.region,
                    chosen_score=0.9,
                    rejected_score=0.1 + 0.05 * (number % 7),
                    spread=0.1,
                )
            )
    write_records(folder / "regions.jsonl", regions)
    write_records(folder / "candidates.jsonl", candidates)
    write_records(folder / "pairs.jsonl", pairs[: len(pairs) - extra])
    return TrainingJob(
        config=config,
        data=data,
        questions=data / "questions.jsonl",
        regions=folder / "regions.jsonl",
        candidates=folder / "candidates.jsonl",
        pairs=folder / "pairs.jsonl",
        policy=policy,
        steps=("{question}",),
        checkpoint=folder / "one",
    )
