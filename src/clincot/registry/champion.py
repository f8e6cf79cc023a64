"""The champion pointer of a model line.

It is one small object that includes its history and is updated by compare-and-swap. The pointer names the checkpoint
that a round starts from and that is served. It starts at the base model (round 0); a decision moves it forward, and an
operator moves it back with a reason. If two processes move it at the same time, one succeeds and the other gets an
error that names the winner.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from clincot.errors import InvalidInput
from clincot.fields import FrozenModel, NonEmptyStr, Sha256
from clincot.jsonl import InvalidRecord, format_validation_error
from clincot.records import Record, format_time_now
from clincot.registry.manifest import Manifest
from clincot.storage.store import KeyExists, KeyNotFound, Store, VersionConflict


class ChampionMoved(InvalidInput):
    """Another process moved the pointer first; the message names the move that won."""


class NoChampion(InvalidInput):
    """The model line has no champion pointer yet."""


class ChampionMove(Record):
    """One move of the pointer."""

    prefix: ClassVar[str] = "move"
    provenance: ClassVar[frozenset[str]] = frozenset({"uri", "by", "at"})

    number: Annotated[int, Field(ge=0)]  # 0, 1, 2, …
    kind: Literal["base", "promote", "rollback"]
    sha256: Sha256  # the new champion
    previous: str = ""  # the champion before this move; "" for the first one
    round: Annotated[int, Field(ge=0)] = 0
    decision: str = ""
    reason: NonEmptyStr
    uri: str = ""
    by: str = ""
    at: str = ""  # UTC


class Champion(FrozenModel):
    """The pointer of a model line. Its last move names the champion."""

    line: NonEmptyStr
    moves: tuple[ChampionMove, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_moves(self) -> Champion:
        for number, move in enumerate(self.moves):
            previous = self.moves[number - 1].sha256 if number else ""
            if (move.number, move.previous) != (number, previous):
                raise ValueError(f"move {number} of the pointer does not follow from the move before it")
        return self

    @property
    def now(self) -> ChampionMove:
        """The latest move; its sha256 is the current champion."""
        return self.moves[-1]

    @property
    def promotion_stack(self) -> tuple[ChampionMove, ...]:
        """The base and all promotions that were not rolled back, in order.

        The last one is the current champion; the others are what it can be rolled back to.
        """
        stack: list[ChampionMove] = []
        for move in self.moves:
            if move.kind == "rollback":
                while stack and stack[-1].sha256 != move.sha256:
                    stack.pop()
            else:
                stack.append(move)
        return tuple(stack)


def build_champion_key(line: str) -> str:
    """The store key of a model line's pointer."""
    return f"champions/{line}.json"


def read_champion(store: Store, line: str) -> Champion:
    """Read the pointer of a model line. Raises NoChampion, InvalidRecord."""
    return _read_pointer(store, line)[0]


def create_champion_pointer(
    store: Store, base: Manifest, *, by: str, reason: str = "the base model is the round-0 champion"
) -> Champion:
    """Create the pointer of a new model line.

    If the line already has a pointer to this model, that pointer is returned. Raises ChampionMoved if its pointer names
    another model.
    """
    move = ChampionMove(
        number=0,
        kind="base",
        sha256=base.sha256,
        round=base.round,
        reason=reason,
        uri=base.uri,
        by=by,
        at=format_time_now(),
    )
    champion = Champion(line=base.line, moves=(move,))
    try:
        store.write_new(build_champion_key(base.line), _encode_champion(champion))
    except KeyExists:
        existing = read_champion(store, base.line)
        if existing.now.sha256 == base.sha256:
            return existing
        raise ChampionMoved(f"{base.line} has a champion already: {_describe_move(existing.now)}") from None
    return champion


def promote_champion(store: Store, to: Manifest, *, over: str, by: str, reason: str, decision: str = "") -> Champion:
    """Make `to` the champion in place of `over`.

    over: digest of the champion that `to` was compared with. Raises ChampionMoved if it is no longer the champion.
    """
    return _append_move(store, to, "promote", over=over, by=by, reason=reason, decision=decision)


def roll_back_champion(store: Store, to: Manifest, *, over: str, by: str, reason: str) -> Champion:
    """Move the pointer back from `over` to an earlier champion of `promotion_stack`.

    Raises ChampionMoved if `over` is no longer the champion, InvalidInput without a reason or if `to` was not champion.
    """
    if not reason.strip():
        raise InvalidInput("a rollback needs a reason, which is kept in the pointer's history")
    champion = read_champion(store, to.line)
    earlier = [move.sha256 for move in champion.promotion_stack[:-1]]
    if to.sha256 not in earlier:
        known = ", ".join(digest[:12] for digest in earlier) or "none, because only the base model has been champion"
        raise InvalidInput(f"{to.line}: {to.sha256[:12]} is no earlier champion; earlier champions: {known}")
    return _append_move(store, to, "rollback", over=over, by=by, reason=reason, decision="")


def _append_move(
    store: Store, to: Manifest, kind: Literal["promote", "rollback"], *, over: str, by: str, reason: str, decision: str
) -> Champion:
    champion, tag = _read_pointer(store, to.line)
    if champion.now.sha256 != over:
        raise ChampionMoved(_describe_conflict(champion, over))
    move = ChampionMove(
        number=len(champion.moves),
        kind=kind,
        sha256=to.sha256,
        previous=over,
        round=to.round,
        decision=decision,
        reason=reason,
        uri=to.uri,
        by=by,
        at=format_time_now(),
    )
    moved = Champion(line=to.line, moves=(*champion.moves, move))
    try:
        store.replace(build_champion_key(to.line), _encode_champion(moved), tag)
    except VersionConflict:
        raise ChampionMoved(_describe_conflict(read_champion(store, to.line), over)) from None
    return moved


def _read_pointer(store: Store, line: str) -> tuple[Champion, str]:
    try:
        content, tag = store.read(build_champion_key(line))
    except KeyNotFound:
        raise NoChampion(
            f"{store.url}: {line} has no champion yet; publish the base model, "
            f"then run `clincot models start DIGEST --name {line}`"
        ) from None
    try:
        return Champion.model_validate_json(content), tag
    except ValidationError as error:
        raise InvalidRecord(
            f"{store.url}/{build_champion_key(line)}: not a champion pointer: {format_validation_error(error)}"
        ) from None


def _describe_conflict(current: Champion, over: str) -> str:
    return (
        f"{current.line}: expected {over[:12]} as champion, but it is {_describe_move(current.now)}; "
        "decide against the current champion"
    )


def _describe_move(move: ChampionMove) -> str:
    decided = f" by {move.decision}" if move.decision else ""
    return f"{move.sha256[:12]} (round {move.round}, {move.kind}{decided}, moved {move.at} by {move.by or 'unknown'})"


def _encode_champion(champion: Champion) -> bytes:
    return (champion.model_dump_json(indent=1) + "\n").encode()
