"""The journal of a rollout.

It is an append-only JSONL file in the store with one event per line; the first event contains the plan. A journal is
created only if it does not exist yet, and a writer appends an event only if the file is still the version that it wrote
last. So two processes cannot drive the same rollout: the second one to write gets an error and stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from clincot.config import DeployConfig
from clincot.deployment.service_settings import ServiceSettings
from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, NonEmptyStr, Sha256
from clincot.jsonl import InvalidRecord, parse_record
from clincot.records import Record, format_time_now, hash_json
from clincot.storage.store import KeyExists, Store, VersionConflict

EventKind = Literal[
    "planned",
    "awaiting approval",
    "approved",
    "started",
    "resumed",
    "waiting",
    "ready",
    "smoke",
    "shifted",
    "watched",
    "served",
    "champion",
    "finished",
    "failed",
    "rolled back",
    "abandoned",
]
TERMINAL_KINDS: frozenset[EventKind] = frozenset({"finished", "rolled back", "abandoned"})


class RolloutPlan(FrozenModel):
    """Which checkpoint is rolled out, where and how.

    `previous` is the champion that it replaces.
    """

    line: NonEmptyStr
    number: Annotated[int, Field(ge=1)]  # counts the rollouts of the model line
    sha256: Sha256
    previous: str = ""  # "" if this checkpoint is the champion already
    # Number of the champion pointer's last move when the rollout was planned: a later move ends the rollout.
    move: Annotated[int | None, Field(exclude_if=lambda value: value is None)] = None
    decision: str = ""
    target: Literal["kserve", "local"]
    settings: DeployConfig
    service: ServiceSettings | None = None  # only for the target kserve

    @property
    def id(self) -> str:
        return f"rollout-{hash_json(self.model_dump(mode='json'))[:20]}"


class RolloutEvent(Record):
    """One event of a rollout. The first event contains the plan."""

    prefix: ClassVar[str] = "event"
    provenance: ClassVar[frozenset[str]] = frozenset({"at", "by"})

    rollout: NonEmptyStr
    number: Annotated[int, Field(ge=0)]
    kind: EventKind
    detail: str = ""
    percent: Annotated[int, Field(ge=0, le=100)] | None = None  # share of the traffic after the event
    plan: RolloutPlan | None = None
    at: str = ""  # UTC
    by: str = ""


class RolloutConflict(InvalidInput):
    """Another process drives this rollout, or started one of the same model line."""


class RolloutJournal:
    """The events of a rollout, and the only way to add one."""

    def __init__(self, store: Store, plan: RolloutPlan, events: list[RolloutEvent], tag: str, by: str) -> None:
        self.store, self.plan, self.events, self.by = store, plan, events, by
        self.tell: Callable[[RolloutEvent], None] = lambda _: None  # called with each event that is added
        self._tag = tag

    @classmethod
    def create(cls, store: Store, plan: RolloutPlan, *, by: str) -> RolloutJournal:
        """Create the journal with the event "planned".

        Raises RolloutConflict if another process has created it.
        """
        event = RolloutEvent(rollout=plan.id, number=0, kind="planned", plan=plan, at=format_time_now(), by=by)
        try:
            tag = store.write_new(build_journal_key(plan.line, plan.number), _encode_event(event))
        except KeyExists:
            other = read_journal(store, plan.line, plan.number, by=by)
            raise RolloutConflict(
                f"{plan.line}: rollout {plan.number} of {other.plan.sha256[:12]} was just started by "
                f"{other.events[0].by or 'another process'}"
            ) from None
        return cls(store, plan, [event], tag, by)

    @property
    def key(self) -> str:
        return build_journal_key(self.plan.line, self.plan.number)

    @property
    def last(self) -> RolloutEvent:
        return self.events[-1]

    @property
    def ended(self) -> bool:
        """Whether the rollout is finished, rolled back or abandoned."""
        return any(event.kind in TERMINAL_KINDS for event in self.events)

    @property
    def awaits_approval(self) -> bool:
        """Whether the rollout is open and waits for a person."""
        kinds = {event.kind for event in self.events}
        return "awaiting approval" in kinds and "approved" not in kinds and not self.ended

    def add_event(self, kind: EventKind, detail: str = "", *, percent: int | None = None) -> RolloutEvent:
        """Append an event.

        Raises RolloutConflict if another process has appended one since.
        """
        event = RolloutEvent(
            rollout=self.plan.id,
            number=len(self.events),
            kind=kind,
            detail=detail,
            percent=percent,
            at=format_time_now(),
            by=self.by,
        )
        content = b"".join(_encode_event(before) for before in self.events) + _encode_event(event)
        try:
            self._tag = self.store.replace(self.key, content, self._tag)
        except VersionConflict:
            raise RolloutConflict(f"{self.store.url}/{self.key}: another process has continued this rollout") from None
        self.events.append(event)
        self.tell(event)
        return event


def build_journal_key(line: str, number: int) -> str:
    """The store key of a rollout's journal."""
    return f"rollouts/{line}/{number:06d}.jsonl"


def read_journal(store: Store, line: str, number: int, *, by: str = "") -> RolloutJournal:
    """Read a rollout's journal. Raises KeyNotFound, InvalidRecord.

    by: the name that events added through the returned journal carry.
    """
    key = build_journal_key(line, number)
    content, tag = store.read(key)
    lines = content.decode("utf-8").splitlines()
    events = [
        parse_record(text, RolloutEvent, where=f"{store.url}/{key}:{number}")
        for number, text in enumerate(lines, start=1)
    ]
    plan = events[0].plan if events else None
    if plan is None or [event.number for event in events] != list(range(len(events))):
        raise InvalidRecord(f"{store.url}/{key}: expected events numbered 0, 1, 2, …, the first one with the plan")
    return RolloutJournal(store, plan, events, tag, by)


def iter_journals(store: Store, line: str, *, by: str = "") -> Iterator[RolloutJournal]:
    """The rollouts of a model line, oldest first."""
    for key in store.keys(f"rollouts/{line}/"):
        yield read_journal(store, line, int(key.rpartition("/")[2].removesuffix(".jsonl")), by=by)


def read_last_journal(store: Store, line: str, *, by: str = "") -> RolloutJournal | None:
    """Read the journal of a model line's latest rollout; None if it has none."""
    numbers = [int(key.rpartition("/")[2].removesuffix(".jsonl")) for key in store.keys(f"rollouts/{line}/")]
    return read_journal(store, line, max(numbers), by=by) if numbers else None


def _encode_event(event: RolloutEvent) -> bytes:
    return (event.model_dump_json(exclude_none=True) + "\n").encode()
