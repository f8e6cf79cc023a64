"""The records of a model line's rounds in its store: their fields, their keys, and how they are read and written.

rounds/<line>/0001/begun.json     the starting policy, and the latest run of the round
rounds/<line>/0001/made.json      digests of the round's outputs, and its decision
rounds/<line>/0001/ended.json     the round is over; the next round can begin
rounds/<line>/0001/failed.json    how a run of the round failed or was lost
runs/<line>/<run>.json            the round of a run, and the policy from which the run started it
unbegun/<line>/failed.json        the latest run, if it failed before its round began; deleted when a round begins

Each record is written atomically. Several records are not, so that every transition in history.py can be repeated.
The times in the records inform people. No decision rests on them.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from clincot.errors import InvalidInput
from clincot.fields import FrozenModel
from clincot.jsonl import InvalidRecord, format_validation_error
from clincot.records import StartingPolicy
from clincot.storage.store import KeyNotFound, Store, write_latest

M = TypeVar("M", bound=BaseModel)
RoundNumber = Annotated[int, Field(ge=1)]
RecordName = Literal["begun", "made", "ended", "failed"]


class RoundStart(FrozenModel):
    """The start of a round: its number, its starting policy, and the run that began or resumed it last."""

    number: RoundNumber
    start: StartingPolicy
    run: str = ""  # "": recorded by an earlier version


class RoundOutputs(FrozenModel):
    """The outputs of a round."""

    number: RoundNumber
    digests: dict[str, str]  # {output name, such as pairs or checkpoint: sha256 of the file or folder}
    decision: str  # the decision's id
    verdict: str
    agreement: float | None = None  # Krippendorff's alpha of the judges' calibrated scores
    run: str = ""  # the run that made them; "": recorded by an earlier version
    start: str = ""  # sha256 of the policy from which that run started

    def has_same_content(self, other: RoundOutputs) -> bool:
        """Whether both are the same files and the same decision, whichever run made them."""
        return (self.number, self.digests, self.decision) == (other.number, other.digests, other.decision)


class RunRound(FrozenModel):
    """The round of a pipeline run; the first one, if the run does several."""

    run: str
    number: RoundNumber
    rounds: int = Field(default=1, ge=1)  # how many rounds the run does
    start: str = ""  # sha256 of the policy from which the run started
    repeats: bool = False  # the round was over already, and was asked for by its number
    found: tuple[str, ...] = ()  # decisions of the rounds that earlier runs had recorded when this one began

    @property
    def numbers(self) -> range:
        return range(self.number, self.number + self.rounds)


class RunEnd(FrozenModel):
    """How a run ended. number: its last round with outputs; None: the run failed before its round began.

    state: SUCCEEDED, FAILED, or LOST for a run that recorded neither an end nor a failure.
    """

    number: RoundNumber | None
    state: str
    # What Kubeflow Pipelines reported of a failed run: FAILED, RUNNING, COMPLETE, CACHED, ...
    reported: str = ""
    run: str = ""
    error: str = ""
    last_record: str = ""  # the task that left the last record of the round; "": none did
    recorded_by: str = ""  # the later run that recorded this; "": the run itself
    at: str  # UTC, ISO 8601


def find_round_start(store: Store, line: str, number: int) -> RoundStart | None:
    """Return the start of a round; None if it has not begun."""
    return _find_record(RoundStart, store, build_round_key(line, number, "begun"))


def find_round_outputs(store: Store, line: str, number: int) -> RoundOutputs | None:
    """Return the outputs of a round; None if it has none."""
    return _find_record(RoundOutputs, store, build_round_key(line, number, "made"))


def read_round_outputs(store: Store, line: str, number: int) -> RoundOutputs:
    """Read the outputs of a round. Raises InvalidInput if the round has none yet."""
    outputs = find_round_outputs(store, line, number)
    if outputs is None:
        raise InvalidInput(f"{store.url}: round {number} of {line} has no outputs yet")
    return outputs


def find_round_end(store: Store, line: str, number: int) -> RunEnd | None:
    """Return the record of a round's end; None if the round has not ended."""
    return _find_record(RunEnd, store, build_round_key(line, number, "ended"))


def find_round_failure(store: Store, line: str, number: int) -> RunEnd | None:
    """Return how a run of the round failed or was lost; None if no run did."""
    return _find_record(RunEnd, store, build_round_key(line, number, "failed"))


def find_run_round(store: Store, line: str, run: str) -> RunRound | None:
    """Return the round of a run; None if the run began no round."""
    return _find_record(RunRound, store, build_run_key(line, run))


def failed_before_start(store: Store, line: str) -> bool:
    """Return whether the line's latest run failed before its round began."""
    return build_unbegun_key(line) in store.keys(f"unbegun/{line}/")


def next_round_number(store: Store, line: str) -> int:
    """Return the number after the last round that ended."""
    ended = [key for key in store.keys(f"rounds/{line}/") if key.endswith("/ended.json")]
    return 1 + max((int(key.split("/")[2]) for key in ended), default=0)


def write_record(store: Store, key: str, record: BaseModel) -> None:
    """Write a record, in place of the one under this key."""
    write_latest(store, key, encode_record(record))


def write_round_record(store: Store, line: str, number: int, name: RecordName, record: BaseModel) -> None:
    """Write a record of a round, in place of the earlier one."""
    write_record(store, build_round_key(line, number, name), record)


def parse_stored_record(kind: type[M], content: bytes, where: str) -> M:
    """Parse a record. Raises InvalidRecord, which names its address."""
    try:
        return kind.model_validate_json(content)
    except ValidationError as error:
        raise InvalidRecord(f"{where}: {format_validation_error(error)}") from None


def encode_record(record: BaseModel) -> bytes:
    """The bytes of a record in the store."""
    return (record.model_dump_json(indent=1) + "\n").encode()


def build_round_key(line: str, number: int, name: RecordName) -> str:
    """The key of a record of a round."""
    return f"rounds/{line}/{number:04d}/{name}.json"


def build_run_key(line: str, run: str) -> str:
    """The key of the record of a run."""
    return f"runs/{line}/{run}.json"


def build_unbegun_key(line: str) -> str:
    """The key of the latest run that failed before its round began."""
    return f"unbegun/{line}/failed.json"


def _find_record(kind: type[M], store: Store, key: str) -> M | None:
    try:
        return parse_stored_record(kind, store.read(key).content, f"{store.url}/{key}")
    except KeyNotFound:
        return None
