"""Generation and judging requests, read from the files of a round: questions, regions, candidates, steps."""

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


def first_step_requests(inputs: Mapping[str, Path], *, per_region: int = 1) -> Iterator[GenerationRequest]:
    """`per_region` requests for every region of the input `regions`, in order."""
    from clincot.datasets.folder import StudyIndex
    from clincot.generation.candidates import plan_first_step

    questions, regions = read_records(inputs["questions"], Question), read_records(inputs["regions"], Region)
    return plan_first_step(questions, StudyIndex(inputs["data"]), regions, per_region=per_region)


def read_steps(inputs: Mapping[str, Path]) -> tuple[str, ...]:
    """The questions of a chain (answer.steps) from the JSON list in the input `steps`; one step without that input.

    Raises InvalidRecord for anything but a list of strings.
    """
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
    """The question that a candidate's step of the chain asked; raises InvalidRecord if the chain has no such step."""
    from clincot.generation.candidates import render_step_question

    if candidate.step >= len(steps):
        raise InvalidRecord(
            f"{candidate.id} is of step {candidate.step}, but the chain has {len(steps)} step(s); give the steps it "
            "was answered with (answer.steps as a JSON list) as the input `steps`"
        )
    return render_step_question(steps[candidate.step], question)


def join_candidates(inputs: Mapping[str, Path]) -> Iterator[tuple[GenerationRequest, Candidate]]:
    """Join every candidate with its question, study and region; all files are in the questions' order."""
    candidates = groupby(read_records(inputs["candidates"], Candidate), key=lambda candidate: candidate.question)
    requests = groupby(first_step_requests(inputs), key=lambda request: request.question.id)
    end: tuple[str, Iterator[Any]] = ("the end of the file", iter(()))
    for (expected, of_question), (question, group) in zip_longest(requests, candidates, fillvalue=end):
        if expected != question:
            raise InvalidRecord(f"{inputs['candidates']}: expected candidates of {expected}, got {question}")
        by_region = {request.region.id: request for request in of_question}
        for candidate in group:
            if candidate.region not in by_region:
                raise InvalidRecord(
                    f"{inputs['candidates']}: {candidate.id} names {candidate.region}, which is not a region of "
                    f"{question} in {inputs['regions']}"
                )
            yield by_region[candidate.region], candidate


def next_step_requests(inputs: Mapping[str, Path], config: AnswerConfig) -> Iterator[GenerationRequest]:
    """The requests of the step after the last one in the input `candidates_before`."""
    from clincot.generation.candidates import plan_next_step

    scores = read_records(inputs["scores_before"], PanelScore)
    before = {**inputs, "candidates": inputs["candidates_before"]}
    for _, group in groupby(join_candidates(before), key=lambda pair: pair[1].question):
        answered = []
        for request, candidate in group:
            score = next(scores, None)
            if score is None or score.candidate != candidate.id:
                actual = "the end of the file" if score is None else f"the one of {score.candidate}"
                raise InvalidRecord(f"{inputs['scores_before']}: expected the score of {candidate.id}, got {actual}")
            answered.append((request, candidate, score.score))
        yield from plan_next_step(answered, continue_from=config.continue_from)


def merge_candidates(before: Iterator[Candidate], new: Iterator[Candidate]) -> Iterator[Candidate]:
    """Merge the candidates of earlier steps with those of this step, question by question."""
    following = groupby(new, key=lambda candidate: candidate.question)
    waiting = next(following, None)
    for question, group in groupby(before, key=lambda candidate: candidate.question):
        yield from group
        if waiting is not None and waiting[0] == question:
            yield from waiting[1]
            waiting = next(following, None)
