"""Index of the rows and images of one ingest, kept in a temporary database so that memory does not grow with the rows.

Questions and answers are stored as digests, never as text. The database is SQLite's unnamed one in the folder for
temporary files: private to the process, and deleted when it is closed or the process ends.
"""

from __future__ import annotations

import errno
import sqlite3
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Self

_TABLES = """
    PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -4000;
    CREATE TABLE files (path TEXT PRIMARY KEY, refused TEXT, sha256 TEXT, width INT, height INT, suffix TEXT, hash TEXT)
        WITHOUT ROWID;
    CREATE INDEX by_content ON files (sha256);
    CREATE TABLE ids (id BLOB PRIMARY KEY, location TEXT) WITHOUT ROWID;
    CREATE TABLE answers (question BLOB PRIMARY KEY, answer BLOB, location TEXT) WITHOUT ROWID;
    CREATE TABLE studies (sha256 TEXT, folder TEXT, modality TEXT, patient TEXT, split TEXT, location TEXT,
        PRIMARY KEY (sha256, folder)) WITHOUT ROWID;
    CREATE TABLE frames (name TEXT PRIMARY KEY, content TEXT) WITHOUT ROWID;
"""
_DISK_ERRNOS = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_IOERR: errno.EIO}


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image file that was decoded completely."""

    sha256: str
    width: int  # pixels, after the EXIF rotation
    height: int
    suffix: str
    near: int  # perceptual hash (clincot.datasets.near_duplicates)


@dataclass(frozen=True)
class TakenStudy:
    """A study that this ingest has written to a folder."""

    modality: str
    patient: str
    split: str
    location: str  # of the row that brought it, such as "row 3"


class IngestIndex:
    """Index of one ingest, used as a context manager. If its disk is full, the block raises OSError."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(_TABLES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._db.close()
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the higher bits hold the extended error code
        if code in _DISK_ERRNOS:
            raise OSError(
                _DISK_ERRNOS[code],
                f"{error} in the folder for temporary files, where the ingest keeps its index. Free some space there,"
                " or set SQLITE_TMPDIR to another folder, and run the same command again",
            ) from error

    def find_file(self, path: Path) -> ImageFacts | str | None:
        """Return a file's facts, the reason why it is refused, or None if it has not been inspected."""
        row = self._db.execute(
            "SELECT refused, sha256, width, height, suffix, hash FROM files WHERE path = ?", (str(path),)
        ).fetchone()
        if row is None:
            return None
        refused, sha256, width, height, suffix, near = row
        return str(refused) if refused is not None else ImageFacts(sha256, width, height, suffix, int(near, 16))

    def remember_file(self, path: Path, facts: ImageFacts | str) -> None:
        """Store a file's facts, or the reason why it is refused."""
        if isinstance(facts, str):
            values: tuple[object, ...] = (facts, None, None, None, None, None)
        else:
            *others, near = astuple(facts)
            values = (None, *others, f"{near:016x}")  # as text: SQLite's integers are signed
        self._db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", (str(path), *values))

    def find_frame(self, name: str) -> str | None:
        """Return what was remembered of a frame of a DICOM file, or None."""
        row = self._db.execute("SELECT content FROM frames WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def remember_frame(self, name: str, content: str) -> None:
        """Store what a later row needs of a rendered frame; the first content stays."""
        self._db.execute("INSERT OR IGNORE INTO frames VALUES (?, ?)", (name, content))

    def register_id(self, digest: bytes, location: str) -> str:
        """Return the location of the first row with this id, which may be this row."""
        self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (digest, location))
        return str(self._db.execute("SELECT location FROM ids WHERE id = ?", (digest,)).fetchone()[0])

    def register_answer(self, question: bytes, answer: bytes, location: str) -> tuple[bytes, str]:
        """Return the first answer to this question and its location, which may be the arguments themselves."""
        self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (question, answer, location))
        known = self._db.execute("SELECT answer, location FROM answers WHERE question = ?", (question,)).fetchone()
        return bytes(known[0]), str(known[1])

    def find_studies(self, sha256: str) -> dict[str, TakenStudy]:
        """Return {folder: its study with this image}."""
        rows = self._db.execute(
            "SELECT folder, modality, patient, split, location FROM studies WHERE sha256 = ?", (sha256,)
        )
        return {folder: TakenStudy(*rest) for folder, *rest in rows}

    def add_study(self, sha256: str, folder: str, study: TakenStudy) -> None:
        """Record that a folder has a study with this image."""
        self._db.execute("INSERT INTO studies VALUES (?, ?, ?, ?, ?, ?)", (sha256, folder, *astuple(study)))

    def contains_image(self, folder: str, sha256_start: str) -> bool:
        """Return whether a study of the folder has an image whose sha256 starts with `sha256_start`."""
        # Every hexadecimal digit sorts before "g", so the range is that of the prefix and the primary key serves it.
        rows = self._db.execute(
            "SELECT 1 FROM studies WHERE sha256 >= ? AND sha256 < ? AND folder = ?",
            (sha256_start, sha256_start + "g", folder),
        )
        return rows.fetchone() is not None

    def find_image_hash(self, sha256: str) -> int:
        """Return the perceptual hash of an image in the index."""
        row = self._db.execute("SELECT hash FROM files WHERE sha256 = ? LIMIT 1", (sha256,)).fetchone()
        return int(row[0], 16)

    def count_modalities(self, folder: str | None = None) -> dict[str, int]:
        """Return {modality: number of distinct images}, of one folder or of all folders."""
        rows = self._db.execute(
            "SELECT modality, count(DISTINCT sha256) FROM studies WHERE ? IS NULL OR folder = ? GROUP BY modality"
            " ORDER BY modality",
            (folder, folder),
        )
        return dict(rows.fetchall())

    def count_images(self, folder: str | None = None) -> int:
        """Return the number of distinct images, of one folder or of all folders."""
        row = self._db.execute(
            "SELECT count(DISTINCT sha256) FROM studies WHERE ? IS NULL OR folder = ?", (folder, folder)
        ).fetchone()
        return int(row[0])
