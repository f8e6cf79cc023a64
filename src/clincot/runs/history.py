"""The rounds of a model line in its store: which began from what, what they made, and how they ended.

rounds/<line>/0001/begun.json     where it starts from, resolved once: an interrupted round goes on from there
rounds/<line>/0001/made.json      digests of what it made, and its decision
rounds/<line>/0001/ended.json     written when its run succeeded; the next round is the one after the last of these
rounds/<line>/0001/failed.json    how the last run of it failed
runs/<line>/<run>.json            which round a run is of: it ends that one and no other
unbegun/<line>/failed.json        the last run, if it failed before any round began; gone when one begins
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clincot.errors import BadInput
from clincot.jsonl import BadRecord, explain
from clincot.records import StartingPolicy
from clincot.registry.champion import NoChampion, read_champion
from clincot.storage.store import AlreadyStored, NotStored, Store

M = TypeVar("M", bound=BaseModel)
Number = Annotated[int, Field(ge=1)]


class Begun(BaseModel):
    """A round that was begun."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Number
    start: StartingPolicy


class Made(BaseModel):
    """What a round made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Number
    digests: dict[str, str]  # {questions, regions, …, checkpoint, decision: sha256 of the file or folder}
    decision: str  # the decision's id
    verdict: str
    agreement: float | None = None  # of the judges: Krippendorff's alpha of their calibrated scores


class RunOf(BaseModel):
    """Which round (of several: the first) a run of the pipeline is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: str
    number: Number


class Ended(BaseModel):
    """How a run ended. number: of its round (of several, the last made); None: none had begun."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: Number | None
    state: str  # as Kubeflow Pipelines has it: SUCCEEDED, FAILED, CANCELLED
    run: str = ""
    error: str = ""
    at: str  # UTC


def begin_round(store: Store, start: StartingPolicy, number: int = 0, *, run: str) -> Begun:
    """The round that the run `run` is (of): `number`, or with 0 the next one.

    A round that began and has not ended is taken up where it began, also when it moved the champion pointer itself in
    the meantime; the next one begins anew where someone else moved it.
    """
    begun = _begun(store, start, number)
    _keep(store, _run_key(start.line, run), RunOf(run=run, number=begun.number))
    store.delete(_unbegun_key(start.line))
    return begun


def _begun(store: Store, start: StartingPolicy, number: int) -> Begun:
    given, number = number, number or next_round(store, start.line)
    fresh = Begun(number=number, start=start)
    key = _key(start.line, number, "begun")
    try:
        store.write_new(key, _bytes(fresh))
        return fresh
    except AlreadyStored:
        content, tag = store.read(key)
    begun = _parsed(Begun, content, f"{store.url}/{key}")
    if given or begun.start.id == start.id or _moved_by(store, begun):
        return begun
    store.replace(key, _bytes(fresh), tag)
    return fresh


def next_round(store: Store, line: str) -> int:
    """The number after the last round that ended well."""
    ended = [key for key in store.keys(f"rounds/{line}/") if key.endswith("/ended.json")]
    return 1 + max((int(key.split("/")[2]) for key in ended), default=0)


def record_made(store: Store, line: str, made: Made) -> None:
    """Keep what a round made."""
    _keep(store, _key(line, made.number, "made"), made)


def read_made(store: Store, line: str, number: int) -> Made:
    """Raises BadInput where the round has not come so far."""
    key = _key(line, number, "made")
    try:
        return _parsed(Made, store.read(key).content, f"{store.url}/{key}")
    except NotStored:
        raise BadInput(f"{store.url}: round {number} of {line} has not made anything yet") from None


def end_round(store: Store, line: str, *, run: str, state: str, error: str = "") -> Ended:
    """Record how the run ended, at the round that it began; of one with several rounds, at all that were made.

    Returns the record of the last of them. A run that failed before its round began touches no round, also where an
    older one is open: it is kept beside them (failed_unbegun). Raises BadInput where one succeeded that began none.
    """
    number = _number_of(store, line, run)
    ended = Ended(number=number, state=state, run=run, error=error, at=datetime.now(UTC).isoformat(timespec="seconds"))
    if number is None and state == "SUCCEEDED":
        raise BadInput(f"{store.url}: the run {run} of {line} succeeded, but {_run_key(line, run)} is not there")
    if number is None:
        _keep(store, _unbegun_key(line), ended)
        return ended
    if state != "SUCCEEDED":
        _keep(store, _key(line, number, "failed"), ended)
        return ended
    made = {int(key.split("/")[2]) for key in store.keys(f"rounds/{line}/") if key.endswith("/made.json")}
    while True:
        _keep(store, _key(line, number, "ended"), ended)
        if number + 1 not in made:
            return ended
        number += 1
        ended = ended.model_copy(update={"number": number})


def failed_unbegun(store: Store, line: str) -> bool:
    """Did the line's last run fail before a round began?"""
    return _unbegun_key(line) in store.keys(f"unbegun/{line}/")


def _number_of(store: Store, line: str, run: str) -> int | None:
    """The round that the run began; None where it began none."""
    key = _run_key(line, run)
    try:
        return _parsed(RunOf, store.read(key).content, f"{store.url}/{key}").number
    except NotStored:
        return None


def _moved_by(store: Store, begun: Begun) -> bool:
    """Did this round's own decision make the champion that is there now?"""
    line = begun.start.line
    try:
        made = read_made(store, line, begun.number)
        now = read_champion(store, line).now
    except (BadInput, NoChampion):
        return False
    return now.decision == made.decision and now.previous == begun.start.sha256


def _keep(store: Store, key: str, record: BaseModel) -> None:
    try:
        store.write_new(key, _bytes(record))
    except AlreadyStored:
        content, tag = store.read(key)
        if content != _bytes(record):
            store.replace(key, _bytes(record), tag)


def _key(line: str, number: int, what: str) -> str:
    return f"rounds/{line}/{number:04d}/{what}.json"


def _run_key(line: str, run: str) -> str:
    return f"runs/{line}/{run}.json"


def _unbegun_key(line: str) -> str:
    return f"unbegun/{line}/failed.json"


def _bytes(record: BaseModel) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()


def _parsed(kind: type[M], content: bytes, where: str) -> M:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise BadRecord(f"{where}: {explain(error)}") from None
