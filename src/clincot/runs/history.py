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

from pydantic import BaseModel, Field, ValidationError

from clincot.errors import InvalidInput
from clincot.fields import FrozenModel
from clincot.jsonl import InvalidRecord, format_validation_error
from clincot.records import StartingPolicy
from clincot.registry.champion import NoChampion, read_champion
from clincot.storage.store import KeyExists, KeyNotFound, Store

M = TypeVar("M", bound=BaseModel)
RoundNumber = Annotated[int, Field(ge=1)]


class RoundStart(FrozenModel):
    """A round that was begun."""

    number: RoundNumber
    start: StartingPolicy


class RoundOutputs(FrozenModel):
    """What a round made."""

    number: RoundNumber
    digests: dict[str, str]  # {questions, regions, …, checkpoint, decision: sha256 of the file or folder}
    decision: str  # the decision's id
    verdict: str
    agreement: float | None = None  # of the judges: Krippendorff's alpha of their calibrated scores


class RunRound(FrozenModel):
    """Which round (of several: the first) a run of the pipeline is."""

    run: str
    number: RoundNumber


class RunEnd(FrozenModel):
    """How a run ended. number: of its round (of several, the last made); None: none had begun."""

    number: RoundNumber | None
    state: str  # as Kubeflow Pipelines has it: SUCCEEDED, FAILED, CANCELLED
    run: str = ""
    error: str = ""
    at: str  # UTC


def begin_round(store: Store, start: StartingPolicy, number: int = 0, *, run: str) -> RoundStart:
    """The round that the run `run` is (of): `number`, or with 0 the next one.

    A round that began and has not ended is taken up where it began, also when it moved the champion pointer itself in
    the meantime; the next one begins anew where someone else moved it.
    """
    begun = _resume_or_begin(store, start, number)
    _write_record(store, _run_key(start.line, run), RunRound(run=run, number=begun.number))
    store.delete(_failed_before_start_key(start.line))
    return begun


def _resume_or_begin(store: Store, start: StartingPolicy, number: int) -> RoundStart:
    given, number = number, number or next_round_number(store, start.line)
    fresh = RoundStart(number=number, start=start)
    key = _round_key(start.line, number, "begun")
    try:
        store.write_new(key, _encode_record(fresh))
        return fresh
    except KeyExists:
        content, tag = store.read(key)
    begun = _parse_model(RoundStart, content, f"{store.url}/{key}")
    if given or begun.start.id == start.id or _moved_champion(store, begun):
        return begun
    store.replace(key, _encode_record(fresh), tag)
    return fresh


def next_round_number(store: Store, line: str) -> int:
    """The number after the last round that ended well."""
    ended = [key for key in store.keys(f"rounds/{line}/") if key.endswith("/ended.json")]
    return 1 + max((int(key.split("/")[2]) for key in ended), default=0)


def record_round_outputs(store: Store, line: str, made: RoundOutputs) -> None:
    """Keep what a round made."""
    _write_record(store, _round_key(line, made.number, "made"), made)


def read_round_outputs(store: Store, line: str, number: int) -> RoundOutputs:
    """Raises BadInput where the round has not come so far."""
    key = _round_key(line, number, "made")
    try:
        return _parse_model(RoundOutputs, store.read(key).content, f"{store.url}/{key}")
    except KeyNotFound:
        raise InvalidInput(f"{store.url}: round {number} of {line} has not made anything yet") from None


def end_round(store: Store, line: str, *, run: str, state: str, error: str = "") -> RunEnd:
    """Record how the run ended, at the round that it began; of one with several rounds, at all that were made.

    Returns the record of the last of them. A run that failed before its round began touches no round, also where an
    older one is open: it is kept beside them (failed_unbegun). Raises BadInput where one succeeded that began none.
    """
    number = _find_round_number(store, line, run)
    ended = RunEnd(number=number, state=state, run=run, error=error, at=datetime.now(UTC).isoformat(timespec="seconds"))
    if number is None and state == "SUCCEEDED":
        raise InvalidInput(f"{store.url}: the run {run} of {line} succeeded, but {_run_key(line, run)} is not there")
    if number is None:
        _write_record(store, _failed_before_start_key(line), ended)
        return ended
    if state != "SUCCEEDED":
        _write_record(store, _round_key(line, number, "failed"), ended)
        return ended
    made = {int(key.split("/")[2]) for key in store.keys(f"rounds/{line}/") if key.endswith("/made.json")}
    while True:
        _write_record(store, _round_key(line, number, "ended"), ended)
        if number + 1 not in made:
            return ended
        number += 1
        ended = ended.model_copy(update={"number": number})


def failed_before_start(store: Store, line: str) -> bool:
    """Did the line's last run fail before a round began?"""
    return _failed_before_start_key(line) in store.keys(f"unbegun/{line}/")


def _find_round_number(store: Store, line: str, run: str) -> int | None:
    """The round that the run began; None where it began none."""
    key = _run_key(line, run)
    try:
        return _parse_model(RunRound, store.read(key).content, f"{store.url}/{key}").number
    except KeyNotFound:
        return None


def _moved_champion(store: Store, begun: RoundStart) -> bool:
    """Did this round's own decision make the champion that is there now?"""
    line = begun.start.line
    try:
        made = read_round_outputs(store, line, begun.number)
        now = read_champion(store, line).now
    except (InvalidInput, NoChampion):
        return False
    return now.decision == made.decision and now.previous == begun.start.sha256


def _write_record(store: Store, key: str, record: BaseModel) -> None:
    try:
        store.write_new(key, _encode_record(record))
    except KeyExists:
        content, tag = store.read(key)
        if content != _encode_record(record):
            store.replace(key, _encode_record(record), tag)


def _round_key(line: str, number: int, what: str) -> str:
    return f"rounds/{line}/{number:04d}/{what}.json"


def _run_key(line: str, run: str) -> str:
    return f"runs/{line}/{run}.json"


def _failed_before_start_key(line: str) -> str:
    return f"unbegun/{line}/failed.json"


def _encode_record(record: BaseModel) -> bytes:
    return (record.model_dump_json(indent=1) + "\n").encode()


def _parse_model(kind: type[M], content: bytes, where: str) -> M:
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise InvalidRecord(f"{where}: {format_validation_error(error)}") from None
