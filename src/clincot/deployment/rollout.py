"""The steps of a rollout on any target.

    planned → [awaiting approval → approved] → started → [waiting, …] → ready → smoke → shifted, watched, …
            → served → champion → finished
    from any step on: failed → rolled back

A target (deployment/targets/kserve.py, deployment/targets/local.py) starts revisions and moves traffic. An interrupted
rollout is resumed from its first step, so every operation of a target must be repeatable.

Before each step that gives the revision more traffic, the champion pointer is read again: if somebody has moved it
since the rollout was planned, the rollout ends and the traffic goes back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any, NamedTuple, Protocol

from clincot.config import DeployConfig
from clincot.deployment.journal import RolloutConflict, RolloutJournal
from clincot.deployment.smoke import (
    RequestFailed,
    RevisionClient,
    SmokeFailed,
    ask_golden_question,
    check_served_answers,
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


class RolloutInterrupted(UserError, RuntimeError):
    """The rollout stopped and could not be rolled back; the message says where the traffic is."""


class RequestCounts(NamedTuple):
    """How many questions were asked, and how many of them failed."""

    requests: int
    failed: int


class CountedRequests(NamedTuple):
    """The questions that each server of the revision has answered since it started."""

    servers: Mapping[str, RequestCounts]  # by the name of the pod or process
    missing: str = ""  # why they are not counted, or which servers' counts are missing


def parse_request_counts(metrics: str) -> RequestCounts | None:
    """Parse the numbers of questions from a server's Prometheus metrics.

    Probes, scrapes and other requests that ask nothing have the protocol "other" and do not count. Requests with a 5xx
    status count as failed. Returns None if clincot_requests_total is missing.
    """
    from prometheus_client.parser import text_string_to_metric_families

    samples = []
    for family in text_string_to_metric_families(metrics):
        samples += [sample for sample in family.samples if sample.name == "clincot_requests_total"]
    if not samples:
        return None
    samples = [sample for sample in samples if sample.labels.get("protocol") != "other"]
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

    @property
    def counts_smoke_requests(self) -> bool:
        """Whether read_request_counts counts the rollout's own questions, too."""
        ...

    def start_revision(self, rollout: str) -> str:
        """Start the new revision next to the old one, without traffic.

        rollout: the rollout's id. Returns a description for the journal.
        """
        ...

    def check_ready(self) -> bool:
        """Whether the new revision is ready, with as many replicas as its share needs.

        Raises NotReady if it never will be, or is no longer ready.
        """
        ...

    def explain_waiting(self) -> str:
        """Why the new revision is not ready yet; "" if nothing is known."""
        ...

    def read_request_counts(self) -> CountedRequests:
        """The questions that the new revision's servers have answered."""
        ...

    def scale_revision(self, percent: int) -> None:
        """Give the new revision the replicas for `percent` of the traffic; check_ready says when they are ready."""
        ...

    def shift_traffic(self, percent: int) -> None:
        """Send `percent` of the traffic to the new revision."""
        ...

    def describe_traffic(self) -> str:
        """A clause that says where users' requests go now."""
        ...

    def post_to_endpoint(self, path: str, payload: Mapping[str, Any], timeout_s: float) -> Any:
        """POST to the address that clients use and return the reply's JSON. Raises RequestFailed."""
        ...

    def finish_rollout(self) -> None:
        """Make the new revision the only one in use."""
        ...

    def remove_former_services(self) -> str:
        """Remove what the service's owner served under other names, after the rollout.

        Returns a clause for the journal; "" if there was nothing. Does not raise.
        """
        ...

    def roll_back(self, rollout: str) -> None:
        """Send all traffic to the old revision and stop the new one.

        rollout: the rollout's id; what it has created beside the revision is removed. Does nothing if none was started.
        """
        ...


class RolloutSteps(NamedTuple):
    """What a rollout does outside of its target."""

    check_pointer: Callable[[], None]  # raises ChampionMoved if the pointer was moved since the rollout was planned
    promote: Callable[[], str]  # moves the champion pointer after the last traffic step; returns a description
    wait: Callable[[float], None] = time.sleep  # sleeps for a number of seconds


def roll_out(
    journal: RolloutJournal,
    target: RolloutTarget,
    manifest: Manifest,
    images: Mapping[str, bytes],
    steps: RolloutSteps,
) -> None:
    """Drive the rollout to its end, recording each step in the journal.

    images: image file of each golden and served question, by its id.
    Raises RolledBack; RolloutConflict if another process continues the rollout (nothing is undone here); and
    RolloutInterrupted if neither going on nor rolling back was possible, for instance because the store or the cluster
    refuses access: the rollout then stays open, and the next `clincot deploy` resumes it. An interruption from outside
    (KeyboardInterrupt, SystemExit) gets a note that says where the traffic is.
    """
    try:
        _take_steps(journal, target, manifest, images, steps)
    except (RolledBack, RolloutConflict):
        raise
    except (UserError, OSError) as error:
        raise RolloutInterrupted(f"{error}; {_describe_open_rollout(target)}") from error
    except (KeyboardInterrupt, SystemExit) as error:
        error.add_note(f"interrupted; {_describe_open_rollout(target)}")
        raise


def _take_steps(
    journal: RolloutJournal,
    target: RolloutTarget,
    manifest: Manifest,
    images: Mapping[str, bytes],
    steps: RolloutSteps,
) -> None:
    started = any(event.kind == "started" for event in journal.events)
    settings = journal.plan.settings
    try:
        steps.check_pointer()
        journal.add_event(
            "resumed" if started else "started", f"{target.how}; {target.start_revision(journal.plan.id)}"
        )
        _wait_until_ready(journal, target, steps.wait)
        journal.add_event("ready")
        journal.add_event("smoke", run_smoke_test(target, manifest, images, settings))
        for percent in target.steps:
            steps.check_pointer()
            target.scale_revision(percent)
            _wait_until_ready(journal, target, steps.wait)
            target.shift_traffic(percent)
            journal.add_event("shifted", percent=percent)
            journal.add_event(
                "watched", _watch_traffic(target, manifest, images, settings, steps.wait), percent=percent
            )
        if manifest.served:
            journal.add_event("served", check_served_answers(target, manifest, images, settings), percent=100)
        journal.add_event("champion", steps.promote())
    except (NotReady, SmokeFailed, TooManyErrors, TargetFailed, ChampionMoved) as error:
        journal.add_event("failed", f"{type(error).__name__}: {error}")
        target.roll_back(journal.plan.id)
        traffic = target.describe_traffic()
        journal.add_event("rolled back", traffic, percent=0)
        raise RolledBack(f"{journal.plan.id} was rolled back: {error}; {traffic}") from error
    target.finish_rollout()
    journal.add_event("finished", target.remove_former_services(), percent=100)


def _describe_open_rollout(target: RolloutTarget) -> str:
    """Where the traffic is, and how an open rollout is ended."""
    try:
        traffic = target.describe_traffic()
    except (UserError, OSError) as error:
        traffic = f"where the traffic goes cannot be read ({error})"
    return (
        f"{traffic}; the rollout is open: `clincot deploy` goes on from its first step, and "
        "`clincot deploy --abandon REASON` sends the traffic back"
    )


def _wait_until_ready(journal: RolloutJournal, target: RolloutTarget, wait: Callable[[float], None]) -> None:
    """Wait for the revision, and record every new reason for which Kubernetes makes it wait."""
    settings = journal.plan.settings
    deadline = time.monotonic() + settings.ready_s
    told = ""
    while not target.check_ready():
        reason = target.explain_waiting()
        if reason and reason != told:
            told = reason
            journal.add_event("waiting", reason)
        if time.monotonic() >= deadline:
            cause = f"; {told}" if told else ""
            raise NotReady(f"the new revision was not ready within {settings.ready_s:g} s{cause}")
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
    asked = failed = server_errors = 0
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
            server_errors += error.status >= 500
        asked += 1
        failed += bool(problem)
        reason = problem or reason
        if asked >= len(manifest.golden):
            wait(min(settings.poll_s, max(0.0, until - time.monotonic())))
    if failed / asked > settings.max_error_rate:
        raise TooManyErrors(
            f"{failed} of {asked} golden questions failed ({settings.max_error_rate:.1%} allowed); the last failure: "
            f"{reason}"
        )
    own = RequestCounts(asked, server_errors) if target.counts_smoke_requests else RequestCounts(0, 0)
    served = _check_served_requests(before, target.read_request_counts(), own, settings)
    return f"{asked} golden questions, {failed} failed; {served}"


def _check_served_requests(
    before: CountedRequests, after: CountedRequests, own: RequestCounts, settings: DeployConfig
) -> str:
    """Summarize the users' requests between two counts, without the rollout's own.

    Raises TooManyErrors.
    """
    if not after.servers:
        return f"the users' requests are not counted here: {after.missing}"
    requests = failed = 0
    for name, counts in after.servers.items():
        earlier = before.servers.get(name, RequestCounts(0, 0))
        if counts.requests < earlier.requests:  # the server was restarted, and counts from 0 again
            earlier = RequestCounts(0, 0)
        requests += counts.requests - earlier.requests
        failed += counts.failed - earlier.failed
    requests, failed = max(0, requests - own.requests), max(0, failed - own.failed)
    if requests and failed / requests > settings.max_error_rate:
        allowed = f"{settings.max_error_rate:.1%} allowed"
        raise TooManyErrors(f"{failed} of {requests} users' requests failed while the revision was watched ({allowed})")
    servers = f"{len(after.servers)} server" + "s" * (len(after.servers) != 1)
    missing = f"; {after.missing}" if after.missing else ""
    return f"{requests} users' requests to {servers}, {failed} failed{missing}"
