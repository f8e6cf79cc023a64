"""JSON lines: records in, records out, streaming, and never a half-written file under its final name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import ValidationError

from clincot.records import Record

R = TypeVar("R", bound=Record)


class BadRecord(ValueError):
    """A line that is not the record it should be: says file:line, what was expected and what came."""


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[IO[str]]:
    """A text file that appears under `path` only when the block ends well; on an error nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + f".{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write one record a line, aside and then renamed; returns how many."""
    count = 0
    with written_aside(path) as file:
        for record in records:
            file.write(record.model_dump_json() + "\n")
            count += 1
    return count


def read_records(path: Path, kind: type[R]) -> Iterator[R]:
    """Stream records; a bad line, a truncated last line or a repeated id raises BadRecord naming file:line."""
    seen: set[bytes] = set()
    for number, line in _lines(path):
        record = parse_record(line, kind, where=f"{path}:{number}")
        key = hashlib.blake2b(record.id.encode(), digest_size=8).digest()
        if key in seen:
            raise BadRecord(
                f"{path}:{number}: duplicate id {record.id!r}; every {kind.__name__} may occur once"
            )
        seen.add(key)
        yield record


def parse_record(line: str, kind: type[R], *, where: str) -> R:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise BadRecord(f"{where}: not a {kind.__name__}: {explain(error)}") from None


def explain(error: ValidationError) -> str:
    """A validation error in one line: field, what was expected, what came."""
    parts = []
    for item in error.errors(include_url=False):
        field = ".".join(str(step) for step in item["loc"])
        came = repr(item.get("input"))
        came = came if len(came) <= 120 else came[:117] + "…"
        parts.append((f"{field}: " if field else "") + f"{item['msg']} (got {came})")
    return "; ".join(parts)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Stream (line number, object) of somebody else's JSONL, before it becomes records."""
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadRecord(
                f"{path}:{number}: not JSON ({error.msg} at column {error.colno}): {line[:80]!r}"
            ) from None
        if not isinstance(row, dict):
            raise BadRecord(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers; a file that ends without a newline was cut off."""
    with path.open("rb") as file:
        number, raw = 0, b"\n"
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            if not raw.endswith(b"\n"):
                raise BadRecord(
                    f"{path}:{number}: the file ends in the middle of a line; it was cut off: {raw[:80]!r}"
                )
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BadRecord(
                    f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})"
                ) from None


def file_digest(*paths: Path) -> str:
    """sha256 over the bytes of the files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()
