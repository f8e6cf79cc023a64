"""JSON lines: records in, records out, streaming, and never a half-written file under its final name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from clincot.errors import InvalidInput
from clincot.records import Record

R = TypeVar("R", bound=Record)


class InvalidRecord(InvalidInput):
    """A line that is not the record it should be: says file:line, what was expected and what came."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[str]]:
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


def write_json(path: Path, content: object) -> None:
    """A JSON document, written aside and then renamed; keys sorted, so that the same content is the same bytes.

    Raises ValueError for NaN and infinity.
    """
    with atomic_write(path) as file:
        json.dump(content, file, indent=2, sort_keys=True, allow_nan=False)
        file.write("\n")


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write one record a line, aside and then renamed; returns how many."""
    count = 0
    with atomic_write(path) as file:
        for record in records:
            file.write(record.model_dump_json() + "\n")
            count += 1
    return count


def read_records(path: Path, kind: type[R]) -> Iterator[R]:
    """Stream records; a bad line, a truncated last line or a repeated id raises BadRecord naming file:line."""
    seen: set[bytes] = set()
    for number, line in _iter_lines(path):
        record = parse_record(line, kind, where=f"{path}:{number}")
        key = hashlib.blake2b(record.id.encode(), digest_size=8).digest()
        if key in seen:
            raise InvalidRecord(f"{path}:{number}: duplicate id {record.id!r}; every {kind.__name__} may occur once")
        seen.add(key)
        yield record


def parse_record(line: str, kind: type[R], *, where: str) -> R:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise InvalidRecord(f"{where}: not a {kind.__name__}: {format_validation_error(error)}") from None


def format_validation_error(error: ValidationError) -> str:
    """A validation error in one line: field, what was expected, what came."""
    parts = []
    for item in error.errors(include_url=False):
        field = ".".join(str(step) for step in item["loc"])
        came = repr(item.get("input"))
        came = came if len(came) <= 120 else came[:117] + "…"
        parts.append((f"{field}: " if field else "") + f"{item['msg']} (got {came})")
    return "; ".join(parts)


def parse_row(line: bytes, *, where: str) -> dict[str, Any]:
    """One line of somebody else's JSONL as an object, before it becomes records; raises BadRecord."""
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_reject_repeated_keys)
    except json.JSONDecodeError as error:
        came = line.rstrip()[:80].decode("utf-8", errors="replace")
        raise InvalidRecord(f"{where}: not JSON ({error.msg} at column {error.colno}): {came!r}") from None
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise InvalidRecord(f"{where}: nested too deeply to be a row") from None
    except _RepeatedKey as error:
        raise InvalidRecord(f"{where}: the field {error.args[0]!r} occurs twice in one row") from None
    if not isinstance(row, dict):
        raise InvalidRecord(f"{where}: expected a JSON object, got {type(row).__name__}")
    if b"\\ud" in line.lower():  # an escaped surrogate; half of a pair is no text and could not be written again
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.end]
            raise InvalidRecord(f"{where}: half of a surrogate pair, {half!r}, is not text") from None
    return row


class _RepeatedKey(Exception):
    pass


def _reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):  # json would keep the last one in silence
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return row


def _iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-blank lines with their numbers; a file that ends without a newline was cut off."""
    with path.open("rb") as file:
        number, raw = 0, b"\n"
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            if not raw.endswith(b"\n"):
                raise InvalidRecord(
                    f"{path}:{number}: the file ends in the middle of a line; it was cut off: {raw[:80]!r}"
                )
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InvalidRecord(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start})") from None


def hash_files(*paths: Path) -> str:
    """sha256 over the bytes of the files, in the order given."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


M = TypeVar("M", bound=BaseModel)


def read_json_model(path: Path, kind: type[M]) -> M:
    """A JSON file as `kind`; raises BadRecord naming the file, what was expected and what came."""
    content = read_json(path)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InvalidRecord(f"{path}: not a {kind.__name__}: {format_validation_error(error)}") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidRecord(f"{path}: no such file; expected a run folder with {path.name} in it") from None
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
