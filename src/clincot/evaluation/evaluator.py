"""The evaluator: a policy answers every benchmark question with a region from each arm.

An arm is the source of the region that the policy looks at:

- `served`: what a server of the policy answers: several regions, one combined answer, with the code and the settings
  that are deployed (generation/visual_cot.py, config.ServeConfig); the region is that of the combined answer;
- `written`: the policy's own region; `windows`, `relevance`, `http`: the region of that grounder;
- controls: `whole` (the whole image), `random` (a random square of equal area), `wrong` (a square that does not show
  the finding), `oracle` (the answer key's box), `shuffled` (the oracle's region on another patient's image).

Every answer becomes one Outcome. Answers are decoded greedily.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path

from clincot.batching import BLOCK_SIZE
from clincot.config import EvaluateConfig
from clincot.datasets.closed_answers import is_same_closed_word, list_closed_words, read_choice
from clincot.errors import InvalidInput
from clincot.evaluation.benchmark import Benchmark
from clincot.evaluation.grounding import best_iou, hits_reference
from clincot.evaluation.vqa import grade_answer
from clincot.generation.grounders import WrittenGrounder, derive_seed, draw_random_square
from clincot.generation.regions import build_grounder, build_grounding_query
from clincot.generation.visual_cot import ImageQuestion, answer_questions, measure_leads
from clincot.geometry import (
    WHOLE_IMAGE,
    Box,
    Cutout,
    compute_coverage,
    crop_square,
    cut_out_region,
    fit_view_side,
    fit_view_square,
)
from clincot.models.protocols import Grounder, Policy
from clincot.prompts import ChainStep, chain_prompt
from clincot.records import Outcome, Question, Reference, Study
from clincot.text import normalize_text

ALL_QUESTIONS = slice(None)
GROUNDER_ARMS = ("windows", "relevance", "http")
MAX_ANSWER_SPACE = 20  # a topic with at most this many distinct answers expects one of them
BATCH_SIZE = 128  # questions; a multiple of the other batches' sizes, so that parts consist of whole batches
_SERVED_BATCH_SIZE = 32  # questions; each has a few regions


@dataclass(frozen=True)
class _RegionInput:
    """A question, the image shown with it, and the region that the policy looks at."""

    question: Question
    shown: Study  # the question's study, except in the control `shuffled`
    box: Box | None  # None: the policy wrote no readable region
    cutout: Cutout | None = None  # of a region with a mask, if the settings cut regions out


def evaluate_policy(
    policy: Policy,
    benchmark: Benchmark,
    studies: Mapping[str, Study],
    folder: Path,
    config: EvaluateConfig,
    *,
    span: slice = ALL_QUESTIONS,
) -> Iterator[Outcome]:
    """Yield outcomes arm by arm, each arm in the benchmark's order.

    studies: by id; folder: holds their images. span: of the questions that are answered; the controls are chosen among
    all questions. Raises InvalidInput if the arm `shuffled` finds images of one patient only.
    """
    questions = _list_questions(benchmark, config)[span]
    spaces = collect_answer_spaces(benchmark)
    for arm in config.arms:
        if arm == "served":
            yield from _answer_as_served(policy, questions, benchmark, studies, folder, config)
            continue
        region_inputs = _choose_regions(arm, questions, benchmark, policy, studies, folder, config)
        for batch in _iter_batches(region_inputs):
            kind = batch[0].question.kind
            prompts = []
            for item in batch:
                box = item.box or WHOLE_IMAGE
                step = ChainStep(
                    item.question.asked_text,
                    box,
                    written=arm == "written",
                    report=kind == "report",
                    cutout=item.cutout,
                )
                prompts.append(chain_prompt(item.shown, folder, policy.views, [step]))
            replies = policy.generate(
                prompts, max_new_tokens=config.get_max_tokens(kind), temperature=0.0, seeds=[0] * len(batch)
            )
            for item, reply in zip(batch, replies, strict=True):
                reference = benchmark.references[item.question.id]
                off = reply.cut_off or not _is_in_format(reply.text, item.question, spaces) or item.box is None
                yield _score_outcome(item, arm, reply.text, reference, policy, off_format=off)


def _list_questions(benchmark: Benchmark, config: EvaluateConfig) -> list[Question]:
    return list(islice(benchmark.questions.values(), config.limit or None))


def _answer_as_served(
    policy: Policy,
    questions: Sequence[Question],
    benchmark: Benchmark,
    studies: Mapping[str, Study],
    folder: Path,
    config: EvaluateConfig,
) -> Iterator[Outcome]:
    """Yield the outcomes of the arm `served`: the answers that clients of a server get, withheld ones included.

    A server does not know the kind of a question, so it cuts off a report at serve.max_new_tokens like any answer.
    """
    spaces = collect_answer_spaces(benchmark)
    for at in range(0, len(questions), _SERVED_BATCH_SIZE):
        batch = questions[at : at + _SERVED_BATCH_SIZE]
        asked = [ImageQuestion(studies[question.study], folder, question.asked_text) for question in batch]
        for question, reply in zip(batch, answer_questions(asked, policy, config.serve), strict=True):
            off = reply.cut_off or not _is_in_format(reply.answer, question, spaces)
            box = None if reply.box == WHOLE_IMAGE else reply.box  # such an answer points nowhere
            item = _RegionInput(question, studies[question.study], box)
            reference = benchmark.references[question.id]
            outcome = _score_outcome(item, "served", reply.answer, reference, policy, off_format=off)
            lead, region_lead = measure_leads(reply)
            yield outcome.replace_fields(
                settings=reply.settings, lead=round(lead, 6), region_lead=round(region_lead, 6)
            )


def _iter_batches(region_inputs: Iterable[_RegionInput]) -> Iterator[list[_RegionInput]]:
    """Batch in order; a batch holds reports only or no reports, because reports may be longer."""
    for _, run in groupby(region_inputs, key=lambda item: item.question.kind == "report"):
        while batch := list(islice(run, BATCH_SIZE)):
            yield batch


@dataclass(frozen=True)
class AnswerSpaces:
    """The answers that are in format: normalised texts of the answer key and words for yes and no."""

    by_topic: Mapping[str, frozenset[str]]  # topics with few answers
    closed: frozenset[str]  # of closed questions; of a language that occurs in the key, all its words for yes and no


def collect_answer_spaces(benchmark: Benchmark) -> AnswerSpaces:
    """Collect the answers of every topic with few of them and those of all closed questions.

    The latter are more than yes and no: "Is it on the left or the right?" is closed too, and the key may be in another
    language. An answer that is right is thus always in format.
    """
    answers: dict[str, set[str]] = {}
    closed = {"yes", "no"}
    for question in benchmark.questions.values():
        answer = benchmark.references[question.id].answer
        if question.kind in ("closed", "open"):
            answers.setdefault(question.topic, set()).add(normalize_text(answer))
        if question.kind == "closed":
            closed |= {normalize_text(answer), *list_closed_words(answer)}
    by_topic = {topic: frozenset(a) for topic, a in answers.items() if topic and len(a) <= MAX_ANSWER_SPACE}
    return AnswerSpaces(by_topic, frozenset(closed))


def _is_in_format(text: str, question: Question, spaces: AnswerSpaces) -> bool:
    """Whether a reply has the form that its question asks for.

    A choice names one of its options. Any other answer is one of its topic's few answers; else, if the question is
    closed, it is one of the benchmark's answers to closed questions or yes or no; else it is not empty.
    """
    answer = normalize_text(text)
    if question.kind == "choice":
        return read_choice(text, question.options) is not None
    if question.kind == "report":
        return bool(answer)
    if space := spaces.by_topic.get(question.topic, frozenset()):
        return answer in space or (question.kind == "closed" and any(is_same_closed_word(answer, a) for a in space))
    return answer in spaces.closed if question.kind == "closed" else bool(answer)


def _score_outcome(
    item: _RegionInput, arm: str, answer: str, reference: Reference, policy: Policy, *, off_format: bool
) -> Outcome:
    box = item.box or WHOLE_IMAGE
    aspect = item.shown.width / item.shown.height
    shown = box if box == WHOLE_IMAGE else crop_square(box, min_side=policy.views.min_crop, aspect=aspect)
    # IoU compares the crop with the crop of the reference, not its box: a crop is never smaller than min_crop.
    iou = best_iou(shown, [fit_view_square(b, aspect=aspect) for b in reference.boxes])
    return Outcome(
        question=item.question.id,
        policy=policy.digest,
        arm=arm,
        box=box,
        answer=answer,
        reference=reference.id,
        correct=grade_answer(answer, item.question, reference),
        # Without a region, count a miss if the key has one; the whole image would count as a hit.
        hit=False if item.box is None and reference.boxes else hits_reference(shown, reference.boxes),
        iou=None if iou is None else (0.0 if item.box is None else round(iou, 6)),
        off_format=off_format,
        no_region=item.box is None,
    )


def _choose_regions(
    arm: str,
    questions: Sequence[Question],
    benchmark: Benchmark,
    policy: Policy,
    studies: Mapping[str, Study],
    folder: Path,
    config: EvaluateConfig,
) -> Iterator[_RegionInput]:
    """Yield every question with its arm's region, in order."""
    if arm == "written" or arm in GROUNDER_ARMS:
        if arm == "written":
            grounder: Grounder = WrittenGrounder(policy, samples=1, temperature=0.0, seed=config.seed)
        else:
            grounder = build_grounder(arm, config.propose, policy, 1)
        fallback = None if arm == "written" else WHOLE_IMAGE  # a grounder that finds nothing leaves the whole image
        limit = config.propose.hypotheses
        for at in range(0, len(questions), BLOCK_SIZE):
            block = questions[at : at + BLOCK_SIZE]
            queries = [build_grounding_query(q, studies[q.study], limit=limit) for q in block]
            for query, regions in zip(queries, grounder.ground(queries, folder), strict=True):
                cutout = cut_out_region(regions[0].mask, config.propose.mask_outside) if regions else None
                yield _RegionInput(query.question, query.study, regions[0].box if regions else fallback, cutout)
        return
    other_studies = _match_other_patients(_list_questions(benchmark, config), benchmark) if arm == "shuffled" else {}
    sides = compute_crop_sides(benchmark, studies)
    for question in questions:
        reference = benchmark.references[question.id]
        shown = studies[other_studies[question.study] if arm == "shuffled" else question.study]
        aspect = shown.width / shown.height
        box = _choose_control_region(arm, question, reference, sides, seed=config.seed, aspect=aspect)
        mask = reference.masks[0] if reference.masks and arm in ("oracle", "shuffled") else None
        yield _RegionInput(question, shown, box, cut_out_region(mask, config.propose.mask_outside))


def _match_other_patients(questions: Sequence[Question], benchmark: Benchmark) -> dict[str, str]:
    """Map each study to the next one of another patient in the benchmark's order, wrapping around at the end."""
    patients = {q.study: benchmark.clusters[q.id] for q in questions}
    order = list(patients)
    other_studies = {}
    for at, study in enumerate(order):
        later = (other for other in order[at + 1 :] + order[:at] if patients[other] != patients[study])
        other = next(later, None)
        if other is None:
            raise InvalidInput(f"the arm 'shuffled' needs images of two patients, all are of {patients[study]!r}")
        other_studies[study] = other
    return other_studies


def compute_crop_sides(benchmark: Benchmark, studies: Mapping[str, Study]) -> dict[str, float]:
    """Compute the median crop side of each finding, for the controls of questions about an absent finding."""
    sides: dict[str, list[float]] = {}
    for reference in benchmark.references.values():
        if reference.boxes:
            study = studies[benchmark.questions[reference.question].study]
            aspect = study.width / study.height
            sides.setdefault(reference.finding, []).extend(fit_view_side(box, aspect=aspect) for box in reference.boxes)
    return {finding: sorted(lengths)[len(lengths) // 2] for finding, lengths in sides.items()}


def _choose_control_region(
    arm: str, question: Question, reference: Reference, sides: Mapping[str, float], *, seed: int, aspect: float
) -> Box:
    """Choose a control's region.

    If the key has no box (an absent finding), every control but `whole` takes a random square of the size that the
    finding has when present, so that the size of the crop does not give the answer away.
    """
    if arm == "whole":
        return WHOLE_IMAGE
    boxes = reference.boxes
    if arm in ("oracle", "shuffled") and boxes:
        return fit_view_square(boxes[0], aspect=aspect)
    side = fit_view_side(boxes[0], aspect=aspect) if boxes else sides.get(reference.finding, 0.25)
    attempts = 20 if arm == "wrong" else 1  # `wrong` takes the draw that covers the finding least
    seeds = [derive_seed(seed, question.id, arm, n) for n in range(attempts)]
    draws = [draw_random_square(one, side, aspect=aspect) for one in seeds]
    return min(draws, key=lambda draw: sum(compute_coverage(box, by=draw) for box in boxes))
