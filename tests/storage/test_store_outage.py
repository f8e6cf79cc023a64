"""A store that is away for a while, cuts connections or loses replies: what is waited for, and what it costs."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from clincot.storage import s3 as store_s3
from clincot.storage.open import open_store
from clincot.storage.store import KeyExists, Store, StoreFailed, StoreUnavailable, VersionConflict, download_file
from tests.support.fast_clock import FastClock
from tests.support.fault_servers import FaultPlan, Gate, gate_before
from tests.support.s3_server import SECRET, S3Server


@dataclass(frozen=True)
class Remote:
    """A store behind a gate; a wait moves the clock of both."""

    store: Store
    gate: Gate
    clock: FastClock

    def leave(self, seconds: float) -> None:
        """Go away for this long, from now on."""
        self.clock.slept.clear()
        self.gate.plan.begin({"store": seconds})


@pytest.fixture
def remote(
    s3: S3Server, fault_plan: FaultPlan, monkeypatch: pytest.MonkeyPatch, fast_clock: FastClock
) -> Iterator[Remote]:
    with gate_before("store", s3.url, fault_plan) as gate:
        for name, value in (s3.environment | {"AWS_ENDPOINT_URL_S3": gate.url}).items():
            monkeypatch.setenv(name, value)
        bucket = f"b-{uuid.uuid4().hex[:12]}"
        s3.bucket(bucket)
        yield Remote(open_store(f"s3://{bucket}/some/prefix"), gate, fast_clock)


OPERATIONS: dict[str, Callable[[Store, Path], object]] = {
    "write_new": lambda store, _: store.write_new("new", b"one"),
    "read": lambda store, _: store.read("key"),
    "replace": lambda store, _: store.replace("key", b"two", store.read("key").tag),
    "upload": lambda store, file: store.upload("file", file),
    "keys": lambda store, _: list(store.keys("k/")),
    "download": lambda store, file: download_file(store, "key", file),
    "delete": lambda store, _: store.delete("key"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_outlasts_a_minute(remote: Remote, tmp_path: Path, operation: str) -> None:
    """Waits of 1, 2, 4, 8, 16 and 30 s: the store, away for 60 s, answers after 61."""
    (tmp_path / "file").write_bytes(b"content")
    remote.store.write_new("key", b"one")
    remote.leave(60.0)
    OPERATIONS[operation](open_store(remote.store.url), tmp_path / "file")  # a new client, without open connections
    assert remote.clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]


def test_after_ten_minutes_the_error_says_how_long_was_waited(remote: Remote) -> None:
    remote.leave(1200.0)
    with pytest.raises(
        StoreUnavailable, match=r"could not read key: .*; still away after 10 min \(CLINCOT_WAIT_S=600\)$"
    ):
        remote.store.read("key")
    assert sum(remote.clock.slept) == pytest.approx(600.0, abs=5.0)


def test_a_download_that_is_cut_goes_on_where_it_was(remote: Remote, tmp_path: Path) -> None:
    """3 MB, cut after 1 MB and again after 2 MB (of the reply, its header included)."""
    content = bytes(range(256)) * 12_000
    (tmp_path / "file").write_bytes(content)
    remote.store.upload("file", tmp_path / "file")
    remote.gate.cut_after = [1_000_000, 1_000_000]
    store = open_store(remote.store.url)
    download_file(store, "file", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == content
    assert remote.gate.cut_after == []


def test_an_object_that_changes_during_a_download_is_not_mixed(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_s3, "BLOCK_BYTES", 1 << 16)
    (tmp_path / "file").write_bytes(b"a" * 3_000_000)
    remote.store.upload("file", tmp_path / "file")
    tag = remote.store.read("file").tag
    remote.gate.cut_after = [1_000_000]
    blocks = open_store(remote.store.url).stream("file")
    next(blocks)
    remote.store.replace("file", b"b" * 3_000_000, tag)
    with pytest.raises(VersionConflict, match="replaced while it was read"):
        list(blocks)


def test_a_lost_reply_is_no_conflict(remote: Remote) -> None:
    """The write arrives, its reply does not: the second attempt finds the content of the first."""
    remote.gate.cut_after = [0]
    tag = open_store(remote.store.url).write_new("key", b"mine")
    remote.gate.cut_after = [0]
    open_store(remote.store.url).replace("key", b"new", tag)
    assert remote.store.read("key").content == b"new"
    with pytest.raises(KeyExists):
        remote.store.write_new("key", b"other")


def test_a_refusal_is_not_waited_for(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-" + SECRET)
    with pytest.raises(StoreFailed, match="HTTP 403"):
        open_store(remote.store.url).read("key")
    assert remote.clock.slept == []


@pytest.mark.parametrize(
    ("code", "waits"), [(socket.EAI_NONAME, False), (socket.EAI_AGAIN, True)], ids=["unknown host", "no name server"]
)
def test_an_unknown_host_is_not_waited_for(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, code: int, waits: bool
) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(code, "from the name server")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(StoreFailed, match="EndpointConnectionError"):
        open_store(remote.store.url).read("key")
    assert bool(remote.clock.slept) == waits
