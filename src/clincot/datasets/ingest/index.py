"""What an ingest has seen so far, in a temporary database on disk: memory stays flat however many rows there are.

Of questions and answers only digests are kept, never the texts. The database is private to the process (SQLite's
unnamed one, in the folder for temporary files) and is gone when it is closed, however the process ends.
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
    CREATE TABLE ids (id BLOB PRIMARY KEY, place TEXT) WITHOUT ROWID;
    CREATE TABLE answers (question BLOB PRIMARY KEY, answer BLOB, place TEXT) WITHOUT ROWID;
    CREATE TABLE studies (sha256 TEXT, folder TEXT, modality TEXT, patient TEXT, split TEXT, place TEXT,
        PRIMARY KEY (sha256, folder)) WITHOUT ROWID;
"""
_DISK_ERRNOS = {sqlite3.SQLITE_FULL: errno.ENOSPC, sqlite3.SQLITE_IOERR: errno.EIO}


@dataclass(frozen=True)
class ImageFacts:
    """An image file that was decoded to its end."""

    sha256: str
    width: int  # pixels, upright
    height: int
    suffix: str
    near: int  # perceptual hash (clincot.datasets.near_duplicates)


@dataclass(frozen=True)
class TakenStudy:
    """An image that is in a folder of this ingest."""

    modality: str
    patient: str
    split: str
    place: str  # the row that brought it


class IngestIndex:
    """Use as a context manager; one ingest, one ledger. A full disk under it ends the block with OSError."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.executescript(_TABLES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._db.close()
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the higher bits say more
        if code in _DISK_ERRNOS:
            raise OSError(
                _DISK_ERRNOS[code],
                f"{error} in the folder for temporary files, where an ingest keeps what it has seen. Make room there,"
                " or name another with SQLITE_TMPDIR, and run the same command again",
            ) from error

    def find_file(self, path: Path) -> ImageFacts | str | None:
        """What was found out about an image file: its facts, why it is refused, or nothing yet."""
        row = self._db.execute(
            "SELECT refused, sha256, width, height, suffix, hash FROM files WHERE path = ?", (str(path),)
        ).fetchone()
        if row is None:
            return None
        refused, sha256, width, height, suffix, near = row
        return str(refused) if refused is not None else ImageFacts(sha256, width, height, suffix, int(near, 16))

    def remember_file(self, path: Path, found: ImageFacts | str) -> None:
        if isinstance(found, str):
            values: tuple[object, ...] = (found, None, None, None, None, None)
        else:
            *same, near = astuple(found)
            values = (None, *same, f"{near:016x}")  # as text: SQLite's integers are signed
        self._db.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", (str(path), *values))

    def register_id(self, digest: bytes, place: str) -> str:
        """The place of the first row with this id, which may be this one."""
        self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (digest, place))
        return str(self._db.execute("SELECT place FROM ids WHERE id = ?", (digest,)).fetchone()[0])

    def register_answer(self, question: bytes, answer: bytes, place: str) -> tuple[bytes, str]:
        """The first answer to this question, and its place; both may be those given."""
        self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", (question, answer, place))
        known = self._db.execute("SELECT answer, place FROM answers WHERE question = ?", (question,)).fetchone()
        return bytes(known[0]), str(known[1])

    def find_studies(self, sha256: str) -> dict[str, TakenStudy]:
        """{folder: the study with this image}."""
        rows = self._db.execute(
            "SELECT folder, modality, patient, split, place FROM studies WHERE sha256 = ?", (sha256,)
        )
        return {folder: TakenStudy(*rest) for folder, *rest in rows}

    def add_study(self, sha256: str, folder: str, study: TakenStudy) -> None:
        self._db.execute("INSERT INTO studies VALUES (?, ?, ?, ?, ?, ?)", (sha256, folder, *astuple(study)))

    def contains_image(self, folder: str, sha256_start: str) -> bool:
        """Whether a study of the folder has an image whose sha256 begins so."""
        found = self._db.execute(
            "SELECT 1 FROM studies WHERE sha256 >= ? AND sha256 < ? AND folder = ?",
            (sha256_start, sha256_start + "g", folder),
        )
        return found.fetchone() is not None

    def find_image_hash(self, sha256: str) -> int:
        """The perceptual hash of an image that was taken."""
        row = self._db.execute("SELECT hash FROM files WHERE sha256 = ? LIMIT 1", (sha256,)).fetchone()
        return int(row[0], 16)

    def count_modalities(self, folder: str | None = None) -> dict[str, int]:
        """{modality: different images of it}, of one folder or of all."""
        rows = self._db.execute(
            "SELECT modality, count(DISTINCT sha256) FROM studies WHERE ? IS NULL OR folder = ? GROUP BY modality"
            " ORDER BY modality",
            (folder, folder),
        )
        return dict(rows.fetchall())

    def count_images(self, folder: str | None = None) -> int:
        """Different images, of one folder or of all."""
        row = self._db.execute(
            "SELECT count(DISTINCT sha256) FROM studies WHERE ? IS NULL OR folder = ?", (folder, folder)
        ).fetchone()
        return int(row[0])
