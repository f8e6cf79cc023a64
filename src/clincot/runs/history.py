"""The history of a model line's rounds in its store: start, outputs and end of every round.

rounds/<line>/0001/begun.json     the starting policy, resolved once; an interrupted round resumes from it
rounds/<line>/0001/made.json      digests of the round's outputs, and its decision
rounds/<line>/0001/ended.json     written by the last task of the round's run; then the next round can begin
rounds/<line>/0001/failed.json    how the round's latest run failed
runs/<line>/<run>.json            the round of a run, so that the run ends no other round
unbegun/<line>/failed.json        the latest run, if it failed before its round began; deleted when a round begins

The end of a round is what its run recorded, not the status that Kubeflow Pipelines reports: the exit task of a run that
succeeded receives COMPLETE, or RUNNING if its last tasks came from the cache, and so does one that failed (KFP 2.17.0,
backend/src/v2/driver/resolve.go, resolves it from the state of the execution in ML Metadata).

Each record is written atomically. Several records are not: begin_round writes begun.json before the run's record, and
a process that is killed in between repeats both.
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
    """The start of a round: its number and its starting policy."""

    number: RoundNumber
    start: StartingPolicy


class RoundOutputs(FrozenModel):
    """The outputs of a round."""

    number: RoundNumber
    digests: dict[str, str]  # {output name, such as pairs or checkpoint: sha256 of the file or folder}
    decision: str  # the decision's id
    verdict: str
    agreement: float | None = None  # Krippendorff's alpha of the judges' calibrated scores


class RunRound(FrozenModel):
    """The round of a pipeline run; the first one, if the run does several."""

    run: str
    number: RoundNumber


class RunEnd(FrozenModel):
    """How a run ended. number: its last round with outputs; None: the run failed before its round began."""

    number: RoundNumber | None
    state: str  # SUCCEEDED or FAILED
    reported: str = (
        ""  # the state that Kubeflow Pipelines reported of a failed run: FAILED, RUNNING, COMPLETE, CACHED, ...
    )
    run: str = ""
    error: str = ""
    at: str  # UTC, ISO 8601


def begin_round(store: Store, start: StartingPolicy, number: int = 0, *, run: str) -> RoundStart:
    """Begin or resume a round and record that `run` is a run of it. number: which round; 0: the next one.

    A round that began and has not ended keeps its starting policy, even if its own decision has moved the champion
    since. Without an explicit number, the next round starts again from `start` if someone else moved the champion.
    """
    begun = _resume_or_begin(store, start, number)
    _write_record(store, _run_key(start.line, run), RunRound(run=run, number=begun.number))
    store.delete(_failed_before_start_key(start.line))
    return begun


def _resume_or_begin(store: Store, start: StartingPolicy, number: int) -> RoundStart:
    explicit, number = bool(number), number or next_round_number(store, start.line)
    fresh = RoundStart(number=number, start=start)
    key = _round_key(start.line, number, "begun")
    try:
        store.write_new(key, _encode_record(fresh))
        return fresh
    except KeyExists:
        content, tag = store.read(key)
    begun = _parse_model(RoundStart, content, f"{store.url}/{key}")
    if explicit or begun.start.id == start.id or _moved_champion(store, begun):
        return begun
    store.replace(key, _encode_record(fresh), tag)
    return fresh


def find_open_round(store: Store, line: str, number: int = 0) -> RoundStart | None:
    """Return the start of a round that began and has not ended; None if there is none.

    number: which round; 0: the next one.
    """
    number = number or next_round_number(store, line)
    if find_round_end(store, line, number) is not None:
        return None
    return _find_record(RoundStart, store, _round_key(line, number, "begun"))


def next_round_number(store: Store, line: str) -> int:
    """Return the number after the last round that ended."""
    ended = [key for key in store.keys(f"rounds/{line}/") if key.endswith("/ended.json")]
    return 1 + max((int(key.split("/")[2]) for key in ended), default=0)


def record_round_outputs(store: Store, line: str, outputs: RoundOutputs) -> None:
    """Record the outputs of a round."""
    _write_record(store, _round_key(line, outputs.number, "made"), outputs)


def read_round_outputs(store: Store, line: str, number: int) -> RoundOutputs:
    """Read the outputs of a round. Raises InvalidInput if the round has none yet."""
    key = _round_key(line, number, "made")
    try:
        return _parse_model(RoundOutputs, store.read(key).content, f"{store.url}/{key}")
    except KeyNotFound:
        raise InvalidInput(f"{store.url}: round {number} of {line} has no outputs yet") from None


def end_round(store: Store, line: str, *, run: str, rounds: int = 1) -> RunEnd:
    """Record that a run has done everything its rounds need; return the record of the last of them.

    rounds: number of rounds in the run. Raises InvalidInput if the run began no round, or if one has no outputs.
    """
    first = _find_round_number(store, line, run)
    if first is None:
        raise InvalidInput(
            f"{store.url}: the run {run} of {line} ends a round, but its record {_run_key(line, run)} does not exist"
        )
    numbers = range(first, first + rounds)
    for number in numbers:
        read_round_outputs(store, line, number)
    ended = RunEnd(number=first, state="SUCCEEDED", run=run, at=_now())
    for number in numbers:
        ended = ended.model_copy(update={"number": number})
        _write_record(store, _round_key(line, number, "ended"), ended)
    return ended


def record_run_failure(store: Store, line: str, *, run: str, reported: str, error: str = "") -> RunEnd:
    """Record that a run failed, unless its round has ended; return the record of the failure, or that of the end.

    reported: the state that Kubeflow Pipelines reports, which is recorded and otherwise ignored. A run that failed
    before its round began changes no round, even if an earlier one is open; its failure is recorded separately (see
    failed_before_start).
    """
    number = _find_round_number(store, line, run)
    failed = RunEnd(number=number, state="FAILED", reported=reported, run=run, error=error, at=_now())
    if number is None:
        _write_record(store, _failed_before_start_key(line), failed)
        return failed
    ended = find_round_end(store, line, number)
    if ended is not None:
        return ended
    _write_record(store, _round_key(line, number, "failed"), failed)
    return failed


def find_round_end(store: Store, line: str, number: int) -> RunEnd | None:
    """Return the record of a round's end; None if the round has not ended."""
    return _find_record(RunEnd, store, _round_key(line, number, "ended"))


def failed_before_start(store: Store, line: str) -> bool:
    """Return whether the line's latest run failed before its round began."""
    return _failed_before_start_key(line) in store.keys(f"unbegun/{line}/")


def find_run_round(store: Store, line: str, run: str) -> RunRound | None:
    """Return the round of a run; None if the run began none."""
    return _find_record(RunRound, store, _run_key(line, run))


def find_round_outputs(store: Store, line: str, number: int) -> RoundOutputs | None:
    """Return the outputs of a round; None if it has none yet."""
    return _find_record(RoundOutputs, store, _round_key(line, number, "made"))


def _find_round_number(store: Store, line: str, run: str) -> int | None:
    """Return the round of a run; None if the run began no round."""
    record = _find_record(RunRound, store, _run_key(line, run))
    return None if record is None else record.number


def _find_record(kind: type[M], store: Store, key: str) -> M | None:
    try:
        return _parse_model(kind, store.read(key).content, f"{store.url}/{key}")
    except KeyNotFound:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _moved_champion(store: Store, begun: RoundStart) -> bool:
    """Return whether this round's own decision promoted the current champion."""
    line = begun.start.line
    try:
        outputs = read_round_outputs(store, line, begun.number)
        now = read_champion(store, line).now
    except (InvalidInput, NoChampion):
        return False
    return now.decision == outputs.decision and now.previous == begun.start.sha256


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
