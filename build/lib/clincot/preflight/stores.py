"""Checks of the store: read, write, delete and conditional write, on which the champion pointer relies."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator

from clincot.config import PreflightConfig
from clincot.preflight.preflight_report import PreflightCheck, fail_check, pass_check, skip_check
from clincot.preflight.probe import Probe
from clincot.storage.open import open_store
from clincot.storage.store import KeyExists, KeyNotFound, Store, VersionConflict

_FIRST_CONTENT, _SECOND_CONTENT = b"one\n", b"two\n"


def build_store_probes(config: PreflightConfig) -> list[Probe]:
    """Build the probe of the store, which is skipped if no store is configured."""
    url = config.publish.store

    def run() -> Iterator[PreflightCheck]:
        if not url:
            yield skip_check("store", "write, read, conditional write, delete", "publish.store is empty")
            return
        yield from check_store(open_store(url))

    remedy = (
        "check publish.store, AWS_ENDPOINT_URL_S3 and the keys in the environment; the account needs to list, read, "
        "write and delete under this prefix"
    )
    description = f"write, read and delete a small object in {_redact_url(url)}"
    return [Probe("store", description, remedy, config.timeout_s, run)]


def check_store(store: Store) -> Iterator[PreflightCheck]:
    """Write, read, replace and delete a small object under a unique key; raises StoreFailed."""
    key = f"preflight/{uuid.uuid4().hex}"
    for _ in store.keys("preflight/"):  # list before writing, because some endpoints create a missing bucket on write
        break
    yield pass_check("store: list", f"list the keys in {store.url}")
    try:
        tag = store.write_new(key, _FIRST_CONTENT)
        yield pass_check("store: write", f"write a new object in {store.url}")
        yield _check_read(store, key)
        yield _check_write_once(store, key)
        yield _check_compare_and_swap(store, key, tag)
    finally:
        with contextlib.suppress(Exception):  # report the first error only
            store.delete(key)
    yield _check_delete(store, key)


def _check_read(store: Store, key: str) -> PreflightCheck:
    content = store.read(key).content
    probe = f"read the object back from {store.url}, and list its key"
    if content != _FIRST_CONTENT:
        return fail_check(
            "store: read",
            probe,
            f"expected {_FIRST_CONTENT!r} as written, got {content[:40]!r}",
            "ask the store's operator: the store does not return what was written",
        )
    if key not in store.keys("preflight/"):
        return fail_check(
            "store: read",
            probe,
            "the object can be read, but is not listed",
            "allow the account to list the bucket under this prefix (s3:ListBucket)",
        )
    return pass_check("store: read", probe)


def _check_write_once(store: Store, key: str) -> PreflightCheck:
    name, probe = "store: write once", "create an object that exists already (If-None-Match)"
    try:
        store.write_new(key, _SECOND_CONTENT)
    except KeyExists:
        return pass_check(name, probe, "refused, as required")
    return fail_check(name, probe, "the object was overwritten", _CONDITIONAL_WRITE_REMEDY)


def _check_compare_and_swap(store: Store, key: str, tag: str) -> PreflightCheck:
    """Check that a version can be replaced once (`tag` is current) but not twice (`tag` is stale)."""
    name, probe = "store: compare and swap", "replace a version, then replace the same version again (If-Match)"
    store.replace(key, _SECOND_CONTENT, tag)
    try:
        store.replace(key, _FIRST_CONTENT, tag)
    except VersionConflict:
        return pass_check(name, probe, "the second was refused, as required")
    return fail_check(name, probe, "the second succeeded too", _CONDITIONAL_WRITE_REMEDY)


_CONDITIONAL_WRITE_REMEDY = (
    "use an endpoint that honours conditional writes (SeaweedFS 4, Ceph and AWS do); without them two rounds could "
    "both become champion"
)


def _check_delete(store: Store, key: str) -> PreflightCheck:
    probe = "delete the object"
    store.delete(key)
    try:
        store.read(key)
    except KeyNotFound:
        return pass_check("store: delete", probe)
    return fail_check("store: delete", probe, f"{key} still exists", "allow the account to delete under this prefix")


def _redact_url(url: str) -> str:
    """Return the address for a message, or "the store" if it might contain credentials."""
    return url if "@" not in url else "the store"
