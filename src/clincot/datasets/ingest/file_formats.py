"""Which format a file has, by its first bytes, so that no message guesses at one from the file's name."""

from __future__ import annotations

import codecs
import csv
import json
from enum import StrEnum
from pathlib import Path

from clincot.jsonl import InvalidRecord

_HEAD_BYTES = 1 << 16


class FileFormat(StrEnum):
    """The formats that are told apart; the value is how a message names the format."""

    PARQUET = "a Parquet file"
    ARROW_FILE = "an Arrow file"
    ARROW_STREAM = "an Arrow stream"
    JSON_ARRAY = "a JSON array"
    JSON_OBJECT = "one JSON object over several lines"
    JSON_LINES = "JSON lines"
    DELIMITED = "a table of separated values (CSV or TSV)"
    ZIP = "a ZIP archive"
    GZIP = "a gzip file"
    TAR = "a tar archive"
    UTF16 = "text in UTF-16"
    PNG = "a PNG image"
    JPEG = "a JPEG image"
    DICOM = "a DICOM file"
    SQLITE = "an SQLite database"
    EXCEL = "an Excel workbook of the old binary format"
    POINTER = "a pointer of Git LFS; the file itself was not downloaded"
    EMPTY = "an empty file"
    UNKNOWN = "of an unknown format"


_MAGIC: tuple[tuple[bytes, FileFormat], ...] = (
    (b"PAR1", FileFormat.PARQUET),
    (b"ARROW1", FileFormat.ARROW_FILE),
    (b"\xff\xff\xff\xff", FileFormat.ARROW_STREAM),  # the continuation marker of the first message
    (b"PK\x03\x04", FileFormat.ZIP),
    (b"PK\x05\x06", FileFormat.ZIP),
    (b"\x1f\x8b", FileFormat.GZIP),
    (codecs.BOM_UTF16_LE, FileFormat.UTF16),
    (codecs.BOM_UTF16_BE, FileFormat.UTF16),
    (b"\x89PNG", FileFormat.PNG),
    (b"\xff\xd8\xff", FileFormat.JPEG),
    (b"SQLite format 3\0", FileFormat.SQLITE),
    (b"\xd0\xcf\x11\xe0", FileFormat.EXCEL),
    (b"version https://git-lfs", FileFormat.POINTER),
)


def identify_format(path: Path) -> FileFormat:
    """Identify a file's format by its content; the name decides nothing."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head.strip():
        return FileFormat.EMPTY
    for magic, found in _MAGIC:
        if head.startswith(magic):
            return found
    if head[128:132] == b"DICM":
        return FileFormat.DICOM
    if head[257:262] == b"ustar":
        return FileFormat.TAR
    return _identify_text(head)


def _identify_text(head: bytes) -> FileFormat:
    if b"\0" in head:  # UTF-16 without its mark: every other byte of plain text is zero
        zeros = max(head[0::2].count(0), head[1::2].count(0))
        return FileFormat.UTF16 if zeros > len(head) // 4 else FileFormat.UNKNOWN
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text.startswith(b"["):
        return FileFormat.JSON_ARRAY
    first = text.splitlines()[0]
    if text.startswith(b"{"):
        if len(text.splitlines()) == 1:
            return FileFormat.JSON_LINES
        try:
            json.loads(first.decode("utf-8", errors="replace"))
        except json.JSONDecodeError:
            # The first line of an indented object holds its brace and at most one field.
            return (
                FileFormat.JSON_OBJECT if first.rstrip() in (b"{",) or first.endswith(b",") else FileFormat.JSON_LINES
            )
        return FileFormat.JSON_LINES
    decoder = codecs.getincrementaldecoder("utf-8")()  # incremental: the last character of the head may be cut
    try:
        decoder.decode(head)
    except UnicodeDecodeError:
        return FileFormat.UNKNOWN
    header = first.decode("utf-8", errors="replace")
    return FileFormat.DELIMITED if find_delimiter(header) else FileFormat.UNKNOWN


def find_delimiter(header: str) -> str:
    """The separator of a table's header row: the tab, comma or semicolon that occurs most; "" if none occurs."""
    counts = {mark: len(next(csv.reader([header], delimiter=mark))) - 1 for mark in "\t,;"}
    best = max(counts, key=lambda mark: counts[mark])
    return best if counts[best] else ""


def check_json_lines(source: Path) -> None:
    """Raise InvalidRecord if a file that should be JSON lines is of another format that can be named."""
    found = identify_format(source)
    if found in (FileFormat.JSON_LINES, FileFormat.UNKNOWN, FileFormat.EMPTY):
        return  # each bad line is refused by its number
    remedy = {
        FileFormat.UTF16: "Save it as UTF-8",
        FileFormat.DICOM: "Read DICOM files with `clincot ingest dicom`",
        FileFormat.GZIP: "Unpack it first",
        FileFormat.TAR: "Unpack it first",
        FileFormat.POINTER: "Run `git lfs pull` where it came from",
    }.get(found, f"Read it with `clincot ingest hf {source}`")
    raise InvalidRecord(f"{source}: expected JSON lines, but the file is {found.value}. {remedy}")
