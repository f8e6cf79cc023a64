"""`clincot store`: create the bucket of an S3 store, and export metrics of the rounds recorded in a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from clincot.cli.framework import Commands, Entry, add_command, build_group
from clincot.cli.serve_command import SERVING_PANEL
from clincot.errors import InvalidInput

PAUSE_S = 2.0  # between two attempts while the server starts


def add_store_commands(commands: Commands) -> None:
    """Add `store` and its commands."""
    about, store = "Create the bucket of an object store, or watch the rounds recorded in it.", Commands()
    add_command(store, "create", create_bucket, CreateArguments)
    add_command(store, "watch", watch_rounds, WatchArguments)
    commands["store"] = Entry(SERVING_PANEL, about, lambda: build_group(store, about))


@dataclass(frozen=True, kw_only=True)
class CreateArguments:
    """Which bucket."""

    url: Annotated[str, typer.Argument(metavar="s3://BUCKET/PREFIX", help="Address of the store.")]
    wait: Annotated[
        float,
        typer.Option(
            "--wait", metavar="SECONDS", help="How long to retry while the server is not up yet (default: no retry)."
        ),
    ] = 0
    pod: Annotated[
        str,
        typer.Option(
            "--pod",
            metavar="NAMESPACE/POD",
            help="Pod of the server. If it cannot start, waiting ends at once with the reason that Kubernetes gives.",
        ),
    ] = ""


def create_bucket(args: CreateArguments) -> int:
    """Create the bucket of s3://BUCKET/PREFIX unless it exists."""
    from clincot.processes import retry_call
    from clincot.storage.open import open_store
    from clincot.storage.s3 import S3Store
    from clincot.storage.store import StoreFailed

    store = open_store(args.url)
    if not isinstance(store, S3Store):
        raise InvalidInput(f"{args.url}: expected s3://bucket/prefix; a folder needs no bucket")
    is_transient = _build_pod_check(args.pod) if args.pod else lambda error: isinstance(error, StoreFailed)
    created = retry_call(
        store.create_bucket,
        is_transient=is_transient,
        wait_s=lambda failures: PAUSE_S,
        timeout_s=args.wait,
    )
    print(f"{store.bucket}: {'made' if created else 'there already'}")
    return 0


def _build_pod_check(pod: str) -> Callable[[BaseException], bool]:
    """Return a function that says whether waiting may help; it raises PodCannotStart if it cannot."""
    from clincot.clients.kubernetes import connect_cluster
    from clincot.clients.pod_status import refuse_failing_pod
    from clincot.storage.store import StoreFailed

    namespace, _, name = pod.partition("/")
    if not (namespace and name):
        raise InvalidInput(f"--pod: expected NAMESPACE/POD, got {pod!r}")
    cluster = connect_cluster()

    def may_pass(error: BaseException) -> bool:
        refuse_failing_pod(cluster, namespace, name)
        return isinstance(error, StoreFailed)

    return may_pass


@dataclass(frozen=True, kw_only=True)
class WatchArguments:
    """Whose rounds, and where the metrics are served."""

    url: Annotated[str, typer.Argument(metavar="STORE", help="Store of the rounds: a folder or s3://bucket/prefix.")]
    name: Annotated[str, typer.Option("--name", help="Name of the model line.")] = "clincot"
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 9090


def watch_rounds(args: WatchArguments) -> int:
    """Serve Prometheus metrics of a line's rounds: failures, rounds without promotion, agreement of the judges."""
    from clincot.runs.exporter import serve_line_metrics
    from clincot.storage.open import open_store

    serve_line_metrics(open_store(args.url), args.name, host=args.host, port=args.port)
    return 0
