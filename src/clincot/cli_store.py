"""`clincot store create`: the bucket of an S3 store, where one does not exist yet."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_store(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `store` to the parser's commands."""
    store = command(commands, "store", "the object store: create its bucket", None)
    parts = store.add_subparsers(dest="part", required=True, metavar="WHAT")
    about = "make the bucket of s3://bucket/prefix, unless it is there"
    create = parts.add_parser("create", help=about, description=about)
    create.add_argument("url", metavar="s3://BUCKET/PREFIX")
    create.set_defaults(run_command=_create)


def _create(args: argparse.Namespace) -> int:
    from clincot.errors import BadInput
    from clincot.store import open_store
    from clincot.store_s3 import S3Store

    store = open_store(args.url)
    if not isinstance(store, S3Store):
        raise BadInput(f"{args.url}: expected s3://bucket/prefix; a folder needs no bucket")
    print(f"{store.bucket}: {'made' if store.create_bucket() else 'there already'}")
    return 0
