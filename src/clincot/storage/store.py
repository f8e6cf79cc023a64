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

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from clincot.errors import InvalidInput, UserError

_KEY_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*(/[A-Za-z0-9_][A-Za-z0-9._=+-]*)*")
BLOCK_BYTES = 1 << 20


class StoreFailed(UserError, RuntimeError):
    """The store could not be reached or refused; says which, and what would mend it."""


class StoreUnavailable(StoreFailed):
    """The store does not answer, or not as it should: it may again in a while."""


class KeyNotFound(UserError, KeyError):
    """Nothing lies under this key."""

    def __str__(self) -> str:
        return str(self.args[0])


class KeyExists(InvalidInput):
    """Something lies under this key already, and is not overwritten."""


class VersionConflict(InvalidInput):
    """What was read has been replaced by someone else since."""


class StoredObject(NamedTuple):
    """Content, and a tag that names this very version of it."""

    content: bytes
    tag: str


class Store(Protocol):
    """A folder or a bucket. Every method may raise StoreFailed."""

    @property
    def url(self) -> str:
        """The store's address, without credentials."""
        ...

    def read(self, key: str) -> StoredObject:
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


def validate_key(key: str) -> str:
    """The key; ValueError where it could leave the store or means different things in a folder and in S3."""
    if not _KEY_PATTERN.fullmatch(key):
        raise InvalidInput(f"not a key of a store: {key!r}; expected names of letters, digits and ._=+- joined by /")
    return key


def hash_object(store: Store, key: str) -> str:
    """sha256 of what really lies there, read again."""
    total = hashlib.sha256()
    for block in store.stream(key):
        total.update(block)
    return total.hexdigest()


def download_file(store: Store, key: str, path: Path) -> None:
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


def _redact_url(url: str) -> str:
    """The address without what stands before an @."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
