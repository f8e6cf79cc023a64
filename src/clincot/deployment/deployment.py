"""Starting, resuming, approving and abandoning rollouts.

The steps of a rollout are in rollout.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from clincot.config import DeployConfig
from clincot.deployment.approval import (
    Approval,
    build_statement,
    check_signature,
    parse_approvers,
    sign_statement,
)
from clincot.deployment.journal import RolloutJournal, RolloutPlan, iter_journals, read_last_journal
from clincot.deployment.rollout import RolloutSteps, RolloutTarget, roll_out
from clincot.deployment.service_settings import UNKNOWN_USER, ServiceSettings
from clincot.deployment.smoke import read_golden_images
from clincot.errors import InvalidInput
from clincot.jsonl import parse_record
from clincot.records import format_time_now
from clincot.registry import champion
from clincot.registry.manifest import Manifest, list_model_names, read_manifest
from clincot.registry.model_registry import follow_champion
from clincot.storage.store import KeyExists, KeyNotFound, Store

MIN_ID_DIGITS = 8  # of an id that an approval names, so that it means one decision


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
            _check_same_settings(plan, settings)
            return last
        raise InvalidInput(
            f"{plan.line}: rollout {plan.number} of {plan.sha256[:12]} to {plan.target} is open "
            f"({last.last.kind} since {last.last.at}); resume it, or abandon it with --abandon"
        )
    read_golden_images(store, manifest)  # raises if there are none: the rollout could not be checked
    now = champion.read_champion(store, manifest.line).now
    decision = _check_decision(store, manifest, now.sha256)
    _check_measured_settings(manifest)
    plan = RolloutPlan(
        line=manifest.line,
        number=1 if last is None else last.plan.number + 1,
        sha256=manifest.sha256,
        previous="" if now.sha256 == manifest.sha256 else now.sha256,
        move=now.number,
        decision=decision,
        target=target,
        settings=settings,
        service=service,
    )
    return RolloutJournal.create(store, plan, by=by)


def _check_same_settings(plan: RolloutPlan, settings: DeployConfig) -> None:
    """Raise InvalidInput if an open rollout has other settings, which would hold without being asked for.

    Whether and whose approval is needed may differ: resume_rollout takes the stricter.
    """
    names = set(DeployConfig.model_fields) - {"approval", "approvers"}
    changed = sorted(name for name in names if getattr(plan.settings, name) != getattr(settings, name))
    if changed:
        own = ", ".join(f"{name} {getattr(plan.settings, name)}" for name in changed)
        raise InvalidInput(
            f"{plan.line}: rollout {plan.number} of {plan.sha256[:12]} is open with other settings ({own}); go on with "
            "these, or end it with --abandon and begin again"
        )


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


def _check_measured_settings(manifest: Manifest) -> None:
    """Raise DeploymentRefused if the decision rests on answers with other settings than those of the server."""
    decision, serve = manifest.decision, manifest.serve
    if decision is not None and decision.served and (serve is None or serve.answer_digest != decision.served):
        deployed = "none are recorded" if serve is None else f"it would be served with {serve.answer_digest}"
        raise DeploymentRefused(
            f"{manifest.line} {manifest.sha256[:12]}: {decision.id} rests on answers with the serve settings "
            f"{decision.served}, but {deployed}; publish it again with the section serve that was evaluated"
        )


def check_pointer(store: Store, plan: RolloutPlan) -> None:
    """Raise ChampionMoved if the champion pointer was moved since the rollout was planned, except by the rollout."""
    now = champion.read_champion(store, plan.line).now
    if now.sha256 == plan.sha256 and (plan.move is None or now.number <= plan.move + 1):
        return
    if now.sha256 == (plan.previous or plan.sha256) and plan.move in (None, now.number):
        return
    raise champion.ChampionMoved(
        f"{plan.line}: the champion was moved while the rollout was open: it is {now.sha256[:12]} ({now.kind}, moved "
        f"{now.at} by {now.by or 'unknown'}: {now.reason}); decide against the current champion"
    )


def resume_rollout(
    store: Store,
    journal: RolloutJournal,
    target: RolloutTarget,
    *,
    settings: DeployConfig | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> Literal["awaiting approval", "finished"]:
    """Run the rollout to its end, or until it needs a person's approval.

    settings: of whoever rolls out: whether an approval is needed, and whose. The plan, which is in the store, can only
    ask for more; default: the plan's. wait: sleeps for a number of seconds. Raises what roll_out raises, and
    InvalidApproval if the store has an approval that does not count.
    """
    settings = settings or journal.plan.settings
    needed = settings.approval or journal.plan.settings.approval
    if needed and not _is_approved(store, journal, settings):
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
        if plan.settings.model_registry:
            follow_champion(plan.settings.model_registry, manifest)
        return f"{plan.sha256[:12]} in the place of {plan.previous[:12]}"

    steps = RolloutSteps(lambda: check_pointer(store, plan), promote, wait)
    roll_out(journal, target, manifest, read_golden_images(store, manifest), steps)
    return "finished"


def _is_approved(store: Store, journal: RolloutJournal, settings: DeployConfig) -> bool:
    """Whether the store has an approval of this rollout and of its decision, and the journal names it.

    Raises InvalidApproval if it has one that is not signed as the settings ask.
    """
    plan = journal.plan
    if not any(event.kind == "approved" for event in journal.events):
        return False
    try:
        content = store.read(_build_approval_key(plan)).content
    except KeyNotFound:
        return False
    approval = parse_record(content.decode("utf-8"), Approval, where=f"{store.url}/{_build_approval_key(plan)}")
    if (approval.rollout, approval.decision) != (plan.id, plan.decision):
        return False
    if settings.approvers:
        check_signature(plan, approval, parse_approvers(settings.approvers))
    return True


def _build_approval_key(plan: RolloutPlan) -> str:
    return f"approvals/{plan.line}/{plan.id}.json"


def approve_rollout(
    store: Store, id_prefix: str, *, by: str, reason: str, key: Path | None = None, approvers: Sequence[str] = ()
) -> RolloutJournal:
    """Approve the rollout that awaits it, and return its journal.

    id_prefix: the id of the rollout or of its decision, or its beginning with at least MIN_ID_DIGITS digits. by: the
    person, who must not be the one that began the rollout. key: the SSH key that signs the approval. approvers: the
    lines of deploy.approvers, one of which must be the person's, if there are any. Raises InvalidInput unless the id
    names exactly one rollout, a person and a reason are given, and nobody else has approved it; and ChampionMoved if
    the rollout is out of date.
    """
    if by.strip() in ("", UNKNOWN_USER) or not reason.strip():
        raise InvalidInput("an approval needs a person's name and a reason (--by, --reason)")
    if len(id_prefix.partition("-")[2]) < MIN_ID_DIGITS:
        raise InvalidInput(
            f"{id_prefix!r} could name several decisions; expected an id with at least {MIN_ID_DIGITS} of its digits, "
            "as in decision-12ab34cd"
        )
    waiting = [journal for journal in _iter_open_rollouts(store, by) if journal.awaits_approval]
    matches = [journal for journal in waiting if _has_id(journal.plan, id_prefix)]
    if len(matches) != 1:
        ids = ", ".join(f"{journal.plan.decision or journal.plan.id} ({journal.plan.line})" for journal in waiting)
        raise InvalidInput(f"{id_prefix} names {len(matches)} rollouts that await approval; waiting: {ids or 'none'}")
    journal = matches[0]
    if by == journal.events[0].by:
        raise InvalidInput(f"{journal.plan.id} was begun by {by}; another person must approve it")
    check_pointer(store, journal.plan)
    approval = Approval(
        rollout=journal.plan.id,
        decision=journal.plan.decision,
        by=by,
        reason=reason,
        at=format_time_now(),
    )
    signed_by = ""
    if key is not None:
        signature = sign_statement(build_statement(journal.plan, approval), key)
        approval = approval.model_copy(update={"signature": signature})
    if approvers:
        signed_by = f" ({check_signature(journal.plan, approval, parse_approvers(approvers)).fingerprint})"
    address = _build_approval_key(journal.plan)
    try:
        store.write_new(address, (approval.model_dump_json(indent=1) + "\n").encode())
    except KeyExists:
        first = Approval.model_validate_json(store.read(address).content)
        if first.by != by:
            raise InvalidInput(f"{journal.plan.id} was already approved by {first.by} at {first.at}") from None
    journal.add_event("approved", f"{by}{signed_by}: {reason}")
    return journal


def abandon_rollout(journal: RolloutJournal, target: RolloutTarget, reason: str) -> None:
    """Abandon an open rollout: move the traffic back and stop the new revision."""
    target.roll_back(journal.plan.id)
    journal.add_event("abandoned", f"{reason}; {target.describe_traffic()}", percent=0)


def roll_back_line(store: Store, line: str, *, to: str, by: str, reason: str) -> Manifest:
    """Move the champion pointer back to an earlier champion and return its manifest, ready for a rollout without steps.

    to: digest of the earlier champion; "": the one before the current. Raises InvalidInput without a reason, without an
    earlier champion, or if a rollout is open (it would go on with the model that is rolled back).
    """
    last = read_last_journal(store, line, by=by)
    if last is not None and not last.ended:
        raise InvalidInput(
            f"{line}: rollout {last.plan.number} of {last.plan.sha256[:12]} is open; --abandon REASON ends it and "
            "sends the traffic back to the champion; roll back after that if the champion itself is bad"
        )
    now = champion.read_champion(store, line)
    earlier = [move.sha256 for move in now.promotion_stack[:-1]]
    if not to and not earlier:
        raise InvalidInput(f"{line}: {now.now.sha256[:12]} is the first champion; there is none to roll back to")
    manifest = read_manifest(store, line, to or earlier[-1])
    champion.roll_back_champion(store, manifest, over=now.now.sha256, by=by, reason=reason)
    return manifest


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
