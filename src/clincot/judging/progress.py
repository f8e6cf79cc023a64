"""A log of the judges' replies, from which an interrupted panel goes on.

Calling models is the expensive part of judging, and judgements.jsonl appears only when it is complete. So every reply
is appended to a second file as it comes, in whatever order, and a rerun reads that file instead of asking again. Failed
requests are not logged: a rerun asks them again.

    {"key": "…"}                                          what the replies belong to: config, inputs and code version
    ["candidate-…", "judge's digest", 0.93, "", 0.98]     candidate, judge, score, reason, mass; one line a reply
"""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from clincot.models.protocols import JudgeReply


class JudgementLog:
    """The replies so far, by candidate and judge's digest. Threads may share it; to be used as a context manager.

    A file with another key is started anew. A last line that was cut off is dropped. path: None keeps no file.
    """

    def __init__(self, path: Path | None, key: str = "") -> None:
        self._path = path
        self._replies: dict[tuple[str, str], JudgeReply] = {}
        self._lock = threading.Lock()
        self._file = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        end = self._read_replies(path, key)
        self._file = path.open("ab" if end else "wb")
        if end:
            self._file.truncate(end)
        else:
            self._write_line({"key": key})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported by the write that failed
                self._file.close()
        if not self._replies:
            self.remove()

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, candidate: str, judge: str) -> JudgeReply | None:
        """The logged reply of a judge, by its digest; None if it has to be asked."""
        return self._replies.get((candidate, judge))

    def add(self, candidate: str, judge: str, reply: JudgeReply) -> None:
        """Append a reply, unless the request failed."""
        if reply.failed:
            return
        with self._lock:
            if (candidate, judge) in self._replies:
                return
            self._replies[candidate, judge] = reply
            if self._file is not None:
                self._write_line([candidate, judge, reply.score, reply.reason, reply.mass])

    def remove(self) -> None:
        """Delete the file: the judgements are complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write_line(self, content: object) -> None:
        assert self._file is not None
        self._file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read_replies(self, path: Path, key: str) -> int:
        """Read the replies; return the length of the readable part, 0 if the file is missing or has another key."""
        if not path.is_file():
            return 0
        end = 0
        with path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    content = json.loads(line) if line.endswith(b"\n") else None
                    if number == 0:
                        if content != {"key": key}:
                            return 0
                    else:
                        candidate, judge, score, reason, mass = content or []
                        self._replies[candidate, judge] = JudgeReply(score, reason=reason, mass=mass)
                except ValueError:  # not JSON, or not five fields
                    break
                end += len(line)
        return end
