"""Open a store by its address."""

from __future__ import annotations

from pathlib import Path

from clincot.errors import BadInput, extra
from clincot.storage.folder_store import FolderStore
from clincot.storage.store import Store, _shown


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
        from clincot.storage.s3 import S3Store
    bucket, _, prefix = rest.strip("/").partition("/")
    return S3Store(bucket, prefix)
