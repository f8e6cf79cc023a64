"""One rollout, top to bottom, wherever it runs: start, wait, smoke requests, traffic in steps, or back.

    planned → [awaiting approval → approved] → started → ready → smoke → shifted, watched, … → champion → finished
                                                   └───────── failed → rolled back ─────────┘

A target (deployment/targets/kserve.py, deployment/targets/local.py) says how a revision is started and traffic is moved. A rollout that was
interrupted is resumed from its start: everything a target does may be done twice.
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
    """The new revision did not become ready, or ceased to be; says what is known of why."""


class TooManyErrors(UserError, RuntimeError):
    """The new revision failed more of its requests than allowed."""


class TargetFailed(UserError, RuntimeError):
    """Where the revision should run refused or could not be reached."""


class RolledBack(UserError, RuntimeError):
    """The rollout failed and the traffic is where it was; says why."""


class RequestCounts(NamedTuple):
    """Requests that the new revision served so far, and how many of them it failed."""

    requests: int
    failed: int


def parse_request_counts(metrics: str) -> RequestCounts | None:
    """From a server's Prometheus metrics (clincot_requests_total by status); None where it does not count."""
    from prometheus_client.parser import text_string_to_metric_families

    samples = [
        sample
        for family in text_string_to_metric_families(metrics)
        for sample in family.samples
        if sample.name == "clincot_requests_total"
    ]
    if not samples:
        return None
    failed = sum(sample.value for sample in samples if sample.labels.get("status", "").startswith("5"))
    return RequestCounts(int(sum(sample.value for sample in samples)), int(failed))


class RolloutTarget(RevisionClient, Protocol):
    """Where revisions run. Every method may raise TargetFailed, and may be called again after it was interrupted."""

    @property
    def how(self) -> str:
        """How traffic is moved here, and why so, in words."""
        ...

    @property
    def steps(self) -> tuple[int, ...]:
        """The shares of traffic that can be had here, in percent, the last one 100."""
        ...

    def start_revision(self) -> str:
        """Start the new revision beside the old one, without traffic; says how, in words."""
        ...

    def check_ready(self) -> bool:
        """Is the new revision ready? Raises NotReady where it will never be, or was and is no longer."""
        ...

    def read_request_counts(self) -> RequestCounts | None:
        """None where nobody counts."""
        ...

    def shift_traffic(self, percent: int) -> None:
        """Send so much of the traffic to the new revision."""
        ...

    def finish_rollout(self) -> None:
        """The new revision is the only one in use from now on."""
        ...

    def roll_back(self) -> None:
        """All traffic to the old revision, the new one stopped. Nothing was started: nothing happens."""
        ...


def roll_out(
    journal: RolloutJournal,
    target: RolloutTarget,
    manifest: Manifest,
    images: Mapping[str, bytes],
    *,
    crown: Callable[[], str],
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Drive the rollout to its end. `crown` moves the champion pointer, at the end, and says so in words.

    Raises RolledBack; RolloutTaken (another process goes on with it, and nothing is undone here); TargetFailed where
    the way back failed too: then the rollout is open, and the next `clincot deploy` resumes it.
    """
    begun = any(event.kind == "started" for event in journal.events)
    try:
        journal.add_event("resumed" if begun else "started", f"{target.how}; {target.start_revision()}")
        _wait_until_ready(target, journal.plan.settings, wait)
        journal.add_event("ready")
        journal.add_event("smoke", run_smoke_test(target, manifest, images, journal.plan.settings))
        for percent in target.steps:
            target.shift_traffic(percent)
            journal.add_event("shifted", percent=percent)
            journal.add_event(
                "watched", _watch_traffic(target, manifest, images, journal.plan.settings, wait), percent=percent
            )
        journal.add_event("champion", crown())
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
    """Look at the revision under its share of traffic, with golden questions among it; raises when it is no good."""
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
            found = describe_mismatch(
                golden, ask_golden_question(target, golden, images[golden.id], settings), settings
            )
        except RequestFailed as error:
            found = f"{golden.id}: {error}"
        asked += 1
        failed += bool(found)
        reason = found or reason
        if asked >= len(manifest.golden):
            wait(min(settings.poll_s, max(0.0, until - time.monotonic())))
    allowed = max(settings.max_error_rate, settings.smoke_misses / len(manifest.golden))
    if failed / asked > allowed:
        raise TooManyErrors(f"{failed} of {asked} golden questions failed ({allowed:.1%} allowed), last {reason}")
    return f"{asked} golden questions, {failed} failed; {_check_served_requests(target, before, settings)}"


def _check_served_requests(target: RolloutTarget, before: RequestCounts | None, settings: DeployConfig) -> str:
    """What the users' requests say, where they are counted."""
    after = target.read_request_counts()
    if before is None or after is None or after.requests < before.requests:  # a restarted server counts from 0
        return "the users' requests are not counted here"
    requests, failed = after.requests - before.requests, after.failed - before.failed
    if requests and failed / requests > settings.max_error_rate:
        raise TooManyErrors(
            f"{failed} of {requests} requests failed while it was watched ({settings.max_error_rate:.1%} allowed)"
        )
    return f"{requests} requests served, {failed} failed"
