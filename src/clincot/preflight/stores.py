"""Can the store be written, read, and written on a condition? The champion pointer rests on the last."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from clincot.config import PreflightSection
from clincot.preflight.preflight_report import Check, failed, passed, skipped
from clincot.preflight.probe import Probe
from clincot.storage.open import open_store
from clincot.storage.store import AlreadyStored, Moved, NotStored, Store

_ONE, _TWO = b"one\n", b"two\n"


def probes(section: PreflightSection) -> list[Probe]:
    url = section.publish.store

    def run() -> Iterator[Check]:
        if not url:
            yield skipped("store", "write, read, conditional write, delete", "no store is named (publish.store)")
            return
        yield from look(open_store(url))

    mend = (
        "check publish.store, AWS_ENDPOINT_URL_S3 and the keys in the environment; the account needs to list, read, "
        "write and delete under this prefix"
    )
    return [Probe("store", f"write, read and delete a small object in {_named(url)}", mend, section.timeout_s, run)]


def look(store: Store) -> Iterator[Check]:
    """A small object of its own name, written, read, replaced and deleted again. Raises StoreFailed."""
    key = f"preflight/{uuid.uuid4().hex}"
    for _ in store.keys("preflight/"):  # first: some endpoints make a missing bucket where one is written to
        break
    yield passed("store: list", f"the names in {store.url}")
    try:
        tag = store.write_new(key, _ONE)
        yield passed("store: write", f"a new object in {store.url}")
        yield _read(store, key)
        yield _written_once(store, key)
        yield _replaced_once(store, key, tag)
    finally:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            store.delete(key)
    yield _deleted(store, key)


def _read(store: Store, key: str) -> Check:
    found, tried = store.read(key).content, f"the same object from {store.url}"
    if found != _ONE:
        return failed(
            "store: read",
            tried,
            f"{found[:40]!r} came, {_ONE!r} was written",
            "ask the store's operator: it does not give back what was written",
        )
    if key not in store.keys("preflight/"):
        return failed(
            "store: read",
            f"{tried}, and its name from a listing",
            "it can be read, but is not listed",
            "allow the account to list the bucket under this prefix (s3:ListBucket)",
        )
    return passed("store: read", f"{tried}, and its name from a listing")


def _written_once(store: Store, key: str) -> Check:
    name, tried = "store: write once", "to write a new object where one is already (If-None-Match)"
    try:
        store.write_new(key, _TWO)
    except AlreadyStored:
        return passed(name, tried, "refused, as it has to be")
    return failed(name, tried, "it was overwritten", _UNCONDITIONAL)


def _replaced_once(store: Store, key: str, tag: str) -> Check:
    """Compare-and-swap: over the version that was read it succeeds, and over the same version again it must not."""
    name, tried = "store: compare and swap", "to replace a version, and then the same version again (If-Match)"
    store.replace(key, _TWO, tag)
    try:
        store.replace(key, _ONE, tag)
    except Moved:
        return passed(name, tried, "the second was refused, as it has to be")
    return failed(name, tried, "the second succeeded too", _UNCONDITIONAL)


_UNCONDITIONAL = (
    "use an endpoint that honours conditional writes (SeaweedFS 4, Ceph, AWS do): two rounds could both become champion"
)


def _deleted(store: Store, key: str) -> Check:
    tried = "to delete the object again"
    store.delete(key)
    try:
        store.read(key)
    except NotStored:
        return passed("store: delete", tried)
    return failed("store: delete", tried, f"{key} is still there", "allow the account to delete under this prefix")


def _named(url: str) -> str:
    """The address for a message; what might hold credentials is not shown."""
    return url if "@" not in url else "the store"
