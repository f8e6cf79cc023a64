"""A local folder as a Store.

Atomic: write_new and upload write a temporary file and hard-link it to its name, which fails if the name exists.
replace holds a file lock per key while it compares the tag and renames the new file into place. Readers see the old
or the new content, never a part. Not atomic: a listing by keys() while others write, and several keys together.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from clincot.storage.store import (
    BLOCK_BYTES,
    KEY_PATTERN,
    KeyExists,
    KeyNotFound,
    StoredObject,
    VersionConflict,
    validate_key,
)


class FolderStore:
    """A folder of this machine, or of a shared file system that supports hard links and file locks."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        return str(self.root)

    def read(self, key: str) -> StoredObject:
        try:
            content = self._resolve_key(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise KeyNotFound(f"{self.url}: nothing is stored under {key}") from None
        return StoredObject(content, _compute_tag(content))

    def write_new(self, key: str, content: bytes) -> str:
        with self._create_temporary(key) as (file, path):
            file.write_bytes(content)
            self._link_new(file, path, key)
        return _compute_tag(content)

    def replace(self, key: str, content: bytes, tag: str) -> str:
        with self._lock_key(key):
            try:
                current = self.read(key).tag
            except KeyNotFound:
                current = ""
            if current != tag:
                raise VersionConflict(f"{self.url}: {key} was replaced by someone else since it was read")
            with self._create_temporary(key) as (file, path):
                file.write_bytes(content)
                _fsync_file(file)
                file.replace(path)
        return _compute_tag(content)

    def upload(self, key: str, path: Path) -> None:
        with self._create_temporary(key) as (file, destination), path.open("rb") as source, file.open("wb") as target:
            while block := source.read(BLOCK_BYTES):
                target.write(block)
            target.flush()
            self._link_new(file, destination, key)

    def stream(self, key: str) -> Iterator[bytes]:
        try:
            with self._resolve_key(key).open("rb") as file:
                while block := file.read(BLOCK_BYTES):
                    yield block
        except (FileNotFoundError, IsADirectoryError):
            raise KeyNotFound(f"{self.url}: nothing is stored under {key}") from None

    def keys(self, prefix: str) -> Iterator[str]:
        folder = self.root / prefix
        if not prefix.endswith("/"):
            raise ValueError(f"a prefix ends with '/', got {prefix!r}")
        names = (path.relative_to(self.root).as_posix() for path in folder.rglob("*") if path.is_file())
        # Temporary files and locks start with a dot, so they match no key.
        yield from sorted(name for name in names if KEY_PATTERN.fullmatch(name))

    def delete(self, key: str) -> None:
        self._resolve_key(key).unlink(missing_ok=True)

    def _resolve_key(self, key: str) -> Path:
        return self.root / validate_key(key)

    @contextlib.contextmanager
    def _create_temporary(self, key: str) -> Iterator[tuple[Path, Path]]:
        """Yield an empty temporary file and the path of the key; the temporary file is removed afterwards."""
        path = self._resolve_key(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        os.close(handle)
        os.chmod(name, 0o644)
        try:
            yield Path(name), path
        finally:
            Path(name).unlink(missing_ok=True)

    def _link_new(self, file: Path, path: Path, key: str) -> None:
        _fsync_file(file)
        try:
            os.link(file, path)  # unlike a rename, fails if the name exists
        except FileExistsError:
            raise KeyExists(f"{self.url}: {key} exists already; nothing is overwritten") from None

    @contextlib.contextmanager
    def _lock_key(self, key: str) -> Iterator[None]:
        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / hashlib.sha256(key.encode()).hexdigest()[:24]).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _compute_tag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
