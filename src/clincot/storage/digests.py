"""Digests of files and folders."""

from __future__ import annotations

from pathlib import Path

from clincot.jsonl import hash_files
from clincot.records import hash_json

_BOOKKEEPING_FILES = frozenset({"record.json", "train_log.json", "train_settings.json"})


def hash_path(path: Path) -> str:
    """Compute the sha256 of a file, or of the names and contents of a folder's files.

    A data set (a folder with studies.jsonl) is hashed by its records, which hold the digests of its images. The
    bookkeeping of a training run (record, log, settings) does not enter the digest of a checkpoint.
    """
    if path.is_file():
        return hash_files(path)
    if (path / "studies.jsonl").is_file():
        parts = [path / name for name in ("studies.jsonl", "questions.jsonl", "references.jsonl")]
        return hash_json([[p.name, hash_files(p)] for p in parts if p.is_file()])
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in _BOOKKEEPING_FILES)
    return hash_json([[str(p.relative_to(path)), hash_files(p)] for p in files])


def hash_path_or_missing(path: Path) -> str:
    """Compute hash_path, or return "missing" if the path does not exist."""
    return hash_path(path) if path.exists() else "missing"
