"""A log of a server's replies, from which an interrupted stage goes on.

Every reply is appended as it comes, in whatever order. A rerun reads the log instead of asking again, so only what was
under way is lost. A reply belongs to the content of its request (prompt, pictures, sampling, model), so the log never
gives an answer to another question.

    {"key": "…"}                                            what the replies belong to: config, inputs, code version
    ["hash of the request", ["yes", [-0.01], false, 97]]    one line a reply: the fields of a Generation or JudgeReply
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clincot.jsonl import KeyedLog
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
    """The replies so far, by request: a KeyedLog of requests and the fields of their replies. Threads may share it."""

    def __init__(self, path: Path | None = None, key: str = "") -> None:
        self._log: KeyedLog[str, list[object]] = KeyedLog(
            path, key, dump=lambda request, reply: [request, reply], load=_load_reply
        )

    def __len__(self) -> int:
        return len(self._log.entries)

    def get(self, request: str) -> Any:
        """The logged reply of a request as a list of fields; None if it has to be asked."""
        return self._log.entries.get(request)

    def add(self, request: str, reply: Sequence[object]) -> None:
        """Append a reply."""
        self._log.add(request, list(reply))

    def close(self, *, complete: bool) -> None:
        """Close the file. complete: the stage has written its outputs, so the file is deleted."""
        self._log.close()
        if complete:
            self._log.remove()


def _load_reply(content: Any) -> tuple[str, list[object]]:
    request, reply = content
    return request, reply
