"""The examples of a run's page: benchmark questions, candidates with their scores, preference pairs.

Examples are drawn by a hash of their ids, never by how well they look. The answer key is read for benchmark
questions only; what the rounds learnt from (preference data) is shown without it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clincot.geometry import WHOLE_IMAGE, box_to_text
from clincot.images import load_cached_view
from clincot.jsonl import InvalidRecord, R, read_records
from clincot.promotion.evidence import EvidenceRow
from clincot.prompts import PromptFormat, build_crop_view, load_prompt_format
from clincot.records import (
    Candidate,
    Judgement,
    Outcome,
    PanelScore,
    PreferencePair,
    Question,
    Reference,
    Region,
    Study,
    hash_json,
)
from clincot.reporting.figures import AnnotatedFilm, BoxMark, annotate_film, encode_data_uri
from clincot.runs.lookup import grep_records

CROP_PX = 160  # of a crop on the page, where the policy takes it at any size


@dataclass(frozen=True)
class GalleryRound:
    """A round's folder, and the policy that answered in it."""

    number: int
    folder: Path
    views: PromptFormat  # of the policy that answered
    judges: dict[str, str]  # {digest: name}, in the panel's order


@dataclass(frozen=True)
class JudgeScore:
    judge: str
    value: float | None
    reason: str


@dataclass(frozen=True)
class CandidateExample:
    """One candidate, as a row of the page."""

    id: str
    number: int  # of its region on the film
    style: str
    grounder: str
    hypothesis: str
    confidence: float
    box: str
    crop: str  # data URI
    text: str
    step: int
    scores: tuple[JudgeScore, ...]
    panel: PanelScore | None


@dataclass(frozen=True)
class QuestionExample:
    """A question of the preference data with its candidates, the best by the panel first."""

    round: int
    question: Question
    film: AnnotatedFilm
    answers: tuple[CandidateExample, ...]

    @property
    def steps(self) -> bool:
        """Whether the candidates are chains of more than one step."""
        return any(answer.step for answer in self.answers)


@dataclass(frozen=True)
class PairExample:
    round: int
    pair: PreferencePair
    question: Question
    film: AnnotatedFilm
    chosen: CandidateExample
    rejected: CandidateExample


@dataclass(frozen=True)
class PolicyAnswer:
    """How one policy answered a benchmark question."""

    policy: str
    style: str
    crop: str
    box: str
    outcome: Outcome


@dataclass(frozen=True)
class BenchmarkExample:
    question: Question
    reference: Reference
    film: AnnotatedFilm
    tried: tuple[PolicyAnswer, ...]


class PageImages:
    """The films of the page, each once, as {element id: data URI}; crops are small and stand where they are used."""

    def __init__(self) -> None:
        self.films: dict[str, tuple[str, Study]] = {}

    def add_film(self, study: Study, folder: Path) -> str:
        name = f"film-{study.sha256[:12]}"
        if name not in self.films:
            self.films[name] = (encode_data_uri(load_cached_view(resolve_image_path(study, folder), None, None)), study)
        return name

    def encode_crop(self, study: Study, folder: Path, views: PromptFormat, region: Region | Outcome) -> str:
        """What the policy saw of a region, at the size at which it saw it."""
        path = resolve_image_path(study, folder)
        picture = build_crop_view(study, folder, views, region.box)
        return encode_data_uri(load_cached_view(path, picture.box, picture.side_px or CROP_PX), lossless=True)


def resolve_image_path(study: Study, folder: Path) -> Path:
    """Where the study's image lies; raises BadRecord where a record points outside the folder."""
    if Path(study.image).is_absolute() or ".." in Path(study.image).parts:
        raise InvalidRecord(f"{study.id}: expected an image inside {folder}, got {study.image!r}")
    return folder / study.image


def sample_by_hash(ids: Iterable[str], count: int) -> list[str]:
    """`count` of the ids, by their hash: the same ones whatever the order, and none for its looks."""
    return heapq.nsmallest(count, set(ids), key=lambda one: hash_json(["shown on the page", one]))


def split_evenly(count: int, rounds: int) -> list[int]:
    """How many of `count` examples each round shows; the first rounds take what does not divide."""
    return [count // rounds + (number < count % rounds) for number in range(rounds)] if rounds else []


def select_question_examples(
    rounds: Sequence[GalleryRound], data: Path, pictures: PageImages, count: int
) -> list[QuestionExample]:
    """Questions of the rounds that made a pair, with every candidate, each judge's score and the panel's."""
    shown = []
    for one, share in zip(rounds, split_evenly(count, len(rounds)), strict=True):
        with_pairs = (pair.question for pair in read_records(one.folder / "pairs.jsonl", PreferencePair))
        found = _RoundRecords(one, data, sample_by_hash(with_pairs, share))
        shown += [found.build_question_example(question, pictures) for question in found.questions]
    return shown


def select_pair_examples(
    rounds: Sequence[GalleryRound], data: Path, pictures: PageImages, count: int
) -> list[PairExample]:
    """Preference pairs of the rounds, at most one a question."""
    shown = []
    for one, share in zip(rounds, split_evenly(count, len(rounds)), strict=True):
        of_question: dict[str, str] = {}
        for pair in read_records(one.folder / "pairs.jsonl", PreferencePair):
            of_question.setdefault(pair.question, pair.id)
        ids = sample_by_hash(of_question.values(), share)
        kept = _order_by_ids(grep_records(one.folder / "pairs.jsonl", PreferencePair, ids), ids)
        found = _RoundRecords(one, data, [pair.question for pair in kept])
        shown += [found.build_pair_example(pair, pictures) for pair in kept]
    return shown


class _RoundRecords:
    """Everything that a round's files say about a few questions; one pass over each file."""

    def __init__(self, one: GalleryRound, data: Path, questions: Sequence[str]) -> None:
        self.round, self.data, self.questions = one, data, questions
        self.asked_of = {q.id: q for q in grep_records(one.folder / "questions.jsonl", Question, questions)}
        studies = {q.study for q in self.asked_of.values()}
        self.studies = {s.id: s for s in grep_records(data / "studies.jsonl", Study, studies)}
        self.regions = list(grep_records(one.folder / "regions.jsonl", Region, questions))
        self.candidates = list(grep_records(one.folder / "candidates.jsonl", Candidate, questions))
        ids = {candidate.id for candidate in self.candidates}
        self.judgements = list(grep_records(one.folder / "judgements.jsonl", Judgement, ids))
        self.scores = {s.candidate: s for s in grep_records(one.folder / "scores.jsonl", PanelScore, ids)}

    def build_question_example(self, question_id: str, pictures: PageImages) -> QuestionExample:
        question = _require_record(self.asked_of, question_id, self.round.folder / "questions.jsonl")
        study = _require_record(self.studies, question.study, self.data / "studies.jsonl")
        regions = [region for region in self.regions if region.question == question_id]
        numbered = {region.id: number for number, region in enumerate(regions, start=1)}
        marks = [
            BoxMark(r.box, f"by-{r.grounder}", f"{numbered[r.id]} {r.hypothesis}{_format_confidence(r)}")
            for r in regions
        ]
        answers = [
            self._build_candidate_example(candidate, numbered.get(candidate.region, 0), study, pictures)
            for candidate in self.candidates
            if candidate.question == question_id
        ]
        text = f"Radiograph with {len(regions)} regions: " + "; ".join(
            f"{numbered[r.id]} {r.hypothesis} at {box_to_text(r.box)} percent" for r in regions
        )
        shown = annotate_film(pictures.add_film(study, self.data), (study.width, study.height), marks, text)
        return QuestionExample(self.round.number, question, shown, tuple(sorted(answers, key=_rank_by_panel)))

    def build_pair_example(self, pair: PreferencePair, pictures: PageImages) -> PairExample:
        question = _require_record(self.asked_of, pair.question, self.round.folder / "questions.jsonl")
        study = _require_record(self.studies, question.study, self.data / "studies.jsonl")
        by_id = {candidate.id: candidate for candidate in self.candidates}
        sides = [
            self._build_candidate_example(
                _require_record(by_id, one, self.round.folder / "candidates.jsonl"), number, study, pictures
            )
            for number, one in enumerate((pair.chosen, pair.rejected), start=1)
        ]
        regions = {region.id: region for region in self.regions}
        chosen, rejected = (
            _require_record(regions, one, self.round.folder / "regions.jsonl")
            for one in (pair.chosen_region, pair.rejected_region)
        )
        marks = [BoxMark(chosen.box, "chosen", "✓ chosen"), BoxMark(rejected.box, "rejected", "✗ rejected")]
        text = f"Radiograph; chosen region {sides[0].box} percent, rejected region {sides[1].box} percent"
        shown = annotate_film(pictures.add_film(study, self.data), (study.width, study.height), marks, text)
        return PairExample(self.round.number, pair, question, shown, sides[0], sides[1])

    def _build_candidate_example(
        self, candidate: Candidate, number: int, study: Study, pictures: PageImages
    ) -> CandidateExample:
        regions = {region.id: region for region in self.regions}
        region = _require_record(regions, candidate.region, self.round.folder / "regions.jsonl")
        given = {j.judge: j for j in self.judgements if j.candidate == candidate.id}
        judges = self.round.judges
        names = {**judges, **{digest: digest[:10] for digest in given if digest not in judges}}
        scores = tuple(
            JudgeScore(name, given[digest].score, given[digest].reason)
            if digest in given
            else JudgeScore(name, None, "not asked")
            for digest, name in names.items()
        )
        return CandidateExample(
            id=candidate.id,
            number=number,
            style=f"by-{region.grounder}",
            grounder=region.grounder,
            hypothesis=region.hypothesis,
            confidence=region.confidence,
            box=box_to_text(region.box),
            crop=pictures.encode_crop(study, self.data, self.round.views, region),
            text=candidate.text,
            step=candidate.step,
            scores=scores,
            panel=self.scores.get(candidate.id),
        )


def select_benchmark_examples(
    policies: Sequence[tuple[str, Path, PromptFormat]], folder: Path, arm: str, pictures: PageImages, count: int
) -> list[BenchmarkExample]:
    """Benchmark questions: where each policy (name, outcomes file, views) looked, and what it answered.

    Only questions that all of the policies answered in this arm, with boxes in the answer key if it has any, and at
    most one a film.
    """
    asked_by = [
        {outcome.question for outcome in read_records(path, Outcome) if outcome.arm == arm} for _, path, _ in policies
    ]
    common = set.intersection(*asked_by) if asked_by else set()
    boxed = {r.question for r in read_records(folder / "references.jsonl", Reference) if r.boxes}
    of_study: dict[str, list[str]] = {}
    kept = common & boxed or common
    for question in read_records(folder / "questions.jsonl", Question):
        if question.id in kept:
            of_study.setdefault(question.study, []).append(question.id)
    ids = sample_by_hash((sample_by_hash(questions, 1)[0] for questions in of_study.values()), count)

    return _build_benchmark_examples(ids, policies, folder, arm, pictures)


def select_discordant_examples(
    evidence: Path,
    policies: Sequence[tuple[str, Path, PromptFormat]],
    folder: Path,
    arm: str,
    pictures: PageImages,
    count: int,
) -> tuple[list[BenchmarkExample], int, int]:
    """Questions of a decision on which exactly one of champion and challenger was right, in equal parts where there are
    enough; and how many the challenger won and lost.

    policies: champion and challenger, as for `benchmarked`.
    """
    sides: dict[bool, list[str]] = {True: [], False: []}  # {the challenger was right: questions}
    for row in read_records(evidence, EvidenceRow):
        old, new = row.sides["champion"].correct, row.sides["challenger"].correct
        if old is not None and new is not None and old != new:
            sides[new].append(row.question)
    lost = sample_by_hash(sides[False], count // 2)
    ids = [*sample_by_hash(sides[True], count - len(lost)), *lost]
    return _build_benchmark_examples(ids, policies, folder, arm, pictures), len(sides[True]), len(sides[False])


def _build_benchmark_examples(
    ids: Sequence[str], policies: Sequence[tuple[str, Path, PromptFormat]], folder: Path, arm: str, pictures: PageImages
) -> list[BenchmarkExample]:
    questions = _order_by_ids(grep_records(folder / "questions.jsonl", Question, ids), ids)
    references = {r.question: r for r in grep_records(folder / "references.jsonl", Reference, ids)}
    studies = {s.id: s for s in grep_records(folder / "studies.jsonl", Study, {q.study for q in questions})}
    outcomes = [{o.question: o for o in grep_records(path, Outcome, ids) if o.arm == arm} for _, path, _ in policies]
    shown = []
    for question in questions:
        study = _require_record(studies, question.study, folder / "studies.jsonl")
        reference = references[question.id]
        tried = []
        marks = []
        for number, ((name, _, views), of) in enumerate(zip(policies, outcomes, strict=True)):
            outcome, style = of[question.id], f"policy-{number % 6}"
            crop = pictures.encode_crop(study, folder, views, outcome)
            tried.append(PolicyAnswer(name, style, crop, box_to_text(outcome.box), outcome))
            marks.append(BoxMark(outcome.box, style, name))
        marks += [BoxMark(box, "key", "answer key") for box in reference.boxes]
        text = f"Radiograph; where {len(tried)} policies looked" + (
            ", and the answer key's region" * bool(reference.boxes)
        )
        on_film = annotate_film(pictures.add_film(study, folder), (study.width, study.height), marks, text)
        shown.append(BenchmarkExample(question, reference, on_film, tuple(tried)))
    return shown


def find_prompt_format(checkpoint: Path) -> PromptFormat:
    """How a checkpoint in a folder sees crops; the defaults for one that lies elsewhere (a hub name)."""
    return load_prompt_format(checkpoint) if checkpoint.is_dir() else PromptFormat()


def read_round_policy(folder: Path) -> str:
    """Digest of the policy that answered in a round: its first candidate's. Every candidate has the same one."""
    return next((candidate.policy for candidate in read_records(folder / "candidates.jsonl", Candidate)), "")


def _rank_by_panel(answer: CandidateExample) -> tuple[int, float]:
    """Steps in order, in each the best first and the unscored last."""
    score = answer.panel.score if answer.panel else None
    return answer.step, 1.0 if score is None else -score


def _format_confidence(region: Region) -> str:
    return "" if region.box == WHOLE_IMAGE else f" {region.confidence:.2f}"


def _order_by_ids(records: Iterable[R], ids: Sequence[str]) -> list[R]:
    """The records with these ids, in the order of the ids; other records that mention them are left out."""
    by_id = {record.id: record for record in records}
    return [by_id[one] for one in ids if one in by_id]


def _require_record(records: Mapping[str, R], one: str, path: Path) -> R:
    try:
        return records[one]
    except KeyError:
        raise InvalidRecord(
            f"{path}: expected {one}, which another record of the run names, but it is not there"
        ) from None
