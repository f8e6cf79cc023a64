"""Where published models, pointers and rollout records lie: a folder, or S3, behind one small interface.

Keys are relative paths with "/" (`models/nodules/4f…/manifest.json`). Three kinds of writes, all atomic:

    write_new    only where nothing is yet (If-None-Match: *)       AlreadyStored
    replace      only over the version that was read (If-Match)     Moved
    upload       write_new of a file of any size

`open_store` takes a folder or `s3://bucket/prefix`. S3 is configured as by the AWS tools: AWS_ENDPOINT_URL_S3 (or
AWS_ENDPOINT_URL), AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or a shared profile, AWS_REGION, AWS_CA_BUNDLE,
HTTPS_PROXY and NO_PROXY. Keys appear in no message.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from clincot.errors import BadInput, ForTheUser, extra

_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*(/[A-Za-z0-9_][A-Za-z0-9._=+-]*)*")
BLOCK = 1 << 20


class StoreFailed(ForTheUser, RuntimeError):
    """The store could not be reached or refused; says which, and what would mend it."""


class StoreAway(StoreFailed):
    """The store does not answer, or not as it should: it may again in a while."""


class NotStored(ForTheUser, KeyError):
    """Nothing lies under this key."""

    def __str__(self) -> str:
        return str(self.args[0])


class AlreadyStored(BadInput):
    """Something lies under this key already, and is not overwritten."""


class Moved(BadInput):
    """What was read has been replaced by someone else since."""


class Version(NamedTuple):
    """Content, and a tag that names this very version of it."""

    content: bytes
    tag: str


class Store(Protocol):
    """A folder or a bucket. Every method may raise StoreFailed."""

    @property
    def url(self) -> str:
        """The store's address, without credentials."""
        ...

    def read(self, key: str) -> Version:
        """Raises NotStored."""
        ...

    def write_new(self, key: str, content: bytes) -> str:
        """The new version's tag. Raises AlreadyStored."""
        ...

    def replace(self, key: str, content: bytes, tag: str) -> str:
        """The new version's tag. Raises Moved where the version `tag` is no longer the one there."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """write_new from a file, streaming. Raises AlreadyStored."""
        ...

    def stream(self, key: str) -> Iterator[bytes]:
        """The content in blocks. Raises NotStored."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """All keys under a prefix that ends with "/", sorted."""
        ...

    def delete(self, key: str) -> None:
        """Nothing happens where nothing lies."""
        ...


def open_store(url: str) -> Store:
    """The store of a folder, `file:` or `s3://bucket/prefix` address."""
    if not url:
        raise BadInput("no store is named; expected a folder or s3://bucket/prefix (--store)")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FolderStore(Path(url))
    if scheme != "s3" or "@" in rest or not rest.strip("/"):
        raise BadInput(
            f"a store is a folder or s3://bucket/prefix (credentials come from the environment), got {_shown(url)!r}"
        )
    with extra("cluster", _shown(url)):
        from clincot.store_s3 import S3Store
    bucket, _, prefix = rest.strip("/").partition("/")
    return S3Store(bucket, prefix)


def checked_key(key: str) -> str:
    """The key; ValueError where it could leave the store or means different things in a folder and in S3."""
    if not _KEY.fullmatch(key):
        raise BadInput(f"not a key of a store: {key!r}; expected names of letters, digits and ._=+- joined by /")
    return key


def sha256_of(store: Store, key: str) -> str:
    """sha256 of what really lies there, read again."""
    total = hashlib.sha256()
    for block in store.stream(key):
        total.update(block)
    return total.hexdigest()


def download(store: Store, key: str, path: Path) -> None:
    """The content as a file that appears when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for block in store.stream(key):
                file.write(block)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class FolderStore:
    """A folder of this machine (or a file system that all machines mount and that has hard links and locks)."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    @property
    def url(self) -> str:
        return str(self.root)

    def read(self, key: str) -> Version:
        try:
            content = self._path(key).read_bytes()
        except (FileNotFoundError, IsADirectoryError):
            raise NotStored(f"{self.url}: nothing is stored under {key}") from None
        return Version(content, _tag(content))

    def write_new(self, key: str, content: bytes) -> str:
        with self._aside(key) as (file, path):
            file.write_bytes(content)
            self._link(file, path, key)
        return _tag(content)

    def replace(self, key: str, content: bytes, tag: str) -> str:
        with self._locked(key):
            try:
                found = self.read(key).tag
            except NotStored:
                found = ""
            if found != tag:
                raise Moved(f"{self.url}: {key} was replaced by someone else since it was read")
            with self._aside(key) as (file, path):
                file.write_bytes(content)
                _fsync(file)
                file.replace(path)
        return _tag(content)

    def upload(self, key: str, path: Path) -> None:
        with self._aside(key) as (file, place), path.open("rb") as source, file.open("wb") as target:
            while block := source.read(BLOCK):
                target.write(block)
            target.flush()
            self._link(file, place, key)

    def stream(self, key: str) -> Iterator[bytes]:
        try:
            with self._path(key).open("rb") as file:
                while block := file.read(BLOCK):
                    yield block
        except (FileNotFoundError, IsADirectoryError):
            raise NotStored(f"{self.url}: nothing is stored under {key}") from None

    def keys(self, prefix: str) -> Iterator[str]:
        folder = self.root / prefix
        if not prefix.endswith("/"):
            raise ValueError(f"a prefix ends with '/', got {prefix!r}")
        found = (path.relative_to(self.root).as_posix() for path in folder.rglob("*") if path.is_file())
        yield from sorted(key for key in found if _KEY.fullmatch(key))  # what is being written starts with a dot

    def delete(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.root / checked_key(key)

    @contextlib.contextmanager
    def _aside(self, key: str) -> Iterator[tuple[Path, Path]]:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
        os.close(handle)
        os.chmod(name, 0o644)
        try:
            yield Path(name), path
        finally:
            Path(name).unlink(missing_ok=True)

    def _link(self, file: Path, path: Path, key: str) -> None:
        _fsync(file)
        try:
            os.link(file, path)  # fails where the name exists, unlike a rename
        except FileExistsError:
            raise AlreadyStored(f"{self.url}: {key} exists already; nothing is overwritten") from None

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        folder = self.root / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / hashlib.sha256(key.encode()).hexdigest()[:24]).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _tag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _fsync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _shown(url: str) -> str:
    """The address without what stands before an @."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
