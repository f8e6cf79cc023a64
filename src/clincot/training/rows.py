"""What is trained on: preference pairs and supervised examples, rebuilt from the records that they came from.

A pair's two sides are two whole conversations, because they look at different regions: the same question, two crops,
two answers. Which tokens a loss may count is said by `Turn.action`: the answer always, the region only where the
policy wrote it itself (a tool's region is input, not action).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from clincot.jsonl import InvalidRecord, read_records
from clincot.prompts import ChainStep, Conversation, PromptFormat, chain_prompt, hash_prompt
from clincot.records import Candidate, PreferencePair, Question, Region, Study

R = TypeVar("R")

SINGLE_STEP = ("{question}",)  # AnswerSection.steps of a chain with one step


@dataclass(frozen=True)
class TrainingRow:
    """One preference pair as the policy sees it."""

    pair: str  # PreferencePair.id
    chosen: Conversation
    rejected: Conversation
    gap: float  # chosen score - rejected score, > 0
    spread: float  # standard deviation between the judges, in score units


@dataclass(frozen=True)
class SFTRow:
    """One conversation whose action turns are to be learned."""

    name: str  # what an error calls it
    conversation: Conversation


@dataclass(frozen=True)
class SourceRecords:
    """The records behind a set of pairs, by id."""

    candidates: Mapping[str, Candidate]
    regions: Mapping[str, Region]
    questions: Mapping[str, Question]
    studies: Mapping[str, Study]


def rebuild_conversation(
    candidate: Candidate,
    sources: SourceRecords,
    folder: Path,
    views: PromptFormat,
    *,
    steps: Sequence[str] = SINGLE_STEP,
) -> Conversation:
    """The conversation in which a candidate was written, ended by its answer.

    `folder` is the data set's, `steps` AnswerSection.steps. Earlier steps of a chain are context, not actions. Raises
    BadRecord where a record is missing or the candidate was written with another wording or other picture sizes.
    """
    question = _find_record(sources.questions, candidate.question, "question", candidate.id)
    report = question.kind == "report"
    if candidate.prompt != (prompt := hash_prompt(views, report=report)):
        raise InvalidRecord(
            f"candidate {candidate.id} was written with prompts {candidate.prompt}, the policy to be trained has "
            f"{prompt}; train the policy that wrote the candidates, or write them anew"
        )
    study = _find_record(sources.studies, question.study, "study", question.id)
    done: list[ChainStep] = []
    for step in _trace_lineage(candidate, sources.candidates):
        if step.step >= len(steps):
            raise InvalidRecord(f"candidate {step.id} is of step {step.step}, but the chain has {len(steps)} steps")
        box = _find_record(sources.regions, step.region, "region", step.id).box
        asked = steps[step.step].replace("{question}", question.text)
        done.append(ChainStep(asked, box, step.region_written, step.text, report=report))
    return chain_prompt(study, folder, views, done)


def build_training_rows(
    pairs: Iterable[PreferencePair],
    sources: SourceRecords,
    folder: Path,
    views: PromptFormat,
    *,
    steps: Sequence[str] = SINGLE_STEP,
) -> Iterator[TrainingRow]:
    """Rows of the pairs, in order, one at a time."""
    for pair in pairs:
        chosen, rejected = (
            rebuild_conversation(
                _find_record(sources.candidates, side, "candidate", pair.id), sources, folder, views, steps=steps
            )
            for side in (pair.chosen, pair.rejected)
        )
        yield TrainingRow(pair.id, chosen, rejected, pair.gap, pair.spread)


def read_training_rows(
    *,
    pairs: Path,
    candidates: Path,
    regions: Path,
    questions: Path,
    studies: Path,
    folder: Path,
    views: PromptFormat,
    steps: Sequence[str] = SINGLE_STEP,
) -> Iterator[TrainingRow]:
    """Rows from the stages' files. Only records that some pair needs are held in memory, and no image is."""
    needed = {side for pair in read_records(pairs, PreferencePair) for side in (pair.chosen, pair.rejected)}
    held: dict[str, Candidate] = {}
    earlier: dict[str, Candidate] = {}  # steps of chains: any of them may be the context of a needed candidate
    longer = len(steps) > 1
    for candidate in read_records(candidates, Candidate):
        if candidate.id in needed:
            held[candidate.id] = candidate
        elif longer and candidate.step < len(steps) - 1:
            earlier[candidate.id] = candidate
    by_id = {**earlier, **held}
    kept = [c for candidate in held.values() for c in _trace_lineage(candidate, by_id)]
    places, asked = {c.region for c in kept}, {c.question for c in kept}
    in_question = {q.id: q for q in read_records(questions, Question) if q.id in asked}
    shown = {q.study for q in in_question.values()}
    sources = SourceRecords(
        candidates={c.id: c for c in kept},
        regions={r.id: r for r in read_records(regions, Region) if r.id in places},
        questions=in_question,
        studies={s.id: s for s in read_records(studies, Study) if s.id in shown},
    )
    yield from build_training_rows(read_records(pairs, PreferencePair), sources, folder, views, steps=steps)


def select_chosen_rows(rows: Iterable[TrainingRow]) -> list[SFTRow]:
    """The chosen sides alone: SFT-on-chosen."""
    return [SFTRow(row.pair, row.chosen) for row in rows]


def _trace_lineage(candidate: Candidate, candidates: Mapping[str, Candidate]) -> list[Candidate]:
    """The candidate and those that it continues, the first step first."""
    line = [candidate]
    while line[0].parent:
        line.insert(0, _find_record(candidates, line[0].parent, "candidate", line[0].id))
    return line


def _find_record(records: Mapping[str, R], key: str, kind: str, child: str) -> R:
    record = records.get(key)
    if record is None:
        raise InvalidRecord(
            f"{child} names the {kind} {key!r}, which is not among the {len(records)} {kind} records given"
        )
    return record
