"""Digests of files and folders."""

from __future__ import annotations

from pathlib import Path

from clincot.jsonl import file_digest
from clincot.records import digest_of


def path_digest(path: Path) -> str:
    """sha256 of a file, or of a folder's names and files; images count by the digests in studies.jsonl."""
    if path.is_file():
        return file_digest(path)
    if (path / "studies.jsonl").is_file():
        parts = [path / name for name in ("studies.jsonl", "questions.jsonl", "references.jsonl")]
        return digest_of([[p.name, file_digest(p)] for p in parts if p.is_file()])
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in {"record.json", "train_log.json"})
    return digest_of([[str(p.relative_to(path)), file_digest(p)] for p in files])


def digest_or_missing(path: Path) -> str:
    return path_digest(path) if path.exists() else "missing"
