"""`clincot store`: the bucket of an S3 store, and what Prometheus sees of the rounds recorded in it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

PAUSE_S = 2.0  # between two tries at a server that is not up yet


def add_store(commands: Any, command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `store` to the parser's commands."""
    store = command(commands, "store", "the object store: create its bucket, watch its rounds", None)
    parts = store.add_subparsers(dest="part", required=True, metavar="WHAT")
    about = "make the bucket of s3://bucket/prefix, unless it is there"
    create = parts.add_parser("create", help=about, description=about)
    create.add_argument("url", metavar="s3://BUCKET/PREFIX")
    create.add_argument("--wait", type=float, default=0, metavar="SECONDS", help="for a server that is not up yet")
    create.set_defaults(run_command=_create)
    about = "metrics for Prometheus of a line's rounds: failed, without promotion, agreement of the judges"
    watch = parts.add_parser("watch", help=about, description=about)
    watch.add_argument("url", metavar="STORE", help="folder or s3://bucket/prefix")
    watch.add_argument("--name", default="clincot", help="the model line (default clincot)")
    watch.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    watch.add_argument("--port", type=int, default=9090)
    watch.set_defaults(run_command=_watch)


def _create(args: argparse.Namespace) -> int:
    from clincot.errors import InvalidInput
    from clincot.processes import retry_call
    from clincot.storage.open import open_store
    from clincot.storage.s3 import S3Store
    from clincot.storage.store import StoreFailed

    store = open_store(args.url)
    if not isinstance(store, S3Store):
        raise InvalidInput(f"{args.url}: expected s3://bucket/prefix; a folder needs no bucket")
    created = retry_call(
        store.create_bucket,
        is_transient=lambda error: isinstance(error, StoreFailed),
        wait_s=lambda failures: PAUSE_S,
        timeout_s=args.wait,
    )
    print(f"{store.bucket}: {'made' if created else 'there already'}")
    return 0


def _watch(args: argparse.Namespace) -> int:
    from clincot.runs.exporter import serve_line_metrics
    from clincot.storage.open import open_store

    serve_line_metrics(open_store(args.url), args.name, host=args.host, port=args.port)
    return 0
