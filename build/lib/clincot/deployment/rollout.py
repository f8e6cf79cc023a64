"""The steps of a rollout on any target.

    planned → [awaiting approval → approved] → started → ready → smoke → shifted, watched, … → champion → finished
                                                   └───────── failed → rolled back ─────────┘

A target (deployment/targets/kserve.py, deployment/targets/local.py) starts revisions and moves traffic. An interrupted
rollout is resumed from its first step, so every operation of a target must be repeatable.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import NamedTuple, Protocol

from clincot.config import DeployConfig
from clincot.deployment.journal import RolloutJournal
from clincot.deployment.smoke import (
    RequestFailed,
    RevisionClient,
    SmokeFailed,
    ask_golden_question,
    describe_mismatch,
    run_smoke_test,
)
from clincot.errors import UserError
from clincot.registry.champion import ChampionMoved
from clincot.registry.manifest import Manifest


class NotReady(UserError, RuntimeError):
    """The new revision did not become ready, or is no longer ready."""


class TooManyErrors(UserError, RuntimeError):
    """The new revision failed more requests than allowed."""


class TargetFailed(UserError, RuntimeError):
    """The target refused an operation or could not be reached."""


class RolledBack(UserError, RuntimeError):
    """The rollout failed, and all traffic is back on the old revision."""


class RequestCounts(NamedTuple):
    """How many requests the new revision has served, and how many of them failed."""

    requests: int
    failed: int


def parse_request_counts(metrics: str) -> RequestCounts | None:
    """Parse the request counts from a server's Prometheus metrics.

    Returns None if clincot_requests_total is missing. Requests with a 5xx status count as failed.
    """
    from prometheus_client.parser import text_string_to_metric_families

    samples = []
    for family in text_string_to_metric_families(metrics):
        samples += [sample for sample in family.samples if sample.name == "clincot_requests_total"]
    if not samples:
        return None
    failed = sum(sample.value for sample in samples if sample.labels.get("status", "").startswith("5"))
    return RequestCounts(int(sum(sample.value for sample in samples)), int(failed))


class RolloutTarget(RevisionClient, Protocol):
    """The place where revisions run.

    Every method may raise TargetFailed, and must be safe to call again after an interruption.
    """

    @property
    def how(self) -> str:
        """A sentence for the journal: how traffic is moved, and why this way."""
        ...

    @property
    def steps(self) -> tuple[int, ...]:
        """The traffic shares of the new revision, in percent; the last one is 100."""
        ...

    def start_revision(self) -> str:
        """Start the new revision next to the old one, without traffic.

        Returns a description for the journal.
        """
        ...

    def check_ready(self) -> bool:
        """Whether the new revision is ready.

        Raises NotReady if it never will be, or is no longer ready.
        """
        ...

    def read_request_counts(self) -> RequestCounts | None:
        """The new revision's counters; None if requests are not counted."""
        ...

    def shift_traffic(self, percent: int) -> None:
        """Send `percent` of the traffic to the new revision."""
        ...

    def finish_rollout(self) -> None:
        """Make the new revision the only one in use."""
        ...

    def roll_back(self) -> None:
        """Send all traffic to the old revision and stop the new one.

        Does nothing if none was started.
        """
        ...


def roll_out(
    journal: RolloutJournal,
    target: RolloutTarget,
    manifest: Manifest,
    images: Mapping[str, bytes],
    *,
    promote: Callable[[], str],
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Drive the rollout to its end, recording each step in the journal.

    images: image file of each golden question, by its id. promote: moves the champion pointer after the last traffic
    step and returns a description. wait: sleeps for a number of seconds.
    Raises RolledBack; RolloutConflict if another process continues the rollout (nothing is undone here); TargetFailed
    if rolling back failed, too: the rollout then stays open, and the next `clincot deploy` resumes it.
    """
    started = any(event.kind == "started" for event in journal.events)
    try:
        journal.add_event("resumed" if started else "started", f"{target.how}; {target.start_revision()}")
        _wait_until_ready(target, journal.plan.settings, wait)
        journal.add_event("ready")
        journal.add_event("smoke", run_smoke_test(target, manifest, images, journal.plan.settings))
        for percent in target.steps:
            target.shift_traffic(percent)
            journal.add_event("shifted", percent=percent)
            journal.add_event(
                "watched", _watch_traffic(target, manifest, images, journal.plan.settings, wait), percent=percent
            )
        journal.add_event("champion", promote())
    except (NotReady, SmokeFailed, TooManyErrors, TargetFailed, ChampionMoved) as error:
        journal.add_event("failed", f"{type(error).__name__}: {error}")
        target.roll_back()
        journal.add_event("rolled back", percent=0)
        raise RolledBack(f"{journal.plan.id} was rolled back: {error}") from error
    target.finish_rollout()
    journal.add_event("finished", percent=100)


def _wait_until_ready(target: RolloutTarget, settings: DeployConfig, wait: Callable[[float], None]) -> None:
    deadline = time.monotonic() + settings.ready_s
    while not target.check_ready():
        if time.monotonic() >= deadline:
            raise NotReady(f"the new revision was not ready within {settings.ready_s:g} s")
        wait(settings.poll_s)


def _watch_traffic(
    target: RolloutTarget,
    manifest: Manifest,
    images: Mapping[str, bytes],
    settings: DeployConfig,
    wait: Callable[[float], None],
) -> str:
    """Watch the revision under its traffic share for step_s seconds.

    Returns a summary for the journal. Golden questions are asked repeatedly, each at least once. Raises NotReady if the
    revision stops being ready, and TooManyErrors if it fails too many golden questions or users' requests.
    """
    before = target.read_request_counts()
    until = time.monotonic() + settings.step_s
    asked = failed = 0
    reason = ""
    for golden in cycle(manifest.golden):
        if asked >= len(manifest.golden) and time.monotonic() >= until:
            break
        if not target.check_ready():
            raise NotReady("the new revision is no longer ready")
        try:
            reply = ask_golden_question(target, golden, images[golden.id], settings)
            problem = describe_mismatch(golden, reply, settings)
        except RequestFailed as error:
            problem = f"{golden.id}: {error}"
        asked += 1
        failed += bool(problem)
        reason = problem or reason
        if asked >= len(manifest.golden):
            wait(min(settings.poll_s, max(0.0, until - time.monotonic())))
    allowed = max(settings.max_error_rate, settings.smoke_misses / len(manifest.golden))
    if failed / asked > allowed:
        raise TooManyErrors(
            f"{failed} of {asked} golden questions failed ({allowed:.1%} allowed); the last failure: {reason}"
        )
    return f"{asked} golden questions, {failed} failed; {_check_served_requests(target, before, settings)}"


def _check_served_requests(target: RolloutTarget, before: RequestCounts | None, settings: DeployConfig) -> str:
    """Summarize the users' requests since `before`, if they are counted.

    Raises TooManyErrors.
    """
    after = target.read_request_counts()
    if before is None or after is None or after.requests < before.requests:  # a restarted server starts at 0
        return "the users' requests are not counted here"
    requests, failed = after.requests - before.requests, after.failed - before.failed
    if requests and failed / requests > settings.max_error_rate:
        allowed = f"{settings.max_error_rate:.1%} allowed"
        raise TooManyErrors(f"{failed} of {requests} requests failed while the revision was watched ({allowed})")
    return f"{requests} requests served, {failed} failed"
