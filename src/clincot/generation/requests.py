"""What the policy and the judges are asked, read from the files of a round: questions, regions, candidates, steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clincot.config import AnswerConfig
from clincot.jsonl import InvalidRecord, read_records
from clincot.records import Candidate, PanelScore, Question, Region

if TYPE_CHECKING:
    from clincot.generation.candidates import GenerationRequest


def first_step_requests(inputs: Mapping[str, Path]) -> Iterator[GenerationRequest]:
    from clincot.datasets.folder import StudyIndex
    from clincot.generation.candidates import plan_first_step

    questions, regions = read_records(inputs["questions"], Question), read_records(inputs["regions"], Region)
    return plan_first_step(questions, StudyIndex(inputs["data"]), regions)


def read_steps(inputs: Mapping[str, Path]) -> tuple[str, ...]:
    """The questions of a chain (answer.steps, as a JSON list in the input `steps`); without it there is one step."""
    if "steps" not in inputs:
        return ("{question}",)
    path, expected = inputs["steps"], 'expected a JSON list of the chain\'s questions, such as ["What is seen?", …]'
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InvalidRecord(f"{path}:{error.lineno}: {expected}, got no JSON ({error.msg})") from None
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise InvalidRecord(f"{path}: {expected}, got {steps!r}")
    return tuple(steps)


def resolve_step_question(candidate: Candidate, question: Question, steps: Sequence[str]) -> str:
    """What the candidate's step of the chain asked; raises BadRecord where the chain has no such step."""
    from clincot.generation.candidates import render_step_question

    if candidate.step >= len(steps):
        raise InvalidRecord(
            f"{candidate.id} is of step {candidate.step}, but the chain has {len(steps)} step(s); give the steps it "
            "was answered with (answer.steps as a JSON list) as the input `steps`"
        )
    return render_step_question(steps[candidate.step], question)


def join_candidates(inputs: Mapping[str, Path]) -> Iterator[tuple[GenerationRequest, Candidate]]:
    """Every candidate with its question, study and region; both files are in the questions' order."""
    candidates = groupby(read_records(inputs["candidates"], Candidate), key=lambda c: c.question)
    asks = groupby(first_step_requests(inputs), key=lambda ask: ask.question.id)
    nothing: tuple[str, Iterator[Any]] = ("the end of the file", iter(()))
    for (question, asked), (answered, group) in zip_longest(asks, candidates, fillvalue=nothing):
        if question != answered:
            raise InvalidRecord(f"{inputs['candidates']}: expected candidates of {question}, got {answered}")
        by_region = {ask.region.id: ask for ask in asked}
        for candidate in group:
            if candidate.region not in by_region:
                raise InvalidRecord(
                    f"{inputs['candidates']}: {candidate.id} names {candidate.region}, not a region given"
                )
            yield by_region[candidate.region], candidate


def next_step_requests(inputs: Mapping[str, Path], config: AnswerConfig) -> Iterator[GenerationRequest]:
    """The asks of the step after the last one in `candidates_before`."""
    from clincot.generation.candidates import plan_next_step

    scores = read_records(inputs["scores_before"], PanelScore)
    before = {**inputs, "candidates": inputs["candidates_before"]}
    for _, group in groupby(join_candidates(before), key=lambda pair: pair[1].question):
        scored = [(ask, candidate, next(scores, None)) for ask, candidate in group]
        for _, candidate, score in scored:
            if score is None or score.candidate != candidate.id:
                came = "the end of the file" if score is None else f"the one of {score.candidate}"
                raise InvalidRecord(f"{inputs['scores_before']}: expected the score of {candidate.id}, got {came}")
        yield from plan_next_step(
            [(ask, candidate, score.score) for ask, candidate, score in scored if score is not None]
        )


def merge_candidates(before: Iterator[Candidate], made: Iterator[Candidate]) -> Iterator[Candidate]:
    """Candidates of the earlier steps and of this one, question by question."""
    following = groupby(made, key=lambda candidate: candidate.question)
    waiting = next(following, None)
    for question, group in groupby(before, key=lambda candidate: candidate.question):
        yield from group
        if waiting is not None and waiting[0] == question:
            yield from waiting[1]
            waiting = next(following, None)
