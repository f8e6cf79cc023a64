"""A log of a server's replies, from which an interrupted stage goes on.

Every reply is appended as it comes, in whatever order. A rerun reads the log instead of asking again, so only what was
under way is lost. A reply belongs to the content of its request (prompt, pictures, sampling, model), so the log never
gives an answer to another question.

    {"key": "…"}                                            what the replies belong to: config, inputs, code version
    ["hash of the request", ["yes", [-0.01], false, 97]]    one line a reply: the fields of a Generation or JudgeReply
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from clincot.prompts import Conversation, Turn
from clincot.records import hash_json


def hash_request(conversation: Conversation, options: Sequence[object]) -> str:
    """Identify a request by the content of its conversation, and by its options."""
    turns = [[turn.role, turn.text, list_picture_keys(turn)] for turn in conversation]
    return hash_json([turns, *options])


def list_picture_keys(turn: Turn) -> list[str]:
    """What identifies the content of a turn's pictures."""
    return [picture.key for picture in turn.pictures]


class ReplyLog:
    """The replies so far, by request. Threads may share it.

    A file with another key is started anew, and a last line that was cut off is dropped. path: None keeps no file.
    """

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self._path = path
        self._replies: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        end = self._read_replies(path, key) if path.is_file() else 0
        self._file = path.open("ab" if end else "wb")
        if end:
            self._file.truncate(end)
        else:
            self._write_line({"key": key})

    def __len__(self) -> int:
        return len(self._replies)

    def get(self, request: str) -> Any:
        """The logged reply of a request as a list of fields; None if it has to be asked."""
        return self._replies.get(request)

    def add(self, request: str, reply: Sequence[object]) -> None:
        """Append a reply."""
        with self._lock:
            if request not in self._replies:
                self._replies[request] = list(reply)
                if self._file is not None:
                    self._write_line([request, list(reply)])

    def close(self, *, complete: bool) -> None:
        """Close the file. complete: the stage has written its outputs, so the file is deleted."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._path is not None and (complete or not self._replies):
            self._path.unlink(missing_ok=True)

    def _write_line(self, content: object) -> None:
        assert self._file is not None
        self._file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read_replies(self, path: Path, key: str) -> int:
        """Read the replies; return the length of the readable part, 0 if the file has another key."""
        end = 0
        with path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    content = json.loads(line) if line.endswith(b"\n") else None
                    if number == 0:
                        if content != {"key": key}:
                            return 0
                    else:
                        request, reply = content or []
                        self._replies[request] = reply
                except ValueError:  # not JSON, or not two fields
                    break
                end += len(line)
        return end
