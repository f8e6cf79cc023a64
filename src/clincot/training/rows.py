"""Training rows: preference pairs and supervised examples, rebuilt from the records of a round.

The two sides of a pair are two complete conversations, because they look at different regions: the same question, two
crops, two answers. `Turn.action` marks the tokens that a loss may count: always the answer, and the region only if the
policy wrote it (a tool's region is input, not an action).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from clincot.jsonl import InvalidRecord, read_records
from clincot.prompts import ChainStep, Conversation, PromptFormat, chain_prompt, hash_prompt
from clincot.records import Candidate, PreferencePair, Question, Region, Study, hash_json
from clincot.text import normalize_text

R = TypeVar("R")

SINGLE_STEP = ("{question}",)  # answer.steps of a chain with one step


@dataclass(frozen=True)
class TrainingRow:
    """One preference pair as the policy sees it."""

    pair: str  # PreferencePair.id
    chosen: Conversation
    rejected: Conversation
    gap: float  # chosen score - rejected score, > 0
    spread: float  # standard deviation between the judges, in score units
    anchor: bool = False  # both sides are one answer of the policy: only the NLL acts (build_anchor_rows)


@dataclass(frozen=True)
class SFTRow:
    """One conversation whose action turns are learned."""

    name: str  # identifies the row in error messages
    conversation: Conversation


@dataclass(frozen=True)
class PairFiles:
    """The files of a round that hold its pairs and the records behind them."""

    pairs: Path
    candidates: Path
    regions: Path
    questions: Path


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
    """Rebuild the conversation in which a candidate was generated, up to and including its answer.

    `folder` is the folder of the data set and `steps` is answer.steps. Earlier steps of a chain are context, not
    actions. Raises InvalidRecord if a record is missing or the candidate was generated with another prompt template or
    other picture sizes.
    """
    question = _find_record(sources.questions, candidate.question, "question", candidate.id)
    report = question.kind == "report"
    if candidate.prompt != (prompt := hash_prompt(views, report=report)):
        raise InvalidRecord(
            f"candidate {candidate.id} was written with prompts {candidate.prompt}, but the policy to train has "
            f"{prompt}; train the policy that generated the candidates, or generate them again"
        )
    study = _find_record(sources.studies, question.study, "study", question.id)
    chain: list[ChainStep] = []
    for step in _trace_lineage(candidate, sources.candidates):
        if step.step >= len(steps):
            raise InvalidRecord(f"candidate {step.id} is of step {step.step}, but the chain has {len(steps)} steps")
        region = _find_record(sources.regions, step.region, "region", step.id)
        step_question = steps[step.step].replace("{question}", question.asked_text)
        chain.append(
            ChainStep(step_question, region.box, step.region_written, step.text, report=report, cutout=region.cutout)
        )
    return chain_prompt(study, folder, views, chain)


def build_training_rows(
    pairs: Iterable[PreferencePair],
    sources: SourceRecords,
    folder: Path,
    views: PromptFormat,
    *,
    steps: Sequence[str] = SINGLE_STEP,
) -> Iterator[TrainingRow]:
    """Yield the row of each pair, in order."""
    for pair in pairs:
        chosen, rejected = (
            rebuild_conversation(
                _find_record(sources.candidates, side, "candidate", pair.id), sources, folder, views, steps=steps
            )
            for side in (pair.chosen, pair.rejected)
        )
        yield TrainingRow(pair.id, chosen, rejected, pair.gap, pair.spread)


def build_anchor_rows(
    anchors: Iterable[Candidate],
    sources: SourceRecords,
    folder: Path,
    views: PromptFormat,
    *,
    steps: Sequence[str] = SINGLE_STEP,
) -> Iterator[TrainingRow]:
    """Yield a row for each candidate with it on both sides.

    Its preference term is constant, so that it only keeps the policy at what it said: a topic on which the judges see
    no difference has no pairs, and without anchors its answers drift with the others' gradients.
    """
    for candidate in anchors:
        conversation = rebuild_conversation(candidate, sources, folder, views, steps=steps)
        yield TrainingRow(f"anchor {candidate.id}", conversation, conversation, gap=0.0, spread=0.0, anchor=True)


def read_training_rows(
    files: PairFiles,
    folder: Path,
    views: PromptFormat,
    *,
    steps: Sequence[str] = SINGLE_STEP,
    anchors_per_question: int = 0,
    seed: int = 0,
) -> Iterator[TrainingRow]:
    """Yield rows from the files of the stages and the data set in `folder`.

    The pairs are followed by up to `anchors_per_question` anchors for each question without a pair, candidates of its
    last step from regions that `seed` chooses. Only the records that some row needs are in memory, and no image.
    """
    anchors = _choose_anchors(files, len(steps), seed, anchors_per_question) if anchors_per_question else []
    used = _read_used_candidates(files, len(steps), {anchor.id for anchor in anchors})
    region_ids = {candidate.region for candidate in used.values()}
    question_ids = {candidate.question for candidate in used.values()}
    used_questions = {q.id: q for q in read_records(files.questions, Question) if q.id in question_ids}
    study_ids = {question.study for question in used_questions.values()}
    sources = SourceRecords(
        candidates=used,
        regions={region.id: region for region in read_records(files.regions, Region) if region.id in region_ids},
        questions=used_questions,
        studies={s.id: s for s in read_records(folder / "studies.jsonl", Study) if s.id in study_ids},
    )
    yield from build_training_rows(read_records(files.pairs, PreferencePair), sources, folder, views, steps=steps)
    yield from build_anchor_rows(anchors, sources, folder, views, steps=steps)


def _choose_anchors(files: PairFiles, step_count: int, seed: int, per_question: int) -> list[Candidate]:
    """Candidates of the last step for questions without a pair, in the order of the file; none without a text.

    They are up to `per_question` for each question, each from another region, and the likeliest answer there, which is
    what the policy would say, right or wrong; no score decides. Within a topic no answer is more frequent than if all
    that the policy gives were equally frequent: anchors that mostly say yes, because windows show what looks most like
    the finding, would teach the policy to say yes to anything.

    A topic that makes pairs is anchored only in regions of the grounders whose regions make them. Elsewhere the policy
    still says what the pairs unteach: in a second round, with few pairs left, such anchors would undo the first.
    """
    topics = {q.id: q.topic or q.kind for q in read_records(files.questions, Question)}
    grounders = {region.id: region.grounder for region in read_records(files.regions, Region)}
    paired: set[str] = set()
    taught: dict[str, set[str]] = {}  # topic -> grounders
    for pair in read_records(files.pairs, PreferencePair):
        paired.add(pair.question)
        sides = {grounders.get(pair.chosen_region, ""), grounders.get(pair.rejected_region, "")}
        taught.setdefault(topics.get(pair.question, ""), set()).update(sides)
    likeliest: dict[tuple[str, str], Candidate] = {}  # (question, region) -> candidate
    for candidate in read_records(files.candidates, Candidate):
        if candidate.question in paired or candidate.step != step_count - 1 or not candidate.text.strip():
            continue
        grounder = grounders.get(candidate.region, "")
        if grounder not in taught.get(topics[candidate.question], {grounder}):
            continue
        key = candidate.question, candidate.region
        likeliest[key] = max(likeliest.get(key, candidate), candidate, key=lambda answer: sum(answer.token_logprobs))
    by_topic: dict[str, list[Candidate]] = {}
    for candidate in sorted(likeliest.values(), key=lambda answer: hash_json([seed, answer.region])):
        by_topic.setdefault(topics[candidate.question], []).append(candidate)
    drawn: set[str] = set()
    for candidates in by_topic.values():
        drawn |= _draw_balanced(candidates, per_question)
    return [candidate for candidate in likeliest.values() if candidate.id in drawn]


def _draw_balanced(candidates: Sequence[Candidate], per_question: int) -> set[str]:
    """Ids of the first candidates: at most `per_question` for each question, and an even share for each answer."""
    questions = {candidate.question for candidate in candidates}
    texts = {normalize_text(candidate.text) for candidate in candidates}
    even_share = -(-len(questions) * per_question // len(texts))  # rounded up
    drawn: set[str] = set()
    of_question: Counter[str] = Counter()
    of_text: Counter[str] = Counter()
    for candidate in candidates:
        text = normalize_text(candidate.text)
        if of_question[candidate.question] < per_question and of_text[text] < even_share:
            drawn.add(candidate.id)
            of_question[candidate.question] += 1
            of_text[text] += 1
    return drawn


def _read_used_candidates(files: PairFiles, step_count: int, anchors: Collection[str]) -> dict[str, Candidate]:
    """The anchors, the candidates of the pairs, and all that they continue, by id."""
    sides: set[str] = set(anchors)
    for pair in read_records(files.pairs, PreferencePair):
        sides |= {pair.chosen, pair.rejected}
    of_pairs: dict[str, Candidate] = {}
    earlier: dict[str, Candidate] = {}  # any candidate before the last step may be the context of another one
    for candidate in read_records(files.candidates, Candidate):
        if candidate.id in sides:
            of_pairs[candidate.id] = candidate
        elif candidate.step < step_count - 1:
            earlier[candidate.id] = candidate
    by_id = {**earlier, **of_pairs}
    used: dict[str, Candidate] = {}
    for candidate in of_pairs.values():
        used.update((ancestor.id, ancestor) for ancestor in _trace_lineage(candidate, by_id))
    return used


def select_chosen_rows(rows: Iterable[TrainingRow]) -> list[SFTRow]:
    """The chosen side of each pair and every anchor, for SFT on chosen."""
    return [SFTRow(row.pair, row.chosen) for row in rows]


def _trace_lineage(candidate: Candidate, candidates: Mapping[str, Candidate]) -> list[Candidate]:
    """The candidate and those that it continues, the first step first."""
    lineage = [candidate]
    while lineage[0].parent:
        lineage.insert(0, _find_record(candidates, lineage[0].parent, "candidate", lineage[0].id))
    return lineage


def _find_record(records: Mapping[str, R], key: str, kind: str, child: str) -> R:
    record = records.get(key)
    if record is None:
        raise InvalidRecord(
            f"{child} names the {kind} {key!r}, which is not among the {len(records)} {kind} records of the input"
        )
    return record
