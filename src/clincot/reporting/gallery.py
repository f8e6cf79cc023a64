"""Examples for a run's page: benchmark questions, candidates with their scores, preference pairs.

Examples are sampled by a hash of their ids, so nobody can pick the ones that look good. The answer key is read for
benchmark questions only; the preference data that the rounds learn from is shown without it.
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

CROP_PX = 160  # side of a crop on the page if the policy accepts crops of any size


@dataclass(frozen=True)
class GalleryRound:
    """A round's folder, and how its policy and judges saw the data."""

    number: int
    folder: Path
    views: PromptFormat  # the format of the policy that answered in this round
    judges: dict[str, str]  # {digest: name}, in the panel's order


@dataclass(frozen=True)
class JudgeScore:
    """One judge's raw score of a candidate; None with a reason if it is unscored."""

    judge: str
    value: float | None
    reason: str


@dataclass(frozen=True)
class CandidateExample:
    """One candidate as a row of the page."""

    id: str
    number: int  # number of its region on the film
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
    """A question of the preference data with its candidates, ranked by the panel's score."""

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
    """A preference pair with both of its candidates."""

    round: int
    pair: PreferencePair
    question: Question
    film: AnnotatedFilm
    chosen: CandidateExample
    rejected: CandidateExample


@dataclass(frozen=True)
class PolicyAnswer:
    """One policy's answer to a benchmark question."""

    policy: str
    style: str
    crop: str
    box: str
    outcome: Outcome


@dataclass(frozen=True)
class BenchmarkExample:
    """A benchmark question with the answer key and every policy's answer."""

    question: Question
    reference: Reference
    film: AnnotatedFilm
    answers: tuple[PolicyAnswer, ...]


class PageImages:
    """The page's films, each stored once and referred to by element id; crops are small and stored in place."""

    def __init__(self) -> None:
        self.films: dict[str, tuple[str, Study]] = {}  # {element id: (data URI, study)}

    def add_film(self, study: Study, folder: Path) -> str:
        """Store a study's film if it is new, and return its element id."""
        name = f"film-{study.sha256[:12]}"
        if name not in self.films:
            self.films[name] = (encode_data_uri(load_cached_view(resolve_image_path(study, folder), None, None)), study)
        return name

    def encode_crop(self, study: Study, folder: Path, views: PromptFormat, region: Region | Outcome) -> str:
        """Encode the crop of a region as the policy saw it, at the size at which it saw it."""
        path = resolve_image_path(study, folder)
        cutout = region.cutout if isinstance(region, Region) else None
        view = build_crop_view(study, folder, views, region.box, cutout)
        return encode_data_uri(load_cached_view(path, view.box, view.side_px or CROP_PX, cutout), lossless=True)


def resolve_image_path(study: Study, folder: Path) -> Path:
    """Return the path of a study's image; raises InvalidRecord if the record points outside the folder."""
    if Path(study.image).is_absolute() or ".." in Path(study.image).parts:
        raise InvalidRecord(f"{study.id}: expected an image inside {folder}, got {study.image!r}")
    return folder / study.image


def sample_by_hash(ids: Iterable[str], count: int) -> list[str]:
    """Sample `count` ids by their hash, so that the sample does not depend on their order or content."""
    return heapq.nsmallest(count, set(ids), key=lambda record_id: hash_json(["shown on the page", record_id]))


def split_evenly(count: int, rounds: int) -> list[int]:
    """Split `count` examples between rounds as evenly as possible; the first rounds take the remainder."""
    return [count // rounds + (number < count % rounds) for number in range(rounds)] if rounds else []


def select_question_examples(
    rounds: Sequence[GalleryRound], data: Path, pictures: PageImages, count: int
) -> list[QuestionExample]:
    """Sample questions that gave a pair, with all candidates and the scores of every judge and the panel."""
    examples = []
    for round_, share in zip(rounds, split_evenly(count, len(rounds)), strict=True):
        with_pairs = (pair.question for pair in read_records(round_.folder / "pairs.jsonl", PreferencePair))
        records = _RoundRecords(round_, data, sample_by_hash(with_pairs, share))
        examples += [records.build_question_example(question, pictures) for question in records.questions]
    return examples


def select_pair_examples(
    rounds: Sequence[GalleryRound], data: Path, pictures: PageImages, count: int
) -> list[PairExample]:
    """Sample preference pairs of the rounds, at most one for each question."""
    examples = []
    for round_, share in zip(rounds, split_evenly(count, len(rounds)), strict=True):
        first_pairs: dict[str, str] = {}  # {question: id of its first pair}
        for pair in read_records(round_.folder / "pairs.jsonl", PreferencePair):
            first_pairs.setdefault(pair.question, pair.id)
        ids = sample_by_hash(first_pairs.values(), share)
        sample = _order_by_ids(grep_records(round_.folder / "pairs.jsonl", PreferencePair, ids), ids)
        records = _RoundRecords(round_, data, [pair.question for pair in sample])
        examples += [records.build_pair_example(pair, pictures) for pair in sample]
    return examples


class _RoundRecords:
    """A round's records about a few questions, read in one pass over each file."""

    def __init__(self, round_: GalleryRound, data: Path, questions: Sequence[str]) -> None:
        folder = round_.folder
        self.round, self.data, self.questions = round_, data, questions
        self.by_question = {q.id: q for q in grep_records(folder / "questions.jsonl", Question, questions)}
        studies = {q.study for q in self.by_question.values()}
        self.studies = {s.id: s for s in grep_records(data / "studies.jsonl", Study, studies)}
        self.regions = list(grep_records(folder / "regions.jsonl", Region, questions))
        self.candidates = list(grep_records(folder / "candidates.jsonl", Candidate, questions))
        ids = {candidate.id for candidate in self.candidates}
        self.judgements = list(grep_records(folder / "judgements.jsonl", Judgement, ids))
        self.scores = {s.candidate: s for s in grep_records(folder / "scores.jsonl", PanelScore, ids)}

    def build_question_example(self, question_id: str, pictures: PageImages) -> QuestionExample:
        """Build the example of a question; raises InvalidRecord if a record that it refers to is missing."""
        question = _require_record(self.by_question, question_id, self.round.folder / "questions.jsonl")
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
        film = annotate_film(pictures.add_film(study, self.data), (study.width, study.height), marks, text)
        return QuestionExample(self.round.number, question, film, tuple(sorted(answers, key=_rank_by_panel)))

    def build_pair_example(self, pair: PreferencePair, pictures: PageImages) -> PairExample:
        """Build the example of a pair; raises InvalidRecord if a record that it refers to is missing."""
        question = _require_record(self.by_question, pair.question, self.round.folder / "questions.jsonl")
        study = _require_record(self.studies, question.study, self.data / "studies.jsonl")
        by_id = {candidate.id: candidate for candidate in self.candidates}
        sides = []
        for number, candidate_id in enumerate((pair.chosen, pair.rejected), start=1):
            candidate = _require_record(by_id, candidate_id, self.round.folder / "candidates.jsonl")
            sides.append(self._build_candidate_example(candidate, number, study, pictures))
        regions = {region.id: region for region in self.regions}
        path = self.round.folder / "regions.jsonl"
        chosen = _require_record(regions, pair.chosen_region, path)
        rejected = _require_record(regions, pair.rejected_region, path)
        marks = [BoxMark(chosen.box, "chosen", "✓ chosen"), BoxMark(rejected.box, "rejected", "✗ rejected")]
        text = f"Radiograph; chosen region {sides[0].box} percent, rejected region {sides[1].box} percent"
        film = annotate_film(pictures.add_film(study, self.data), (study.width, study.height), marks, text)
        return PairExample(self.round.number, pair, question, film, sides[0], sides[1])

    def _build_candidate_example(
        self, candidate: Candidate, number: int, study: Study, pictures: PageImages
    ) -> CandidateExample:
        regions = {region.id: region for region in self.regions}
        region = _require_record(regions, candidate.region, self.round.folder / "regions.jsonl")
        judgements = {j.judge: j for j in self.judgements if j.candidate == candidate.id}
        names = dict(self.round.judges)
        for digest in judgements:
            names.setdefault(digest, digest[:10])
        scores = []
        for digest, name in names.items():
            judgement = judgements.get(digest)
            if judgement is None:
                scores.append(JudgeScore(name, None, "not asked"))
            else:
                scores.append(JudgeScore(name, judgement.score, judgement.reason))
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
            scores=tuple(scores),
            panel=self.scores.get(candidate.id),
        )


def select_benchmark_examples(
    policies: Sequence[tuple[str, Path, PromptFormat]], folder: Path, arm: str, pictures: PageImages, count: int
) -> list[BenchmarkExample]:
    """Sample benchmark questions, with each policy's region and answer.

    policies: (name, outcomes file, prompt format). The sample is taken from the questions that all policies answered
    in this arm, those with boxes in the answer key if there are any, and has at most one question for each film.
    """
    answered = [_read_answered_questions(path, arm) for _, path, _ in policies]
    common = set.intersection(*answered) if answered else set()
    with_boxes = {r.question for r in read_records(folder / "references.jsonl", Reference) if r.boxes}
    eligible = common & with_boxes or common
    by_study: dict[str, list[str]] = {}
    for question in read_records(folder / "questions.jsonl", Question):
        if question.id in eligible:
            by_study.setdefault(question.study, []).append(question.id)
    ids = sample_by_hash((sample_by_hash(questions, 1)[0] for questions in by_study.values()), count)
    return _build_benchmark_examples(ids, policies, folder, arm, pictures)


def _read_answered_questions(path: Path, arm: str) -> set[str]:
    return {outcome.question for outcome in read_records(path, Outcome) if outcome.arm == arm}


def select_discordant_examples(
    evidence: Path,
    policies: Sequence[tuple[str, Path, PromptFormat]],
    folder: Path,
    arm: str,
    pictures: PageImages,
    count: int,
) -> tuple[list[BenchmarkExample], int, int]:
    """Sample a decision's questions on which exactly one of champion and challenger was right.

    policies: champion and challenger, as for `select_benchmark_examples`. Returns the examples, half of them won by
    either side if there are enough, and the number of all questions that the challenger won and lost.
    """
    won: list[str] = []  # by the challenger
    lost: list[str] = []
    for row in read_records(evidence, EvidenceRow):
        old, new = row.sides["champion"].correct, row.sides["challenger"].correct
        if old is not None and new is not None and old != new:
            (won if new else lost).append(row.question)
    lost_sample = sample_by_hash(lost, count // 2)
    ids = [*sample_by_hash(won, count - len(lost_sample)), *lost_sample]
    return _build_benchmark_examples(ids, policies, folder, arm, pictures), len(won), len(lost)


def _build_benchmark_examples(
    ids: Sequence[str], policies: Sequence[tuple[str, Path, PromptFormat]], folder: Path, arm: str, pictures: PageImages
) -> list[BenchmarkExample]:
    questions = _order_by_ids(grep_records(folder / "questions.jsonl", Question, ids), ids)
    references = {r.question: r for r in grep_records(folder / "references.jsonl", Reference, ids)}
    study_ids = {question.study for question in questions}
    studies = {study.id: study for study in grep_records(folder / "studies.jsonl", Study, study_ids)}
    outcomes = [_grep_outcomes(path, ids, arm) for _, path, _ in policies]
    examples = []
    for question in questions:
        study = _require_record(studies, question.study, folder / "studies.jsonl")
        reference = references[question.id]
        answers = []
        marks = []
        for number, ((name, _, views), by_question) in enumerate(zip(policies, outcomes, strict=True)):
            outcome, style = by_question[question.id], f"policy-{number % 6}"
            crop = pictures.encode_crop(study, folder, views, outcome)
            answers.append(PolicyAnswer(name, style, crop, box_to_text(outcome.box), outcome))
            marks.append(BoxMark(outcome.box, style, name))
        marks += [BoxMark(box, "key", "answer key") for box in reference.boxes]
        regions = "; ".join(f"{answer.policy} at {answer.box} percent" for answer in answers)
        key = "; ".join(f"answer key at {box_to_text(box)} percent" for box in reference.boxes)
        text = f"Radiograph with the regions of {len(answers)} policies: {regions}" + (f"; {key}" if key else "")
        film = annotate_film(pictures.add_film(study, folder), (study.width, study.height), marks, text)
        examples.append(BenchmarkExample(question, reference, film, tuple(answers)))
    return examples


def _grep_outcomes(path: Path, ids: Sequence[str], arm: str) -> dict[str, Outcome]:
    return {outcome.question: outcome for outcome in grep_records(path, Outcome, ids) if outcome.arm == arm}


def find_prompt_format(checkpoint: Path) -> PromptFormat:
    """Return a checkpoint's prompt format; the default one if it is not a folder but a hub name."""
    return load_prompt_format(checkpoint) if checkpoint.is_dir() else PromptFormat()


def read_round_policy(folder: Path) -> str:
    """Return the digest of the policy that answered in a round, which all candidates share; "" if there are none."""
    return next((candidate.policy for candidate in read_records(folder / "candidates.jsonl", Candidate)), "")


def _rank_by_panel(answer: CandidateExample) -> tuple[int, float]:
    """Sort key: steps in order, within a step the best score first and unscored candidates last."""
    score = answer.panel.score if answer.panel else None
    return answer.step, 1.0 if score is None else -score


def _format_confidence(region: Region) -> str:
    return "" if region.box == WHOLE_IMAGE else f" {region.confidence:.2f}"


def _order_by_ids(records: Iterable[R], ids: Sequence[str]) -> list[R]:
    """Return the records with these ids in the order of the ids, without other records that mention the ids."""
    by_id = {record.id: record for record in records}
    return [by_id[record_id] for record_id in ids if record_id in by_id]


def _require_record(records: Mapping[str, R], record_id: str, path: Path) -> R:
    """Return a record; raises InvalidRecord if it is missing."""
    try:
        return records[record_id]
    except KeyError:
        raise InvalidRecord(
            f"{path}: expected {record_id}, which another record of the run refers to, but it is missing"
        ) from None
