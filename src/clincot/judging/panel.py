"""The panel: every judge scores every candidate, and the calibrated scores become one score and a spread.

Two passes, so that the expensive one (calling models) leaves a file on which the cheap one (combining) can be repeated,
for instance with another calibration:

    JudgePanel.collect_judgements   -> judgements.jsonl   one Judgement for each candidate and judge, in that order
    ScoreCombiner.score_candidates  -> scores.jsonl       one PanelScore for each candidate, in the same order

Endpoints are asked at the same time, each with several requests in flight, and the next batch is asked while the last
requests of a batch are retried; judges in this process take turns. A failed
request to an endpoint is retried on its own and costs, if it keeps failing, the score of its candidate. For a judge in
this process the whole call is retried. A judge is excluded if it fails as a whole: an endpoint that refuses
connections, the key or the model, one whose failed requests exceed judge.max_failures, one that returns no real
probabilities, a call that keeps failing. It is excluded *for all candidates*, including those it has already scored:
otherwise two candidates of one question could be scored by different panels, and their gap would partly be a gap
between judges. An endpoint that cannot report which model it serves is excluded as well; without a digest it has no
judgements, and the report says why. With fewer judges than the quorum the stage fails. A missing score is None with a
reason, and it is counted; it is never replaced by a number.

Replies are logged as they come (progress.py), so a rerun of an interrupted panel asks only what is missing.
"""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import TypeVar

from clincot.clients.http import HttpFailure
from clincot.config import JudgeConfig
from clincot.errors import InvalidInput, ModelFailed
from clincot.jsonl import read_records, write_records
from clincot.judging.asking import (
    EndpointTally,
    JudgeRequest,
    ask_local_judge,
    build_judge_conversation,
    build_retry_policy,
    describe_failure,
    get_judge_style,
    is_transient_failure,
    warn_of_retry,
)
from clincot.judging.calibration import Calibration, CalibrationMethod, make_identity_calibration
from clincot.judging.combination import PanelMember, PanelReport, QuorumLost, ScoreCombiner, report_unreachable_judge
from clincot.judging.progress import JudgementLog
from clincot.models.protocols import Judge, JudgeReply, RemoteJudge, is_remote
from clincot.processes import retry_call
from clincot.prompts import hash_judge_prompt
from clincot.records import Judgement
from clincot.waiting import end_waits_on_interrupt

_log = logging.getLogger(__name__)
T = TypeVar("T")

_BATCHES_AHEAD = 1  # batches that endpoints are asked about while an earlier one is not complete
_SMALL_MASS = 0.5  # mean P(yes) + P(no) below which a judge is warned about


@dataclass(frozen=True)
class ExcludedJudge:
    """A judge that failed after all retries, and at which candidate."""

    name: str
    at: int | None  # index of the candidate (0-based); None: it failed when asked for its digest
    error: str
    calls: int = 0  # attempts of the call that failed; 0: the requests were retried one by one

    def __str__(self) -> str:
        when = "when asked for its digest" if self.at is None else f"at candidate {self.at}"
        return f"{self.name} {when}{f' after {self.calls} calls' if self.calls else ''}: {self.error}"


@dataclass(frozen=True)
class _AskedBatch:
    """A batch that the endpoints are being asked about, with the replies of the judges in this process."""

    requests: list[JudgeRequest]
    at: int  # index of its first candidate
    futures: dict[str, Future[list[JudgeReply]]]
    replies: dict[str, Sequence[JudgeReply]]


class JudgePanel:
    """Judges that rate the same candidates.

    `judges` are those that reported their digest when the panel was built. `excluded`, by name, also holds those that
    did not, and is final once `collect_judgements` is exhausted.

    The settings come from `config`, a judge's own from config.judges by name. log: replies of an interrupted run.
    sleep and draw: for tests, see RequestRetries. Raises QuorumLost if too few judges report a digest, InvalidInput if
    names or digests are not distinct or there are fewer judges than the quorum.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        config: JudgeConfig,
        *,
        log: JudgementLog | None = None,
        sleep: Callable[[float], None] = time.sleep,
        draw: Callable[[], float] = random.random,
    ) -> None:
        names = [judge.name for judge in judges]
        if len(set(names)) < len(names):
            raise InvalidInput(f"every judge needs a name of its own, got {', '.join(names)}")
        if len(judges) < config.quorum:
            raise InvalidInput(f"the quorum is {config.quorum} judges, but the panel has {len(judges)}")
        self.quorum = config.quorum
        self.excluded: dict[str, ExcludedJudge] = {}
        self._config = config
        self._size = len(judges)
        self._log = log if log is not None else JudgementLog(None)  # an empty log is false
        self._sleep = sleep
        self._retry = build_retry_policy(config, sleep=sleep, draw=draw)
        self._styles = {judge.name: get_judge_style(config, judge.name) for judge in judges}
        self._tallies = {judge.name: EndpointTally() for judge in judges if is_remote(judge)}
        _wait_for_endpoints(judges)
        self.judges = tuple(judge for judge in judges if self._identify_judge(judge))
        if len({judge.digest for judge in self.judges}) < len(self.judges):
            known = ", ".join(f"{judge.name} ({judge.digest[:12]})" for judge in self.judges)
            raise InvalidInput(f"every judge needs a digest of its own, or it would count twice, got {known}")

    @property
    def mean_masses(self) -> dict[str, float]:
        """{name: mean P(yes) + P(no)} of the judges that report it."""
        return {name: tally.mass_sum / tally.masses for name, tally in self._tallies.items() if tally.masses}

    def collect_judgements(self, requests: Iterable[JudgeRequest], folder: Path) -> Iterator[Judgement]:
        """Yield one Judgement for each request and judge, batch by batch; images are below `folder`.

        Raises QuorumLost as soon as too few judges are left, and InvalidInput if there are no requests.
        """
        judged = 0
        asked: deque[_AskedBatch] = deque()
        ahead = _BATCHES_AHEAD if self._tallies else 0
        workers = max(1, len(self._tallies) * (ahead + 1))
        with ThreadPoolExecutor(max_workers=workers) as pool, end_waits_on_interrupt():
            for batch in self._iter_batches(requests):
                asked.append(self._ask_batch(pool, batch, folder, at=judged))
                judged += len(batch)
                if len(asked) > ahead:
                    yield from self._collect_batch(asked.popleft())
            while asked:
                yield from self._collect_batch(asked.popleft())
        if judged == 0:
            raise InvalidInput("no candidates to judge: the candidates file is empty")
        self._exclude_faulty(at=judged - 1, last=True)

    def _iter_batches(self, requests: Iterable[JudgeRequest]) -> Iterator[list[JudgeRequest]]:
        for _, block in groupby(requests, key=lambda request: request.unit):
            while batch := list(islice(block, self._config.batch_size)):
                yield batch

    def _identify_judge(self, judge: Judge) -> bool:
        return self._call_with_retries(judge, lambda: judge.digest, at=None) is not None

    def _ask_batch(self, pool: ThreadPoolExecutor, batch: list[JudgeRequest], folder: Path, *, at: int) -> _AskedBatch:
        """Send a batch to the endpoints, and ask the judges in this process about it."""
        asked = [judge for judge in self.judges if judge.name not in self.excluded]
        futures = {
            judge.name: pool.submit(self._ask_endpoint, judge, batch, folder) for judge in asked if is_remote(judge)
        }
        replies: dict[str, Sequence[JudgeReply]] = {}
        for judge in asked:
            if judge.name not in futures:
                local = self._ask_local(judge, batch, folder, at=at)
                if local is not None:
                    replies[judge.name] = local
        return _AskedBatch(batch, at, futures, replies)

    def _collect_batch(self, asked: _AskedBatch) -> Iterator[Judgement]:
        """Wait for the endpoints; yield the judgements of each candidate, without a score for an excluded judge."""
        batch, replies = asked.requests, dict(asked.replies)
        for name, future in asked.futures.items():
            if name in self.excluded:  # at an earlier batch
                continue
            try:
                replies[name] = future.result()
            except ModelFailed as error:
                self._exclude_judge(ExcludedJudge(name, at=asked.at, error=describe_failure(error)))
                continue
            for request, reply in zip(batch, replies[name], strict=True):
                self._tallies[name].add(request, reply)
        self._exclude_faulty(at=asked.at)
        columns = []
        for judge in self.judges:
            if judge.name in replies:
                column = replies[judge.name]
            else:
                reason = f"judge left out: {self.excluded[judge.name].error}"
                column = [JudgeReply(None, reason=reason)] * len(batch)
            columns.append(self._build_judgements(judge, batch, column))
        for row in zip(*columns, strict=True):
            yield from row

    def _build_judgements(
        self, judge: Judge, batch: Sequence[JudgeRequest], replies: Sequence[JudgeReply]
    ) -> list[Judgement]:
        prompt = hash_judge_prompt(judge.views, self._styles[judge.name])
        return [
            Judgement(
                candidate=request.candidate, judge=judge.digest, prompt=prompt, score=reply.score, reason=reply.reason
            )
            for request, reply in zip(batch, replies, strict=True)
        ]

    def _ask_endpoint(self, judge: RemoteJudge, batch: Sequence[JudgeRequest], folder: Path) -> list[JudgeReply]:
        """The endpoint's replies; only those that the log does not have are requested. Raises ModelFailed."""
        digest, style = judge.digest, self._styles[judge.name]
        replies = [self._log.get(request.candidate, digest) for request in batch]
        missing = [position for position, reply in enumerate(replies) if reply is None]

        def keep(number: int, reply: JudgeReply) -> None:
            replies[missing[number]] = reply
            self._log.add(batch[missing[number]].candidate, digest, reply)

        prompts = [build_judge_conversation(judge, style, batch[position], folder) for position in missing]
        judge.rate(prompts, retry=self._retry, on_reply=keep, on_retry=lambda e, d: warn_of_retry(judge, e, d))
        return [reply for reply in replies if reply is not None]

    def _ask_local(
        self, judge: Judge, batch: Sequence[JudgeRequest], folder: Path, *, at: int
    ) -> Sequence[JudgeReply] | None:
        """The replies of a judge in this process; None if every attempt failed, and the judge is excluded then.

        The log is used for a whole batch only, because the composition of a batch can change the last digit of a score.
        """
        logged = [self._log.get(request.candidate, judge.digest) for request in batch]
        complete = [reply for reply in logged if reply is not None]
        if len(complete) == len(batch):
            return complete
        style = self._styles[judge.name]
        replies = self._call_with_retries(judge, lambda: ask_local_judge(judge, style, batch, folder), at=at)
        for request, reply in zip(batch, replies or (), strict=False):
            self._log.add(request.candidate, judge.digest, reply)
        return replies

    def _exclude_faulty(self, *, at: int, last: bool = False) -> None:
        """Exclude endpoints whose replies so far show that they cannot be used."""
        for judge in self.judges:
            if judge.name in self.excluded or not is_remote(judge):
                continue
            fault = self._tallies[judge.name].find_fault(
                max_failures=self._config.max_failures, probabilities=judge.reads_probabilities, last=last
            )
            if fault:
                self._exclude_judge(ExcludedJudge(judge.name, at=at, error=fault))

    def _call_with_retries(self, judge: Judge, call: Callable[[], T], *, at: int | None) -> T | None:
        """The result of the call, or None if every attempt failed; the judge is then excluded."""
        calls = self._config.retries + 1
        try:
            return retry_call(
                call,
                is_transient=is_transient_failure,
                wait_s=lambda failures: self._config.retry_delay_s * 2 ** (failures - 1),
                attempts=calls,
                on_retry=lambda error, delay_s: warn_of_retry(judge, error, delay_s),
                sleep=self._sleep,
            )
        except ModelFailed as error:
            asked_once = isinstance(error, HttpFailure) and not error.transient
            self._exclude_judge(
                ExcludedJudge(judge.name, at=at, calls=0 if asked_once else calls, error=describe_failure(error))
            )
            return None

    def _exclude_judge(self, failed: ExcludedJudge) -> None:
        self.excluded[failed.name] = failed
        left = self._size - len(self.excluded)
        if left < self.quorum:
            errors = "; ".join(str(judge) for judge in self.excluded.values())
            raise QuorumLost(f"{left} of {self._size} judges left, the quorum is {self.quorum}: {errors}")
        _log.warning("judge excluded: %s; %d judges remain", failed, left)


def _wait_for_endpoints(judges: Sequence[Judge]) -> None:
    """Ask all endpoints at the same time for their digests, so that the waits for those that are away overlap.

    A failure is reported when the judge is identified, which does not wait for the same endpoint again.
    """
    remote = [judge for judge in judges if is_remote(judge)]

    def ask(judge: RemoteJudge) -> None:
        with contextlib.suppress(ModelFailed):
            _ = judge.digest

    with ThreadPoolExecutor(max_workers=max(1, len(remote))) as pool, end_waits_on_interrupt():
        list(pool.map(ask, remote))


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


def judge_candidates(  # noqa: PLR0913 (the config, three paths and what tests replace)
    judges: Sequence[Judge],
    requests: Iterable[JudgeRequest],
    config: JudgeConfig,
    *,
    folder: Path,
    judgements_path: Path,
    scores_path: Path,
    progress_key: str = "",
    sleep: Callable[[float], None] = time.sleep,
) -> PanelReport:
    """Run both passes and write their files; weights come from config.judges by name (1 for a judge not listed).

    progress_key: identifies config and inputs; a rerun with the same key goes on where an interrupted run stopped. "":
    no progress is kept. Raises QuorumLost (no scores are written then) and what JudgePanel, ScoreCombiner and
    read_calibrations raise.
    """
    progress = judgements_path.with_name(f".{judgements_path.name}.progress") if progress_key else None
    with JudgementLog(progress, progress_key) as log:
        panel = JudgePanel(judges, config, log=log, sleep=sleep)
        names = {judge.digest: judge.name for judge in panel.judges}
        if config.calibration_path:  # checked before any judge is called, so that a missing calibration fails at once
            read_calibrations(config.calibration_path, names, method=config.calibration)
        if len(log):
            _log.info("%s: %d replies of an interrupted run are used", progress, len(log))
        write_records(judgements_path, panel.collect_judgements(requests, folder))
        excluded = {judge.name: judge.error for judge in panel.excluded.values()}
        report = _write_panel_scores(config, names, excluded, judgements_path, scores_path)
        log.remove()
    return _add_masses(report, panel.mean_masses)


def _add_masses(report: PanelReport, masses: Mapping[str, float]) -> PanelReport:
    """The report with each judge's mean P(yes) + P(no), {name: mass}; a small one is logged."""
    for name, mass in masses.items():
        if mass < _SMALL_MASS:
            _log.warning(
                "judge %s: yes and no together have a probability of %.2g on average; it is about to write something "
                "else, such as a thinking block (see `thinking`)",
                name,
                mass,
            )
    judges = [judge.model_copy(update={"mean_mass": masses.get(judge.name)}) for judge in report.judges]
    return report.model_copy(update={"judges": tuple(judges)})


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
    merged = _write_panel_scores(config, members, excluded, judgements_path, scores_path)
    return _add_masses(merged, _average_masses(reports))


def _average_masses(reports: Sequence[PanelReport]) -> dict[str, float]:
    """{name: mean mass} over the shards, weighted by their candidates."""
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    for report in reports:
        for judge in report.judges:
            if judge.mean_mass is not None:
                sums[judge.name] = sums.get(judge.name, 0.0) + judge.mean_mass * report.candidates
                counts[judge.name] = counts.get(judge.name, 0) + report.candidates
    return {name: sums[name] / count for name, count in counts.items()}
