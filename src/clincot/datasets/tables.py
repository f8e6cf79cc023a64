"""Rows of tables in the formats that data sets are published in, streamed: Parquet, Arrow, JSON, JSON lines, CSV, TSV.

A row is a dict by column. A cell is what the format stores: text, numbers, lists, and for an image of Hugging Face's
`datasets` a dict with `bytes` and `path` (datasets 5.2.0, features/image.py).
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clincot.datasets.ingest.file_formats import FileFormat, find_delimiter, identify_format
from clincot.jsonl import InvalidRecord, parse_row

Row = dict[str, Any]
_BATCH_ROWS = 64  # rows of Parquet and Arrow that are in memory together: each may hold images
_BLOCK = 1 << 20
_MAX_ELEMENT = 64 << 20  # bytes of one element of a JSON array


def iter_table_rows(path: Path) -> Iterator[tuple[int, Row | InvalidRecord]]:
    """Yield (number from 1, row) in the file's order; a row that cannot be parsed is an InvalidRecord.

    Raises InvalidRecord, which names the format that was found, if the file is no table or is damaged.
    """
    found = identify_format(path)
    reader = _READERS.get(found)
    if reader is None:
        raise InvalidRecord(
            f"{path}: expected Parquet, Arrow, JSON, JSON lines, CSV or TSV, but the file is {found.value}"
        )
    yield from reader(path)


def _read_parquet(path: Path) -> Iterator[tuple[int, Row | InvalidRecord]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for group in range(file.num_row_groups):  # an iterator over all groups keeps memory of those it has read
                for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, row
    except (pa.ArrowException, OSError) as error:
        raise InvalidRecord(
            f"{path}: a Parquet file that is damaged or cut off after {number} rows ({error})"
        ) from None


def _read_arrow(path: Path) -> Iterator[tuple[int, Row | InvalidRecord]]:
    import pyarrow as pa

    number = 0
    try:
        with pa.OSFile(str(path)) as file:  # of a mapped file, all pages that were read would stay in memory
            if identify_format(path) is FileFormat.ARROW_FILE:
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(at) for at in range(reader.num_record_batches))
            else:
                batches = iter(pa.ipc.open_stream(file))
            for batch in batches:
                batch.validate(full=True)  # Arrow trusts offsets: those of a damaged file would crash the process
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                        number += 1
                        yield number, row
    except (pa.ArrowException, OSError) as error:
        raise InvalidRecord(f"{path}: an Arrow file that is damaged or cut off after {number} rows ({error})") from None


def _read_json_lines(path: Path) -> Iterator[tuple[int, Row | InvalidRecord]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _try_parse(line)


def _try_parse(line: bytes) -> Row | InvalidRecord:
    try:
        return parse_row(line, where="this line")
    except InvalidRecord as error:
        return error


def _read_json_array(path: Path) -> Iterator[tuple[int, Row | InvalidRecord]]:
    """Stream the elements of an array: a block is read when the elements of the earlier blocks are used up."""
    scanner = _ArrayScanner(path)
    for number, value in enumerate(scanner.iter_elements(), start=1):
        if isinstance(value, dict):
            yield number, value
        else:
            yield number, InvalidRecord(f"expected a JSON object, got {type(value).__name__} {str(value)[:80]!r}")


class _ArrayScanner:
    """Decodes a JSON array of any length element by element, with at most one element and one block in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._text = ""
        self._at = 0
        self._decoder = json.JSONDecoder()

    def iter_elements(self) -> Iterator[Any]:
        with self._path.open("rb") as file:
            blocks = self._iter_blocks(iter(lambda: file.read(_BLOCK), b""))
            first = self._next_mark(blocks)
            assert first == "["  # identify_format has seen it
            mark = self._peek(blocks)
            count = 0
            while mark != "]":
                yield self._decode_element(blocks, count)
                count += 1
                mark = self._next_mark(blocks)
                if mark not in (",", "]"):
                    raise self._damaged(count, f"expected a comma or the end of the array, got {mark!r}")
                if mark == ",":
                    self._peek(blocks)

    def _iter_blocks(self, blocks: Iterator[bytes]) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        try:
            for block in blocks:
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise InvalidRecord(f"{self._path}: not UTF-8 ({error.reason})") from None

    def _extend(self, blocks: Iterator[str]) -> bool:
        block = next(blocks, None)
        if block is None:
            return False
        self._text, self._at = self._text[self._at :] + block, 0
        return True

    def _peek(self, blocks: Iterator[str]) -> str:
        """The next character that is no space, which stays; "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._extend(blocks):
                return ""

    def _next_mark(self, blocks: Iterator[str]) -> str:
        mark = self._peek(blocks)
        self._at += bool(mark)
        return mark

    def _decode_element(self, blocks: Iterator[str], count: int) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                fault = f"{error.msg} at character {error.pos - self._at} of the element"
            except RecursionError:
                raise self._damaged(count, "it is nested too deeply") from None
            else:
                # A number at the end of a block may go on in the next one.
                if end < len(self._text) or isinstance(value, dict | list | str) or not self._extend(blocks):
                    self._at = end
                    return value
                continue
            if len(self._text) - self._at > _MAX_ELEMENT or not self._extend(blocks):
                raise self._damaged(count, fault)

    def _damaged(self, count: int, fault: str) -> InvalidRecord:
        return InvalidRecord(f"{self._path}: a JSON array whose element {count + 1} cannot be read: {fault}")


def _read_json_object(path: Path) -> Iterator[tuple[int, Row | InvalidRecord]]:
    """The rows of the only list of objects in an object, such as {"data": […]}."""
    if path.stat().st_size > _MAX_ELEMENT:
        raise InvalidRecord(f"{path}: one JSON object of more than {_MAX_ELEMENT} bytes. Write its rows as an array")
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InvalidRecord(f"{path}: one JSON object over several lines that cannot be read: {error}") from None
    lists = {name: rows for name, rows in content.items() if isinstance(rows, list) and rows}
    if len(lists) != 1:
        raise InvalidRecord(
            f"{path}: one JSON object with the fields {', '.join(map(repr, content))}; expected an array of rows, or an"
            " object with one field that is such an array"
        )
    (rows,) = lists.values()
    for number, row in enumerate(rows, start=1):
        yield number, row if isinstance(row, dict) else InvalidRecord(f"expected an object, got {type(row).__name__}")


def _read_delimited(path: Path) -> Iterator[tuple[int, Row | InvalidRecord]]:
    csv.field_size_limit(min(sys.maxsize, _MAX_ELEMENT))
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            reader = csv.reader(file, delimiter=find_delimiter(header.strip()), strict=True)
            names = [name.strip() for name in next(reader)]
            if repeated := {name for name in names if name and names.count(name) > 1}:
                raise InvalidRecord(f"{path}: the columns {', '.join(map(repr, sorted(repeated)))} occur twice")
            number = 0
            for cells in reader:
                if not cells:
                    continue
                number += 1
                if len(cells) != len(names):
                    yield number, InvalidRecord(f"expected {len(names)} cells as in the header, got {len(cells)}")
                else:
                    yield number, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise InvalidRecord(
            f"{path}:{reader.line_num}: a table of separated values that cannot be read: {error}"
        ) from None
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None


_READERS: dict[FileFormat, Callable[[Path], Iterator[tuple[int, Row | InvalidRecord]]]] = {
    FileFormat.PARQUET: _read_parquet,
    FileFormat.ARROW_FILE: _read_arrow,
    FileFormat.ARROW_STREAM: _read_arrow,
    FileFormat.JSON_LINES: _read_json_lines,
    FileFormat.JSON_ARRAY: _read_json_array,
    FileFormat.JSON_OBJECT: _read_json_object,
    FileFormat.DELIMITED: _read_delimited,
}
