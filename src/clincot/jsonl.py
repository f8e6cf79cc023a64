"""JSON and JSON Lines files: streamed records, precise errors, and atomic writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from clincot.errors import InvalidInput
from clincot.records import Record

R = TypeVar("R", bound=Record)
M = TypeVar("M", bound=BaseModel)
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class InvalidRecord(InvalidInput):
    """An invalid record or file; the message names file and line, what was expected and what was found."""


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[str]]:
    """Open a text file that appears under `path` only if the block succeeds. An error leaves no file behind.

    Writes to a temporary file in the same folder, flushes it to disk and renames it. A killed process may leave the
    temporary file (*.partial), never an incomplete file under the final name.
    """
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
    """Write a JSON document atomically, with sorted keys, so that equal content gives equal bytes.

    Raises ValueError for NaN and infinity.
    """
    with atomic_write(path) as file:
        json.dump(content, file, indent=2, sort_keys=True, allow_nan=False)
        file.write("\n")


def write_records(path: Path, records: Iterable[Record]) -> int:
    """Write one record per line, atomically; return the number of records."""
    count = 0
    with atomic_write(path) as file:
        for record in records:
            file.write(record.model_dump_json() + "\n")
            count += 1
    return count


def read_records(path: Path, kind: type[R]) -> Iterator[R]:
    """Stream the records of a file.

    Raises InvalidRecord, naming file and line, for an invalid line, a truncated last line or a repeated id.
    """
    seen: set[bytes] = set()
    for number, line in _iter_lines(path):
        record = parse_record(line, kind, where=f"{path}:{number}")
        key = hashlib.blake2b(record.id.encode(), digest_size=8).digest()
        if key in seen:
            raise InvalidRecord(f"{path}:{number}: duplicate id {record.id!r}; every {kind.__name__} may occur once")
        seen.add(key)
        yield record


def read_models(path: Path, kind: type[M]) -> Iterator[M]:
    """Stream the lines of a file that have no ids. Raises InvalidRecord, naming file and line, for an invalid line."""
    for number, line in _iter_lines(path):
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            problem = format_validation_error(error)
            raise InvalidRecord(f"{path}:{number}: not a {kind.__name__}: {problem}") from None


def parse_record(line: str, kind: type[R], *, where: str) -> R:
    """Parse one line as a record. Raises InvalidRecord, whose message begins with `where`."""
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        raise InvalidRecord(f"{where}: not a {kind.__name__}: {format_validation_error(error)}") from None


def format_validation_error(error: ValidationError) -> str:
    """Format a validation error in one line: field, what was expected, what was found."""
    return "; ".join(format_problem(item) for item in error.errors(include_url=False))


def format_problem(item: ErrorDetails) -> str:
    """Format one problem of a validation error: field, what was expected, what was found."""
    field = ".".join(str(step) for step in item["loc"])
    actual = repr(item.get("input"))
    actual = actual if len(actual) <= 120 else actual[:117] + "…"
    return (f"{field}: " if field else "") + f"{strip_prefix(item['msg'])} (got {actual})"


def strip_prefix(message: str) -> str:
    """Remove what pydantic puts before the message of a validator's ValueError."""
    return message.removeprefix("Value error, ")


def parse_row(line: bytes, *, where: str) -> dict[str, Any]:
    """Parse one line of a foreign JSONL file as an object. Raises InvalidRecord.

    Stricter than json.loads: rejects repeated keys and unpaired surrogates, which could not be written again.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_reject_repeated_keys)
    except json.JSONDecodeError as error:
        start = line.rstrip()[:80].decode("utf-8", errors="replace")
        raise InvalidRecord(f"{where}: not JSON ({error.msg} at column {error.colno}): {start!r}") from None
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except RecursionError:
        raise InvalidRecord(f"{where}: nested too deeply to be a row") from None
    except _RepeatedKey as error:
        raise InvalidRecord(f"{where}: the field {error.args[0]!r} occurs twice in one row") from None
    if not isinstance(row, dict):
        raise InvalidRecord(f"{where}: expected a JSON object, got {type(row).__name__}")
    if b"\\ud" in line.lower():  # an escaped surrogate, perhaps without its other half
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
    if len(row) < len(pairs):  # json would silently keep the last one
        keys = [key for key, _ in pairs]
        raise _RepeatedKey(next(key for key in keys if keys.count(key) > 1))
    return row


def _iter_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield non-blank lines with their numbers. Raises InvalidRecord if the last line has no newline."""
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
    """Compute the sha256 of the concatenated bytes of the files, in the order of the arguments."""
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


def read_json_model(path: Path, kind: type[M]) -> M:
    """Read a JSON file as a model. Raises InvalidRecord, which names the file and the invalid field."""
    content = read_json(path)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise InvalidRecord(f"{path}: not a {kind.__name__}: {format_validation_error(error)}") from None


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder. Raises InvalidRecord if it is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidRecord(f"{path}: no such file; expected a run folder with {path.name} in it") from None
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InvalidRecord(f"{path}:{error.lineno}: not JSON ({error.msg})") from None


class KeyedLog(Generic[K, V]):
    """Entries that are appended as they come, and from which an interrupted run goes on. Threads may share it.

    The first line, {"key": …}, says what the entries belong to. A file with another key is started anew, and a last
    line that was cut off is dropped. path: None keeps no file. dump: an entry as the JSON content of its line. load:
    the reverse; it raises ValueError for anything else.
    """

    def __init__(
        self, path: Path | None, key: str, *, dump: Callable[[K, V], object], load: Callable[[Any], tuple[K, V]]
    ) -> None:
        self.entries: dict[K, V] = {}
        self._path = path
        self._dump, self._load = dump, load
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        end = self._read_entries(path, key) if path.is_file() else 0
        self._file = path.open("ab" if end else "wb")
        if end:
            self._file.truncate(end)
        else:
            self._write_line({"key": key})

    def add(self, name: K, entry: V) -> None:
        """Append an entry, unless there is one of that name."""
        with self._lock:
            if name not in self.entries:
                self.entries[name] = entry
                if self._file is not None:
                    self._write_line(self._dump(name, entry))

    def close(self) -> None:
        """Close the file, and delete it if it has no entry."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported by the write that failed
                self._file.close()
            self._file = None
        if not self.entries:
            self.remove()

    def remove(self) -> None:
        """Delete the file: what the entries were for is complete."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _write_line(self, content: object) -> None:
        assert self._file is not None
        self._file.write(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def _read_entries(self, path: Path, key: str) -> int:
        """Read the entries; return the length of the readable part, 0 if the file has another key."""
        end = 0
        with path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    content = json.loads(line) if line.endswith(b"\n") else None
                    if number == 0:
                        if content != {"key": key}:
                            return 0
                    else:
                        name, entry = self._load(content or [])
                        self.entries[name] = entry
                except ValueError:  # not JSON, or no entry
                    break
                end += len(line)
        return end
