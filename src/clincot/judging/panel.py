"""The panel: every judge scores every candidate, then the calibrated scores become one score and a spread.

Two passes, so that the expensive one (asking models) leaves a file that the cheap one (combining) can be
repeated on, for instance with another calibration:

    Panel.judgements(asks)      -> judgements.jsonl   one Judgement per candidate and judge, in that order
    Combination.scores(…)       -> scores.jsonl       one PanelScore per candidate, in the candidates' order

A call that fails is retried. A judge that still fails is left out *of all candidates*, those it scored before
included: otherwise two candidates of one question could be scored by different panels and their gap would
partly be a gap between judges. So is an endpoint that cannot even be asked which model it serves: without a digest
it has no judgements at all, and the report says why. Fewer judges than the quorum: the stage fails. A missing score
is None with a reason, and counted; it is never a number.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from numbers import Real
from pathlib import Path
from typing import TypeVar

from clincot.config import JudgeConfig
from clincot.errors import InvalidInput, ModelFailed
from clincot.geometry import Box
from clincot.jsonl import read_records, write_records
from clincot.judging.calibration import Calibration, CalibrationMethod, make_identity_calibration
from clincot.judging.combination import PanelMember, PanelReport, QuorumLost, ScoreCombiner, report_unreachable_judge
from clincot.models.protocols import Judge
from clincot.processes import retry_call
from clincot.prompts import hash_prompt, judge_prompt
from clincot.records import Judgement, Study

_log = logging.getLogger(__name__)
T = TypeVar("T")

NO_PROBABILITY = "neither yes nor no has a probability to speak of"


@dataclass(frozen=True)
class JudgeRequest:
    """What a judge needs to know of a candidate: the image, the region's box, the question, the answer."""

    candidate: str  # the candidate's id
    study: Study
    question: str  # as the candidate's step asked it
    box: Box
    answer: str
    unit: int = 0  # of units.py: those of one unit are judged together


@dataclass(frozen=True)
class ExcludedJudge:
    """A judge that failed after all its retries, and from when on."""

    name: str
    at: int | None  # the candidate (0-based); None: it never said who it is
    calls: int
    error: str

    def __str__(self) -> str:
        when = "when asked who it is" if self.at is None else f"at candidate {self.at}"
        return f"{self.name} {when} after {self.calls} calls: {self.error}"


class JudgePanel:
    """Judges that answer the same questions. `judges` are those that said who they are (their digest) when the panel
    was made; `left_out`, by name, has the others too and is final once `judgements` is exhausted.

    quorum: judges that must be left; retries of a failed call, the first after retry_delay_s, doubling. Raises
    QuorumLost where too few judges say who they are, ValueError where the judges given cannot be a panel.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        *,
        quorum: int,
        retries: int,
        retry_delay_s: float,
        batch_size: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        names = [judge.name for judge in judges]
        if len(set(names)) < len(names):
            raise InvalidInput(f"every judge needs a name of its own, got {', '.join(names)}")
        if len(judges) < quorum:
            raise InvalidInput(f"the quorum is {quorum} judges, but the panel has {len(judges)}")
        self.quorum = quorum
        self.excluded: dict[str, ExcludedJudge] = {}
        self._size = len(judges)
        self._calls = retries + 1
        self._delay_s = retry_delay_s
        self._batch = batch_size
        self._sleep = sleep
        self.judges = tuple(judge for judge in judges if self._identify_judge(judge))
        if len({judge.digest for judge in self.judges}) < len(self.judges):
            known = ", ".join(f"{judge.name} ({judge.digest[:12]})" for judge in self.judges)
            raise InvalidInput(f"every judge needs a digest of its own, else it counts twice, got {known}")

    def collect_judgements(self, asks: Iterable[JudgeRequest], folder: Path) -> Iterator[Judgement]:
        """One Judgement per ask and judge, streaming; images are below `folder`.

        Raises QuorumLost as soon as too few judges are left, ValueError when there is nothing to judge.
        """
        done = 0
        for _, unit in groupby(asks, key=lambda ask: ask.unit):
            while batch := list(islice(unit, self._batch)):
                columns = [self._judge_batch(judge, batch, folder, at=done) for judge in self.judges]
                for row in zip(*columns, strict=True):
                    yield from row
                done += len(batch)
        if done == 0:
            raise InvalidInput("no candidates to judge: the candidates file is empty")

    def _identify_judge(self, judge: Judge) -> bool:
        return self._call_with_retries(judge, lambda: judge.digest, at=None) is not None

    def _judge_batch(self, judge: Judge, batch: Sequence[JudgeRequest], folder: Path, *, at: int) -> list[Judgement]:
        """One judge's judgements of a batch."""
        replies: list[float | str] | None = None
        if judge.name not in self.excluded:
            replies = self._call_with_retries(judge, lambda: _ask_judge(judge, batch, folder), at=at)
        if replies is None:
            replies = [f"judge left out: {self.excluded[judge.name].error}"] * len(batch)
        prompt = hash_prompt(judge.views)
        return [
            Judgement(candidate=ask.candidate, judge=judge.digest, prompt=prompt, score=None, reason=reply)
            if isinstance(reply, str)
            else Judgement(candidate=ask.candidate, judge=judge.digest, prompt=prompt, score=reply)
            for ask, reply in zip(batch, replies, strict=True)
        ]

    def _call_with_retries(self, judge: Judge, call: Callable[[], T], *, at: int | None) -> T | None:
        """What the call returns; None where it fails to the last, and then the judge is in left_out."""

        def warn(error: BaseException, delay_s: float) -> None:
            _log.warning("judge %s failed (%s); again in %g s", judge.name, _describe_failure(error), delay_s)

        try:
            return retry_call(
                call,
                is_transient=lambda error: isinstance(error, ModelFailed),
                wait_s=lambda failures: self._delay_s * 2 ** (failures - 1),
                attempts=self._calls,
                on_retry=warn,
                sleep=self._sleep,
            )
        except ModelFailed as error:
            self._exclude_judge(ExcludedJudge(judge.name, at=at, calls=self._calls, error=_describe_failure(error)))
            return None

    def _exclude_judge(self, failed: ExcludedJudge) -> None:
        self.excluded[failed.name] = failed
        left = self._size - len(self.excluded)
        if left < self.quorum:
            errors = "; ".join(str(out) for out in self.excluded.values())
            raise QuorumLost(f"{left} of {self._size} judges left, the quorum is {self.quorum}: {errors}")
        _log.warning("judge %s left out; %d judges go on", failed, left)


def _describe_failure(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _ask_judge(judge: Judge, batch: Sequence[JudgeRequest], folder: Path) -> list[float | str]:
    """Scores or reasons; raises ModelFailed."""
    replies = judge.p_yes(
        [judge_prompt(a.study, folder, judge.views, question=a.question, answer=a.answer, box=a.box) for a in batch]
    )
    if len(replies) != len(batch):
        raise ModelFailed(f"gave {len(replies)} scores for {len(batch)} candidates")
    return [_parse_score(reply) for reply in replies]


def _parse_score(reply: float | None) -> float | str:
    """A probability as it came, or why it is none: nothing is clipped into range."""
    if reply is None:
        return NO_PROBABILITY
    if isinstance(reply, bool) or not isinstance(reply, Real):
        return f"the judge gave a {type(reply).__name__} where a probability was expected"
    score = float(reply)
    if not math.isfinite(score):
        return "the judge gave a number that is not finite"
    if not 0.0 <= score <= 1.0:
        return "the judge gave a number outside [0, 1]"
    return score


def read_calibrations(path: Path, judges: Mapping[str, str], *, method: CalibrationMethod) -> dict[str, Calibration]:
    """{digest: calibration} of a calibration file (JSONL); every judge ({digest: name}) must be in it, once."""
    found: dict[str, Calibration] = {}
    for calibration in read_records(path, Calibration):
        if calibration.judge in found:
            raise InvalidInput(f"{path}: two calibrations of judge {calibration.judge}, expected one")
        if calibration.method != method:
            raise InvalidInput(
                f"{path}: the calibration of judge {calibration.judge} is {calibration.method}, "
                f"but judge.calibration asks for {method}"
            )
        found[calibration.judge] = calibration
    missing = [f"{name} ({digest})" for digest, name in judges.items() if digest not in found]
    if missing:
        raise InvalidInput(
            f"{path}: no calibration of {', '.join(missing)}; it has {sorted(found)}. Fit it for this panel, "
            "or leave judge.calibration_file empty to use raw probabilities"
        )
    return found


def judge_candidates(
    judges: Sequence[Judge],
    asks: Iterable[JudgeRequest],
    config: JudgeConfig,
    *,
    folder: Path,
    judgements_path: Path,
    scores_path: Path,
    sleep: Callable[[float], None] = time.sleep,
) -> PanelReport:
    """Both passes over files. Weights come from section.judges by name; a judge not named there weighs 1.

    Raises QuorumLost (no scores are written then), and what Panel, Combination and read_calibrations raise.
    """
    panel = JudgePanel(
        judges,
        quorum=config.quorum,
        retries=config.retries,
        retry_delay_s=config.retry_delay_s,
        batch_size=config.batch_size,
        sleep=sleep,
    )
    seated = {judge.digest: judge.name for judge in panel.judges}
    if config.calibration_path:  # before anything is asked: a judge without one is found at once
        read_calibrations(config.calibration_path, seated, method=config.calibration)
    write_records(judgements_path, panel.collect_judgements(asks, folder))
    left_out = {out.name: out.error for out in panel.excluded.values()}
    return _write_panel_scores(config, seated, left_out, judgements_path, scores_path)


def _write_panel_scores(
    config: JudgeConfig,
    seated: Mapping[str, str],
    left_out: Mapping[str, str],
    judgements_path: Path,
    scores_path: Path,
) -> PanelReport:
    """Write the scores. seated: {digest: name}; left_out: {name: why}, of judges without a digest too."""
    if config.calibration_path:
        calibrations = read_calibrations(config.calibration_path, seated, method=config.calibration)
    else:
        calibrations = {digest: make_identity_calibration(digest) for digest in seated}
    weights = {spec.name: spec.weight for spec in config.judges}
    seats = [
        PanelMember(
            name=name, weight=weights.get(name, 1.0), calibration=calibrations[digest], excluded=left_out.get(name, "")
        )
        for digest, name in seated.items()
    ]
    combination = ScoreCombiner(seats, quorum=config.quorum)
    write_records(scores_path, combination.score_candidates(read_records(judgements_path, Judgement)))
    report = combination.build_report()
    missing = tuple(
        report_unreachable_judge(name, weight=weights.get(name, 1.0), error=error, candidates=report.candidates)
        for name, error in left_out.items()
        if name not in seated.values()
    )
    return report.model_copy(update={"judges": (*report.judges, *missing)})


def combine_panel(
    config: JudgeConfig,
    reports: Sequence[PanelReport],
    judgements: Iterable[Judgement],
    judgements_path: Path,
    scores_path: Path,
) -> PanelReport:
    """The second pass over the judgements of a panel that sat once a shard, with a report of each.

    A judge that was left out of one shard is left out of all of them. Raises QuorumLost naming the shards.
    """
    left_out: dict[str, str] = {}
    named: dict[str, str] = {}  # {digest: name}, in the order in which they sit
    for number, report in enumerate(reports, start=1):
        for one in report.judges:
            where = f" (in shard {number} of {len(reports)})" if len(reports) > 1 else ""
            if one.left_out:
                left_out.setdefault(one.name, one.left_out + where)
            if one.digest:
                named.setdefault(one.digest, one.name)
    unknown = {one.name for report in reports for one in report.judges if not one.digest}  # never said who they are
    seated = {digest: name for digest, name in named.items() if name not in unknown}
    if len(set(seated.values())) < len(seated):
        raise InvalidInput(f"a judge was another model in one shard than in another: {seated}; judge all shards again")
    left = len({one.name for report in reports for one in report.judges} - set(left_out))
    if left < config.quorum:
        errors = "; ".join(f"{name}: {error}" for name, error in left_out.items())
        raise QuorumLost(f"{left} judges answered in all shards, the quorum is {config.quorum}: {errors}")
    write_records(judgements_path, (one for one in judgements if one.judge in seated))
    return _write_panel_scores(config, seated, left_out, judgements_path, scores_path)
