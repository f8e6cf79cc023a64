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

from clincot.config import DeploySection
from clincot.deployment.journal import Journal
from clincot.deployment.smoke import RequestFailed, Server, SmokeFailed, ask, miss, smoke
from clincot.errors import ForTheUser
from clincot.registry.champion import ChampionMoved
from clincot.registry.manifest import Manifest


class NotReady(ForTheUser, RuntimeError):
    """The new revision did not become ready, or ceased to be; says what is known of why."""


class TooManyErrors(ForTheUser, RuntimeError):
    """The new revision failed more of its requests than allowed."""


class TargetFailed(ForTheUser, RuntimeError):
    """Where the revision should run refused or could not be reached."""


class RolledBack(ForTheUser, RuntimeError):
    """The rollout failed and the traffic is where it was; says why."""


class Counts(NamedTuple):
    """Requests that the new revision served so far, and how many of them it failed."""

    requests: int
    failed: int


def counts_of(metrics: str) -> Counts | None:
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
    return Counts(int(sum(sample.value for sample in samples)), int(failed))


class Target(Server, Protocol):
    """Where revisions run. Every method may raise TargetFailed, and may be called again after it was interrupted."""

    @property
    def how(self) -> str:
        """How traffic is moved here, and why so, in words."""
        ...

    @property
    def steps(self) -> tuple[int, ...]:
        """The shares of traffic that can be had here, in percent, the last one 100."""
        ...

    def start(self) -> str:
        """Start the new revision beside the old one, without traffic; says how, in words."""
        ...

    def check(self) -> bool:
        """Is the new revision ready? Raises NotReady where it will never be, or was and is no longer."""
        ...

    def counts(self) -> Counts | None:
        """None where nobody counts."""
        ...

    def shift(self, percent: int) -> None:
        """Send so much of the traffic to the new revision."""
        ...

    def finish(self) -> None:
        """The new revision is the only one in use from now on."""
        ...

    def undo(self) -> None:
        """All traffic to the old revision, the new one stopped. Nothing was started: nothing happens."""
        ...


def roll_out(
    journal: Journal,
    target: Target,
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
        journal.add("resumed" if begun else "started", f"{target.how}; {target.start()}")
        _wait_ready(target, journal.plan.settings, wait)
        journal.add("ready")
        journal.add("smoke", smoke(target, manifest, images, journal.plan.settings))
        for percent in target.steps:
            target.shift(percent)
            journal.add("shifted", percent=percent)
            journal.add("watched", _watch(target, manifest, images, journal.plan.settings, wait), percent=percent)
        journal.add("champion", crown())
    except (NotReady, SmokeFailed, TooManyErrors, TargetFailed, ChampionMoved) as error:
        journal.add("failed", f"{type(error).__name__}: {error}")
        target.undo()
        journal.add("rolled back", percent=0)
        raise RolledBack(f"{journal.plan.id} was rolled back: {error}") from error
    target.finish()
    journal.add("finished", percent=100)


def _wait_ready(target: Target, settings: DeploySection, wait: Callable[[float], None]) -> None:
    deadline = time.monotonic() + settings.ready_s
    while not target.check():
        if time.monotonic() >= deadline:
            raise NotReady(f"the new revision was not ready within {settings.ready_s:g} s")
        wait(settings.poll_s)


def _watch(
    target: Target,
    manifest: Manifest,
    images: Mapping[str, bytes],
    settings: DeploySection,
    wait: Callable[[float], None],
) -> str:
    """Look at the revision under its share of traffic, with golden questions among it; raises when it is no good."""
    before = target.counts()
    until = time.monotonic() + settings.step_s
    asked = failed = 0
    reason = ""
    for golden in cycle(manifest.golden):
        if asked >= len(manifest.golden) and time.monotonic() >= until:
            break
        if not target.check():
            raise NotReady("the new revision is no longer ready")
        try:
            found = miss(golden, ask(target, golden, images[golden.id], settings), settings)
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
    return f"{asked} golden questions, {failed} failed; {_served(target, before, settings)}"


def _served(target: Target, before: Counts | None, settings: DeploySection) -> str:
    """What the users' requests say, where they are counted."""
    after = target.counts()
    if before is None or after is None or after.requests < before.requests:  # a restarted server counts from 0
        return "the users' requests are not counted here"
    requests, failed = after.requests - before.requests, after.failed - before.failed
    if requests and failed / requests > settings.max_error_rate:
        raise TooManyErrors(
            f"{failed} of {requests} requests failed while it was watched ({settings.max_error_rate:.1%} allowed)"
        )
    return f"{requests} requests served, {failed} failed"
