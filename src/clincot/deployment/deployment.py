"""Which rollout is begun, resumed, approved or given up. What happens in it is rollout.py's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import ClassVar, Literal

from clincot.config import DeployConfig
from clincot.deployment.journal import RolloutJournal, RolloutPlan, iter_journals, read_last_journal
from clincot.deployment.rollout import RolloutTarget, roll_out
from clincot.deployment.service_settings import ServiceSettings
from clincot.deployment.smoke import read_golden_images
from clincot.errors import InvalidInput
from clincot.fields import NonEmptyStr
from clincot.records import Record
from clincot.registry import champion
from clincot.registry.manifest import Manifest, list_model_names, read_manifest
from clincot.storage.store import KeyExists, Store


class Approval(Record):
    """Who let a rollout go ahead, and why."""

    prefix: ClassVar[str] = "approval"
    provenance: ClassVar[frozenset[str]] = frozenset({"at"})

    rollout: NonEmptyStr
    decision: str
    by: NonEmptyStr
    reason: NonEmptyStr
    at: str = ""  # UTC


class DeploymentRefused(InvalidInput):
    """The checkpoint is not the champion, and no decision says that it should be."""


def start_rollout(
    store: Store,
    manifest: Manifest,
    settings: DeployConfig,
    *,
    target: Literal["kserve", "local"],
    service: ServiceSettings | None,
    by: str,
) -> RolloutJournal:
    """A new rollout of the line, or this checkpoint's open one. Raises NotToBeDeployed, RolloutTaken, ValueError."""
    before = read_last_journal(store, manifest.line, by=by)
    if before is not None and not before.ended:
        plan = before.plan
        if (plan.sha256, plan.target, plan.service) == (manifest.sha256, target, service):
            return before
        raise InvalidInput(
            f"{plan.line}: rollout {plan.number} of {plan.sha256[:12]} to {plan.target} is open "
            f"({before.last.kind} since {before.last.at}); run it to its end, or give it up with --abandon"
        )
    read_golden_images(store, manifest)  # without them nothing could be checked
    now = champion.read_champion(store, manifest.line).now
    decision = _check_decision(store, manifest, now.sha256)
    plan = RolloutPlan(
        line=manifest.line,
        number=1 if before is None else before.plan.number + 1,
        sha256=manifest.sha256,
        previous="" if now.sha256 == manifest.sha256 else now.sha256,
        decision=decision,
        target=target,
        settings=settings,
        service=service,
    )
    return RolloutJournal.create(store, plan, by=by)


def _check_decision(store: Store, manifest: Manifest, now: str) -> str:
    """The id of the decision by which the checkpoint follows the champion; "" for the champion itself."""
    if manifest.kind == "adapter":
        raise DeploymentRefused(f"{manifest.line} {manifest.sha256[:12]} is an adapter; publish it merged to deploy it")
    decision = manifest.decision
    if now == manifest.sha256:
        return "" if decision is None else decision.id
    if decision is None or decision.verdict != "promote":
        said = "has no decision" if decision is None else f"was decided {decision.verdict!r}: {decision.reasons[0]}"
        raise DeploymentRefused(
            f"{manifest.line} {manifest.sha256[:12]} {said}; only a promoted checkpoint is rolled out"
        )
    against = read_manifest(store, manifest.line, now).measured
    if decision.champion != against:
        raise DeploymentRefused(
            f"{decision.id} was decided against {decision.champion[:12]}, but the champion is {against[:12]} by now; "
            "decide again"
        )
    return decision.id


def resume_rollout(
    store: Store, journal: RolloutJournal, target: RolloutTarget, *, wait: Callable[[float], None] = time.sleep
) -> Literal["awaiting approval", "finished"]:
    """Run the rollout to its end, or up to where a person has to say yes. Raises what roll_out raises."""
    if journal.plan.settings.approval and not any(event.kind == "approved" for event in journal.events):
        if not journal.awaits_approval:
            journal.add_event("awaiting approval", f"clincot approve {journal.plan.decision or journal.plan.id}")
        return "awaiting approval"
    plan = journal.plan
    manifest = read_manifest(store, plan.line, plan.sha256)

    def crown() -> str:
        now = champion.read_champion(store, plan.line).now
        if now.sha256 == plan.sha256:
            return f"{plan.sha256[:12]} is champion already"
        champion.promote_champion(
            store, manifest, over=plan.previous, by=journal.by, decision=plan.decision, reason=f"rolled out: {plan.id}"
        )
        return f"{plan.sha256[:12]} in the place of {plan.previous[:12]}"

    roll_out(journal, target, manifest, read_golden_images(store, manifest), crown=crown, wait=wait)
    return "finished"


def approve_rollout(store: Store, given: str, *, by: str, reason: str) -> RolloutJournal:
    """Approve the rollout that waits for this decision (or rollout); given: an id, or the beginning of one."""
    if not by.strip() or not reason.strip():
        raise InvalidInput("an approval carries a name and a reason (--by, --reason)")
    waiting = [journal for journal in _iter_open_rollouts(store, by) if journal.awaits_approval]
    found = [
        j for j in waiting if (j.plan.decision and j.plan.decision.startswith(given)) or j.plan.id.startswith(given)
    ]
    if len(found) != 1:
        ids = ", ".join(f"{j.plan.decision or j.plan.id} ({j.plan.line})" for j in waiting) or "none"
        raise InvalidInput(f"{given} names {len(found)} rollouts that await approval; waiting: {ids}")
    journal = found[0]
    approval = Approval(
        rollout=journal.plan.id,
        decision=journal.plan.decision,
        by=by,
        reason=reason,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    key = f"approvals/{journal.plan.line}/{journal.plan.id}.json"
    try:
        store.write_new(key, (approval.model_dump_json(indent=1) + "\n").encode())
    except KeyExists:
        first = Approval.model_validate_json(store.read(key).content)
        if first.by != by:
            raise InvalidInput(f"{journal.plan.id} was approved by {first.by} at {first.at} already") from None
    journal.add_event("approved", f"{by}: {reason}")
    return journal


def abandon_rollout(journal: RolloutJournal, target: RolloutTarget, reason: str) -> None:
    """Give an open rollout up: traffic back, the new revision stopped."""
    target.roll_back()
    journal.add_event("abandoned", reason, percent=0)


def _iter_open_rollouts(store: Store, by: str) -> Iterator[RolloutJournal]:
    for line in list_model_names(store):
        last = read_last_journal(store, line, by=by)
        if last is not None and not last.ended:
            yield last


def find_referenced_checkpoints(store: Store, line: str) -> dict[str, str]:
    """{digest: what still names it} of a line: pointer, rollouts and decisions. These are never pruned."""
    named: dict[str, str] = {}
    try:
        found = champion.read_champion(store, line)
    except champion.NoChampion:
        found = None
    for journal in iter_journals(store, line):
        for digest in (journal.plan.previous, journal.plan.sha256):
            if digest:
                named[digest] = f"rollout {journal.plan.number}"
    if found is not None:
        named |= {move.sha256: "the champion's history" for move in found.moves}
        named[found.now.sha256] = "the champion pointer"
    return named
