"""Open a store by its address."""

from __future__ import annotations

from pathlib import Path

from clincot.errors import InvalidInput, require_extra
from clincot.storage.folder_store import FolderStore
from clincot.storage.store import Store, redact_url


def open_store(url: str) -> Store:
    """Open the store at a folder path or an address s3://bucket/prefix. Raises InvalidInput for anything else."""
    if not url:
        raise InvalidInput("no store is named; expected a folder or s3://bucket/prefix (--store)")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return FolderStore(Path(url))
    if scheme != "s3" or "@" in rest or not rest.strip("/"):
        raise InvalidInput(
            "expected a store: a folder or s3://bucket/prefix (credentials come from the environment), got "
            f"{redact_url(url)!r}"
        )
    with require_extra("cluster", redact_url(url)):
        from clincot.storage.s3 import S3Store
    bucket, _, prefix = rest.strip("/").partition("/")
    return S3Store(bucket, prefix)
