"""From a panel's judgements to one score and one spread per candidate, and the report on how that went."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Annotated

from pydantic import Field

from clincot.errors import InvalidInput, UserError
from clincot.fields import FrozenModel, UnitFloat
from clincot.judging.agreement import IntervalAlpha, KrippendorffAlpha
from clincot.judging.calibration import Calibration
from clincot.records import Judgement, PanelScore

Count = Annotated[int, Field(ge=0)]


class QuorumLost(UserError, RuntimeError):
    """Too few judges gave a score: says which judges failed, and how."""


class BadJudgements(InvalidInput):
    """A judgements file that is not one judgement per candidate and judge, candidate by candidate."""


@dataclass(frozen=True)
class PanelMember:
    """A judge's place in the panel."""

    name: str
    weight: float  # > 0, relative
    calibration: Calibration  # names the judge's digest
    excluded: str = ""  # why none of its scores may count; empty: they count

    @property
    def digest(self) -> str:
        return self.calibration.judge


class JudgeReport(FrozenModel):
    """What one judge contributed."""

    name: str
    digest: str  # "" for an endpoint that never said which model it serves; it has no judgements then
    weight: Annotated[float, Field(gt=0)]
    calibration: str  # the calibration's id; "" without a digest
    scored: Count
    unscored: dict[str, int]  # reason -> candidates
    mean_raw: UnitFloat | None  # None: it scored nothing
    mean_calibrated: UnitFloat | None
    sd_raw: Annotated[float, Field(ge=0)] | None = None  # of its raw scores; 0: it says the same to everything
    left_out: str = ""


def report_unreachable_judge(name: str, *, weight: float, error: str, candidates: int) -> JudgeReport:
    """The report on a judge that could not even be asked who it is, about so many candidates."""
    return JudgeReport(
        name=name,
        digest="",
        weight=weight,
        calibration="",
        scored=0,
        unscored={error: candidates},
        mean_raw=None,
        mean_calibrated=None,
        left_out=error,
    )


class PanelReport(FrozenModel):
    """The panel's work on one candidate set. Alpha is Krippendorff's, over the judges that were used."""

    quorum: Annotated[int, Field(ge=1)]
    candidates: Count
    scored: Count
    unscored: dict[str, int]  # reason -> candidates without a panel score
    judges: tuple[JudgeReport, ...]
    alpha_raw: KrippendorffAlpha
    alpha_calibrated: KrippendorffAlpha
    mean_spread: Annotated[float, Field(ge=0)] | None
    scores: dict[str, int] = Field(default_factory=dict)  # panel scores: lower edge of a bin 0.1 wide -> candidates


@dataclass
class _JudgeTally:
    """What one judge has contributed so far."""

    scored: int = 0
    raw_sum: float = 0.0
    raw_squares: float = 0.0  # of distances from the first score, so that a constant has exactly 0
    raw_shift: float = 0.0
    raw_first: float | None = None
    calibrated_sum: float = 0.0
    unscored: Counter[str] = field(default_factory=Counter)

    def add(self, raw: float, calibrated: float) -> None:
        self.raw_first = raw if self.raw_first is None else self.raw_first
        self.scored += 1
        self.raw_sum += raw
        self.raw_shift += raw - self.raw_first
        self.raw_squares += (raw - self.raw_first) ** 2
        self.calibrated_sum += calibrated

    @property
    def sd_raw(self) -> float | None:
        if self.scored == 0:
            return None
        return math.sqrt(max(0.0, self.raw_squares / self.scored - (self.raw_shift / self.scored) ** 2))


def combine_scores(scores: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Weighted mean and spread (weighted population standard deviation) of calibrated scores [J].

    mean = sum w s / sum w,  spread = sqrt(sum w (s - mean)^2 / sum w). One judge alone has spread 0: that is
    absence of evidence, not agreement, and what a quorum above 1 is for.
    """
    if not scores:
        raise ValueError("no scores to combine")
    total = sum(weights)
    mean = sum(w * s for w, s in zip(weights, scores, strict=True)) / total
    variance = sum(w * (s - mean) ** 2 for w, s in zip(weights, scores, strict=True)) / total
    return min(1.0, max(0.0, mean)), math.sqrt(variance)  # rounding may carry a mean of ones past 1


class ScoreCombiner:
    """One pass over judgements. `report` is complete once `scores` is exhausted."""

    def __init__(self, seats: Sequence[PanelMember], *, quorum: int) -> None:
        self._members = {seat.digest: seat for seat in seats}
        if len(self._members) < len(seats):
            raise ValueError(f"two seats for one judge: {[(seat.name, seat.digest) for seat in seats]}")
        self._quorum = quorum
        self._tallies = {digest: _JudgeTally() for digest in self._members}
        self._candidates = 0
        self._unscored: Counter[str] = Counter()
        self._alpha_raw, self._alpha_calibrated = IntervalAlpha(), IntervalAlpha()
        self._spread_sum = 0.0
        self._histogram: Counter[str] = Counter()

    def score_candidates(self, judgements: Iterable[Judgement]) -> Iterator[PanelScore]:
        """One PanelScore per candidate, in the order of the judgements.

        Raises BadJudgements where a candidate lacks a judge, has a foreign or repeated one, or comes twice;
        QuorumLost at the end when not a single candidate could be scored.
        """
        seen: set[str] = set()
        for candidate, group in groupby(judgements, key=lambda given: given.candidate):
            if candidate in seen:
                raise BadJudgements(f"the judgements of {candidate} do not stand together")
            seen.add(candidate)
            yield self._score_candidate(candidate, list(group))
        if not seen:
            raise InvalidInput("no judgements to combine: the judgements file is empty")
        if self._unscored.total() == self._candidates:
            judges = "; ".join(f"{self._members[d].name}: {dict(t.unscored)}" for d, t in self._tallies.items())
            raise QuorumLost(f"none of {self._candidates} candidates reached the quorum of {self._quorum}: {judges}")

    def _score_candidate(self, candidate: str, given: Sequence[Judgement]) -> PanelScore:
        if sorted(one.judge for one in given) != sorted(self._members):
            raise BadJudgements(
                f"{candidate} has judgements of {sorted(one.judge for one in given)}, "
                f"expected one of each of {sorted(self._members)}"
            )
        raw, calibrated, weights = [], [], []
        for one in given:
            seat, tally = self._members[one.judge], self._tallies[one.judge]
            if seat.excluded or one.score is None:
                tally.unscored[seat.excluded or one.reason] += 1
                continue
            raw.append(one.score)
            calibrated.append(seat.calibration.calibrate_score(one.score))
            weights.append(seat.weight)
            tally.add(raw[-1], calibrated[-1])
        self._candidates += 1
        self._alpha_raw.add(raw)
        self._alpha_calibrated.add(calibrated)
        if len(raw) < self._quorum:
            reason = f"{len(raw)} of {len(given)} judges gave a score, the quorum is {self._quorum}"
            self._unscored[reason] += 1
            return PanelScore(candidate=candidate, score=None, spread=0.0, judges=len(raw), reason=reason)
        score, spread = combine_scores(calibrated, weights)
        self._spread_sum += spread
        self._histogram[f"{min(9, int(score * 10)) / 10:.1f}"] += 1
        return PanelScore(candidate=candidate, score=score, spread=spread, judges=len(raw))

    def build_report(self) -> PanelReport:
        scored = self._candidates - self._unscored.total()
        return PanelReport(
            quorum=self._quorum,
            candidates=self._candidates,
            scored=scored,
            unscored=dict(sorted(self._unscored.items())),
            judges=tuple(self._build_judge_report(seat) for seat in self._members.values()),
            alpha_raw=self._alpha_raw.compute_alpha(),
            alpha_calibrated=self._alpha_calibrated.compute_alpha(),
            mean_spread=self._spread_sum / scored if scored else None,
            scores=dict(sorted(self._histogram.items())),
        )

    def _build_judge_report(self, seat: PanelMember) -> JudgeReport:
        tally = self._tallies[seat.digest]
        return JudgeReport(
            name=seat.name,
            digest=seat.digest,
            weight=seat.weight,
            calibration=seat.calibration.id,
            scored=tally.scored,
            unscored=dict(sorted(tally.unscored.items())),
            mean_raw=tally.raw_sum / tally.scored if tally.scored else None,
            mean_calibrated=tally.calibrated_sum / tally.scored if tally.scored else None,
            sd_raw=tally.sd_raw,
            left_out=seat.excluded,
        )
