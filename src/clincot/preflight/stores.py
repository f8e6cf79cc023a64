"""Can the store be written, read, and written on a condition? The champion pointer rests on the last."""

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
    url = config.publish.store

    def run() -> Iterator[PreflightCheck]:
        if not url:
            yield skip_check("store", "write, read, conditional write, delete", "no store is named (publish.store)")
            return
        yield from check_store(open_store(url))

    mend = (
        "check publish.store, AWS_ENDPOINT_URL_S3 and the keys in the environment; the account needs to list, read, "
        "write and delete under this prefix"
    )
    return [Probe("store", f"write, read and delete a small object in {_redact_url(url)}", mend, config.timeout_s, run)]


def check_store(store: Store) -> Iterator[PreflightCheck]:
    """A small object of its own name, written, read, replaced and deleted again. Raises StoreFailed."""
    key = f"preflight/{uuid.uuid4().hex}"
    for _ in store.keys("preflight/"):  # first: some endpoints make a missing bucket where one is written to
        break
    yield pass_check("store: list", f"the names in {store.url}")
    try:
        tag = store.write_new(key, _FIRST_CONTENT)
        yield pass_check("store: write", f"a new object in {store.url}")
        yield _check_read(store, key)
        yield _check_write_once(store, key)
        yield _check_compare_and_swap(store, key, tag)
    finally:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            store.delete(key)
    yield _check_delete(store, key)


def _check_read(store: Store, key: str) -> PreflightCheck:
    found, tried = store.read(key).content, f"the same object from {store.url}"
    if found != _FIRST_CONTENT:
        return fail_check(
            "store: read",
            tried,
            f"{found[:40]!r} came, {_FIRST_CONTENT!r} was written",
            "ask the store's operator: it does not give back what was written",
        )
    if key not in store.keys("preflight/"):
        return fail_check(
            "store: read",
            f"{tried}, and its name from a listing",
            "it can be read, but is not listed",
            "allow the account to list the bucket under this prefix (s3:ListBucket)",
        )
    return pass_check("store: read", f"{tried}, and its name from a listing")


def _check_write_once(store: Store, key: str) -> PreflightCheck:
    name, tried = "store: write once", "to write a new object where one is already (If-None-Match)"
    try:
        store.write_new(key, _SECOND_CONTENT)
    except KeyExists:
        return pass_check(name, tried, "refused, as it has to be")
    return fail_check(name, tried, "it was overwritten", _CONDITIONAL_WRITE_REMEDY)


def _check_compare_and_swap(store: Store, key: str, tag: str) -> PreflightCheck:
    """Compare-and-swap: over the version that was read it succeeds, and over the same version again it must not."""
    name, tried = "store: compare and swap", "to replace a version, and then the same version again (If-Match)"
    store.replace(key, _SECOND_CONTENT, tag)
    try:
        store.replace(key, _FIRST_CONTENT, tag)
    except VersionConflict:
        return pass_check(name, tried, "the second was refused, as it has to be")
    return fail_check(name, tried, "the second succeeded too", _CONDITIONAL_WRITE_REMEDY)


_CONDITIONAL_WRITE_REMEDY = (
    "use an endpoint that honours conditional writes (SeaweedFS 4, Ceph, AWS do): two rounds could both become champion"
)


def _check_delete(store: Store, key: str) -> PreflightCheck:
    tried = "to delete the object again"
    store.delete(key)
    try:
        store.read(key)
    except KeyNotFound:
        return pass_check("store: delete", tried)
    return fail_check("store: delete", tried, f"{key} is still there", "allow the account to delete under this prefix")


def _redact_url(url: str) -> str:
    """The address for a message; what might hold credentials is not shown."""
    return url if "@" not in url else "the store"
