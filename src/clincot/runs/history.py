"""The states of a round, and every transition between them.

A round is *new*, *open* (begun.json), *complete* (made.json, and its decision has had its effect) or *ended*
(ended.json). What the store holds decides, and never the status that Kubeflow Pipelines reports: the exit task of a run
that succeeded receives COMPLETE, or RUNNING if its last tasks came from the cache, and so does one that failed (KFP
2.17.0, backend/src/v2/driver/resolve.go, resolves it from the state of the execution in ML Metadata). A terminated run
has no exit task, and a run that is retried in the UI has none the second time.

So a later run may find a round without an end. `begin_round` then says what became of the run before, and

- ends a round that is complete, and begins the next one;
- resumes an open round from its first starting policy, also if its own decision has moved the champion since;
- begins an open round again, under the same number, if somebody else has moved the champion.

The first of several runs of a round that records its outputs decides the round. Another one that made something else is
refused when it records them, before anything acts on its decision. A run that resumes a round knows the outputs that it
found, and may replace those, as long as they had no effect. docs/kubeflow/recurring.md has all transitions in a table.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from clincot.errors import InvalidInput
from clincot.records import StartingPolicy, format_time_now
from clincot.registry.champion import Champion, NoChampion, read_champion
from clincot.registry.manifest import NotPublished, read_manifest
from clincot.runs.round_records import (
    RoundOutputs,
    RoundStart,
    RunEnd,
    RunRound,
    build_round_key,
    build_run_key,
    build_unbegun_key,
    encode_record,
    find_round_end,
    find_round_failure,
    find_round_outputs,
    find_round_start,
    find_run_round,
    next_round_number,
    parse_stored_record,
    read_round_outputs,
    write_record,
    write_round_record,
)
from clincot.storage.store import KeyExists, KeyNotFound, Store, VersionConflict

_ATTEMPTS = 8  # to begin a round while other runs of the line begin theirs


class RoundTaken(InvalidInput):
    """Another run has decided the round, or has begun it again from another policy."""


class BegunRound(NamedTuple):
    """The round that a run does, and sentences that say what became of earlier runs of it."""

    begun: RoundStart
    notes: tuple[str, ...]


def begin_round(store: Store, start: StartingPolicy, number: int = 0, *, run: str, rounds: int = 1) -> BegunRound:
    """Begin, resume or repeat a round, and record that `run` is a run of it.

    start: the policy that a new round starts from. number: which round; 0: the next one. rounds: how many rounds the
    run does. A repeated call of the same run, whose pod was lost, returns the same.
    """
    line = start.line
    mine = find_run_round(store, line, run)
    if mine is not None and find_round_end(store, line, mine.number) is None:
        begun = find_round_start(store, line, mine.number)
        if begun is not None and begun.run == run:
            return BegunRound(begun, ())
    if number:
        begun, notes, repeats = _begin_requested(store, RoundStart(number=number, start=start, run=run))
    else:
        begun, notes = _begin_next(store, start, run)
        repeats = False
    record = RunRound(run=run, number=begun.number, rounds=rounds, start=begun.start.sha256, repeats=repeats)
    earlier = [find_round_outputs(store, line, number) for number in record.numbers]
    record = record.model_copy(update={"found": tuple(made.decision for made in earlier if made is not None)})
    write_record(store, build_run_key(line, run), record)
    store.delete(build_unbegun_key(line))
    return BegunRound(begun, notes)


def record_round_outputs(store: Store, line: str, outputs: RoundOutputs, *, run: str) -> str:
    """Record what a run made of a round, before anything acts on its decision; return what was done, in words.

    Raises RoundTaken if the round is over with other outputs, or was begun again from another policy in the meantime.
    """
    mine = _require_run_round(store, line, run, "records the outputs of")
    outputs = outputs.model_copy(update={"run": run, "start": mine.start})
    number = outputs.number
    if not mine.repeats and (other := _find_other_result(store, line, number, mine)) is not None:
        if other.has_same_content(outputs):
            return f"round {number} of {line}: the run {other.run} has recorded the same outputs already"
        raise RoundTaken(
            f"{store.url}: round {number} of {line} was decided by the run {other.run} ({other.verdict}, "
            f"{other.decision}) with other outputs than those of this run; nothing acts on this run's decision "
            f"({outputs.verdict}). Start another run for the next round"
        )
    begun = find_round_start(store, line, mine.number)
    if begun is not None and mine.start and begun.start.sha256 != mine.start:
        raise RoundTaken(
            f"{store.url}: the champion has changed, and the run {begun.run} has begun round {mine.number} of {line} "
            f"again from {begun.start.sha256[:12]}; this run started from {mine.start[:12]}, and nothing acts on its "
            "decision"
        )
    write_round_record(store, line, number, "made", outputs)
    return f"round {number} of {line}: {outputs.verdict}"


def end_round(store: Store, line: str, *, run: str, rounds: int = 1) -> RunEnd:
    """Record that a run has done everything its rounds need; return the record of the last of them.

    rounds: number of rounds in the run. A round that another run has ended keeps that run's record. Raises
    InvalidInput if the run began no round, or if one has no outputs.
    """
    mine = _require_run_round(store, line, run, "ends")
    numbers = range(mine.number, mine.number + rounds)
    for number in numbers:
        read_round_outputs(store, line, number)
    for number in numbers:
        if mine.repeats or find_round_end(store, line, number) is None:
            ended = RunEnd(number=number, state="SUCCEEDED", run=run, at=format_time_now())
            write_round_record(store, line, number, "ended", ended)
    last = find_round_end(store, line, numbers[-1])
    assert last is not None
    return last


def record_run_failure(store: Store, line: str, *, run: str, reported: str, error: str = "") -> RunEnd:
    """Record that a run failed, unless its round has ended; return the record of the failure, or that of the end.

    reported: the state that Kubeflow Pipelines reports, which is recorded and otherwise ignored. error: what it passes
    on, which is usually nothing; then the record says which task left the last record. A run that failed before its
    round began changes no round, even if an earlier one is open; its failure is recorded separately (see
    round_records.failed_before_start).
    """
    mine = find_run_round(store, line, run)
    if mine is None:
        error = error or "no error was passed on, and the run has no record: preflight or start_round failed"
        failed = RunEnd(number=None, state="FAILED", reported=reported, run=run, error=error, at=format_time_now())
        write_record(store, build_unbegun_key(line), failed)
        return failed
    ends = [find_round_end(store, line, number) for number in mine.numbers]
    open_numbers = [number for number, end in zip(mine.numbers, ends, strict=True) if end is None]
    if not open_numbers:
        return next(end for end in reversed(ends) if end is not None)
    number = open_numbers[0]
    failed = RunEnd(
        number=number,
        state="FAILED",
        reported=reported,
        run=run,
        error=error,
        last_record=_find_last_record(store, line, mine, open_numbers),
        at=format_time_now(),
    )
    if not error:
        said = f"no error was passed on; the last record of the run is that of {failed.last_record}"
        failed = failed.model_copy(update={"error": f"{said}. `clincot pipeline status {run}` names the task"})
    begun = find_round_start(store, line, mine.number)
    if begun is not None and begun.run not in ("", run):  # the record of the round is that of its latest run
        return failed.model_copy(update={"error": f"{failed.error}; the run {begun.run} has the round now"})
    write_round_record(store, line, number, "failed", failed)
    return failed


def is_round_complete(store: Store, line: str, outputs: RoundOutputs) -> bool:
    """Return whether a round with these outputs needs nothing more: its decision has had its effect.

    A verdict other than "promote" has none. A promotion has had its effect when the decision moved the champion.
    """
    if outputs.verdict != "promote":
        return True
    champion = _find_champion(store, line)
    return champion is not None and any(move.decision == outputs.decision for move in champion.moves)


def _begin_requested(store: Store, fresh: RoundStart) -> tuple[RoundStart, tuple[str, ...], bool]:
    """Begin, resume or repeat the round that was asked for by its number. The third value: the round is over."""
    line, number = fresh.start.line, fresh.number
    ended = find_round_end(store, line, number)
    outputs = find_round_outputs(store, line, number)
    begun, before = _take_round(store, fresh)
    if ended is not None:
        note = f"round {number} of {line} was ended by {_name_run(ended.run)}; this run was asked for it and repeats it"
        return begun, (note,), True
    if before is None or before.run == fresh.run:
        return begun, (), False
    lost = _describe_previous_run(store, before, by=fresh.run)
    repeats = outputs is not None and is_round_complete(store, line, outputs)
    return begun, (f"{lost}: this run resumes it from {begun.start.uri}",), repeats


def _take_round(store: Store, fresh: RoundStart) -> tuple[RoundStart, RoundStart | None]:
    """Begin a round, or note the run at the start that is there; return it, and the one that was there before."""
    for _ in range(_ATTEMPTS):
        found = _read_start(store, fresh.start.line, fresh.number)
        if found is None:
            if _create_start(store, fresh):
                return fresh, None
            continue
        before, tag = found
        begun = before.model_copy(update={"run": fresh.run})
        if begun == before or _replace_start(store, begun, tag):
            return begun, before
    raise _describe_contention(store, fresh.start.line)


def _begin_next(store: Store, start: StartingPolicy, run: str) -> tuple[RoundStart, tuple[str, ...]]:
    """End what is complete, then begin or resume the first round without an end."""
    line, notes = start.line, list[str]()
    for _ in range(_ATTEMPTS):
        fresh = RoundStart(number=next_round_number(store, line), start=start, run=run)
        found = _read_start(store, line, fresh.number)
        if found is None:
            if _create_start(store, fresh):
                return fresh, tuple(notes)
            continue
        before, tag = found
        attempt = _find_attempt(store, before)
        keep = _can_resume(store, start, before, attempt)
        complete = _list_complete_rounds(store, before, attempt)
        if len(complete) == attempt.rounds or (complete and not keep):
            notes += [_end_complete_round(store, line, outputs, by=run) for outputs in complete]
            continue
        if before.run == run:
            return before, tuple(notes)
        begun = before.model_copy(update={"run": run}) if keep else fresh
        if _replace_start(store, begun, tag):
            lost, address = _describe_previous_run(store, before, by=run), begun.start.uri
            resumes = f"{lost}: this run resumes it from {address}"
            again = f"{lost}: the champion has changed since, so this run begins it again from {address}"
            return begun, (*notes, resumes if keep else again)
    raise _describe_contention(store, line)


def _read_start(store: Store, line: str, number: int) -> tuple[RoundStart, str] | None:
    """Read the start of a round with the tag of its version; None if the round has not begun."""
    key = build_round_key(line, number, "begun")
    try:
        content, tag = store.read(key)
    except KeyNotFound:
        return None
    return parse_stored_record(RoundStart, content, f"{store.url}/{key}"), tag


def _create_start(store: Store, fresh: RoundStart) -> bool:
    """Write the start of a new round; False: another run has begun it meanwhile."""
    try:
        store.write_new(build_round_key(fresh.start.line, fresh.number, "begun"), encode_record(fresh))
    except KeyExists:
        return False
    return True


def _replace_start(store: Store, begun: RoundStart, tag: str) -> bool:
    """Replace the version with this tag; False: another run has replaced it meanwhile."""
    try:
        store.replace(build_round_key(begun.start.line, begun.number, "begun"), encode_record(begun), tag)
    except VersionConflict:
        return False
    return True


def _describe_contention(store: Store, line: str) -> RoundTaken:
    return RoundTaken(
        f"{store.url}: other runs of {line} began their rounds {_ATTEMPTS} times in the meantime; run this one again"
    )


def _find_attempt(store: Store, begun: RoundStart) -> RunRound:
    """The record of the run that has the round."""
    recorded = find_run_round(store, begun.start.line, begun.run) if begun.run else None
    if recorded is not None and recorded.number == begun.number:
        return recorded
    return RunRound(run=begun.run, number=begun.number, start=begun.start.sha256)


def _list_complete_rounds(store: Store, begun: RoundStart, attempt: RunRound) -> list[RoundOutputs]:
    """The outputs of the first rounds of the attempt that are complete, up to one that is not."""
    complete: list[RoundOutputs] = []
    for number in attempt.numbers:
        outputs = find_round_outputs(store, begun.start.line, number)
        if outputs is None or outputs.start not in ("", begun.start.sha256):
            break
        if not is_round_complete(store, begun.start.line, outputs):
            break
        complete.append(outputs)
    return complete


def _can_resume(store: Store, start: StartingPolicy, begun: RoundStart, attempt: RunRound) -> bool:
    """Whether the round goes on from its first start: the champion is unchanged, or its own decisions moved it."""
    if begun.start.id == start.id:
        return True
    line = begun.start.line
    champion = _find_champion(store, line)
    outputs = [find_round_outputs(store, line, number) for number in attempt.numbers]
    own = {made.decision for made in outputs if made is not None and made.start in ("", begun.start.sha256)}
    return champion is not None and champion.now.decision in own


def _end_complete_round(store: Store, line: str, outputs: RoundOutputs, *, by: str) -> str:
    """Record the end of a round whose run could not; return what was found, in words."""
    ended = RunEnd(number=outputs.number, state="SUCCEEDED", run=outputs.run, recorded_by=by, at=format_time_now())
    if find_round_end(store, line, outputs.number) is None:
        write_round_record(store, line, outputs.number, "ended", ended)
    effect = "the champion was moved" if outputs.verdict == "promote" else "nothing was to be promoted"
    failure = find_round_failure(store, line, outputs.number)
    how = "failed afterwards" if failure is not None and failure.run == outputs.run else "did not record its end"
    return (
        f"round {outputs.number} of {line} is complete ({outputs.verdict}; {effect}), but {_name_run(outputs.run)} "
        f"{how}: its end is recorded now"
    )


def _describe_previous_run(store: Store, before: RoundStart, *, by: str) -> str:
    """Say what became of the run that had the round, and record it if nobody has."""
    line, number = before.start.line, before.number
    failure = find_round_failure(store, line, number)
    begun = f"round {number} of {line} was begun by {_name_run(before.run)} and has not ended"
    if failure is not None and before.run in ("", failure.run):
        if failure.state == "LOST":
            return f"{begun}, because that run was terminated or lost"
        return f"{begun}, because that run failed ({failure.error})" if failure.error else f"{begun}: that run failed"
    lost = RunEnd(
        number=number,
        state="LOST",
        run=before.run,
        error="the run recorded neither an end nor a failure",
        last_record=_find_last_record(store, line, _find_attempt(store, before), [number]),
        recorded_by=by,
        at=format_time_now(),
    )
    write_round_record(store, line, number, "failed", lost)
    return f"{begun}, nor recorded a failure, so it was terminated, was lost or still runs"


def _find_other_result(store: Store, line: str, number: int, mine: RunRound) -> RoundOutputs | None:
    """The outputs with which another run decided the round: it ended or completed it, or recorded them meanwhile."""
    outputs = find_round_outputs(store, line, number)
    if outputs is None or outputs.run in ("", mine.run):
        return None
    over = find_round_end(store, line, number) is not None or is_round_complete(store, line, outputs)
    return outputs if over or outputs.decision not in mine.found else None


def _find_last_record(store: Store, line: str, attempt: RunRound, numbers: Iterable[int]) -> str:
    """The task that left the last record of the run's rounds in the store."""
    last = "start_round"
    for number in numbers:
        outputs = find_round_outputs(store, line, number)
        if outputs is None or outputs.start not in ("", attempt.start):
            break
        last = "record_round"
        if outputs.verdict == "promote":
            last = "publish" if _is_published(store, line, outputs) else last
            last = "deploy" if is_round_complete(store, line, outputs) else last
    return last


def _is_published(store: Store, line: str, outputs: RoundOutputs) -> bool:
    try:
        manifest = read_manifest(store, line, outputs.digests["checkpoint"])
    except (NotPublished, KeyError):
        return False
    return manifest.decision is not None and manifest.decision.id == outputs.decision


def _require_run_round(store: Store, line: str, run: str, doing: str) -> RunRound:
    record = find_run_round(store, line, run)
    if record is None:
        raise InvalidInput(
            f"{store.url}: the run {run} of {line} {doing} a round, but its record {build_run_key(line, run)} does "
            "not exist"
        )
    return record


def _find_champion(store: Store, line: str) -> Champion | None:
    try:
        return read_champion(store, line)
    except NoChampion:
        return None


def _name_run(run: str) -> str:
    return f"the run {run}" if run else "an earlier run"
