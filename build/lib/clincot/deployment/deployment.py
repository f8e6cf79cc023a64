"""Starting, resuming, approving and abandoning rollouts.

The steps of a rollout are in rollout.py.
"""

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
    """Who approved a rollout, and why."""

    prefix: ClassVar[str] = "approval"
    provenance: ClassVar[frozenset[str]] = frozenset({"at"})

    rollout: NonEmptyStr
    decision: str
    by: NonEmptyStr
    reason: NonEmptyStr
    at: str = ""  # UTC


class DeploymentRefused(InvalidInput):
    """The checkpoint is neither the champion nor promoted over the champion."""


def start_rollout(
    store: Store,
    manifest: Manifest,
    settings: DeployConfig,
    *,
    target: Literal["kserve", "local"],
    service: ServiceSettings | None,
    by: str,
) -> RolloutJournal:
    """Start a rollout of the checkpoint, or return its open one.

    Raises DeploymentRefused, RolloutConflict (another process starts one), and InvalidInput (another rollout of the
    model line is open, or the checkpoint has no golden questions).
    """
    last = read_last_journal(store, manifest.line, by=by)
    if last is not None and not last.ended:
        plan = last.plan
        if (plan.sha256, plan.target, plan.service) == (manifest.sha256, target, service):
            return last
        raise InvalidInput(
            f"{plan.line}: rollout {plan.number} of {plan.sha256[:12]} to {plan.target} is open "
            f"({last.last.kind} since {last.last.at}); resume it, or abandon it with --abandon"
        )
    read_golden_images(store, manifest)  # raises if there are none: the rollout could not be checked
    now = champion.read_champion(store, manifest.line).now
    decision = _check_decision(store, manifest, now.sha256)
    plan = RolloutPlan(
        line=manifest.line,
        number=1 if last is None else last.plan.number + 1,
        sha256=manifest.sha256,
        previous="" if now.sha256 == manifest.sha256 else now.sha256,
        decision=decision,
        target=target,
        settings=settings,
        service=service,
    )
    return RolloutJournal.create(store, plan, by=by)


def _check_decision(store: Store, manifest: Manifest, now: str) -> str:
    """Return the id of the decision that promotes the checkpoint over `now`.

    now: digest of the champion. Raises DeploymentRefused if there is no such decision.
    """
    if manifest.kind == "adapter":
        raise DeploymentRefused(
            f"{manifest.line} {manifest.sha256[:12]} is an adapter; publish the merged checkpoint to deploy it"
        )
    decision = manifest.decision
    if now == manifest.sha256:
        return "" if decision is None else decision.id
    if decision is None or decision.verdict != "promote":
        problem = "has no decision" if decision is None else f"was decided {decision.verdict!r}: {decision.reasons[0]}"
        raise DeploymentRefused(
            f"{manifest.line} {manifest.sha256[:12]} {problem}; only a promoted checkpoint can be rolled out"
        )
    against = read_manifest(store, manifest.line, now).measured
    if decision.champion != against:
        raise DeploymentRefused(
            f"{decision.id} was decided against {decision.champion[:12]}, but the champion is now {against[:12]}; "
            "decide again"
        )
    return decision.id


def resume_rollout(
    store: Store, journal: RolloutJournal, target: RolloutTarget, *, wait: Callable[[float], None] = time.sleep
) -> Literal["awaiting approval", "finished"]:
    """Run the rollout to its end, or until it needs a person's approval.

    Raises what roll_out raises.
    wait: sleeps for a number of seconds.
    """
    if journal.plan.settings.approval and not any(event.kind == "approved" for event in journal.events):
        if not journal.awaits_approval:
            journal.add_event("awaiting approval", f"clincot approve {journal.plan.decision or journal.plan.id}")
        return "awaiting approval"
    plan = journal.plan
    manifest = read_manifest(store, plan.line, plan.sha256)

    def promote() -> str:
        now = champion.read_champion(store, plan.line).now
        if now.sha256 == plan.sha256:
            return f"{plan.sha256[:12]} is champion already"
        champion.promote_champion(
            store, manifest, over=plan.previous, by=journal.by, decision=plan.decision, reason=f"rolled out: {plan.id}"
        )
        return f"{plan.sha256[:12]} in the place of {plan.previous[:12]}"

    roll_out(journal, target, manifest, read_golden_images(store, manifest), promote=promote, wait=wait)
    return "finished"


def approve_rollout(store: Store, id_prefix: str, *, by: str, reason: str) -> RolloutJournal:
    """Approve the rollout that awaits it, and return its journal.

    id_prefix: the id of the rollout or of its decision, or the beginning of one. Raises InvalidInput unless it names
    exactly one rollout, and `by` and `reason` are set.
    """
    if not by.strip() or not reason.strip():
        raise InvalidInput("an approval needs a name and a reason (--by, --reason)")
    waiting = [journal for journal in _iter_open_rollouts(store, by) if journal.awaits_approval]
    matches = [journal for journal in waiting if _has_id(journal.plan, id_prefix)]
    if len(matches) != 1:
        ids = ", ".join(f"{journal.plan.decision or journal.plan.id} ({journal.plan.line})" for journal in waiting)
        raise InvalidInput(f"{id_prefix} names {len(matches)} rollouts that await approval; waiting: {ids or 'none'}")
    journal = matches[0]
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
            raise InvalidInput(f"{journal.plan.id} was already approved by {first.by} at {first.at}") from None
    journal.add_event("approved", f"{by}: {reason}")
    return journal


def abandon_rollout(journal: RolloutJournal, target: RolloutTarget, reason: str) -> None:
    """Abandon an open rollout: move the traffic back and stop the new revision."""
    target.roll_back()
    journal.add_event("abandoned", reason, percent=0)


def _has_id(plan: RolloutPlan, prefix: str) -> bool:
    return plan.id.startswith(prefix) or bool(plan.decision and plan.decision.startswith(prefix))


def _iter_open_rollouts(store: Store, by: str) -> Iterator[RolloutJournal]:
    for line in list_model_names(store):
        last = read_last_journal(store, line, by=by)
        if last is not None and not last.ended:
            yield last


def find_referenced_checkpoints(store: Store, line: str) -> dict[str, str]:
    """Map each checkpoint that is still in use to what names it.

    The champion pointer and rollouts name checkpoints. These checkpoints are never pruned.
    """
    references: dict[str, str] = {}
    try:
        pointer = champion.read_champion(store, line)
    except champion.NoChampion:
        pointer = None
    for journal in iter_journals(store, line):
        for digest in (journal.plan.previous, journal.plan.sha256):
            if digest:
                references[digest] = f"rollout {journal.plan.number}"
    if pointer is not None:
        references |= {move.sha256: "the champion's history" for move in pointer.moves}
        references[pointer.now.sha256] = "the champion pointer"
    return references
