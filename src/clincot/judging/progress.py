"""A log of the judges' replies, from which an interrupted panel goes on.

Calling models is the expensive part of judging, and judgements.jsonl appears only when it is complete. So every reply
is appended to a second file as it comes, in whatever order, and a rerun reads that file instead of asking again. Failed
requests are not logged: a rerun asks them again.

    {"key": "…"}                                          what the replies belong to: config, inputs and code version
    ["candidate-…", "judge's digest", 0.93, "", 0.98]     candidate, judge, score, reason, mass; one line a reply
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from clincot.jsonl import KeyedLog
from clincot.models.protocols import JudgeReply


class JudgementLog:
    """The replies so far, by candidate and judge's digest: a KeyedLog. To be used as a context manager.

    Threads may share it.
    """

    def __init__(self, path: Path | None, key: str = "") -> None:
        self._log: KeyedLog[tuple[str, str], JudgeReply] = KeyedLog(path, key, dump=_dump_reply, load=_load_reply)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._log.close()

    def __len__(self) -> int:
        return len(self._log.entries)

    def get(self, candidate: str, judge: str) -> JudgeReply | None:
        """The logged reply of a judge, by its digest; None if it has to be asked."""
        return self._log.entries.get((candidate, judge))

    def add(self, candidate: str, judge: str, reply: JudgeReply) -> None:
        """Append a reply, unless the request failed."""
        if not reply.failed:
            self._log.add((candidate, judge), reply)

    def remove(self) -> None:
        """Delete the file: the judgements are complete."""
        self._log.remove()


def _dump_reply(name: tuple[str, str], reply: JudgeReply) -> object:
    return [*name, reply.score, reply.reason, reply.mass]


def _load_reply(content: Any) -> tuple[tuple[str, str], JudgeReply]:
    candidate, judge, score, reason, mass = content
    return (candidate, judge), JudgeReply(score, reason=reason, mass=mass)
