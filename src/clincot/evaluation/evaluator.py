"""A policy answers a benchmark, looking where each arm tells it to; every answer becomes an Outcome.

Arms by where the region comes from: `written` (the policy's own), `windows`, `relevance`, `http` (grounders); controls:
`whole` (no place in particular), `random` (anywhere, equal area), `wrong` (a place that does not show the finding),
`oracle` (the answer key's box) and `shuffled` (the oracle's place, on another patient's image). Answers are greedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from clincot.batching import BLOCK_SIZE
from clincot.config import EvaluateConfig
from clincot.errors import InvalidInput
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.grounding import best_iou, hits_reference
from clincot.evaluation.vqa import grade_answer
from clincot.generation.grounders import WrittenGrounder, derive_seed, draw_random_square
from clincot.generation.regions import build_grounder, build_grounding_query
from clincot.geometry import WHOLE_IMAGE, Box, choose_view_side, choose_view_square, compute_coverage, crop_square
from clincot.models.protocols import Generation, Grounder, RelevancePolicy
from clincot.prompts import ChainStep, chain_prompt
from clincot.records import Outcome, Question, Reference, Study
from clincot.text import normalize_text

GROUNDER_ARMS = ("windows", "relevance", "http")
MAX_ANSWER_SPACE = 20  # a topic with at most so many answers has a format: one of them
_BATCH_SIZE = 128


@dataclass(frozen=True)
class _RegionInput:
    """A question, the image shown for it, and where the policy looks."""

    question: Question
    shown: Study  # the question's study, but for the shuffled control
    box: Box | None  # None: the policy wrote no region that can be read


def evaluate_policy(
    policy: RelevancePolicy, benchmark: Benchmark, studies: Mapping[str, Study], folder: Path, config: EvaluateConfig
) -> Iterator[Outcome]:
    """Outcomes arm by arm, each in the benchmark's order, streaming."""
    questions = list(islice(benchmark.questions.values(), config.limit or None))
    spaces = collect_answer_spaces(benchmark)
    for arm in config.arms:
        looks = _choose_regions(arm, questions, benchmark, policy, studies, folder, config)
        for batch in _iter_batches(looks):
            kind = batch[0].question.kind
            steps = [
                [ChainStep(k.question.text, k.box or WHOLE_IMAGE, written=arm == "written", report=kind == "report")]
                for k in batch
            ]
            replies = policy.generate(
                [chain_prompt(k.shown, folder, policy.views, s) for k, s in zip(batch, steps, strict=True)],
                max_new_tokens=config.get_max_tokens(kind),
                temperature=0.0,
                seeds=[0] * len(batch),
            )
            for one, reply in zip(batch, replies, strict=True):
                reference = benchmark.references[one.question.id]
                space = spaces.get(one.question.topic, frozenset())
                off = reply.cut_off or not _is_in_format(reply, one.question, space) or one.box is None
                yield _score_outcome(one, arm, reply.text, reference, policy, off_format=off)


def _iter_batches(looks: Iterable[_RegionInput]) -> Iterator[list[_RegionInput]]:
    """In order; those of a batch all ask for reports, or none does: a report may be longer."""
    for _, run in groupby(looks, key=lambda look: look.question.kind == "report"):
        while batch := list(islice(run, _BATCH_SIZE)):
            yield batch


def collect_answer_spaces(benchmark: Benchmark) -> dict[str, frozenset[str]]:
    """The normalised answers of every topic that has few: an answer outside them is off format."""
    answers: dict[str, set[str]] = {}
    for question in benchmark.questions.values():
        if question.kind != "report":
            answers.setdefault(question.topic, set()).add(normalize_text(benchmark.references[question.id].answer))
    return {topic: frozenset(a) for topic, a in answers.items() if topic and len(a) <= MAX_ANSWER_SPACE}


def _is_in_format(reply: Generation, question: Question, space: frozenset[str]) -> bool:
    """One of the topic's few answers; else yes or no to a closed question; else anything that says something."""
    answer = normalize_text(reply.text)
    if space and question.kind != "report":
        return answer in space
    if question.kind == "closed":
        return answer in {"yes", "no"}
    return bool(answer)


def _score_outcome(
    one: _RegionInput, arm: str, answer: str, reference: Reference, policy: RelevancePolicy, *, off_format: bool
) -> Outcome:
    box = one.box or WHOLE_IMAGE
    aspect = one.shown.width / one.shown.height
    shown = box if box == WHOLE_IMAGE else crop_square(box, min_side=policy.views.min_crop, aspect=aspect)
    # IoU of what is shown with what would be shown of the reference: a crop is never smaller than min_crop
    iou = best_iou(shown, [choose_view_square(b) for b in reference.boxes])
    return Outcome(
        question=one.question.id,
        policy=policy.digest,
        arm=arm,
        box=box,
        answer=answer,
        reference=reference.id,
        correct=grade_answer(answer, one.question, reference),
        hit=False if one.box is None and reference.boxes else hits_reference(shown, reference.boxes),
        iou=None if iou is None else (0.0 if one.box is None else round(iou, 6)),
        off_format=off_format,
    )


def _choose_regions(
    arm: str,
    questions: Sequence[Question],
    benchmark: Benchmark,
    policy: RelevancePolicy,
    studies: Mapping[str, Study],
    folder: Path,
    config: EvaluateConfig,
) -> Iterator[_RegionInput]:
    if arm == "written" or arm in GROUNDER_ARMS:
        if arm == "written":
            grounder: Grounder = WrittenGrounder(policy, samples=1, temperature=0.0, seed=config.seed)
        else:
            grounder = build_grounder(arm, config.propose, policy, 1)
        fallback = None if arm == "written" else WHOLE_IMAGE  # a tool that finds nothing leaves the whole image
        for at in range(0, len(questions), BLOCK_SIZE):
            limit = config.propose.hypotheses
            sought = [build_grounding_query(q, studies[q.study], limit=limit) for q in questions[at : at + BLOCK_SIZE]]
            for one, found in zip(sought, grounder.ground(sought, folder), strict=True):
                yield _RegionInput(one.question, one.study, found[0].box if found else fallback)
        return
    following = _match_other_patients(questions, benchmark) if arm == "shuffled" else {}
    sides = compute_crop_sides(benchmark)
    for question in questions:
        reference = benchmark.references[question.id]
        shown = studies[following[question.study] if arm == "shuffled" else question.study]
        yield _RegionInput(question, shown, _choose_control_region(arm, question, reference, sides, config.seed))


def _match_other_patients(questions: Sequence[Question], benchmark: Benchmark) -> dict[str, str]:
    """{study: the next study, in the benchmark's order and round its end, of another patient}."""
    patients = {q.study: benchmark.clusters[q.id] for q in questions}
    order = list(patients)
    following = {}
    for at, study in enumerate(order):
        later = (other for other in order[at + 1 :] + order[:at] if patients[other] != patients[study])
        other = next(later, None)
        if other is None:
            raise InvalidInput(f"the arm 'shuffled' needs images of two patients, all are of {patients[study]!r}")
        following[study] = other
    return following


def compute_crop_sides(benchmark: Benchmark) -> dict[str, float]:
    """The median side of the squares that look at each finding, for controls where the finding is absent."""
    sides: dict[str, list[float]] = {}
    for reference in benchmark.references.values():
        for box in reference.boxes:
            sides.setdefault(reference.finding, []).append(choose_view_side(box))
    return {finding: sorted(found)[len(found) // 2] for finding, found in sides.items()}


def _choose_control_region(
    arm: str, question: Question, reference: Reference, sides: Mapping[str, float], seed: int
) -> Box:
    """A control's region. Where the key has no box (an absent finding) every control looks anywhere, at as large a
    square as for the finding when present: its size must not tell."""
    if arm == "whole":
        return WHOLE_IMAGE
    boxes = reference.boxes
    if arm in ("oracle", "shuffled") and boxes:
        return choose_view_square(boxes[0])
    side = choose_view_side(boxes[0]) if boxes else sides.get(reference.finding, 0.25)
    draws = [
        draw_random_square(derive_seed(seed, question.id, arm, n), side) for n in range(20 if arm == "wrong" else 1)
    ]
    return min(draws, key=lambda draw: sum(compute_coverage(box, by=draw) for box in boxes))
