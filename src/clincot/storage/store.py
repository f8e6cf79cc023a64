"""The Store protocol: published models, champion pointers and rollout records in a folder or in S3.

Keys are relative paths with "/" (`models/nodules/4f…/manifest.json`). Every write is atomic for its one key:

    write_new    creates a key; raises KeyExists if it exists (If-None-Match: *)
    replace      replaces the version that was read; raises VersionConflict if it has changed (If-Match)
    upload       write_new of a file of any size

A reader sees the old content of a key or the new one, never a part. Two writes are not atomic together, and keys()
may miss keys that are written while it lists. So a writer of several keys writes the key that readers start from (a
manifest, a pointer) last.

`open_store` takes a folder or `s3://bucket/prefix`. S3 is configured as for the AWS tools: AWS_ENDPOINT_URL_S3 (or
AWS_ENDPOINT_URL), AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or a shared profile, AWS_REGION, AWS_CA_BUNDLE,
HTTPS_PROXY and NO_PROXY. Messages never contain credentials.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from clincot.errors import InvalidInput, UserError
from clincot.waiting import Outage

KEY_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*(/[A-Za-z0-9_][A-Za-z0-9._=+-]*)*")
BLOCK_BYTES = 1 << 20  # read and written at a time


class StoreFailed(UserError, RuntimeError):
    """The store could not be reached, or refused a request; the message says which, and how to fix it."""


class StoreUnavailable(StoreFailed):
    """The store does not answer, or answers with a server error; the same request may succeed later."""

    def __init__(self, message: str, outage: Outage | None = None) -> None:
        super().__init__(message)
        self.outage = outage


class KeyNotFound(UserError, KeyError):
    """No object is stored under this key."""

    def __str__(self) -> str:
        return str(self.args[0])


class KeyExists(InvalidInput):
    """An object is stored under this key already; it was not overwritten."""


class VersionConflict(InvalidInput):
    """Another client has replaced the object since it was read."""


class StoredObject(NamedTuple):
    """An object's content, and the tag of this version of it (for replace)."""

    content: bytes
    tag: str


class Store(Protocol):
    """An object store. Every method may raise StoreFailed, and InvalidInput for an invalid key."""

    @property
    def url(self) -> str:
        """The store's address, without credentials."""
        ...

    def read(self, key: str) -> StoredObject:
        """Return the object. Raises KeyNotFound."""
        ...

    def write_new(self, key: str, content: bytes) -> str:
        """Store a new object and return its tag. Raises KeyExists."""
        ...

    def replace(self, key: str, content: bytes, tag: str) -> str:
        """Replace the version with this tag; return the new tag. Raises VersionConflict."""
        ...

    def upload(self, key: str, path: Path) -> None:
        """Store a file as a new object, streaming. Raises KeyExists."""
        ...

    def stream(self, key: str) -> Iterator[bytes]:
        """Yield the content in blocks. Raises KeyNotFound."""
        ...

    def keys(self, prefix: str) -> Iterator[str]:
        """Yield all keys below a prefix, sorted. Raises ValueError unless the prefix ends with "/"."""
        ...

    def delete(self, key: str) -> None:
        """Delete an object. Does nothing if it does not exist."""
        ...


def validate_key(key: str) -> str:
    """Return the key. Raises InvalidInput if it could leave the store or differs between a folder and S3."""
    if not KEY_PATTERN.fullmatch(key):
        raise InvalidInput(f"not a key of a store: {key!r}; expected names of letters, digits and ._=+- joined by /")
    return key


def write_latest(store: Store, key: str, content: bytes) -> None:
    """Store an object, in place of the one under this key. Raises VersionConflict if another client replaces it too."""
    try:
        store.write_new(key, content)
    except KeyExists:
        stored = store.read(key)
        if stored.content != content:
            store.replace(key, content, stored.tag)


def hash_object(store: Store, key: str) -> str:
    """Compute the sha256 of a stored object by reading it. Raises KeyNotFound."""
    total = hashlib.sha256()
    for block in store.stream(key):
        total.update(block)
    return total.hexdigest()


def download_file(store: Store, key: str, path: Path) -> None:
    """Download an object to a file, which appears under its name only when it is complete. Raises KeyNotFound."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for block in store.stream(key):
                file.write(block)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def redact_url(url: str) -> str:
    """Return an address without credentials, that is, without everything before an @."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
