"""People's verdicts as one more judge: judgements, agreement with the panel, vetoes on pairs, and calibration.

People judge only the pairs of the queue, so their scores are not mixed into the panel's: of two candidates of a
question one would be scored by people and the other would not. They are compared with the panel, they veto pairs, and a
judge's calibration can be fitted on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from pydantic import Field

from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, NonEmptyStr, UnitFloat
from clincot.judging.agreement import KrippendorffAlpha, compute_krippendorff_alpha
from clincot.judging.calibration import Calibration, CalibrationMethod, fit_calibration
from clincot.judging.review_queue import REVIEW_REASONS, ReviewItem
from clincot.records import Judgement, PreferencePair, hash_json


class ReaderVerdict(FrozenModel):
    """One reader's verdict on one task. None: unsure."""

    task: NonEmptyStr
    reader: NonEmptyStr
    a_right: bool | None
    b_right: bool | None
    better: Literal["a", "b", "equal"]


class ReviewedPair(FrozenModel):
    """What the readers say about a pair. Their votes: for the chosen answer, for the rejected one, for neither."""

    pair: NonEmptyStr
    reason: NonEmptyStr  # why the pair is in the queue
    chosen_score: UnitFloat | None  # share of the readers who call it right; None: all are unsure
    rejected_score: UnitFloat | None
    for_chosen: int
    for_rejected: int
    for_neither: int

    @property
    def veto(self) -> str:
        """Why the pair should not be trained on; "": it may be."""
        if self.for_rejected > self.for_chosen:
            return "readers prefer the rejected answer"
        if self.chosen_score is not None and self.chosen_score < 0.5:
            return "readers call the chosen answer wrong"
        return ""


class Confusion(FrozenModel):
    """Counts of candidates: what a judge says (score >= 0.5 is right), and what people say."""

    both_right: int = 0
    both_wrong: int = 0
    only_judge_right: int = 0
    only_people_right: int = 0
    undecided: int = 0  # people are split evenly


class JudgeAgreement(FrozenModel):
    """How one judge, or the panel, agrees with people."""

    name: NonEmptyStr
    alpha: KrippendorffAlpha  # interval, of its score and people's
    confusion: Confusion


class OrderAgreement(FrozenModel):
    """On how many pairs people prefer the same answer as the panel."""

    reason: NonEmptyStr
    same: int = 0
    opposite: int = 0
    no_difference: int = 0


class ReviewReport(FrozenModel):
    """People as a judge, compared with the panel."""

    judge: NonEmptyStr  # people's digest
    readers: int
    tasks: int  # of the queue
    reviewed: int  # tasks with a verdict
    readers_alpha: KrippendorffAlpha  # of the readers among themselves
    judges: tuple[JudgeAgreement, ...]  # the panel first
    orders: tuple[OrderAgreement, ...]  # by reason; only `random` is a fair sample of the round
    vetoes: dict[str, int] = Field(default_factory=dict)  # reason -> pairs


class PeopleJudge:
    """Verdicts joined with the key of the queue. Raises InvalidInput for a task that is not in the key."""

    def __init__(self, items: Sequence[ReviewItem], verdicts: Sequence[ReaderVerdict], instructions: str) -> None:
        """instructions: what the readers saw, such as the labelling configuration; the digest covers it."""
        known = {item.task for item in items}
        unknown = sorted({verdict.task for verdict in verdicts} - known)
        if unknown:
            raise InvalidInput(
                f"{len(unknown)} tasks are not in the key, for instance {unknown[0]}; they belong to another export"
            )
        if not verdicts:
            raise InvalidInput("no verdict: no task of the export has been annotated")
        self.items = list(items)
        self.readers = sorted({verdict.reader for verdict in verdicts})
        self.prompt = hash_json(["instructions to readers", instructions])
        self.digest = hash_json(["people", self.prompt, self.readers])
        self._verdicts: dict[str, list[ReaderVerdict]] = {}
        self._opinions: dict[str, dict[str, bool | None]] = {}  # {candidate: {reader: right}}
        by_task = {item.task: item for item in items}
        for verdict in verdicts:
            item = by_task[verdict.task]
            self._verdicts.setdefault(verdict.task, []).append(verdict)
            self._opinions.setdefault(item.answer_a, {})[verdict.reader] = verdict.a_right
            self._opinions.setdefault(item.answer_b, {})[verdict.reader] = verdict.b_right

    def build_judgements(self) -> list[Judgement]:
        """One judgement of each reviewed candidate: the share of readers who call it right."""
        judgements = []
        for candidate, opinions in self._opinions.items():
            score = _share_right(opinions.values())
            reason = "" if score is not None else "every reader is unsure"
            judgements.append(
                Judgement(candidate=candidate, judge=self.digest, prompt=self.prompt, score=score, reason=reason)
            )
        return judgements

    def review_pairs(self, pairs: Iterable[PreferencePair]) -> list[ReviewedPair]:
        """What the readers say about each reviewed pair."""
        by_pair = {item.pair: item for item in self.items if item.task in self._verdicts}
        reviewed = []
        for pair in pairs:
            item = by_pair.get(pair.id)
            if item is None:
                continue
            chosen, rejected = ("a", "b") if item.answer_a == pair.chosen else ("b", "a")
            votes: Counter[str] = Counter(verdict.better for verdict in self._verdicts[item.task])
            reviewed.append(
                ReviewedPair(
                    pair=pair.id,
                    reason=item.reason,
                    chosen_score=_share_right(self._opinions[pair.chosen].values()),
                    rejected_score=_share_right(self._opinions[pair.rejected].values()),
                    for_chosen=votes[chosen],
                    for_rejected=votes[rejected],
                    for_neither=votes["equal"],
                )
            )
        return reviewed

    def compare(
        self, panel: Mapping[str, float], judges: Mapping[str, Mapping[str, float]], reviewed: Sequence[ReviewedPair]
    ) -> ReviewReport:
        """The report. panel: {candidate: score}; judges: {name: {candidate: raw score}}."""
        people = {judgement.candidate: judgement.score for judgement in self.build_judgements()}
        readers = [self._list_scores(opinions) for opinions in self._opinions.values()]
        return ReviewReport(
            judge=self.digest,
            readers=len(self.readers),
            tasks=len(self.items),
            reviewed=len(self._verdicts),
            readers_alpha=compute_krippendorff_alpha(readers),
            judges=tuple(_compare_judge(name, scores, people) for name, scores in {"panel": panel, **judges}.items()),
            orders=_count_orders(reviewed),
            vetoes=dict(Counter(pair.veto for pair in reviewed if pair.veto)),
        )

    def _list_scores(self, opinions: Mapping[str, bool | None]) -> list[float | None]:
        """The readers' scores of one candidate: 1 for right, 0 for wrong."""
        given = [opinions.get(reader) for reader in self.readers]
        return [None if right is None else float(right) for right in given]

    def fit_calibrations(
        self, judges: Mapping[str, Mapping[str, float]], method: CalibrationMethod
    ) -> list[Calibration]:
        """Fit one calibration for each judge, {digest: {candidate: raw score}}, on what most readers say.

        Candidates on which readers are split evenly are left out. Raises CalibrationRefused.
        """
        people = {judgement.candidate: judgement.score for judgement in self.build_judgements()}
        labels = {candidate: score > 0.5 for candidate, score in people.items() if score not in (None, 0.5)}
        right = list(labels.values())
        calibrations = []
        for digest, scores in judges.items():
            given = [scores.get(candidate) for candidate in labels]
            calibrations.append(fit_calibration(digest, given, right, method=method))
        return calibrations


def _share_right(opinions: Iterable[bool | None]) -> float | None:
    sure = [opinion for opinion in opinions if opinion is not None]
    return sum(sure) / len(sure) if sure else None


def _compare_judge(name: str, scores: Mapping[str, float], people: Mapping[str, float | None]) -> JudgeAgreement:
    both = [(scores[one], value) for one, value in people.items() if value is not None and one in scores]
    counts: Counter[str] = Counter()
    for score, value in both:
        if value == 0.5:
            counts["undecided"] += 1
        elif (score >= 0.5) == (value > 0.5):
            counts["both_right" if value > 0.5 else "both_wrong"] += 1
        else:
            counts["only_people_right" if value > 0.5 else "only_judge_right"] += 1
    return JudgeAgreement(name=name, alpha=compute_krippendorff_alpha(both), confusion=Confusion(**counts))


def _count_orders(reviewed: Sequence[ReviewedPair]) -> tuple[OrderAgreement, ...]:
    counts: dict[str, Counter[str]] = {}
    for pair in reviewed:
        difference = pair.for_chosen - pair.for_rejected
        outcome = "same" if difference > 0 else "opposite" if difference < 0 else "no_difference"
        counts.setdefault(pair.reason, Counter())[outcome] += 1
    return tuple(OrderAgreement(reason=reason, **counts[reason]) for reason in REVIEW_REASONS if reason in counts)
