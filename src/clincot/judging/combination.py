"""Combine a panel's judgements into one score and one spread for each candidate, with a report."""

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
    """Too few judges gave a score; the message names the judges that failed and their errors."""


class BadJudgements(InvalidInput):
    """A judgements file without exactly one judgement for each candidate and judge, grouped by candidate."""


@dataclass(frozen=True)
class PanelMember:
    """A judge of the panel with its weight and calibration."""

    name: str
    weight: float  # > 0, relative to the other members
    calibration: Calibration  # holds the judge's digest
    excluded: str = ""  # why none of its scores may count; empty: they count

    @property
    def digest(self) -> str:
        """The judge's digest."""
        return self.calibration.judge


class JudgeReport(FrozenModel):
    """What one judge contributed."""

    name: str
    digest: str  # "" for an endpoint that never reported which model it serves; it has no judgements then
    weight: Annotated[float, Field(gt=0)]
    calibration: str  # the calibration's id; "" without a digest
    scored: Count
    unscored: dict[str, int]  # reason -> candidates
    mean_raw: UnitFloat | None  # None: it scored no candidate
    mean_calibrated: UnitFloat | None
    sd_raw: Annotated[float, Field(ge=0)] | None = None  # standard deviation of its raw scores; 0: all are equal
    left_out: str = ""  # why the judge was excluded; empty: it was not
    # Mean of P(yes) + P(no) over its replies; None, and not written: unknown. A small one means that the judge is about
    # to write something else, and its ratio of yes to no is mostly noise.
    mean_mass: UnitFloat | None = Field(default=None, exclude_if=lambda mass: mass is None)


def report_unreachable_judge(name: str, *, weight: float, error: str, candidates: int) -> JudgeReport:
    """The report on a judge that never reported its digest and so judged none of the `candidates`."""
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
    """How the panel scored one set of candidates. Alpha is Krippendorff's, over the judges that were not excluded."""

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
    """Running sums over one judge's scores."""

    scored: int = 0
    raw_sum: float = 0.0
    raw_squares: float = 0.0  # squared distances from the first score, so that equal scores give exactly 0
    raw_shift: float = 0.0  # distances from the first score
    raw_first: float | None = None
    calibrated_sum: float = 0.0
    unscored: Counter[str] = field(default_factory=Counter)

    def add(self, raw: float, calibrated: float) -> None:
        """Count one score."""
        self.raw_first = raw if self.raw_first is None else self.raw_first
        self.scored += 1
        self.raw_sum += raw
        self.raw_shift += raw - self.raw_first
        self.raw_squares += (raw - self.raw_first) ** 2
        self.calibrated_sum += calibrated

    @property
    def sd_raw(self) -> float | None:
        """Population standard deviation of the raw scores; None without a score."""
        if self.scored == 0:
            return None
        return math.sqrt(max(0.0, self.raw_squares / self.scored - (self.raw_shift / self.scored) ** 2))


def combine_scores(scores: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Weighted mean and spread (weighted population standard deviation) of one candidate's calibrated scores.

    mean = sum w s / sum w and spread = sqrt(sum w (s - mean)^2 / sum w), over the judges' scores s and weights w. A
    single judge has spread 0, which is absence of evidence and not agreement; a quorum above 1 prevents it.
    """
    if not scores:
        raise ValueError("no scores to combine")
    total = sum(weights)
    mean = sum(w * s for w, s in zip(weights, scores, strict=True)) / total
    variance = sum(w * (s - mean) ** 2 for w, s in zip(weights, scores, strict=True)) / total
    return min(1.0, max(0.0, mean)), math.sqrt(variance)  # rounding may carry a mean of ones past 1


class ScoreCombiner:
    """Combines judgements in one pass. `build_report` is complete once `score_candidates` is exhausted."""

    def __init__(self, members: Sequence[PanelMember], *, quorum: int) -> None:
        self._members = {member.digest: member for member in members}
        if len(self._members) < len(members):
            names = [(member.name, member.digest) for member in members]
            raise ValueError(f"expected panel members with different digests, got {names}")
        self._quorum = quorum
        self._tallies = {digest: _JudgeTally() for digest in self._members}
        self._candidates = 0
        self._unscored: Counter[str] = Counter()
        self._alpha_raw, self._alpha_calibrated = IntervalAlpha(), IntervalAlpha()
        self._spread_sum = 0.0
        self._histogram: Counter[str] = Counter()

    def score_candidates(self, judgements: Iterable[Judgement]) -> Iterator[PanelScore]:
        """Yield one PanelScore for each candidate, in the order of the judgements.

        Raises BadJudgements if a candidate lacks a judge, has an unknown or repeated one, or occurs twice, and
        QuorumLost at the end if not a single candidate could be scored.
        """
        seen: set[str] = set()
        for candidate, group in groupby(judgements, key=lambda judgement: judgement.candidate):
            if candidate in seen:
                raise BadJudgements(f"the judgements of {candidate} are not consecutive")
            seen.add(candidate)
            yield self._score_candidate(candidate, list(group))
        if not seen:
            raise InvalidInput("no judgements to combine: the judgements file is empty")
        if self._unscored.total() == self._candidates:
            judges = "; ".join(f"{self._members[d].name}: {dict(t.unscored)}" for d, t in self._tallies.items())
            raise QuorumLost(f"none of {self._candidates} candidates reached the quorum of {self._quorum}: {judges}")

    def _score_candidate(self, candidate: str, judgements: Sequence[Judgement]) -> PanelScore:
        judges = sorted(judgement.judge for judgement in judgements)
        if judges != sorted(self._members):
            raise BadJudgements(
                f"{candidate} has judgements of {judges}, expected one of each of {sorted(self._members)}"
            )
        raw, calibrated, weights = [], [], []
        for judgement in judgements:
            member, tally = self._members[judgement.judge], self._tallies[judgement.judge]
            if member.excluded or judgement.score is None:
                tally.unscored[member.excluded or judgement.reason] += 1
                continue
            raw.append(judgement.score)
            calibrated.append(member.calibration.calibrate_score(judgement.score))
            weights.append(member.weight)
            tally.add(raw[-1], calibrated[-1])
        self._candidates += 1
        self._alpha_raw.add(raw)
        self._alpha_calibrated.add(calibrated)
        if len(raw) < self._quorum:
            reason = f"{len(raw)} of {len(judgements)} judges gave a score, the quorum is {self._quorum}"
            self._unscored[reason] += 1
            return PanelScore(candidate=candidate, score=None, spread=0.0, judges=len(raw), reason=reason)
        score, spread = combine_scores(calibrated, weights)
        self._spread_sum += spread
        self._histogram[f"{min(9, int(score * 10)) / 10:.1f}"] += 1
        return PanelScore(candidate=candidate, score=score, spread=spread, judges=len(raw))

    def build_report(self) -> PanelReport:
        """The report on all candidates scored so far."""
        scored = self._candidates - self._unscored.total()
        return PanelReport(
            quorum=self._quorum,
            candidates=self._candidates,
            scored=scored,
            unscored=dict(sorted(self._unscored.items())),
            judges=tuple(self._build_judge_report(member) for member in self._members.values()),
            alpha_raw=self._alpha_raw.compute_alpha(),
            alpha_calibrated=self._alpha_calibrated.compute_alpha(),
            mean_spread=self._spread_sum / scored if scored else None,
            scores=dict(sorted(self._histogram.items())),
        )

    def _build_judge_report(self, member: PanelMember) -> JudgeReport:
        tally = self._tallies[member.digest]
        return JudgeReport(
            name=member.name,
            digest=member.digest,
            weight=member.weight,
            calibration=member.calibration.id,
            scored=tally.scored,
            unscored=dict(sorted(tally.unscored.items())),
            mean_raw=tally.raw_sum / tally.scored if tally.scored else None,
            mean_calibrated=tally.calibrated_sum / tally.scored if tally.scored else None,
            sd_raw=tally.sd_raw,
            left_out=member.excluded,
        )
