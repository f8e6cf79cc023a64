"""The panel: every judge scores every candidate, and the calibrated scores become one score and a spread.

Two passes, so that the expensive one (calling models) leaves a file on which the cheap one (combining) can be repeated,
for instance with another calibration:

    JudgePanel.collect_judgements   -> judgements.jsonl   one Judgement for each candidate and judge, in that order
    ScoreCombiner.score_candidates  -> scores.jsonl       one PanelScore for each candidate, in the same order

A failed call is retried. A judge that keeps failing is excluded *for all candidates*, including those it has already
scored: otherwise two candidates of one question could be scored by different panels, and their gap would partly be a
gap between judges. An endpoint that cannot report which model it serves is excluded as well; without a digest it has no
judgements, and the report says why. With fewer judges than the quorum the stage fails. A missing score is None with a
reason, and it is counted; it is never replaced by a number.
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
    """What a judge needs to rate a candidate: the image, the region's box, the question, the answer."""

    candidate: str  # the candidate's id
    study: Study
    question: str  # as the candidate's chain step asked it
    box: Box
    answer: str
    unit: int = 0  # block number (batching.py); a batch never spans two blocks


@dataclass(frozen=True)
class ExcludedJudge:
    """A judge that failed after all retries, and at which candidate."""

    name: str
    at: int | None  # index of the candidate (0-based); None: it failed when asked for its digest
    calls: int
    error: str

    def __str__(self) -> str:
        when = "when asked for its digest" if self.at is None else f"at candidate {self.at}"
        return f"{self.name} {when} after {self.calls} calls: {self.error}"


class JudgePanel:
    """Judges that rate the same candidates.

    `judges` are those that reported their digest when the panel was built. `excluded`, by name, also holds those that
    did not, and is final once `collect_judgements` is exhausted.

    quorum: least number of judges that must remain. retries: repetitions of a failed call; the first one after
    retry_delay_s, then doubling. Raises QuorumLost if too few judges report a digest, and InvalidInput if names or
    digests are not distinct or there are fewer judges than the quorum.
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
            raise InvalidInput(f"every judge needs a digest of its own, or it would count twice, got {known}")

    def collect_judgements(self, requests: Iterable[JudgeRequest], folder: Path) -> Iterator[Judgement]:
        """Yield one Judgement for each request and judge, batch by batch; images are below `folder`.

        Raises QuorumLost as soon as too few judges are left, and InvalidInput if there are no requests.
        """
        judged = 0
        for _, block in groupby(requests, key=lambda request: request.unit):
            while batch := list(islice(block, self._batch)):
                columns = [self._judge_batch(judge, batch, folder, at=judged) for judge in self.judges]
                for row in zip(*columns, strict=True):
                    yield from row
                judged += len(batch)
        if judged == 0:
            raise InvalidInput("no candidates to judge: the candidates file is empty")

    def _identify_judge(self, judge: Judge) -> bool:
        return self._call_with_retries(judge, lambda: judge.digest, at=None) is not None

    def _judge_batch(self, judge: Judge, batch: Sequence[JudgeRequest], folder: Path, *, at: int) -> list[Judgement]:
        """One judge's judgements of a batch; of an excluded judge, judgements without a score."""
        replies: list[float | str] | None = None
        if judge.name not in self.excluded:
            replies = self._call_with_retries(judge, lambda: _ask_judge(judge, batch, folder), at=at)
        if replies is None:
            replies = [f"judge left out: {self.excluded[judge.name].error}"] * len(batch)
        prompt = hash_prompt(judge.views)
        judgements = []
        for request, reply in zip(batch, replies, strict=True):
            score, reason = (None, reply) if isinstance(reply, str) else (reply, "")
            judgements.append(
                Judgement(candidate=request.candidate, judge=judge.digest, prompt=prompt, score=score, reason=reason)
            )
        return judgements

    def _call_with_retries(self, judge: Judge, call: Callable[[], T], *, at: int | None) -> T | None:
        """The result of the call, or None if every attempt failed; the judge is then excluded."""

        def warn(error: BaseException, delay_s: float) -> None:
            _log.warning("judge %s failed (%s); retrying in %g s", judge.name, _describe_failure(error), delay_s)

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
            errors = "; ".join(str(judge) for judge in self.excluded.values())
            raise QuorumLost(f"{left} of {self._size} judges left, the quorum is {self.quorum}: {errors}")
        _log.warning("judge excluded: %s; %d judges remain", failed, left)


def _describe_failure(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _ask_judge(judge: Judge, batch: Sequence[JudgeRequest], folder: Path) -> list[float | str]:
    """The score of each candidate, or the reason why it has none; raises ModelFailed if the whole call failed."""
    replies = judge.p_yes(
        [
            judge_prompt(
                request.study,
                folder,
                judge.views,
                question=request.question,
                answer=request.answer,
                box=request.box,
            )
            for request in batch
        ]
    )
    if len(replies) != len(batch):
        raise ModelFailed(f"gave {len(replies)} scores for {len(batch)} candidates")
    return [_parse_score(reply) for reply in replies]


def _parse_score(reply: float | None) -> float | str:
    """The probability unchanged, or the reason why the reply is not one; nothing is clipped into range."""
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
    """Read {digest: calibration} from a JSONL file; every judge of `judges` ({digest: name}) must be in it once.

    Raises InvalidInput for a missing or repeated judge and for a calibration fitted with another method.
    """
    calibrations: dict[str, Calibration] = {}
    for calibration in read_records(path, Calibration):
        if calibration.judge in calibrations:
            raise InvalidInput(f"{path}: two calibrations of judge {calibration.judge}, expected one")
        if calibration.method != method:
            raise InvalidInput(
                f"{path}: the calibration of judge {calibration.judge} is {calibration.method}, "
                f"but judge.calibration asks for {method}"
            )
        calibrations[calibration.judge] = calibration
    missing = [f"{name} ({digest})" for digest, name in judges.items() if digest not in calibrations]
    if missing:
        raise InvalidInput(
            f"{path}: no calibration of {', '.join(missing)}; it has {sorted(calibrations)}. Fit it for this panel, "
            "or leave judge.calibration_file empty to use raw probabilities"
        )
    return calibrations


def judge_candidates(
    judges: Sequence[Judge],
    requests: Iterable[JudgeRequest],
    config: JudgeConfig,
    *,
    folder: Path,
    judgements_path: Path,
    scores_path: Path,
    sleep: Callable[[float], None] = time.sleep,
) -> PanelReport:
    """Run both passes and write their files; weights come from config.judges by name (1 for a judge not listed).

    Raises QuorumLost (no scores are written then) and what JudgePanel, ScoreCombiner and read_calibrations raise.
    """
    panel = JudgePanel(
        judges,
        quorum=config.quorum,
        retries=config.retries,
        retry_delay_s=config.retry_delay_s,
        batch_size=config.batch_size,
        sleep=sleep,
    )
    names = {judge.digest: judge.name for judge in panel.judges}
    if config.calibration_path:  # checked before any judge is called, so that a missing calibration fails at once
        read_calibrations(config.calibration_path, names, method=config.calibration)
    write_records(judgements_path, panel.collect_judgements(requests, folder))
    excluded = {judge.name: judge.error for judge in panel.excluded.values()}
    return _write_panel_scores(config, names, excluded, judgements_path, scores_path)


def _write_panel_scores(
    config: JudgeConfig,
    names: Mapping[str, str],
    excluded: Mapping[str, str],
    judgements_path: Path,
    scores_path: Path,
) -> PanelReport:
    """Write the scores. names: {digest: name}; excluded: {name: reason}, including judges without a digest."""
    if config.calibration_path:
        calibrations = read_calibrations(config.calibration_path, names, method=config.calibration)
    else:
        calibrations = {digest: make_identity_calibration(digest) for digest in names}
    weights = {spec.name: spec.weight for spec in config.judges}
    members = [
        PanelMember(
            name=name, weight=weights.get(name, 1.0), calibration=calibrations[digest], excluded=excluded.get(name, "")
        )
        for digest, name in names.items()
    ]
    combiner = ScoreCombiner(members, quorum=config.quorum)
    write_records(scores_path, combiner.score_candidates(read_records(judgements_path, Judgement)))
    report = combiner.build_report()
    unreachable = tuple(
        report_unreachable_judge(name, weight=weights.get(name, 1.0), error=error, candidates=report.candidates)
        for name, error in excluded.items()
        if name not in names.values()
    )
    return report.model_copy(update={"judges": (*report.judges, *unreachable)})


def combine_panel(
    config: JudgeConfig,
    reports: Sequence[PanelReport],
    judgements: Iterable[Judgement],
    judgements_path: Path,
    scores_path: Path,
) -> PanelReport:
    """Run the second pass over the judgements of all shards, given the panel report of each shard.

    A judge that was excluded in one shard is excluded in all of them. Raises QuorumLost naming the shards, and
    InvalidInput if a name belongs to different models in different shards.
    """
    excluded: dict[str, str] = {}
    names_by_digest: dict[str, str] = {}  # in the order of the panel
    judges: set[str] = set()
    without_digest: set[str] = set()  # names of judges that did not report a digest in some shard
    for number, report in enumerate(reports, start=1):
        where = f" (in shard {number} of {len(reports)})" if len(reports) > 1 else ""
        for judge in report.judges:
            judges.add(judge.name)
            if judge.left_out:
                excluded.setdefault(judge.name, judge.left_out + where)
            if judge.digest:
                names_by_digest.setdefault(judge.digest, judge.name)
            else:
                without_digest.add(judge.name)
    members = {digest: name for digest, name in names_by_digest.items() if name not in without_digest}
    if len(set(members.values())) < len(members):
        raise InvalidInput(f"a judge was a different model in different shards: {members}; judge all shards again")
    left = len(judges - set(excluded))
    if left < config.quorum:
        errors = "; ".join(f"{name}: {error}" for name, error in excluded.items())
        raise QuorumLost(f"{left} judges answered in all shards, the quorum is {config.quorum}: {errors}")
    write_records(judgements_path, (judgement for judgement in judgements if judgement.judge in members))
    return _write_panel_scores(config, members, excluded, judgements_path, scores_path)
